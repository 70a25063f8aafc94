"""CUDA C++ W4A8 kernels for Hopper: include-free source, compiled at first use and kept in a user cache."""
