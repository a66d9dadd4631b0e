"""Scores of a set of images against one of the same noise, with confidence intervals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qandc.errors import ConfigError, DataError
from qandc.metrics import (
    FeatureStatistics,
    class_accuracy,
    extract_features,
    frechet_distance,
    inception_score,
    load_fashion_classifier,
    load_statistics,
)
from qandc.pipelines import class_names, fashion_dit_path

__all__ = ["Scorer", "load_images", "scorer_for"]

RESAMPLES = 50
Z_95 = 1.96


def load_images(path: Path) -> np.ndarray:
    """``arr_0`` of an ``.npz``: ``[N, H, W, C] uint8``.

    Raises:
        DataError: no such file, or it holds something else.
    """
    try:
        with np.load(path, allow_pickle=False) as data:
            images = data["arr_0"]
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise DataError(f"{str(path)!r} holds no images ({error}); delete it and run the same command again") from error
    return images


def scorer_for(pipe: Any, features: str = "auto") -> Scorer:
    """By the classifier that is shipped where it knows the classes of a pipeline, else by likeness alone.

    Args:
        pipe: a ``DiTPipeline``.
        features: "auto", or "none" for likeness alone.

    Raises:
        ConfigError: another name.
    """
    if features not in ("auto", "none"):
        raise ConfigError(f"--features {features!r} is unknown; choose auto or none")
    known = json.loads((fashion_dit_path() / "model_index.json").read_text())["id2label"]
    if features == "none" or class_names(pipe) != {int(label): name for label, name in known.items()}:
        return Scorer()
    return Scorer(load_fashion_classifier(pipe.device), "fashion-classifier", load_statistics(), accuracy=True)


class Scorer:
    """Likeness to the images of full precision; with an extractor also what its features say.

    Every metric comes with half of its 95 % confidence interval: 1.96 standard deviations over bootstrap resamples of
    the images (Efron 1979), the same resamples for all metrics.

    Args:
        extractor: a model of images in [-1, 1] to features and logits, or None.
        name: of the extractor, noted in results.
        reference: statistics of real images by the extractor, for the Fréchet distance.
        accuracy: whether the logits are those of the classes that are drawn.
    """

    def __init__(
        self,
        extractor: Any = None,
        name: str = "none",
        reference: FeatureStatistics | None = None,
        accuracy: bool = False,
    ) -> None:
        self.extractor, self.name, self.reference, self.accuracy = extractor, name, reference, accuracy

    def __call__(self, images: np.ndarray, full: np.ndarray, labels: np.ndarray) -> dict[str, dict[str, float]]:
        """``images`` and those of full precision ``[N, H, W, C] uint8``: metric to ``{"value", "ci95"}``.

        PSNR is in dB, capped at 100 (equal images); the Fréchet distance is missing without a reference.
        """
        likeness = _psnr(images, full)
        found: dict[str, Callable[[Any], float]] = {"psnr_to_fp": lambda chosen: float(likeness[chosen].mean())}
        if self.extractor is not None:
            pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
            features, logits = extract_features(self.extractor, pixels)
            reference, classes = self.reference, torch.from_numpy(labels)
            if reference is not None:
                found["frechet_distance"] = lambda chosen: frechet_distance(
                    FeatureStatistics.of(features[chosen]), reference
                )
            found["inception_score"] = lambda chosen: inception_score(logits[chosen])
            if self.accuracy:
                found["class_accuracy"] = lambda chosen: class_accuracy(logits[chosen], classes[chosen])
        every = np.arange(len(images))
        generator = np.random.default_rng(0)
        resamples = [generator.integers(0, len(images), len(images)) for _ in range(RESAMPLES)]
        return {
            name: {
                "value": metric(every),
                "ci95": Z_95 * float(np.std([metric(chosen) for chosen in resamples], ddof=1)),
            }
            for name, metric in found.items()
        }


def _psnr(images: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Of each image, in dB, at most 100, in blocks that keep memory small."""
    if images.shape != reference.shape:
        raise DataError(
            f"images {list(images.shape)} and those of full precision {list(reference.shape)} differ in shape"
        )
    found = []
    for first in range(0, len(images), 500):
        ours, theirs = (part[first : first + 500].astype(np.float64) for part in (images, reference))
        error = np.square(ours - theirs).mean((1, 2, 3))
        found.append(np.minimum(100, 10 * np.log10(255**2 / np.maximum(error, 1e-12))))
    return np.concatenate(found)
