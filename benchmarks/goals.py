"""What the kernels must reach and should reach, from the rows of one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

__all__ = [
    "ADALN",
    "ATTENTION_SIZES",
    "BF16",
    "CALLED",
    "COMPILED",
    "COMPUTE",
    "CUDNN",
    "DROP_IN",
    "EAGER",
    "FILE_A_MODEL",
    "FP8",
    "FP32",
    "FULL_METHOD",
    "FUSED_CALLED",
    "GATE",
    "GELU",
    "HOST_RIVALS",
    "HOST_ROWS",
    "IMAGES_BF16",
    "IMAGES_CACHED",
    "IMAGES_FUSED",
    "IMAGES_FUSED4",
    "INT_MM",
    "INT_MM_COMPILED",
    "LARGE_LAYERS",
    "LARGE_ROWS",
    "OWN_ATTENTION",
    "PER_TOKEN",
    "PIPELINE_COMPILED",
    "PIPELINE_EAGER",
    "PLAIN",
    "RUN",
    "SQUARE_LAYER",
    "STATIC",
    "SUITES",
    "cache_goals",
    "file_of",
    "goals",
    "images_goals",
    "median",
    "model_goals",
    "models_goals",
    "pipeline_goals",
    "suite_of",
]

FP8, STATIC, PER_TOKEN = "fp8 _scaled_mm rowwise", "W8A8", "W8A8 per token"
LARGE_LAYERS = {  # (N, K) of FLUX.1, whose first four are Qwen-Image's as well
    "qkv": (9216, 3072), "out": (3072, 3072), "fc1": (12288, 3072), "fc2": (3072, 12288),
    "qkv + fc1": (21504, 3072), "out + fc2": (3072, 15360),
}  # fmt: skip
LARGE_ROWS = (512, 4096, 4608)
BF16, FP32 = "bf16 F.linear", "fp32 F.linear"
INT_MM, INT_MM_COMPILED = "torch._int_mm + dequantize", "torch._int_mm + dequantize, compiled"
PLAIN, GELU, GATE = "W8A8, bf16 out", "W8A8 + GELU + requantize", "W8A8 + gate + residual"
ADALN, EAGER = "adaln_quantize_per_tensor", "eager torch"
COMPILED, CALLED, FUSED, FUSED4 = "bf16 compiled", "bf16 eager, called", "fused W8A8", "fused W4A8"
FUSED_CALLED = f"{FUSED}, called"
OWN_ATTENTION, CUDNN = "attention_quantize_per_tensor", "torch cuDNN attention + quantize"
ATTENTION_SIZES = (  # tokens, or queries x keys, and samples; the last two are PixArt-Sigma's at 1024 x 1024
    ("256 tokens", 2), ("256 tokens", 16), ("256 tokens", 64), ("1024 tokens", 2), ("1024 tokens", 16),
    ("4096 tokens", 2), ("4096 x 300 tokens", 2),
)  # fmt: skip
COMPUTE, RUN = "compute step", "no cache"
IMAGES_BF16, IMAGES_CACHED = "bf16 compiled", ("delta", "branch", "taylor")
IMAGES_FUSED = "W8A8 + W8A16, fused, graph()"
IMAGES_FUSED4 = "W4A8 + W4A16, fused, graph()"
FUSED_BLOCKS = f"QuantLinear {IMAGES_FUSED}"
FUSED_PER_TOKEN = "QuantLinear W8A8 + W8A16, per token, fused, graph()"
PIPELINE_EAGER, PIPELINE_COMPILED = "diffusers bf16, eager", "bf16 compiled, a graph per step"
FULL_METHOD = "fused W8A8 + branch cache + VC"
DROP_IN, INT8DQ = "QuantLinear W8A8, compiled", "torchao int8dq, compiled"
SQUARE_LAYER = "8192^3"
LAYERS = ("qkv", "out", "fc1", "fc2")
MODEL = "DiT-XL/2-256"
CACHE_FORMS = ("block", "branch", "taylor 1")
W8A8_RATIOS = {16384: (1.5, 1.8), 4096: (1.25, 1.5), 512: (1.0, 1.3)}  # M: must, goal
EPILOGUES = (("fc1", GELU, "gelu_requantize"), ("out", GATE, "gate_residual"), ("fc2", GATE, "gate_residual"))

Row = dict[str, Any]


def find(rows: list[Row], op: str, layer: str, m: int, candidate: str, key: str) -> float | None:
    """One figure of one row; None if it was not measured."""
    wanted = {"op": op, "layer": layer, "m": m, "candidate": candidate}
    for row in rows:
        if wanted.items() <= row.items():
            return row.get(key)
    return None


def median(rows: list[Row], op: str, layer: str, m: int, candidate: str) -> float | None:
    """Median time in µs."""
    return find(rows, op, layer, m, candidate, "median_us")


def over(rows: list[Row], op: str, layer: str, m: int, slow: str, fast: str) -> float | None:
    """Return how many times as fast one candidate is as the other: by turns where that was measured."""
    if find(rows, op, layer, m, fast, "rival") == slow:
        return find(rows, op, layer, m, fast, "rival_ratio")
    return ratio(median(rows, op, layer, m, slow), median(rows, op, layer, m, fast))


def ratio(a: float | None, b: float | None) -> float | None:
    """``a / b``; None if either was not measured."""
    return None if a is None or b is None else a / b


def _goal(
    name: str, value: float | None, must: float, goal: float | None = None, better: str = "higher", unit: str = "1"
) -> Row:
    return {"name": name, "value": value, "unit": unit, "better": better, "must": must, "goal": goal}


def goals(rows: list[Row]) -> Iterator[Row]:
    """Every goal of the kernels with its value in these rows, None where it was not measured."""

    def linear(layer: str, m: int, candidate: str) -> float | None:
        return median(rows, "linear", layer, m, candidate)

    for m, (must, goal) in W8A8_RATIOS.items():
        for layer in LAYERS:
            value = over(rows, "linear", layer, m, BF16, "W8A8")
            yield _goal(f"w8a8_over_bf16_{layer}_{m}", value, must, goal)
    for layer, candidate, name in EPILOGUES:
        for m in sorted(W8A8_RATIOS):
            times = (median(rows, "epilogue", layer, m, which) for which in (candidate, PLAIN))
            yield _goal(f"{name}_time_over_bf16_store_{layer}_{m}", ratio(*times), 1.1, 1.0, "lower")
    rate = find(rows, "linear", SQUARE_LAYER, 8192, "W8A8", "tops")
    yield _goal("w8a8_8192", rate, 1200, 1500, unit="TOP/s")
    for m in (4096, 16384):
        for layer in LAYERS:
            w4a8, w8a8 = (over(rows, "linear", layer, m, BF16, which) for which in ("W4A8", "W8A8"))
            yield _goal(f"w4a8_over_bf16_{layer}_{m}", w4a8, 1.2, w8a8)
    copies = [row["gbytes_per_s"] for row in rows if row["op"] == "copy" and "gbytes_per_s" in row]
    share = ratio(find(rows, "adaln", "LN", 16384, ADALN, "gbytes_per_s"), max(copies, default=None))
    yield _goal("adaln_quantize_share_of_copy_bandwidth_16384", share, 0.60, 0.85)
    for m in (4096, 16384):
        for layer in LAYERS:
            rivals = [t for name in (INT_MM, INT_MM_COMPILED) if (t := linear(layer, m, name)) is not None]
            value = ratio(min(rivals, default=None), linear(layer, m, "W8A8"))
            yield _goal(f"w8a8_over_int_mm_dequantize_{layer}_{m}", value, 1.7, 2.0)


def model_goals(rows: list[Row]) -> Iterator[Row]:
    """The same for a whole denoising step of DiT-XL/2 at 256 x 256 pixels."""

    def faster(m: int, slow: str, fast: str) -> float | None:
        return over(rows, "model", MODEL, m, slow, fast)

    for m, must in ((2, 1.8), (16, 1.5), (64, 1.7)):
        yield _goal(f"fused_w8a8_over_compiled_bf16_{m}", faster(m, COMPILED, FUSED), must, 2.0)
    yield _goal("fused_w8a8_over_torchao_int8dq_16", faster(16, INT8DQ, FUSED), 2.0)
    for m, must in ((2, 12.0), (64, 2.2)):
        yield _goal(f"fused_w8a8_over_eager_bf16_as_called_{m}", faster(m, CALLED, FUSED_CALLED), must)
    for m in (2, 16, 64):
        yield _goal(f"fused_w4a8_over_compiled_bf16_{m}", faster(m, COMPILED, FUSED4), 1.3)
    sizes = (find(rows, "model", MODEL, 2, which, "block_linear_bytes") for which in (FUSED4, COMPILED))
    yield _goal("w4a8_share_of_bf16_block_weight_bytes", ratio(*sizes), 0.20, None, "lower")
    for m, bounds in ((2, (1.0, 1.1)), (16, (1.05, 1.2)), (64, (1.25, 1.35))):
        yield _goal(f"compiled_quantlinear_over_compiled_bf16_{m}", faster(m, COMPILED, DROP_IN), *bounds)
        yield _goal(f"the_same_as_called_{m}", faster(m, f"{COMPILED}, called", f"{DROP_IN}, called"), *bounds)
    for layer, batch in ATTENTION_SIZES:
        value = over(rows, "attention", layer, batch, CUDNN, OWN_ATTENTION)
        yield _goal(f"attention_over_cudnn_and_quantize_{layer.replace(' ', '_')}_{batch}", value, 1.0)


def cache_goals(rows: list[Row]) -> Iterator[Row]:
    """The same for reuse steps, as a share of the fused compute step, and for runs of 50 steps."""

    def time(m: int, which: str, layer: str = MODEL) -> float | None:
        return median(rows, "cache", layer, m, which)

    for m, musts in ((64, {"block": 0.03, "branch": 0.08, "taylor 1": 0.08}), (2, dict.fromkeys(CACHE_FORMS, 0.15))):
        for form, must in musts.items():
            for ahead, suffix in (("", ""), (", prepared run", "_prepared")):
                value = ratio(time(m, f"reuse {form}{ahead}"), time(m, COMPUTE + ahead))
                name = f"reuse_over_compute_{form.replace(' ', '_')}_{m}{suffix}"
                yield _goal(name, value, must, None, "lower")
    for form in CACHE_FORMS:
        for m in (2, 16, 64):
            for ahead, suffix in (("", ""), (", prepared run", "_prepared")):
                value = ratio(time(m, f"corrected {form}{ahead}"), time(m, f"reuse {form}{ahead}"))
                name = f"compensated_reuse_over_reuse_{form.replace(' ', '_')}_{m}{suffix}"
                yield _goal(name, value, 1.03, None, "lower")
    for form in CACHE_FORMS:
        value = ratio(time(64, RUN, "50 steps"), time(64, form, "50 steps"))
        yield _goal(f"run_of_50_steps_over_{form.replace(' ', '_')}_64", value, 2.6)


def pipeline_goals(rows: list[Row]) -> Iterator[Row]:
    """The same for whole pipelines of DiT-XL/2 at 256 x 256 pixels, 50 steps; "denoising": without the decoder."""
    for images, rival, must in ((1, PIPELINE_COMPILED, 4.5), (1, PIPELINE_EAGER, 30.0), (32, PIPELINE_COMPILED, 4.0)):
        theirs, ours, decoder = (
            median(rows, "pipeline", "50 steps", images, which) for which in (rival, FULL_METHOD, "decoder alone")
        )
        if rival == PIPELINE_EAGER:
            yield _goal(f"full_method_over_eager_diffusers_{images}", ratio(theirs, ours), must)
            continue
        name = f"full_method_over_compiled_bf16_{images}"
        yield _goal(name, over(rows, "pipeline", "50 steps", images, rival, FULL_METHOD), must)
        alone = None
        if theirs is not None and ours is not None and decoder is not None:
            alone = (theirs - decoder) / (ours - decoder)
        yield _goal(f"{name}_denoising", alone, must)


HOST_ROWS = 256
HOST_GOALS = {  # ours: theirs, must, goal
    "int8_linear": ("F.linear", 3.0, 2.0),
    "QuantLinear W8A8 static": ("nn.Linear", 4.0, 2.5),
    "QuantLinear W8A8 static, compiled": ("nn.Linear, compiled", 1.5, 1.1),
}
HOST_RIVALS = {ours: theirs for ours, (theirs, _, _) in HOST_GOALS.items()}


def host_goals(rows: list[Row]) -> Iterator[Row]:
    """Compare what calls cost the host with what torch's cost it."""
    for ours, (theirs, must, goal) in HOST_GOALS.items():
        value = ratio(1.0, over(rows, "host", "a call", HOST_ROWS, theirs, ours))
        yield _goal(f"host_{_words(ours)}_over_{_words(theirs)}", value, must, goal, "lower")


