"""Checkpoints with INT8 weights: `rowint8 quantize`."""
