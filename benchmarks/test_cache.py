"""What a feature cache costs and saves on the fused DiT-XL/2: steps of each kind, and whole runs."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from benchmarks.conftest import Measure
from benchmarks.goals import COMPUTE, RUN
from benchmarks.models import CANDIDATES, dit_xl_2, inputs
from benchmarks.timing import DEVICE, Candidate, launches_for, relative_error
from qandc import CacheConfig, apply_cache_to_dit, make_scheduler, prepare_run, remove_cache, sample_latents
from qandc.caching.features import FeatureStore
from qandc.caching.plan import Action, Plan
from qandc.fusion.fuse import Fused
from qandc.models.dit.fused import FusedStep

LAYER, LATENT = "DiT-XL/2-256", 32
FORMS = {  # name: mode, sets of features, storage
    "block": ("block", 1, None),
    "branch": ("branch", 1, None),
    "taylor 1": ("taylor", 2, None),
    "branch int8": ("branch", 1, "int8"),
    "taylor 1 int8": ("taylor", 2, "int8"),
}
AHEAD = ", prepared run"
CORRECTED = "corrected "  # the reuse of a cache with a compensation of features
KINDS = [f"{kind}{form}" for kind in ("keeping ", "reuse ", CORRECTED) for form in FORMS]
STEPS = [f"{kind}{ahead}" for ahead in ("", AHEAD) for kind in (COMPUTE, *KINDS)]
RUNS = {
    RUN: None,
    "block": CacheConfig("block", interval=3),
    "branch": CacheConfig("branch", interval=3),
    "taylor 1": CacheConfig("taylor", interval=3),
    "branch int8": CacheConfig("branch", interval=3, storage_dtype="int8"),
}
RUN_STEPS = 50


@cache
def model() -> Any:
    """W8A8, kernels launched one by one: the benchmark captures them itself."""
    return CANDIDATES["fused W8A8"][0](dit_xl_2(LATENT))


@cache
def graphed_model() -> Any:
    return CANDIDATES["fused W8A8, called"][0](dit_xl_2(LATENT))


def candidate(m: int, name: str) -> tuple[Candidate, int]:
    """A step of its own kind, and the memory of its features."""
    kind, _, ahead = name.partition(",")
    arguments = inputs(dit_xl_2(LATENT), m)
    latents, timestep, labels = (arguments[key] for key in ("hidden_states", "timestep", "class_labels"))
    step: FusedStep = Fused.of(model()).step(model())
    conditioning: dict[str, torch.Tensor] = {}
    if ahead:
        prepare_run(model(), timestep[:1], labels)
        run = Fused.of(model()).run
        conditioning = {"modulations": run.tables[0][0], "final": run.tables[1][0]}
    timestep = timestep.float()
    with torch.no_grad():
        expected = step(latents, timestep, labels, **conditioning)
    nbytes, launch = 0, lambda i: step(latents, timestep, labels, **conditioning)
    if kind != COMPUTE:
        what, _, form = kind.partition(" ")
        mode, sets, storage_dtype = FORMS[form]
        store = FeatureStore(CacheConfig(mode, order=max(1, sets - 1), storage_dtype=storage_dtype))
        store.make(step.features_shape(latents), latents.dtype, latents.device)
        nbytes = store.nbytes
        plans = [Plan(Action.STORE, store, at) for at in range(sets)]
        with torch.no_grad():
            for plan in plans:
                step(latents, timestep, labels, **conditioning, plan=plan)
        if what == "keeping":
            launch = lambda i: step(latents, timestep, labels, **conditioning, plan=plans[i % sets])  # noqa: E731
        else:  # features of this very step in all sets, weights that add up to one: it must equal the compute step
            weights = torch.tensor([4 / 3, -1 / 3], device=DEVICE) if sets > 1 else None
            given = {"modulations": None, "final": None, **conditioning}
            if what == CORRECTED.strip():
                shape = *store.values.shape[1:3], store.values.shape[-1]
                given |= {"gains": torch.ones(shape, device=DEVICE), "offsets": torch.zeros(shape, device=DEVICE)}
            launch = lambda i: step.reused(latents, timestep, labels, store, weights, **given)  # noqa: E731

    def error(y: torch.Tensor, i: int) -> float:
        return relative_error(y, expected)

    return Candidate(launch, error, 0.03, launches_for(1, 1e-4)), nbytes


def whole_run(m: int, name: str) -> Candidate:
    """``sample_latents`` of m / 2 images, from Python, in one CUDA graph with its scheduler."""
    transformer, config = graphed_model(), RUNS[name]
    scheduler = make_scheduler("ddim", {"num_train_timesteps": 1000, "clip_sample": False})
    images = m // 2
    call = {"num_inference_steps": RUN_STEPS, "guidance_scale": 4.0, "seeds": range(images), "cuda_graph": True}

    def launch(i: int) -> torch.Tensor:
        return sample_latents(transformer, scheduler, [207] * images, **call)

    expected = launch(0)
    if config is not None:
        apply_cache_to_dit(transformer, config=config)
        launch(0)

    def error(y: torch.Tensor, i: int) -> float:
        # random weights, so no images; far off all the same if features of other steps, rows or runs were reused
        return relative_error(y, expected)

    return Candidate(launch, error, 0.7, 1, wall_clock=True)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("m", [2, 16, 64])
def test_step(measure: Measure, m: int, name: str) -> None:
    row: dict[str, Any] = {"op": "cache", "layer": LAYER, "m": m, "candidate": name}

    def build() -> Candidate:
        built, row["cache_bytes"] = candidate(m, name)
        return built

    measure(row, build)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("m", [2, 64])
def test_run(measure: Measure, m: int, name: str) -> None:
    row: dict[str, Any] = {"op": "cache", "layer": f"{RUN_STEPS} steps", "m": m}
    row["candidate"] = name
    config = RUNS[name]
    row["compute_steps"] = RUN_STEPS if config is None else sum(config.of_steps(RUN_STEPS))
    try:
        measure(row, lambda: whole_run(m, name))
    finally:
        if DEVICE != "cpu" and config is not None:
            remove_cache(graphed_model())