def products_goals(rows: list[Row]) -> Iterator[Row]:
    """Compare our products with torch's fp8 at the sizes of FLUX.1 and Qwen-Image."""
    for layer in LARGE_LAYERS:
        for m in LARGE_ROWS:
            value = over(rows, "products", layer, m, FP8, STATIC)
            yield _goal(f"w8a8_over_fp8_{layer.replace(' ', '')}_{m}", value, 0.95, 1.05)


def models_goals(rows: list[Row]) -> Iterator[Row]:
    """Speed of drop-in layers as called, over that of bf16 and fp8 run the same way; that of fused blocks, and ms."""
    compiled = {
        "PixArt-Sigma": (1.1, 1.2),
        "SD3.5-large": (1.2, 1.4),
        "Qwen-Image": (1.25, 1.45),
        "FLUX.1-dev": (1.3, 1.45),
    }
    cases = [(layer, "QuantLinear W8A8", "bf16 eager", 1.0, 1.15) for layer in compiled]
    cases += [(layer, "QuantLinear W8A8, compiled", "bf16 compiled", *bounds) for layer, bounds in compiled.items()]
    fused = {"PixArt-Sigma": (1.35, 1.6), "SD3.5-large": (1.45, 1.65)}
    fused |= dict.fromkeys(("Qwen-Image", "FLUX.1-dev"), (1.6, 1.8))
    cases += [(layer, FUSED_BLOCKS, "bf16 compiled", *bounds) for layer, bounds in fused.items()]
    cases.append(("FLUX.1-dev", FUSED_PER_TOKEN, "bf16 compiled", 1.5, 1.58))  # 3.1 ms more, as counted
    cases.append(("FLUX.1-dev", "QuantLinear W8A8, compiled", "torchao fp8 rowwise, compiled", 1.0, 1.1))
    cases.append(("FLUX.1-dev", FUSED_BLOCKS, "torchao fp8 rowwise, compiled", 1.15))
    tokens = {row["layer"]: row["m"] for row in rows}
    for layer, ours, theirs, *bounds in cases:
        key = "models", layer, tokens.get(layer, 0)
        yield _goal(f"{layer}_{_words(ours)}_over_{_words(theirs)}", over(rows, *key, theirs, ours), *bounds)
    for ours, *bounds in ((FUSED_BLOCKS, 84.0, 76.0), (FUSED_BLOCKS.replace("W8", "W4"), 90.0, 80.0)):
        time = median(rows, "models", "FLUX.1-dev", tokens.get("FLUX.1-dev", 0), ours)
        yield _goal(f"ms_FLUX.1-dev_{_words(ours)}", None if time is None else time / 1e3, *bounds, "lower", "ms")


