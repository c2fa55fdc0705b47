"""Text to chunks on disk, and back to token arrays."""
