"""Images and videos of the pipelines that people run, as called: real sizes, random weights, embeddings as prompts."""

from __future__ import annotations

import copy
import inspect
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

from benchmarks.conftest import WITHOUT_GPU, Measure
from benchmarks.families import clone, compiled, fused, fuses, model_of, quantized, torchao_fp8
from benchmarks.goals import IMAGES_BF16, IMAGES_CACHED, IMAGES_FUSED, IMAGES_FUSED4
from benchmarks.models import autoencoder_kl
from benchmarks.rivals import NotInstalled, library
from benchmarks.timing import DEVICE, Candidate, Timed, checked, relative_error
from qandc import CacheConfig, apply_cache, fuse, graph, optimize, remove_cache, ungraph

Model = Any
Row = dict[str, Any]
Launch = Callable[..., torch.Tensor]  # of the number of a launch, and of what else the pipeline is to be given
INTERVAL = 3  # of steps one is computed, where something is cached
TEXT = 512
SHARES, LONG = 3, 8.0  # times that parts of a run are measured; once if they take so many seconds
CACHED_BOUND = 2.0  # random weights draw no images; what is reused must all the same not be far off or NaN
TO_BE_COMPILED = "bf16"  # by what caches it
AHEAD = ", modulations ahead"
ONE_LINE = "optimize(pipe)"
CACHE_DIT, OFFLOADED = "bf16 compiled, cache-dit", f"{IMAGES_FUSED4}{AHEAD}, offloaded"


class Pipe(NamedTuple):
    """A pipeline with all but its transformer, and how people call it."""

    name: str
    scheduler: tuple[str, dict[str, Any]]
    decoder: Callable[[], Any]
    embeddings: dict[str, tuple[int, ...]]  # shapes of a batch of one; of a negative prompt, too, if guided
    guided: bool
    call: dict[str, Any]
    steps: int
    pixels: int = 1024


def _decoder(channels: int) -> Any:
    return autoencoder_kl(channels, 1024, shift_factor=0.1)


def _decoder_of(name: str) -> Any:
    import diffusers

    return getattr(diffusers, name)()


FLOW = "FlowMatchEulerDiscreteScheduler"
PIPES: dict[str, Pipe] = {
    "FLUX.1-dev": Pipe(
        "FluxPipeline",
        (FLOW, {"shift": 3.0, "use_dynamic_shifting": True}),
        lambda: _decoder(16),
        {"prompt_embeds": (TEXT, 4096), "pooled_prompt_embeds": (768,)},
        False,
        {"guidance_scale": 3.5},
        28,
    ),
    "Qwen-Image": Pipe(
        "QwenImagePipeline",
        (FLOW, {"shift": 1.0, "use_dynamic_shifting": True}),
        lambda: _decoder_of("AutoencoderKLQwenImage"),
        {"prompt_embeds": (128, 3584)},
        True,
        {"true_cfg_scale": 4.0},
        50,
    ),
    "SD3.5-large": Pipe(
        "StableDiffusion3Pipeline",
        (FLOW, {"shift": 3.0}),
        lambda: _decoder(16),
        {"prompt_embeds": (333, 4096), "pooled_prompt_embeds": (2048,)},
        True,
        {"guidance_scale": 3.5},
        28,
    ),
    "PixArt-Sigma": Pipe(
        "PixArtSigmaPipeline",
        ("DPMSolverMultistepScheduler", {}),
        lambda: _decoder(4),
        {"prompt_embeds": (300, 4096), "prompt_attention_mask": (300,)},
        True,
        {"guidance_scale": 4.5, "negative_prompt": None},
        20,
    ),
    "Z-Image": Pipe(
        "ZImagePipeline",
        (FLOW, {"shift": 6.0}),
        lambda: _decoder(16),
        {"prompt_embeds": (128, 2560)},
        True,
        {"guidance_scale": 4.0},
        50,
    ),
    "Wan-2.1-1.3B": Pipe(
        "WanPipeline",
        ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}),
        lambda: _decoder_of("AutoencoderKLWan"),
        {"prompt_embeds": (TEXT, 4096)},
        True,
        {"guidance_scale": 5.0, "height": 480, "width": 832, "num_frames": 81},
        20,
    ),
}
PIPES |= {  # where a step is short, and what the host does between steps counts most
    "PixArt-Sigma-512": PIPES["PixArt-Sigma"]._replace(pixels=512),
    "SD3.5-medium-512": PIPES["SD3.5-large"]._replace(pixels=512),
}


