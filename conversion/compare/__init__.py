"""What verification is made of: both sides' models run on prompts, and tensors under one set of names."""
