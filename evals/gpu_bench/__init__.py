"""Measures the GPU kernels beside their peers in one process: contenders, a cold clock, checks, and the table."""
