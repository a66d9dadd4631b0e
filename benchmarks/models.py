"""DiT-XL/2 with random weights, and the ways to run one denoising step of it that are compared."""

from __future__ import annotations

import copy
import importlib
import statistics
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.rivals import INDUCTOR_OPTIONS, NotInstalled, library
from benchmarks.timing import DEVICE, Candidate, prepare
from qandc import calibrate, fuse_dit, graph, quantize_model
from qandc.quantization.linear import QuantLinear
from qandc_kernels import int8_linear

__all__ = [
    "CANDIDATES",
    "autoencoder_kl",
    "block_linear_bytes",
    "compile_blocks",
    "dit_xl_2",
    "floor_seconds",
    "inputs",
    "operations",
    "tensor_bytes",
]

Model = Any
SKIP_PATTERNS = ("pos_embed", "norm")
LINEARS_PER_BLOCK = 12  # hidden² products of a block: q, k, v, out, 4 + 4 of the MLP


class Rates(NamedTuple):
    """The best that this GPU reaches: bytes, int8 and bf16 operations per second."""

    copy: float
    int8: float
    bf16: float


@cache
def measured_rates() -> Rates:
    """Of a copy of 1 GiB and of products of 8192 x 8192 x 8192, ours in int8 and cuBLAS's in bf16."""
    n = 8192
    x, y = torch.randn(2, n, n, device=DEVICE, dtype=torch.bfloat16).unbind(0)
    xq, yq = torch.randint(-127, 128, (2, n, n), device=DEVICE, dtype=torch.int8).unbind(0)
    scale, scales = torch.ones((), device=DEVICE), torch.ones(n, device=DEVICE)
    large = torch.randn(1 << 28, device=DEVICE, dtype=torch.bfloat16)
    copied = torch.empty_like(large)

    def seconds(launch: Callable[[int], Any]) -> float:
        launch(0)
        timed = prepare(Candidate(launch, lambda result, i: 0.0, 0.0, launches=4))
        return statistics.median(timed.seconds() for _ in range(timed.rounds()))

    return Rates(
        2 * large.numel() * large.element_size() / seconds(lambda i: torch.neg(large, out=copied)),
        2 * n**3 / seconds(lambda i: int8_linear(xq, yq, scale, scales, out_dtype=torch.bfloat16)),
        2 * n**3 / seconds(lambda i: F.linear(x, y)),
    )


@cache
def dit_xl_2(latent: int) -> Model:
    """bf16 on the GPU; every weight random, none zero, so that every path carries signal."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = DiTTransformer2DModel(sample_size=latent, out_channels=8)
    return torch.nn.Module.to(model, torch.bfloat16).eval()


def autoencoder_kl(channels: int, size: int, **others: Any) -> Model:
    """An autoencoder of the widths of Stable Diffusion's, with random weights."""
    from diffusers import AutoencoderKL

    widths = (128, 256, 512, 512)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=2,
        latent_channels=channels,
        sample_size=size,
        **others,
    )