def images_goals(rows: list[Row]) -> Iterator[Row]:
    """Seconds for an image with every third step computed, and how many times faster that is than without a cache."""
    runs = (("FLUX.1-dev", 28), ("Qwen-Image", 50), ("SD3.5-large", 28), ("PixArt-Sigma", 20))
    for layer, steps in runs:
        for mode in IMAGES_CACHED if layer == "FLUX.1-dev" else ("taylor",):
            plain, cached = (
                median(rows, "images", layer, steps, IMAGES_FUSED + end) for end in ("", f", {mode} cache")
            )
            if layer == "FLUX.1-dev":
                seconds = None if cached is None else cached / 1e6
                yield _goal(f"seconds_{layer}_{steps}_steps_{mode}", seconds, 1.4, 1.2, "lower", "s")
            yield _goal(f"{mode}_over_no_cache_{layer}_{steps}_steps", ratio(plain, cached), 2.2)
    taylor = find(rows, "images", "FLUX.1-dev", 28, f"{IMAGES_FUSED}, taylor cache", "latents_us")
    seconds = None if taylor is None else taylor / 1e6
    yield _goal("seconds_FLUX.1-dev_28_steps_taylor_without_decoder", seconds, 1.0, 0.85, "lower", "s")
    for layer, steps in (*runs, ("PixArt-Sigma-512", 20), ("SD3.5-medium-512", 28)):
        alone, called = (
            find(rows, "images", layer, steps, IMAGES_FUSED, f"{key}_us") for key in ("replays", "latents")
        )
        yield _goal(f"graphs_alone_over_run_as_called_{layer}_{steps}_steps", ratio(alone, called), 0.95, 0.98)


