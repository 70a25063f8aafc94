"""Portable GPU kernels in Triton, for every NVIDIA card from Ampere on; Triton is imported on first use only."""