def inputs(model: Model, rows: int, timestep: int = 500) -> dict[str, Any]:
    """Latents, one timestep for all rows, labels: half of them the null class, as for classifier-free guidance."""
    generator = torch.Generator().manual_seed(rows)
    config, device = model.config, model.device
    shape = (rows, config.in_channels, config.sample_size, config.sample_size)
    labels = torch.arange(rows) % config.num_embeds_ada_norm
    labels[rows // 2 :] = config.num_embeds_ada_norm
    return {
        "hidden_states": torch.randn(shape, generator=generator).to(device, model.dtype),
        "timestep": torch.tensor([timestep], device=device).expand(rows),
        "class_labels": labels.to(device),
        "return_dict": False,
    }


def _calibrated(model: Model, w_bits: int) -> Model:
    quantized = quantize_model(copy.deepcopy(model), w_bits=w_bits, skip_patterns=SKIP_PATTERNS)
    return calibrate(quantized, [inputs(model, 2, t) for t in (999, 500, 10)])


def compile_blocks(model: Model, options: dict[str, Any] | None = None) -> Model:
    """Regional compilation: one graph for all blocks, for each shape; inductor's defaults but for ``options``."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for block in model.transformer_blocks:
        block.compile(fullgraph=True, dynamic=False, options=options)
    return model


class SimulatedLinear(torch.nn.Module):
    """What simulators of W8A8 run: round, clamp and scale back, then a bf16 product."""

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__()
        self.register_buffer("weight", layer.weight.clone())  # a plain tensor
        self.register_buffer("scale", layer.act_scale)
        self.register_buffer("zero_point", layer.act_zero_point)
        self.bias = layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = (x.float() / self.scale + self.zero_point).round().clamp(-128, 127)
        return F.linear(((q - self.zero_point) * self.scale).to(x.dtype), self.weight, self.bias)


def _simulated(model: Model) -> Model:
    model = _calibrated(model, 8)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, QuantLinear) and child.act_scale is not None:  # proj_out_1 sees a row per sample
                setattr(module, name, SimulatedLinear(child))
    return model


def _torchao_quantization() -> Any:
    library("torchao")
    return importlib.import_module("torchao.quantization")


def _torchao(model: Model, config: str, recommended: bool = True, **arguments: Any) -> Model:
    """torchao on the linear layers of the blocks, compiled with what it recommends or with inductor's defaults."""
    quantization = _torchao_quantization()
    warnings.filterwarnings("ignore", message="Int8Tensor does not implement")
    model = copy.deepcopy(model)
    try:
        chosen = getattr(quantization, config)(**arguments, set_inductor_config=False)
    except Exception as error:
        raise NotInstalled(f"torchao {config}: {error}") from error

    def wanted(module: torch.nn.Module, name: str) -> bool:
        chosen_part = name.startswith("transformer_blocks") and not any(p in name for p in SKIP_PATTERNS)
        return isinstance(module, torch.nn.Linear) and chosen_part

    quantization.quantize_(model, chosen, filter_fn=wanted)
    # all that torchao recommends but this, which takes minutes for each shape of a block
    options = {key: value for key, value in INDUCTOR_OPTIONS.items() if not key.endswith("check_all_directions")}
    return compile_blocks(model, options if recommended else None)


def _fp8(model: Model) -> Model:
    per_row = _torchao_quantization().PerRow()
    # what torchao recommends did not end in 7 minutes for 16 rows
    return _torchao(model, "Float8DynamicActivationFloat8WeightConfig", recommended=False, granularity=per_row)


def _fused(model: Model, w_bits: int, cuda_graphs: bool) -> Model:
    return fuse_dit(_calibrated(model, w_bits), cuda_graphs=cuda_graphs)


CANDIDATES: dict[str, tuple[Callable[[Model], Model], float]] = {
    # how it is made from the bf16 model, and how far its output may be from that model's
    "bf16 eager, called": (copy.deepcopy, 0.02),
    "bf16 eager": (copy.deepcopy, 0.02),
    "bf16 compiled": (lambda model: compile_blocks(copy.deepcopy(model)), 0.02),
    "simulated W8A8, compiled": (lambda model: compile_blocks(_simulated(model)), 0.1),
    "QuantLinear W8A8": (lambda model: _calibrated(model, 8), 0.1),
    "bf16 compiled, called": (lambda model: compile_blocks(copy.deepcopy(model)), 0.02),
    "QuantLinear W8A8, compiled": (lambda model: compile_blocks(_calibrated(model, 8)), 0.1),
    "QuantLinear W8A8, compiled, called": (lambda model: compile_blocks(_calibrated(model, 8)), 0.1),
    "QuantLinear W8A8, compiled, graph(), called": (lambda model: graph(compile_blocks(_calibrated(model, 8))), 0.1),
    "fused W8A8": (lambda model: _fused(model, 8, False), 0.1),
    "fused W4A8": (lambda model: _fused(model, 4, False), 0.5),
    "fused W8A8, prepared run": (lambda model: _fused(model, 8, False), 0.1),
    "fused W4A8, prepared run": (lambda model: _fused(model, 4, False), 0.5),
    "fused W8A8, called": (lambda model: _fused(model, 8, True), 0.1),
    "torchao int8dq, compiled": (lambda model: _torchao(model, "Int8DynamicActivationInt8WeightConfig"), 0.1),
    "torchao fp8 rowwise, compiled": (_fp8, 0.2),
}


def tensor_bytes(model: Model) -> int:
    """Of all parameters and buffers; tensors that share memory count once."""
    found: dict[int, int] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        parts = [tensor]
        if hasattr(tensor, "__tensor_flatten__"):  # torchao's tensors hold others
            parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        for part in parts:
            found[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
    return sum(found.values())


def block_linear_bytes(model: Model) -> int | None:
    """Of the linear layers in the blocks, with scales and sums if quantized; None for layers of other libraries."""
    total = 0
    for name, layer in model.named_modules():
        if not name.startswith("transformer_blocks") or "norm" in name:
            continue
        if isinstance(layer, QuantLinear):
            total += layer.weight_bytes
        elif isinstance(layer, torch.nn.Linear) and type(layer.weight) is torch.nn.Parameter:
            total += layer.weight.numel() * layer.weight.element_size()
    return total or None


def operations(model: Model, rows: int) -> tuple[float, float]:
    """Of the products with block weights, and of attention."""
    config = model.config
    tokens = (config.sample_size // config.patch_size) ** 2
    hidden = config.num_attention_heads * config.attention_head_dim
    weights = 2 * rows * tokens * LINEARS_PER_BLOCK * hidden**2
    return config.num_layers * weights, config.num_layers * 4 * rows * tokens**2 * hidden


def floor_seconds(model: Model, rows: int, weight_bits: int, activation_bits: int) -> float:
    """The least time of a step on this GPU: the longer of all operations at the best rates measured, and of reading all
    weights once. Conditioning and output are bf16 and count as bytes alone; activations are left out."""
    rates = measured_rates()
    config = model.config
    hidden = config.num_attention_heads * config.attention_head_dim
    linear, attention = operations(model, rows)
    compute = linear / (rates.int8 if activation_bits == 8 else rates.bf16) + attention / rates.bf16
    conditioning = 2 * config.num_layers * hidden * (7 * hidden + 256)
    memory = (config.num_layers * LINEARS_PER_BLOCK * hidden**2 * weight_bits / 8 + conditioning) / rates.copy
    return max(compute, memory)
