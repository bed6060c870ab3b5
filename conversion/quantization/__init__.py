"""Quantization: calibration with ModelOpt, what was lost, and an artifact for each runtime."""
