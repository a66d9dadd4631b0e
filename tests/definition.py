"""Run a model as a feature cache would, by definition: hooks replace outputs of branches, or of whole blocks.

diffusers does all else, so gates are those of the current step, and nothing of ours is asked how a model is made.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from qandc import FeatureCompensation
from qandc.caching.schedule import CacheConfig, forecast_weights

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
}
BRANCHES = {"DiTTransformer2DModel": ("attn1", "ff"), "PixArtTransformer2DModel": ("attn1", "attn2", "ff")}


class Step(NamedTuple):
    """A forward: what it predicts, the features of its branches or blocks, what all blocks together add."""

    output: torch.Tensor
    features: list[torch.Tensor]
    added: torch.Tensor


@torch.no_grad()
def step_of(model: Any, given: dict[str, Any], mode: str, features: list[torch.Tensor] | None = None) -> Step:
    """Run a forward without a cache, with ``features`` in the place of its own."""
    blocks = list(model.transformer_blocks)
    names = next(BRANCHES[cls.__name__] for cls in type(model).__mro__ if cls.__name__ in BRANCHES)
    parts = blocks if mode == "delta" else [getattr(block, name) for block in blocks for name in names]
    found: list[torch.Tensor] = []
    ends: list[torch.Tensor] = []

    def replace(part: Any, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        inside = args[0] if mode == "delta" else 0
        found.append(output - inside)
        return None if features is None else inside + features[len(found) - 1]

    handles = [part.register_forward_hook(replace) for part in parts]
    handles.append(blocks[0].register_forward_pre_hook(lambda block, args: ends.append(args[0].clone())))
    handles.append(blocks[-1].register_forward_hook(lambda block, args, output: ends.append(output.clone())))
    output = model(**given)[0]
    for handle in handles:
        handle.remove()
    return Step(output, found, ends[1] - ends[0])


def forecast(steps: dict[int, Step], computed: list[int], step: int, order: int) -> list[torch.Tensor]:
    """Forecast the features of a step from those of computed steps, newest first."""
    weights = forecast_weights(computed, step, order)
    kept = zip(*(steps[s].features for s in computed), strict=True)
    return [sum(w * f for w, f in zip(weights, features, strict=True)) for features in kept]  # type: ignore[misc]


def by_definition(
    model: Any,
    config: CacheConfig,
    inputs: list[dict[str, Any]],
    compensation: FeatureCompensation | None = None,
) -> list[torch.Tensor]:
    """Return the outputs of all steps of a run; in mode ``delta`` a compensation is for a model of one block."""
    steps: dict[int, Step] = {}
    order, outputs, reused = config.history - 1, [], 0
    for step, given in enumerate(inputs):
        features = None
        if not config.computes(step):
            features = forecast(steps, sorted(steps, reverse=True)[: order + 1], step, order)
            if compensation is not None:
                pairs = (t[reused].flatten(0, 1) for t in (compensation.gains, compensation.offsets))
                features = [a * f + b for f, a, b in zip(features, *pairs, strict=True)]
            reused += 1
        now = step_of(model, given, config.mode, features)
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
