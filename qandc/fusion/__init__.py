"""Make one program of a model: fused kernels and CUDA graphs."""
