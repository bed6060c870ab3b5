"""Checkpoints between Hugging Face, NeMo 2 and other runtimes: exact, streaming, and refused when it is not."""
