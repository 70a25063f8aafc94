"""Native loops of quantization: codes of one block of columns after another."""
