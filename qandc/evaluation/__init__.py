"""Compare sets of images; knows no diffusion model."""
