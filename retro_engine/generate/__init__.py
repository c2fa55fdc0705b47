"""Sampling and generation with retrieval at every chunk boundary."""
