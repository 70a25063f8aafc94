"""Layouts of quantized weights on disk, one file each: pure functions from integers to named tensors and back."""
