"""Compare attention of DiT-XL/2 and PixArt with an int8 output with torch's attention and a quantization after it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.conftest import Measure
from benchmarks.goals import ATTENTION_SIZES, CUDNN, OWN_ATTENTION
from benchmarks.problems import DTYPE, HIDDEN, copies_beyond_l2
from benchmarks.timing import DEVICE, Candidate, launches_for, relative_error
from qandc_kernels import attention_quantize_per_tensor, quantize_per_tensor, reference

HEADS = 16
BACKENDS = {CUDNN: SDPBackend.CUDNN_ATTENTION, "torch flash attention + quantize": SDPBackend.FLASH_ATTENTION}
CASES = [(layer, batch, name) for layer, batch in ATTENTION_SIZES for name in (OWN_ATTENTION, *BACKENDS)]


def candidate(tokens: int, keys: int, batch: int, name: str) -> Candidate:
    generator = torch.Generator(DEVICE).manual_seed(0)
    nbytes = batch * tokens * 3 * HIDDEN * 2
    shape = (math.ceil(copies_beyond_l2(nbytes) / 8), batch, tokens, 3, HEADS, HIDDEN // HEADS)
    qkv = torch.randn(shape, generator=generator, device=DEVICE, dtype=DTYPE)
    scale = torch.tensor(0.02, device=DEVICE)
    bias = None if keys == tokens else torch.zeros(batch, keys, device=DEVICE, dtype=DTYPE)  # a prompt has a mask

    def parts(i: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = qkv[i % len(qkv)].unbind(2)
        return q, k[:, :keys], v[:, :keys]

    def launch(i: int) -> torch.Tensor:
        q, k, v = parts(i)
        if name == OWN_ATTENTION:
            return attention_quantize_per_tensor(q, k, v, scale, key_bias=bias)
        with sdpa_kernel(BACKENDS[name]):
            y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        return quantize_per_tensor(y.transpose(1, 2), scale)

    def error(y: torch.Tensor, i: int) -> float:
        return relative_error(y, reference.attention_quantize_per_tensor(*parts(i), scale))

    return Candidate(launch, error, 0.05, launches_for(len(qkv), 4 * batch * tokens * keys * HIDDEN / 1e15))


@pytest.mark.parametrize(("layer", "m", "name"), CASES)
def test_attention(measure: Measure, layer: str, m: int, name: str) -> None:
    tokens, *others = map(int, layer.removesuffix(" tokens").split(" x "))
    keys = others[0] if others else tokens
    row: dict[str, Any] = {"op": "attention", "layer": layer, "m": m, "candidate": name}
    row |= {"activations": "float", "ceiling": "bf16"}
    against = (CUDNN, lambda: candidate(tokens, keys, m, CUDNN)) if name == OWN_ATTENTION else None
    build = lambda: candidate(tokens, keys, m, name)  # noqa: E731
    measure(row, build, rival=against, operations=4 * m * tokens * keys * HIDDEN)