RECIPES: dict[str, tuple[Callable[[Model, str], Model], float]] = {
    # how a transformer is made from the bf16 model, and how far its latents may be from that model's
    "bf16 eager": (lambda model, layer: clone(model), 0.05),
    IMAGES_BF16: (lambda model, layer: compiled(clone(model)), 0.2),
    TO_BE_COMPILED: (lambda model, layer: clone(model), 0.2),
    IMAGES_FUSED: (lambda model, layer: fused(model, layer, 8), 0.4),
    # of weights that are its own: those of modulation may leave the GPU
    IMAGES_FUSED4: (lambda model, layer: graph(fuse(copy.deepcopy(quantized(model, layer, 4, "W4A16")))), 0.6),
    "torchao fp8 rowwise, compiled": (
        lambda model, layer: torchao_fp8(model),
        0.4,
    ),
}


@contextmanager
def _ours_cached(config: CacheConfig, pipe: Any, row: Row) -> Iterator[None]:
    cache = apply_cache(pipe.transformer, config=config)
    try:
        yield
        row["cache_bytes"], row["compute_steps"] = cache.nbytes, sum(config.of_steps(row["m"]))
    finally:
        remove_cache(pipe.transformer)


@contextmanager
def _ahead(pipe: Any, row: Row, launch: Launch, offloaded: bool = False) -> Iterator[None]:
    """Compute the modulations of a run at its first step, as ``optimize`` has it; weights in host memory or not."""
    graph(ungraph(pipe.transformer), pipe=pipe, offload_modulation=offloaded)
    try:
        yield
    finally:
        graph(ungraph(pipe.transformer))


@contextmanager
def _cached_ahead(pipe: Any, row: Row, launch: Launch) -> Iterator[None]:
    """Cache and compute modulations ahead, as ``optimize`` does with a calibrated model."""
    with _ahead(pipe, row, launch), _ours_cached(CacheConfig("taylor", interval=INTERVAL), pipe, row):
        yield


@contextmanager
def _one_line(pipe: Any, row: Row, launch: Launch) -> Iterator[None]:
    """Optimize a pipeline as README does first: what is fused, compiled, cached and captured is the call's choice."""
    (plan,) = optimize(pipe, restorable=False).transformers
    assert plan.cache is not None
    row["compute_steps"] = sum(plan.cache.of_steps(row["m"]))
    yield


@contextmanager
def _taylorseer(pipe: Any, row: Row, launch: Launch) -> Iterator[None]:
    from diffusers import TaylorSeerCacheConfig

    with _of_diffusers(pipe, TaylorSeerCacheConfig(cache_interval=INTERVAL, disable_cache_before_step=1)):
        yield


@contextmanager
def _first_block(pipe: Any, row: Row, launch: Launch) -> Iterator[None]:
    from diffusers import FirstBlockCacheConfig
    from diffusers.hooks.first_block_cache import FBCHeadBlockHook

    decide, computed = FBCHeadBlockHook._should_compute_remaining_blocks, 0

    def counted(hook: Any, residual: torch.Tensor) -> bool:
        nonlocal computed
        computed += (found := decide(hook, residual))
        return found

    FBCHeadBlockHook._should_compute_remaining_blocks = torch.compiler.disable(counted)
    try:
        with _of_diffusers(pipe, FirstBlockCacheConfig(threshold=0.12)):
            yield
            computed = 0
            launch(0)
            row["compute_steps"] = computed
    finally:
        FBCHeadBlockHook._should_compute_remaining_blocks = decide


@contextmanager
def _of_diffusers(pipe: Any, config: Any) -> Iterator[None]:
    """Hooks first, compiled then, as diffusers wants it; hooks decide in Python, so that graphs of blocks break."""
    if not hasattr(pipe.transformer, "enable_cache"):
        raise NotInstalled(f"diffusers has no such cache for a {type(pipe.transformer).__name__}")
    pipe.transformer.enable_cache(config)
    compiled(pipe.transformer, fullgraph=False)
    try:
        yield
    finally:
        pipe.transformer.disable_cache()


@contextmanager
def _cache_dit(pipe: Any, row: Row, launch: Launch) -> Iterator[None]:
    """Compute every third step, as the others here, and the first block always; no threshold decides otherwise."""
    cache_dit = library("cache-dit")
    mask = [int(step % INTERVAL == 0) for step in range(row["m"])]
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        max_warmup_steps=1,
        residual_diff_threshold=1e9,
        num_inference_steps=row["m"],
        steps_computation_mask=mask,
    )
    cache_dit.enable_cache(pipe, cache_config=config)
    compiled(pipe.transformer, fullgraph=False)
    try:
        yield
    finally:
        cache_dit.disable_cache(pipe)


