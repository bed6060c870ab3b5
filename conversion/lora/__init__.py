"""LoRA adapters: PEFT's format, merging, and NeMo's adapter checkpoints."""
