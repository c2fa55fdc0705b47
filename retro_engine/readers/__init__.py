"""Small models that were taught to read: what one is, where its base lies, and what it answers from a user's documents.

The readers of this package are its folders: NAME/reader.json, adapters.safetensors, README.md (readers/reader_file.py).
"""
