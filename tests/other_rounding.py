"""Round float32 matrix products as another processor might: ``pytest -p tests.other_rounding``.

Libraries choose how to sum by processor, number of threads and shape, so a product of another batch shape may differ in
its last bits. This plugin moves the elements of every product by up to ``2^-24 Σ |x_k y_k|``, in a pattern that depends
on the shapes alone; sums of integers stay exact. A test that passes with and without it holds by its bound, not by the
machine.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch

_library = torch.library.Library("aten", "IMPL")  # kept: its overrides end with it


def _product(x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | float = 0.0) -> torch.Tensor:
    def exact(t: torch.Tensor) -> np.ndarray:
        return t.detach().to(torch.float64 if t.is_floating_point() else t.dtype).numpy()

    found = exact(x) @ exact(y)
    if isinstance(bias, torch.Tensor):
        found = found + exact(bias)
    if x.dtype == torch.float32 and not (x.equal(x.round()) and y.equal(y.round())):
        pattern = np.random.default_rng(abs(hash((x.shape, y.shape))) % 2**32).integers(-1, 2, found.shape)
        found = found + pattern * 2.0**-24 * (abs(exact(x)) @ abs(exact(y)))
    return torch.from_numpy(np.ascontiguousarray(found)).to(x.dtype)


def _product_and_sum(
    bias: torch.Tensor, x: torch.Tensor, y: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    if beta != 1 or alpha != 1:
        return beta * bias + alpha * _product(x, y)
    return _product(x, y, bias)


with warnings.catch_warnings(action="ignore", category=UserWarning):  # that a kernel is overridden
    for _names, _implementation in ((("mm", "bmm"), _product), (("addmm", "baddbmm"), _product_and_sum)):
        for _name in _names:
            _library.impl(_name, _implementation, "CPU")
