"""Weights of other projects in and out: Hugging Face, GGUF, Megatron, NeMo."""
