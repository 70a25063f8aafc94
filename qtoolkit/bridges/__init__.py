"""Between checkpoint layouts: what other tools' quantization configs say, and changing a layout without loss."""
