"""The Triton kernels and their starts."""
