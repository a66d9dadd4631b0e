"""Hold the Triton kernels, and start them."""
