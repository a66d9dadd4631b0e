"""Images from a whole pipeline: DiT-XL/2 at 256 x 256 pixels, guidance, DDIM, the autoencoder's decoder included."""

from __future__ import annotations

import copy
import os
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from benchmarks.conftest import NO_GPU, Measure
from benchmarks.goals import FULL_METHOD, PIPELINE_COMPILED, PIPELINE_EAGER
from benchmarks.models import CANDIDATES, autoencoder_kl, compile_blocks, dit_xl_2
from benchmarks.timing import DEVICE, Candidate, relative_error
from qandc import (
    CacheConfig,
    Compensation,
    apply_cache_to_dit,
    decode_latents,
    make_scheduler,
    remove_cache,
    sample_latents,
)
from qandc.fusion.graphs import GraphCache
from qandc.sampling.loop import describe_run
from qandc.variance_compensation import FittedFor

LATENT, GUIDANCE = 32, 4.0
STEPS, IMAGES = 50, (1, 8, 32)
BRANCH, TAYLOR = CacheConfig("branch", interval=3), CacheConfig("taylor", interval=3)


class Ours(NamedTuple):
    """One CUDA graph for the whole run, or one for each kind of step."""

    cache: CacheConfig | None = None
    compensated: bool = False
    whole_run: bool = True


OURS = {
    "fused W8A8": Ours(),
    "fused W8A8 + branch cache": Ours(BRANCH),
    "fused W8A8 + taylor cache": Ours(TAYLOR),
    FULL_METHOD: Ours(BRANCH, compensated=True),
    f"{FULL_METHOD}, a graph per step": Ours(BRANCH, compensated=True, whole_run=False),
}
DECODER = "decoder alone"
NAMES = (PIPELINE_EAGER, "diffusers bf16, compiled", PIPELINE_COMPILED, *OURS, DECODER)
CASES = [(m, name) for m in IMAGES for name in NAMES]
SCHEDULER = {"num_train_timesteps": 1000, "clip_sample": False}