Cache = Callable[[Any, Row, Launch], Any]
CANDIDATES: dict[str, tuple[str, Cache | None]] = {name: (name, None) for name in RECIPES if name != TO_BE_COMPILED}
CANDIDATES |= {  # the transformer that is cached, and how
    f"{IMAGES_FUSED}, {mode} cache": (
        IMAGES_FUSED,
        lambda pipe, row, launch, mode=mode: _ours_cached(CacheConfig(mode, interval=INTERVAL), pipe, row),
    )
    for mode in IMAGES_CACHED
}
CANDIDATES |= {
    f"{IMAGES_FUSED}{AHEAD}": (IMAGES_FUSED, _ahead),
    f"{IMAGES_FUSED}, taylor cache{AHEAD}": (IMAGES_FUSED, _cached_ahead),
    OFFLOADED: (IMAGES_FUSED4, partial(_ahead, offloaded=True)),
    ONE_LINE: (TO_BE_COMPILED, _one_line),
    "bf16 compiled, diffusers' TaylorSeer": (TO_BE_COMPILED, _taylorseer),
    "bf16 compiled, diffusers' FirstBlockCache": (TO_BE_COMPILED, _first_block),
    CACHE_DIT: (TO_BE_COMPILED, _cache_dit),
}
# a transformer is made once for all that follow each other with it
ORDER = sorted(CANDIDATES, key=lambda name: ("torchao" in name, list(RECIPES).index(CANDIDATES[name][0])))

USUAL = (IMAGES_BF16, CACHE_DIT, ONE_LINE, IMAGES_FUSED, f"{IMAGES_FUSED}, taylor cache", IMAGES_FUSED4)
SHORT = (IMAGES_BF16, ONE_LINE)  # of what has no fused blocks


def _compared(layer: str, name: str) -> bool:
    """Say what is drawn with a model: with FLUX.1 all, with others what decides a claim."""
    return layer == "FLUX.1-dev" or name in (USUAL if fuses(layer) else SHORT)


CASES = [(layer, name, pipe.steps) for layer, pipe in PIPES.items() for name in ORDER if _compared(layer, name)]

current: dict[str, Any] = {}  # the transformer used last, by what it is made of
rivals: dict[str, Any] = {}  # what ours took turns with last
expected: dict[tuple[str, int], torch.Tensor] = {}  # latents of the bf16 model


def transformer(layer: str, recipe: str, fresh: bool) -> Model:
    if current.get("key") != (layer, recipe) or fresh:
        current.clear()
        torch._dynamo.reset()
        rivals["cold"] = True
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
        current.update(key=(layer, recipe), model=RECIPES[recipe][0](model_of(layer), layer))
    return current["model"]


def pipeline(layer: str, model: Model) -> Any:
    import diffusers

    pipe = PIPES[layer]
    cls = getattr(diffusers, pipe.name)
    parts = dict.fromkeys(list(inspect.signature(cls).parameters))
    torch.manual_seed(1)
    decoder = pipe.decoder().to(DEVICE, torch.bfloat16).eval()
    scheduler = getattr(diffusers, pipe.scheduler[0])(**pipe.scheduler[1])
    made = cls(**{**parts, "transformer": model, "vae": decoder, "scheduler": scheduler})
    made.set_progress_bar_config(disable=True)
    return made


