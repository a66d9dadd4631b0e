"""Attention of DiT-XL/2 with an int8 output: one kernel, against torch's attention and a quantization after it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.conftest import Measure
from benchmarks.goals import CUDNN, OWN_ATTENTION
from benchmarks.problems import DTYPE, HIDDEN, copies_beyond_l2
from benchmarks.timing import DEVICE, Candidate, launches_for, relative_error
from qandc_kernels import attention_quantize_per_tensor, quantize_per_tensor, reference

HEADS = 16
BACKENDS = {CUDNN: SDPBackend.CUDNN_ATTENTION, "torch flash attention + quantize": SDPBackend.FLASH_ATTENTION}
SIZES = [(256, 2), (256, 16), (256, 64), (1024, 2), (1024, 16)]  # tokens, batch
CASES = [(f"{tokens} tokens", batch, name) for tokens, batch in SIZES for name in (OWN_ATTENTION, *BACKENDS)]


def candidate(tokens: int, batch: int, name: str) -> Candidate:
    generator = torch.Generator(DEVICE).manual_seed(0)
    nbytes = batch * tokens * 3 * HIDDEN * 2
    shape = (math.ceil(copies_beyond_l2(nbytes) / 8), batch, tokens, 3, HEADS, HIDDEN // HEADS)
    qkv = torch.randn(shape, generator=generator, device=DEVICE, dtype=DTYPE)
    scale = torch.tensor(0.02, device=DEVICE)

    def launch(i: int) -> torch.Tensor:
        q, k, v = qkv[i % len(qkv)].unbind(2)
        if name == OWN_ATTENTION:
            return attention_quantize_per_tensor(q, k, v, scale)
        with sdpa_kernel(BACKENDS[name]):
            y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        return quantize_per_tensor(y.transpose(1, 2), scale)

    def error(y: torch.Tensor, i: int) -> float:
        return relative_error(y, reference.attention_quantize_per_tensor(*qkv[i % len(qkv)].unbind(2), scale))

    return Candidate(launch, error, 0.05, launches_for(len(qkv), 4 * batch * tokens**2 * HIDDEN / 1e15))


@pytest.mark.parametrize(("layer", "m", "name"), CASES)
def test_attention(measure: Measure, layer: str, m: int, name: str) -> None:
    tokens = int(layer.partition(" ")[0])
    row: dict[str, Any] = {"op": "attention", "layer": layer, "m": m, "candidate": name}
    row |= {"activations": "float", "ceiling": "bf16"}
    measure(row, lambda: candidate(tokens, m, name), operations=4 * m * tokens**2 * HIDDEN)
