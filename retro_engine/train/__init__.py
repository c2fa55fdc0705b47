"""Training: torchrun -m retro_engine.train, or retro train."""
