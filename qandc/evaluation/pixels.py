"""Convert pixels between 8 bits and float: one rule for every file that is written and every image that is compared."""

from __future__ import annotations

import torch

from qandc.errors import DataError

__all__ = ["check_images", "to_float", "to_uint8"]


def to_uint8(images: torch.Tensor, name: str = "images", first: int = 0) -> torch.Tensor:
    """Round ``images [B, ...]`` of float values in [-1, 1] to uint8 0 to 255, in float32; uint8 stays as it is.

    Values outside of [-1, 1] are clamped.

    Args:
        images: a tensor, on any device.
        name: begins the message of an error.
        first: the number of the first image, for that message.

    Raises:
        DataError: they are no tensor, neither float nor uint8, or contain NaN or inf.
    """
    known = isinstance(images, torch.Tensor) and images.ndim > 0
    if not known or not (images.dtype == torch.uint8 or images.is_floating_point()):
        given = f"{list(images.shape)} {images.dtype}" if isinstance(images, torch.Tensor) else type(images).__name__
        raise DataError(f"{name}: pixels are a torch tensor, uint8, or float in [-1, 1]; got {given}; convert them")
    if images.dtype == torch.uint8:
        return images
    values = images.float()
    finite = values.isfinite()
    if not bool(finite.all()):
        broken = int(finite.reshape(len(values), -1).all(1).int().argmin())
        value = "NaN" if bool(values[broken].isnan().any()) else "inf"
        raise DataError(
            f"{name} contain NaN or inf: image {first + broken} holds {value}; look for the sampling run that made it, "
            "check its model, or lower the guidance"
        )
    return ((values / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def to_float(images: torch.Tensor, centre: float = 127.5) -> torch.Tensor:
    """Map uint8 images to float32: ``centre`` becomes 0, and 0 becomes -1; by default 0 to 255 become -1 to 1."""
    return (images.float() - centre) / centre


def check_images(images: torch.Tensor, channels: tuple[int, ...], name: str) -> None:
    """Refuse what a network that takes float images ``[B, C, H, W]`` with one of these numbers of channels cannot take.

    Raises:
        DataError: another type, number of dimensions or of channels, or no pixel.
    """
    if (
        not isinstance(images, torch.Tensor)
        or not images.is_floating_point()
        or images.ndim != 4
        or images.shape[1] not in channels
        or 0 in images.shape[2:]
    ):
        given = f"{list(images.shape)} {images.dtype}" if isinstance(images, torch.Tensor) else type(images).__name__
        wanted = " or ".join(map(str, channels))
        raise DataError(f"{name} takes float images [B, {wanted}, H, W] in [-1, 1]; got {given}; convert them")
