"""`python -m retro_engine.bench`: what the project promises, measured on the reader's machine."""