def _words(candidate: str) -> str:
    return candidate.replace(", ", "_").replace(" ", "_")


SUITES: dict[str, tuple[set[str], Callable[[list[Row]], Iterator[Row]]]] = {
    "kernels": ({"adaln", "copy", "epilogue", "linear"}, goals),
    "model": ({"attention", "model"}, model_goals),
    "cache-cost": ({"cache"}, cache_goals),
    "pipeline": ({"pipeline"}, pipeline_goals),
    "models": ({"models"}, models_goals),
    "images": ({"images"}, images_goals),
    "host": ({"host"}, host_goals),
    "products": ({"products"}, products_goals),
}
"""Map the name of a suite of benchmarks to the kinds of rows that it measures, and to its goals."""
FILE_A_MODEL = ("models", "images")
"""Suites of benchmarks that write a file of results for each model, so that models are measured side by side."""


def suite_of(row: Row) -> str:
    """Name the suite of benchmarks that a row belongs to."""
    return next(name for name, (ops, _) in SUITES.items() if row["op"] in ops)


def file_of(row: Row) -> str:
    """Name the file of results that holds a row."""
    suite = suite_of(row)
    return f"{suite}-{row['layer']}" if suite in FILE_A_MODEL else suite


def reached(goal: Row, which: str) -> bool | None:
    """Whether the value reaches the goal's ``which``, "must" or "goal"; None where either is unknown."""
    value, bound = goal["value"], goal[which]
    if value is None or bound is None:
        return None
    compare: Callable[[float, float], bool] = float.__ge__ if goal["better"] == "higher" else float.__le__
    return compare(float(value), float(bound))
