"""Compare sets of images; knows no diffusion model."""

from qandc.evaluation.compare import evaluate

__all__ = ["evaluate"]
