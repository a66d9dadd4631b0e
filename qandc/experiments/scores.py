"""Score a set of images against one of the same noise, with confidence intervals."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qandc.errors import ConfigError, DataError
from qandc.evaluation.compare import FASHION_MNIST, reference_statistics
from qandc.evaluation.extractors import EXTRACTORS, Extractor, load_extractor
from qandc.evaluation.images import Images
from qandc.evaluation.metrics import FeatureStatistics, class_accuracy, frechet_distance, inception_score, psnr
from qandc.evaluation.npz import AT_ONCE, Npz
from qandc.sampling.pipelines import class_names, fashion_dit_path
from qandc.support.files import read_json

__all__ = ["Scorer", "load_images", "scorer_for"]

RESAMPLES = 50
AT_A_TIME = 500  # images compared at a time, in float64
Z_95 = 1.96


def load_images(path: Path) -> np.ndarray:
    """Read all of ``arr_0`` of an ``.npz`` that this package wrote, and did not compress: ``[N, H, W, C] uint8``.

    Raises:
        DataError: no such file, or it holds something else.
    """
    failure, advice = f"{str(path)!r} holds no images", "delete it and run the same command again"
    images = Npz(path, failure, advice).read("arr_0", limit=max(AT_ONCE, os.path.getsize(path)))
    if images.ndim != 4 or images.dtype != np.uint8:
        raise DataError(f"{failure} ([N, H, W, C] uint8) but {list(images.shape)} {images.dtype}; {advice}")
    return images


def scorer_for(
    pipe: Any, features: str = "auto", reference: str | Path | None = None, inception_weights: Path | None = None
) -> Scorer:
    """Choose what scores the images of a pipeline.

    Args:
        pipe: what draws them.
        features: a name of :data:`qandc.evaluation.extractors.EXTRACTORS`; "auto", the shipped classifier where it
            knows the classes of the pipeline, else "none", likeness alone.
        reference: of the Fréchet distance: images or statistics, as :func:`qandc.evaluation.evaluate` takes them. By
            default the training images of Fashion-MNIST for the shipped classifier, else there is no distance.
        inception_weights: file of the weights of "inception".

    Raises:
        ConfigError: an unknown name, missing weights, or a reference of other features.
        DataError: the reference cannot be read.
    """
    if features not in ("auto", "none", *EXTRACTORS):
        raise ConfigError(f"--features {features!r} is unknown; choose one of auto, none, {', '.join(EXTRACTORS)}")
    known = read_json(fashion_dit_path() / "model_index.json", "pipeline", "install qandc anew")["id2label"]
    ours = hasattr(pipe, "labels") and class_names(pipe) == {int(label): name for label, name in known.items()}
    if features == "auto":
        features = EXTRACTORS[0] if ours else "none"
    if features == "none":
        if reference is not None or inception_weights is not None:
            raise ConfigError(
                "a reference or Inception weights need --features with the name of a network; choose one of "
                f"{', '.join(EXTRACTORS)}"
            )
        return Scorer()
    network = load_extractor(features, pipe.device, inception_weights)
    if reference is None and features == EXTRACTORS[0]:
        reference = FASHION_MNIST
    statistics = None if reference is None else reference_statistics(reference, network).features
    return Scorer(network, statistics, accuracy=ours and features == EXTRACTORS[0])


class Scorer:
    """Score likeness to the images of full precision; with an extractor also what its features say.

    Every metric comes with half of its 95 % confidence interval: 1.96 standard deviations over bootstrap resamples of
    the images (Efron 1979), the same resamples for all metrics.

    Args:
        extractor: of features and logits, or None.
        reference: statistics of real images by the extractor, for the Fréchet distance, or None.
        accuracy: whether the logits are those of the classes that are drawn.
    """

    def __init__(
        self, extractor: Extractor | None = None, reference: FeatureStatistics | None = None, accuracy: bool = False
    ) -> None:
        self.extractor, self.reference, self.accuracy = extractor, reference, accuracy

    @property
    def name(self) -> str:
        """Return the name of the extractor, which results note."""
        return "none" if self.extractor is None else self.extractor.name

    @property
    def reference_digest(self) -> str | None:
        """Hash the reference, to tell references apart."""
        return None if self.reference is None else hashlib.sha256(self.reference.covariance.tobytes()).hexdigest()[:16]

    def __call__(self, images: np.ndarray, full: np.ndarray, labels: np.ndarray) -> dict[str, dict[str, float]]:
        """Score ``images`` by those of full precision, both ``[N, H, W, C] uint8``: metric to ``{"value", "ci95"}``.

        PSNR, its mean and that of the worst image, is in dB, capped at 100 (equal images); the Fréchet distance is
        missing without a reference.

        Raises:
            DataError: arrays are empty, of other types, or do not fit each other; features contain NaN or inf.
        """
        for given in (images, full):
            if not isinstance(given, np.ndarray) or given.dtype != np.uint8 or given.ndim != 4 or 0 in given.shape:
                raise DataError(f"scores are those of uint8 arrays [N >= 1, H, W, C]; got {_described(given)}")
        if not isinstance(labels, np.ndarray) or labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
            raise DataError(f"labels are an array of {len(images)} integers; got {_described(labels)}")
        if images.shape != full.shape:
            raise DataError(
                f"images {list(images.shape)} and those of full precision {list(full.shape)} differ in shape"
            )
        pairs = zip(Images.of(images).batches(AT_A_TIME), Images.of(full).batches(AT_A_TIME), strict=True)
        likeness = torch.cat([psnr(*pair) for pair in pairs]).clamp(max=100).numpy()
        found: dict[str, Callable[[Any], float]] = {
            "psnr_to_fp": lambda chosen: float(likeness[chosen].mean()),
            "psnr_worst": lambda chosen: float(likeness[chosen].min()),
        }
        if self.extractor is not None:
            batches = [(found.features.cpu(), found.logits.cpu()) for found in self.extractor(Images.of(images))]
            features, logits = (torch.cat(parts).double() for parts in zip(*batches, strict=True))
            reference, classes = self.reference, torch.from_numpy(labels.astype(np.int64))
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


def _described(given: object) -> str:
    return f"{list(given.shape)} {given.dtype}" if isinstance(given, np.ndarray) else type(given).__name__
