"""Define the exceptions of qandc and of the kernels below it, and nothing else.

::

    QandCError
    ├── ArgumentError      an argument of a kernel is not what is allowed     (also a TypeError and a ValueError)
    ├── ConfigError        a setting is outside what is allowed               (also a ValueError)
    ├── ModelError         a model or pipeline cannot be used as asked        (also a ValueError)
    │   └── CacheError     a feature cache cannot be attached, used, removed
    ├── DataError          calibration or weight data are empty or not finite (also a ValueError)
    ├── DeviceError        the device asked for is not here                   (also a RuntimeError)
    ├── OutputError        a result cannot be written                         (also an OSError)
    └── ProcessError       a process of a run has ended or was told to        (also a RuntimeError)

Every message says what was given, what is allowed and what to do. The command line prints it in one line and exits
with status 2; library callers catch ``QandCError``, or the builtin they would expect.
"""

from __future__ import annotations

from qandc_kernels import ArgumentError, DeviceError, QandCError

__all__ = [
    "ArgumentError",
    "CacheError",
    "ConfigError",
    "DataError",
    "DeviceError",
    "ModelError",
    "OutputError",
    "ProcessError",
    "QandCError",
]


class ConfigError(QandCError, ValueError):
    """Say that a setting is outside what is allowed."""


class ModelError(QandCError, ValueError):
    """Say that a model or pipeline cannot be used as asked."""


class CacheError(ModelError):
    """Say that a feature cache cannot be attached, used or removed."""


class DataError(QandCError, ValueError):
    """Say that calibration or weight data are empty or not finite."""


class OutputError(QandCError, OSError):
    """Say that a result cannot be written."""


class ProcessError(QandCError, RuntimeError):
    """Say that a process of a run has ended, or was told to."""
