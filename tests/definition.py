"""Run a model as a feature cache would, by definition: hooks replace outputs of branches, or of whole blocks.

diffusers does all else, so gates are those of the current step, and nothing of ours is asked how a model is made.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
import torch

from qandc import FeatureCompensation
from qandc.caching.schedule import CacheConfig, forecast_weights
from tests.tiny_models import output_of, speed_of

LENGTH = 10  # of the runs that these are for
UNEVEN = (True, True, True, False, True, False, False, True, False, False)
CONFIGS = {
    "delta": CacheConfig("delta", interval=3),
    "branch": CacheConfig("branch", interval=3),
    "branch uneven": CacheConfig("branch", schedule=UNEVEN),
    "branch last": CacheConfig("branch", interval=4, num_inference_steps=LENGTH, last_step_computed=True),
    "taylor": CacheConfig("taylor", interval=3),
    "taylor uneven": CacheConfig("taylor", schedule=UNEVEN),
    "taylor 2": CacheConfig("taylor", interval=4, order=2),
    "taylor 2 uneven": CacheConfig("taylor", schedule=UNEVEN, order=2),
    "hicache 2 uneven": CacheConfig("hicache", schedule=UNEVEN, order=2),
    "crf": CacheConfig("crf", interval=3),
}
BRANCHES = {  # by list of blocks, in all streams
    "DiTTransformer2DModel": {"transformer_blocks": ("attn1", "ff")},
    "PixArtTransformer2DModel": {"transformer_blocks": ("attn1", "attn2", "ff")},
    "FluxTransformer2DModel": {
        "transformer_blocks": ("attn", "ff", "ff_context"),
        "single_transformer_blocks": ("proj_out",),
    },
    "ChromaTransformer2DModel": {
        "transformer_blocks": ("attn", "ff", "ff_context"),
        "single_transformer_blocks": ("proj_out",),
    },
    "QwenImageTransformer2DModel": {"transformer_blocks": ("attn", "img_mlp", "txt_mlp")},
    "SD3Transformer2DModel": {"transformer_blocks": ("attn", "ff", "attn2", "ff_context")},
    "WanTransformer3DModel": {"blocks": ("attn1", "attn2", "ffn")},
    "ZImageTransformer2DModel": {"layers": ("attention_norm2", "ffn_norm2")},
}
PER_BRANCH = ("branch", "taylor", "hicache")
TOKENS = 16  # of an image in the small FLUX.1, whose single blocks have it behind the text
OF_TEXT = ("ff_context", "txt_mlp")
STREAMS = ("encoder_hidden_states", "hidden_states")  # as blocks of two return them


def cases(kinds: Iterable[str], *more: str) -> list[Any]:
    """Make parameters of a test: each class, a config of each kind, and what is given; slow for most classes."""
    return [
        pytest.param(name, CONFIGS[kind], *more, id="-".join([kind, name, *more]), marks=speed_of(name))
        for kind, name in itertools.product(kinds, BRANCHES)
    ]


class Step(NamedTuple):
    """Hold a forward: its output, what branches or blocks add (tuples for two streams), what they add to the image."""

    output: torch.Tensor
    features: list[Any]
    added: torch.Tensor


def each(function: Callable[..., torch.Tensor], *values: Any) -> Any:
    """Apply a function to tensors, or to each of tuples; None, a stream that ends, stays."""
    if isinstance(values[0], tuple):
        return tuple(each(function, *parts) for parts in zip(*values, strict=True))
    return None if values[0] is None else function(*values)


def parts_of(model: Any, mode: str) -> list[tuple[str, Any]]:
    """List what a cache reuses, by name: blocks, or branches."""
    lists = next(BRANCHES[cls.__name__] for cls in type(model).__mro__ if cls.__name__ in BRANCHES)
    blocks = [(block, names) for name, names in lists.items() for block in getattr(model, name)]
    if mode not in PER_BRANCH:
        return [("block", block) for block, _ in blocks]
    return [(name, getattr(block, name)) for block, names in blocks for name in names if getattr(block, name, None)]


@torch.no_grad()
def step_of(model: Any, given: dict[str, Any], mode: str, features: list[Any] | None = None) -> Step:
    """Run a forward without a cache, with ``features`` in the place of its own."""
    parts, blocks = parts_of(model, mode), [block for _, block in parts_of(model, "delta")]
    found: list[Any] = []
    ends: list[torch.Tensor] = []

    def replace(part: Any, args: Any, kwargs: Any, output: Any) -> Any:
        if mode in PER_BRANCH:
            found.append(output)
            return None if features is None else features[len(found) - 1]
        inside = args[0] if args else kwargs["hidden_states"]
        if isinstance(output, tuple):
            inside = tuple(kwargs[name] for name in STREAMS)
        found.append(each(lambda y, x: y - x, output, inside))
        return None if features is None else each(lambda f, x: x + f, features[len(found) - 1], inside)

    def begin(block: Any, args: Any, kwargs: Any) -> None:
        ends.append((args[0] if args else kwargs["hidden_states"]).clone())

    def end(block: Any, args: Any, output: Any) -> None:
        ends.append((output[-1] if isinstance(output, tuple) else output)[:, -ends[0].shape[1] :].clone())

    handles = [part.register_forward_hook(replace, with_kwargs=True) for _, part in parts]
    handles.append(blocks[0].register_forward_pre_hook(begin, with_kwargs=True))
    handles.append(blocks[-1].register_forward_hook(end))
    output = output_of(model, given)
    for handle in handles:
        handle.remove()
    return Step(output, found, ends[1] - ends[0])


def of_image(model: Any, mode: str, features: list[Any]) -> list[torch.Tensor]:
    """Return the parts of features that add to the image, as views; those of text are left out."""
    if mode not in PER_BRANCH:
        images = [f[-1] if isinstance(f, tuple) else f for f in features]
        return [f[:, -images[0].shape[1] :] for f in images]
    named = zip(parts_of(model, mode), features, strict=True)
    images = [(name, f[0] if isinstance(f, tuple) else f) for (name, _), f in named if name not in OF_TEXT]
    return [f[:, -TOKENS:] if name == "proj_out" else f for name, f in images]


def forecast(steps: dict[int, Step], computed: list[int], step: int, order: int, mode: str = "taylor") -> list[Any]:
    """Forecast the features of a step from those of computed steps, newest first."""
    weights = forecast_weights(computed, step, order, mode)

    def weighted(*features: torch.Tensor) -> torch.Tensor:
        return sum(w * f for w, f in zip(weights, features, strict=True))  # type: ignore[return-value]

    kept = zip(*(steps[s].features for s in computed), strict=True)
    return [each(weighted, *features) for features in kept]


def by_definition(
    model: Any,
    config: CacheConfig,
    inputs: list[dict[str, Any]],
    compensation: FeatureCompensation | None = None,
    known: list[Step] | None = None,
) -> list[torch.Tensor]:
    """Return the outputs of all steps of a run; ``known`` are those of the same run without a cache."""
    steps: dict[int, Step] = {}
    order, outputs, reused = config.history - 1, [], 0
    for step, given in enumerate(inputs):
        features = None
        if not config.computes(step):
            features = forecast(steps, sorted(steps, reverse=True)[: order + 1], step, order, config.mode)
            if compensation is not None:
                gains, offsets = (t[reused].flatten(0, 1) for t in (compensation.gains, compensation.offsets))
                corrected = of_image(model, config.mode, features)
                if not config.per_branch:  # of all blocks: the gain for each, the offset once
                    gains = gains.expand(len(corrected), -1)
                    offsets = torch.cat([torch.zeros(len(corrected) - 1, offsets.shape[1]), offsets])
                for f, a, b in zip(corrected, gains, offsets, strict=True):
                    f.mul_(a).add_(b)
            reused += 1
        now = known[step] if known and features is None else step_of(model, given, config.mode, features)
        outputs.append(now.output)
        if features is None:
            steps[step] = now
    return outputs


def assert_equal_runs(actual: list[torch.Tensor], expected: list[torch.Tensor], atol: float = 2e-5) -> None:
    """Compare the outputs of two runs step by step, elementwise."""
    assert len(actual) == len(expected)
    for step, (a, e) in enumerate(zip(actual, expected, strict=True)):
        torch.testing.assert_close(a, e, atol=atol, rtol=1e-4, msg=lambda text, step=step: f"step {step}: {text}")


def inputs_of_dit(
    step: int, seed: int = 0, rows: int = 4, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Any:
    """Make the arguments of one step of ``make_dit``, but for its labels: one tensor for all steps of a run."""
    generator = torch.Generator().manual_seed(100 * seed + step)
    return {
        "hidden_states": torch.randn(rows, 4, 8, 8, generator=generator).to(device, dtype),
        "timestep": torch.tensor([900 - 20 * step], device=device).expand(rows),
    }


def make_labels(rows: int = 4, device: str = "cpu") -> torch.Tensor:
    """Make the labels of a run, conditional and unconditional ones among them."""
    return torch.tensor([1, 2, 1000, 1000, 7, 8])[:rows].to(device)


@torch.no_grad()
def run_dit(
    model: Any, steps: int = LENGTH, seed: int = 0, rows: int = 4, labels: torch.Tensor | None = None, **where: Any
) -> list[torch.Tensor]:
    """Return the outputs of all steps of a run."""
    labels = make_labels(rows, where.get("device", "cpu")) if labels is None else labels
    return [model(**inputs_of_dit(s, seed, rows, **where), class_labels=labels).sample for s in range(steps)]
