"""Chunks to neighbors, offline and live."""
