"""Run pipelines: find and load them, the denoising loop, the paths of runs."""
