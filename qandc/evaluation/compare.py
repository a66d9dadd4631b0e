"""Compare two sets of images, or one with saved statistics: Fréchet distances, IS, precision, recall, KID."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qandc.errors import ConfigError, DataError, QandCError
from qandc.evaluation.extractors import Extractor, load_extractor
from qandc.evaluation.images import MAX_PIXELS, Images, MaxPixels
from qandc.evaluation.metrics import (
    FeatureStatistics,
    RunningStatistics,
    SubsetSize,
    fashion_classifier_path,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from qandc.evaluation.npz import Npz
from qandc.support.arguments import Count, Seed, checked
from qandc.support.files import write_whole

__all__ = ["FASHION_MNIST", "Evaluation", "ReferenceStatistics", "evaluate", "reference_statistics"]

logger = logging.getLogger(__name__)

FASHION_MNIST = "fashion-mnist"
"""Names the shipped statistics of the 60,000 training images, by the shipped classifier."""

USUAL_COUNT = 10_000


@dataclass(frozen=True)
class ReferenceStatistics:
    """Hold mean and covariance of the features of a set of images.

    Attributes:
        features: of the pooled features; its ``count`` is 0 where the file does not say.
        spatial: of the spatial features (after norm and ReLU, see
            :class:`qandc.evaluation.extractors.Extractor`), or None.
        extractor: the name of the network, or None where the file does not say.
    """

    features: FeatureStatistics
    spatial: FeatureStatistics | None = None
    extractor: str | None = None

    def save(self, path: str | Path) -> None:
        """Write an ``.npz`` with ``mu, sigma, mu_s, sigma_s`` (names of the ADM suite), ``count`` and ``extractor``.

        Raises:
            OutputError: it cannot be written.
        """
        arrays: dict[str, Any] = {"mu": self.features.mean, "sigma": self.features.covariance}
        if self.spatial is not None:
            arrays |= {"mu_s": self.spatial.mean, "sigma_s": self.spatial.covariance}
        arrays |= {"count": np.int64(self.features.count), "extractor": np.str_(self.extractor or "")}

        def write(partial: Path) -> None:
            with partial.open("wb") as file:  # by name, numpy would add .npz
                np.savez_compressed(file, **arrays)

        write_whole(Path(path), write)

    @classmethod
    def load(cls, path: str | Path) -> ReferenceStatistics | None:
        """Read statistics as :meth:`save`, the ADM suite or pytorch-fid write them; None if the file holds none.

        Raises:
            DataError: the file cannot be read, or its arrays don't fit each other.
        """
        data = _open_npz(path)
        names = ("mu", "sigma") if "mu" in data.names else ("mean", "covariance")
        if names[0] not in data.names:
            return None
        count = data.integer("count") if "count" in data.names else 0
        features = _statistics(path, data, *names, count)
        spatial = _statistics(path, data, "mu_s", "sigma_s", count) if "mu_s" in data.names else None
        extractor = str(data.read("extractor", limit=4096)) if "extractor" in data.names else ""
        return cls(features, spatial, extractor or None)


def _open_npz(path: str | Path) -> Npz:
    return Npz(path, f"reference {str(path)!r} cannot be read", "write it again with --save-statistics")


def _statistics(path: str | Path, data: Npz, mean: str, covariance: str, count: int) -> FeatureStatistics:
    shape, square = data.header(mean).shape, data.header(covariance).shape
    if len(shape) != 1 or square != shape * 2:
        shapes = f"{mean} is {list(shape)} and {covariance} {list(square)}"
        raise DataError(f"reference {str(path)!r}: {shapes}; statistics are [D] and [D, D], make them anew")
    arrays = (data.read(name) for name in (mean, covariance))
    try:
        first, second = (array.astype(np.float64) if array.dtype.kind in "iuf" else array for array in arrays)
        return FeatureStatistics(first, second, count)
    except QandCError as error:
        raise DataError(f"reference {str(path)!r}: {error}") from None


@dataclass(frozen=True)
class Evaluation:
    """Tell how a set of images compares with a reference. What could not be computed is None; ``notes`` say why.

    Attributes:
        images, reference: names.
        count, reference_count: how many; the reference's is 0 if its statistics do not say.
        extractor, description: the features' network.
        frechet_distance: of the pooled features. FID with the published Inception weights, and only then.
        spatial: the layer whose output after norm and ReLU, the first 7 channels, are the spatial features.
        spatial_frechet_distance: of the spatial features; sFID, likewise.
        inception_score: of the images, over parts of ``split`` or all of them.
        precision, recall: Kynkäänniemi et al. 2019, k = 3.
        kernel_distance, kernel_distance_std: mean and deviation over subsets; KID, likewise. The deviation of a single
            subset is 0, which says nothing.
        statistics: those of the reference, to be saved.
    """

    images: str
    reference: str
    count: int
    reference_count: int
    extractor: str
    description: str
    spatial: str
    split: int | None
    frechet_distance: float
    spatial_frechet_distance: float | None
    inception_score: float
    precision: float | None
    recall: float | None
    kernel_distance: float | None
    kernel_distance_std: float | None
    notes: tuple[str, ...]
    statistics: ReferenceStatistics = field(repr=False, compare=False)

    def record(self) -> dict[str, Any]:
        """Return all but the statistics, for JSON."""
        return {name: value for name, value in asdict(self).items() if name != "statistics"}


@dataclass(frozen=True)
class _Extracted:
    features: torch.Tensor  # [N, D]
    logits: torch.Tensor
    statistics: ReferenceStatistics


@checked
def evaluate(
    images: str | Path | Images,
    reference: str | Path | Images | ReferenceStatistics,
    extractor: Extractor | str = "fashion-classifier",
    *,
    allow_unequal: bool = False,
    kernel_subsets: Count = 100,
    kernel_subset_size: SubsetSize = 1000,
    seed: Seed = 0,
    max_pixels: MaxPixels = MAX_PIXELS,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Evaluation:
    """Compare images with a reference.

    Args:
        images: an ``.npz`` file or a folder (:meth:`Images.open`), or :meth:`Images.of` an array.
        reference: the same, or statistics: an ``.npz`` file of :meth:`ReferenceStatistics.save`, of the ADM suite or
            of pytorch-fid, or :data:`FASHION_MNIST`. Statistics give the Fréchet distances only. If a file holds images
            and fitting statistics, the latter decide the Fréchet distances, as in the ADM suite.
        extractor: one that is loaded, or its name (:func:`load_extractor`), which loads it on the CPU.
        allow_unequal: compare different numbers of images, or with statistics of an unknown number.
        kernel_subsets, kernel_subset_size, seed: see :func:`qandc.evaluation.metrics.kernel_distance`.
        max_pixels: that one image of a file may have, see :meth:`Images.open`.
        progress: called with "images" or "reference", images done, images in all.

    Few images give large Fréchet distances: fewer than 10,000, or than features, are a warning in the log.

    Raises:
        ConfigError: there is no such file; sets differ in size or number; statistics are of another extractor; an
            argument is none of these.
        DataError: a file cannot be read or holds something else; fewer than 4 images; NaN in images or features.
    """
    network = load_extractor(extractor) if isinstance(extractor, str) else extractor
    ours = images if isinstance(images, Images) else Images.open(images, max_pixels)
    theirs, saved = _open_reference(reference, network, max_pixels)
    name = theirs.name if theirs is not None else _name(reference)
    fewest = _check(ours, theirs, saved, name, allow_unequal)
    found = _extract(network, ours, lambda done: progress("images", done, ours.count))
    held = None
    if theirs is not None:
        total = theirs.count
        held = _extract(network, theirs, lambda done: progress("reference", done, total))
    statistics = saved if saved is not None else held.statistics if held is not None else None
    assert statistics is not None
    _warn(fewest, found.statistics)
    notes = []
    spatial_distance = precision = recall = distance = deviation = None
    if statistics.spatial is not None and found.statistics.spatial is not None:
        spatial_distance = frechet_distance(found.statistics.spatial, statistics.spatial)
    else:
        notes.append("the reference's statistics hold no spatial features: no spatial distance")
    if held is not None:
        precision, recall = precision_recall(found.features, held.features)
        distance, deviation = kernel_distance(found.features, held.features, kernel_subsets, kernel_subset_size, seed)
    else:
        notes.append("the reference has statistics and no images: no precision, recall and kernel distance")
    return Evaluation(
        images=ours.name,
        reference=name,
        count=ours.count,
        reference_count=statistics.features.count,
        extractor=network.name,
        description=network.description,
        spatial=network.spatial,
        split=network.split,
        frechet_distance=frechet_distance(found.statistics.features, statistics.features),
        spatial_frechet_distance=spatial_distance,
        inception_score=inception_score(found.logits, network.split),
        precision=precision,
        recall=recall,
        kernel_distance=distance,
        kernel_distance_std=deviation,
        notes=tuple(notes),
        statistics=statistics,
    )


def reference_statistics(
    reference: str | Path | Images | ReferenceStatistics, network: Extractor
) -> ReferenceStatistics:
    """Load the statistics that a reference of :func:`evaluate` has, or compute those of its images.

    Raises:
        ConfigError, DataError: as :func:`evaluate`.
    """
    images, saved = _open_reference(reference, network, MAX_PIXELS)
    if saved is not None:
        return saved
    assert images is not None
    return _extract(network, images, lambda done: None).statistics


def _name(reference: object) -> str:
    return str(reference) if isinstance(reference, (str, Path)) else "statistics"


def _open_reference(
    reference: str | Path | Images | ReferenceStatistics, network: Extractor, max_pixels: int
) -> tuple[Images | None, ReferenceStatistics | None]:
    """Open a reference: images, statistics, or both."""
    if isinstance(reference, Images):
        return reference, None
    if isinstance(reference, ReferenceStatistics):
        _refuse_others(reference, network, "statistics")
        return None, reference
    path = Path(reference)
    if str(reference) == FASHION_MNIST and not os.path.exists(path):
        path = fashion_classifier_path() / "train-statistics.npz"
    if path.suffix.lower() != ".npz" or not os.path.isfile(path):
        if not os.path.exists(path):
            raise ConfigError(
                f"reference {str(path)!r} is not there; give a folder of images, an .npz of images or statistics, or "
                f"{FASHION_MNIST}"
            )
        return Images.open(path, max_pixels), None
    statistics = ReferenceStatistics.load(path)
    if statistics is None:
        return Images.open(path, max_pixels), None
    if "arr_0" not in _open_npz(path).names:
        _refuse_others(statistics, network, str(path))
        return None, statistics
    if not _fit(statistics, network):
        logger.info("the statistics in %s are of other features; they are made anew from its images", path)
        return Images.open(path, max_pixels), None
    return Images.open(path, max_pixels), statistics


def _fit(statistics: ReferenceStatistics, network: Extractor) -> bool:
    """Accept statistics of this extractor; a file that names none is believed if the numbers of features are equal."""
    return statistics.extractor in (None, network.name) and len(statistics.features.mean) == network.num_features


def _refuse_others(statistics: ReferenceStatistics, network: Extractor, name: str) -> None:
    if not _fit(statistics, network):
        made = statistics.extractor or "an extractor it does not name"
        raise ConfigError(
            f"reference {name!r} holds {len(statistics.features.mean)} features of {made}, but features are "
            f"{network.name} with {network.num_features}; choose the same features, or give the images of the reference"
        )


def _check(
    ours: Images, theirs: Images | None, saved: ReferenceStatistics | None, name: str, allow_unequal: bool
) -> int:
    """Check shapes and numbers before the work begins; return the number of images of the smaller set."""
    if theirs is not None and ours.shape != theirs.shape:
        if ours.shape[2] != theirs.shape[2]:
            kind = {1: "grayscale", 3: "RGB"}
            raise ConfigError(
                f"{ours.name} is {kind[ours.shape[2]]}, {name} is {kind[theirs.shape[2]]}; convert one of them"
            )
        raise ConfigError(
            f"images of {ours.name} are {ours.shape[0]} x {ours.shape[1]}, those of {name} {theirs.shape[0]} x "
            f"{theirs.shape[1]}; bring them to one size"
        )
    if ours.count < 4 or (theirs is not None and theirs.count < 4):
        few = ours if ours.count < 4 or theirs is None else theirs
        raise DataError(f"{few.name} holds {few.count} images; distances and neighbours need 4 or more of each set")
    counts = [*([theirs.count] if theirs is not None else []), *([saved.features.count] if saved is not None else [])]
    if not allow_unequal and any(count != ours.count for count in counts):
        number = " and ".join(str(count or "an unknown number") for count in counts)
        raise ConfigError(
            f"{ours.name} holds {ours.count} images, {name} is of {number}; distances depend on the number: give equal "
            "numbers, or --allow-unequal (allow_unequal=True)"
        )
    return min(count for count in (ours.count, *counts) if count)


def _warn(fewest: int, statistics: ReferenceStatistics) -> None:
    """Warn of what is computed all the same, but means less."""
    if fewest < USUAL_COUNT:
        logger.warning(
            "%d images: Fréchet distances of fewer than %d are too large; compare only those of equal numbers",
            fewest,
            USUAL_COUNT,
        )
    for kind, part in (("", statistics.features), ("spatial ", statistics.spatial)):
        if part is not None and fewest <= len(part.mean):
            logger.warning(
                "%d images for %d %sfeatures: a covariance has no full rank, its distance is not reliable; take more "
                "images, or trust the kernel distance",
                fewest,
                len(part.mean),
                kind,
            )


def _extract(network: Extractor, images: Images, progress: Callable[[int], None]) -> _Extracted:
    """Extract features, which are kept on the extractor's device; spatial features are only summed up."""
    pooled, spatial = RunningStatistics(), RunningStatistics()
    features, logits = [], []
    for batch in network(images):
        pooled.add(batch.features)
        spatial.add(batch.spatial)
        features.append(batch.features)
        logits.append(batch.logits)
        progress(pooled.count)
    statistics = ReferenceStatistics(pooled.result(), spatial.result(), network.name)
    return _Extracted(torch.cat(features), torch.cat(logits), statistics)
