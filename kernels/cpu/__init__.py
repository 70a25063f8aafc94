"""C++ kernels for CPUs: one weight layout, three instruction sets and a portable path, compiled at first use."""
