"""What is measured on a float model and what is changed in it before packing."""