def images(layer: str, pipe: Any, steps: int) -> Launch:
    """A call of the pipeline, picture included; what it gives here are the latents, as the decoder gets them."""
    about, seen = PIPES[layer], []
    generator = torch.Generator().manual_seed(0)
    names = [sign + name for name in about.embeddings for sign in (("", "negative_") if about.guided else ("",))]
    shapes = [about.embeddings[name.removeprefix("negative_")] for name in names]
    given = {
        name: torch.ones(1, *shape, dtype=torch.int64)
        if name.endswith("mask")
        else torch.randn(1, *shape, generator=generator).bfloat16()
        for name, shape in zip(names, shapes, strict=True)
    }
    if layer == "Qwen-Image":
        given |= {f"{name}_mask": torch.ones(1, 128, dtype=torch.int64) for name in names}
    decode = pipe.vae.decode

    def kept(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen[:] = [latents]
        return decode(latents, *args, **kwargs)

    pipe.vae.decode = kept

    def launch(i: int, **others: Any) -> torch.Tensor:
        texts = {name: value.to(DEVICE) for name, value in given.items()}  # new ones, as an encoder makes them
        noise = torch.Generator().manual_seed(0)
        if layer == "Z-Image":  # prompts of all lengths
            texts = {name: list(value) for name, value in texts.items()}
        call = {"height": about.pixels, "width": about.pixels, "num_inference_steps": steps, **about.call, **others}
        pipe(**texts, **call, generator=noise)
        return seen[0]

    return launch


def rival(layer: str, steps: int, recipe: str) -> Timed:
    """Make what ours take turns with, and check it once; it stays beside other transformers."""
    if rivals.get("key") != (layer, recipe):
        rivals.clear()  # whose memory this one may need
        make, bound = RECIPES[recipe]
        launch = images(layer, pipeline(layer, make(model_of(layer), layer)), steps)
        candidate = Candidate(launch, lambda y, i: relative_error(y, expected[layer, steps]), bound, 1, wall_clock=True)
        rivals.update(key=(layer, recipe), launch=launch, timed=checked(candidate)[1])
    elif rivals.pop("cold", False):  # its blocks are to be compiled once more
        rivals["launch"](0, num_inference_steps=2)
    return rivals["timed"]


def build(layer: str, name: str, steps: int, row: Row, held: ExitStack) -> Candidate:
    """Attach what the candidate caches for as long as ``held`` is open."""
    recipe, cache = CANDIDATES[name]
    theirs = name.startswith(TO_BE_COMPILED) and cache is not None
    if (layer, steps) not in expected:
        expected[layer, steps] = images(layer, pipeline(layer, model_of(layer)), steps)(0)
    pipe = pipeline(layer, transformer(layer, recipe, fresh=recipe == TO_BE_COMPILED))
    launch = images(layer, pipe, steps)
    if cache is not None:
        try:
            held.enter_context(cache(pipe, row, launch))
            if theirs:
                launch(0)
        except Exception as reason:
            if not theirs or isinstance(reason, NotInstalled):
                raise
            raise NotInstalled(f"{type(reason).__name__}: {reason}") from reason

    def error(y: torch.Tensor, i: int) -> float:
        return relative_error(y, expected[layer, steps])

    return Candidate(launch, error, RECIPES[recipe][1] if cache is None else CACHED_BOUND, 1, wall_clock=True)


def shares(launch: Launch) -> Row:
    """Return the times of a call without its decoder, of the host before the first graph, and of the graphs alone.

    A whole run as one graph could save no more than what a call takes beside the other two.
    """
    graphs: list[torch.cuda.CUDAGraph] = []
    before: list[float] = []
    replay = torch.cuda.CUDAGraph.replay

    def noted(graph: torch.cuda.CUDAGraph) -> None:
        before.extend([time.perf_counter() - begin] if not graphs else [])
        graphs.append(graph)
        replay(graph)

    def latents() -> None:
        with mock.patch.object(torch.cuda.CUDAGraph, "replay", noted):
            launch(0, output_type="latent")

    def replays() -> None:
        for each in graphs:
            replay(each)

    called, alone = [], []
    while len(called) < SHARES and sum(called) < LONG:
        graphs.clear()
        begin = time.perf_counter()
        called.append(_wall(latents))
        alone.append(_wall(replays))
    if not graphs:
        return {"replays": 0}
    found = {"latents_us": called, "before_us": before, "replays_us": alone}
    return {"replays": len(graphs), **{name: 1e6 * statistics.median(taken) for name, taken in found.items()}}


def _wall(call: Callable[[], None]) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


@pytest.mark.parametrize(("layer", "name", "m"), CASES)
def test_images(measure: Measure, request: pytest.FixtureRequest, layer: str, name: str, m: int) -> None:
    """M is the number of steps."""
    row: Row = {"op": "images", "layer": layer, "m": m, "candidate": name}
    skip = WITHOUT_GPU
    if any(word in name for word in ("torchao", "cache-dit")) and request.config.getoption("--rivals") == "none":
        skip = "rivals: none"
    with ExitStack() as held:
        alone = AHEAD in name and "cache" not in name
        theirs = CANDIDATES[name][0] if alone else IMAGES_BF16  # what is ahead, with the same that is not
        against = None if name.startswith("bf16") else (theirs, lambda: rival(layer, m, theirs))
        made: list[Candidate] = []
        measure(row, lambda: made.append(build(layer, name, m, row, held)) or made[0], skip, rival=against)
        if "median_us" in row and ("graph()" in name or name == ONE_LINE):  # the row that measure has kept
            held_now = current["model"].state_dict().values()
            row["gpu_bytes"] = sum(tensor.nbytes for tensor in held_now if tensor.is_cuda)
            with torch.no_grad():
                row |= shares(made[0].launch)
