"""Define the exceptions of this package, and the base class that :mod:`qandc.errors` shares with it."""

from __future__ import annotations

__all__ = ["ArgumentError", "DeviceError", "QandCError"]


class QandCError(Exception):
    """Stand for every error that qandc and qandc_kernels raise on purpose."""


class ArgumentError(QandCError, TypeError, ValueError):
    """Say that an argument of a kernel has a type, dtype, shape, layout, device or value that is not allowed."""


class DeviceError(QandCError, RuntimeError):
    """Say that the device asked for is not here."""
