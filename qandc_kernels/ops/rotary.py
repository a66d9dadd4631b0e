"""Define the public op between the product for q, k and v and attention. For inference: it passes on no gradient."""

from __future__ import annotations

from qandc_kernels import reference
from qandc_kernels.backend import launching_on
from qandc_kernels.ops._register import launcher, public_op

__all__ = ["qk_norm_rope_"]

qk_norm_rope_triton = launcher("rotary.qk_norm_rope_triton")


def _qk_norm_rope_(qkv, q_weight, k_weight, cos, sin, eps):
    q_weight, k_weight = (t if t.stride(-1) == 1 else t.contiguous() for t in (q_weight, k_weight))
    with launching_on(qkv):
        qk_norm_rope_triton(qkv, q_weight, k_weight, cos, sin, eps)


qk_norm_rope_ = public_op(reference.qk_norm_rope_, _qk_norm_rope_, lambda *given: None, writes=("qkv",))
