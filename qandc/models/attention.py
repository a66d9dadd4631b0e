"""Compute attention of fused blocks by what measured fastest for its shape: torch's backends, or our kernel."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from qandc.errors import ModelError
from qandc.models.products import Product, quantized
from qandc_kernels import attention_quantize_per_tensor

__all__ = ["attend", "attend_quantized"]

Tensor = torch.Tensor
CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
MANY_KEYS = 1536  # from here on cuDNN was as fast as our kernel or faster with heads of 72 (H200; docs/kernel-notes.md)
_lock = threading.Lock()


def attend(qkv: Tensor, processor: Any, mask: Tensor | None = None) -> Tensor:
    """Return attention ``[B, tokens, heads, D]`` by diffusers' backend, if one was chosen, or the fastest of torch."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    if getattr(processor, "_parallel_config", None) is not None:
        raise ModelError("enable_parallelism was called after fuse, which then lacks tokens; call unfuse before it")
    q, k, v = qkv.unbind(2)
    first = mask is None and _cudnn_is_fastest(q)  # with a mask torch chooses
    with _preferring_cudnn() if first else contextlib.nullcontext():
        return dispatch_attention_fn(q, k, v, mask, backend=getattr(processor, "_attention_backend", None))


def attend_quantized(
    q: Tensor, k: Tensor, v: Tensor, product: Product, nan_flag: Tensor | None, key_bias: Tensor | None = None
) -> tuple[Tensor, Product]:
    """Return attention as int8 ``[B, tokens, K]`` for a product, and the product for it; heads are [B, keys, heads, D].

    Our kernel takes the range of the product (:func:`qandc_kernels.attention_quantize_per_tensor`). A scale per token
    needs all heads of a token first: then, as with many keys, torch attends.
    """
    scale, zero_point = product.x_scale, product.x_zero_point
    first = key_bias is None and k.shape[1] >= MANY_KEYS and _cudnn_is_fastest(q)
    if scale is not None and not first:
        return attention_quantize_per_tensor(q, k, v, scale, zero_point, nan_flag, key_bias).flatten(2), product
    mask = None if key_bias is None else key_bias[:, None, None]
    with _preferring_cudnn() if first else contextlib.nullcontext():
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)
    return quantized(y.transpose(1, 2), product, nan_flag)


@contextlib.contextmanager
def _preferring_cudnn() -> Iterator[None]:
    """Have torch prefer cuDNN inside the block: for all threads, one of ours at a time, or what was would be lost."""
    with _lock, sdpa_kernel(CUDNN_FIRST, set_priority=True):
        yield


def _cudnn_is_fastest(q: Tensor) -> bool:
    """Tell whether torch should prefer cuDNN: on sm_90 and newer, twice as fast as flash at 4,608 tokens, heads of 128.

    Not before 9.15.1 where the number of tokens is no multiple of 128, which it got wrong (pytorch#169849).
    """
    if not q.is_cuda or q.element_size() != 2 or torch.cuda.get_device_capability(q.device) < (9, 0):
        return False
    cuda = torch.backends.cuda
    if not (cuda.cudnn_sdp_enabled() and cuda.flash_sdp_enabled() and cuda.mem_efficient_sdp_enabled()):
        return False  # somebody has chosen, with sdpa_kernel for example
    return q.shape[1] % 128 == 0 or (torch.backends.cudnn.version() or 0) >= 91501