class Graphed(nn.Module):
    """A module of one tensor, replayed from a CUDA graph for each shape."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.graphs = module, GraphCache()

    def forward(self, x: torch.Tensor, *nothing: None) -> torch.Tensor:
        return self.graphs.run(self.module, (x,))[0]


@cache
def autoencoder(eager: bool) -> Any:
    """Of Stable Diffusion, as DiT-XL/2 uses it, random weights; if not eager, its decoder compiled and in one graph."""
    torch.manual_seed(1)
    with torch.device(DEVICE):
        vae = autoencoder_kl(4, 256)
    vae = vae.to(torch.bfloat16).eval()
    if not eager:
        vae.decoder.compile(dynamic=False)
        vae.decoder = Graphed(vae.decoder)
    return vae


@cache
def transformer(name: str) -> Any:
    if name == PIPELINE_EAGER:
        return dit_xl_2(LATENT)
    if name in OURS:
        return CANDIDATES["fused W8A8, called"][0](dit_xl_2(LATENT))
    model = compile_blocks(copy.deepcopy(dit_xl_2(LATENT)))
    if name == PIPELINE_COMPILED:  # a step is one graph, as it is in the fused model
        graphs, forward = GraphCache(), model.forward

        def step(x: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return forward(x, timestep=timestep, class_labels=labels, return_dict=False)[0]

        def graphed(x: torch.Tensor, timestep: Any, class_labels: Any, return_dict: bool) -> tuple[torch.Tensor]:
            return (graphs.run(step, (x, timestep, class_labels))[0],)

        model.forward = graphed
    return model


def compensation(model: Any) -> Compensation:
    """Gains of 1: the work is the same for any."""
    scheduler = make_scheduler("ddim", SCHEDULER)
    scheduler.set_timesteps(STEPS)
    ones = torch.ones(STEPS, 4)
    return Compensation(
        ones, 0 * ones, "sample", "least_squares", FittedFor(**describe_run(model, scheduler, GUIDANCE))
    )


def images(name: str, m: int, whole_run: bool = True) -> Callable[[int], torch.Tensor]:
    """What a call draws, on the CPU; ours in one graph, where that is asked for."""
    labels, seeds = [207] * m, range(m)
    if name.startswith("diffusers"):
        from diffusers import DiTPipeline

        vae = autoencoder(eager=name == PIPELINE_EAGER)
        pipe = DiTPipeline(transformer(name), vae, make_scheduler("ddim", SCHEDULER))
        pipe.set_progress_bar_config(disable=True)

        def called(i: int) -> torch.Tensor:
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            call = {"guidance_scale": GUIDANCE, "num_inference_steps": STEPS, "output_type": "np"}
            return torch.from_numpy(pipe(labels, generator=generators, **call).images)

        return called
    model = transformer("fused W8A8" if name in OURS else name)
    ours = OURS.get(name, Ours(whole_run=False))
    call = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "seeds": seeds}
    call["cuda_graph"] = ours.whole_run and whole_run
    if ours.compensated:
        call["compensation"] = compensation(model)
    scheduler = make_scheduler("ddim", SCHEDULER)

    def drawn(i: int) -> torch.Tensor:
        return decode_latents(autoencoder(eager=False), sample_latents(model, scheduler, labels, **call))

    return drawn


def decoder(m: int) -> Callable[[int], torch.Tensor]:
    latents = torch.randn(m, 4, LATENT, LATENT, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    return lambda i: decode_latents(autoencoder(eager=False), latents)


def candidate(name: str, m: int) -> Candidate:
    launch = decoder(m) if name == DECODER else images(name, m)
    expected = launch(0) if name == DECODER else images(name, m, whole_run=False)(0)

    def error(y: torch.Tensor, i: int) -> float:
        # random weights draw no images; a run must all the same be the one before, step by step, over again
        return relative_error(y, expected)

    return Candidate(launch, error, 0.05, 1, wall_clock=True)


@contextmanager
def power() -> Iterator[list[float]]:
    """Watts of this GPU, ten times a second; none without nvidia-smi."""
    found: list[float] = []
    which = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    command = [
        "nvidia-smi",
        "-i",
        which,
        "--query-gpu=power.draw.instant",
        "--format=csv,noheader,nounits",
        "-lms",
        "100",
    ]
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    except OSError:
        yield found
        return

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip().replace(".", "", 1).isdigit():
                found.append(float(line))

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield found
    finally:
        process.terminate()
        thread.join()
        process.wait()


def energy(launch: Callable[[int], Any], m: int) -> float | None:
    """Joules of the GPU for an image: mean power over a second or more, times the time of an image."""
    launch(0)
    with power() as watts:
        started, count = time.perf_counter(), 0
        while count == 0 or time.perf_counter() - started < 1:
            launch(0)
            torch.cuda.synchronize()
            count += 1
        seconds = (time.perf_counter() - started) / (count * m)
    return statistics.mean(watts) * seconds if watts else None


@pytest.mark.parametrize(("m", "name"), CASES)
def test_pipeline(measure: Measure, m: int, name: str) -> None:
    row: dict[str, Any] = {"op": "pipeline", "layer": f"{STEPS} steps", "m": m, "candidate": name}
    if DEVICE == "cpu":
        measure(row, lambda: candidate(name, m), NO_GPU)
        return
    config = OURS[name].cache if name in OURS else None
    if name != DECODER:
        row["compute_steps"] = STEPS if config is None else sum(config.of_steps(STEPS))
    if config is not None:
        apply_cache_to_dit(transformer("fused W8A8"), config=config)
    built: list[Candidate] = []
    try:
        against = (PIPELINE_COMPILED, lambda: candidate(PIPELINE_COMPILED, m)) if name in OURS else None
        build = lambda: built.append(candidate(name, m)) or built[0]  # type: ignore[func-returns-value] # noqa: E731
        measure(row, build, rival=against)
        if "median_us" in row:
            row["images_per_s"] = m / (row["median_us"] / 1e6)
            row["joules_per_image"] = energy(built[0].launch, m)
    finally:
        if config is not None:
            remove_cache(transformer("fused W8A8"))
