"""Where the kernels run: in Triton's interpreter on a machine without a GPU, on the GPU where there is one."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import os
import signal
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined, so before any import of one
os.environ.setdefault("HF_HUB_OFFLINE", "1")

QUICK_CASES = 4  # of a test with many: others, in between, are slow
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_unconfigure() -> None:
    gc.unfreeze()  # for libraries that count what is left at the end


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(reason="needs an NVIDIA GPU")
    no_interpreter = pytest.mark.skip(
        reason="kernels are compiled for the GPU here; TRITON_INTERPRET=1 interprets them"
    )
    for item in items:
        if "gpu" in item.keywords and (INTERPRETED or not torch.cuda.is_available()):
            item.add_marker(no_gpu)
        if "interpret" in item.keywords and not INTERPRETED:
            item.add_marker(no_interpreter)
    cases: dict[tuple[Path, str], list[pytest.Item]] = {}
    for item in items:
        if not {"slow", "gpu"} & set(item.keywords):
            cases.setdefault((item.path, getattr(item, "originalname", item.name)), []).append(item)
    for alike in cases.values():
        last = len(alike) - 1
        quick = {round(i * last / (QUICK_CASES - 1)) for i in range(QUICK_CASES)}
        for i, item in enumerate(alike):
            if last >= QUICK_CASES and i not in quick:
                item.add_marker(pytest.mark.slow)


@pytest.fixture(
    params=[pytest.param("cpu", marks=pytest.mark.interpret), pytest.param("cuda", marks=pytest.mark.gpu)],
    ids=["interpreter", "cuda"],
)
def kernel_device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """A device on which the public ops launch Triton kernels: the GPU, or the CPU with kernels interpreted."""
    from qandc_kernels import select_backend, use_backend  # here: TRITON_INTERPRET is read when kernels are imported

    if request.param == "cpu":
        with use_backend("triton"):
            yield torch.device("cpu")
    else:  # as called by users: layers go straight to their kernels only where nobody chose a backend
        assert select_backend("cuda").name == "triton"
        yield torch.device("cuda")


@pytest.fixture
def fused_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let fused models run fused wherever they are: with plain torch in the place of kernels on a CPU."""
    from qandc_kernels import Backend

    monkeypatch.setattr("qandc.fusion.blocks.select_backend", lambda device: Backend("triton", "as if"))


@pytest.fixture(scope="session", autouse=True)
def _filled_memory() -> Iterator[None]:
    """New tensors hold NaN, or the largest integer, so that an element no kernel wrote shows up."""
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.set_deterministic_debug_mode(before)


@pytest.fixture(scope="module", autouse=True)
def _new_objects() -> None:
    """Let garbage collections look at what a module of tests makes, not at the million objects there are before."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


class FloatsMade(TorchDispatchMode):
    """Counts by size the float tensors that operations other than ``leave_out`` return, none on the meta device."""

    def __init__(self, leave_out: object = None) -> None:
        super().__init__()
        self.leave_out = leave_out
        self.sizes: Counter[int] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is not self.leave_out:
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and not leaf.is_meta:
                    self.sizes[leaf.numel()] += 1
        return result


def in_a_thread(function, *args, **kwargs):
    """What the function returns or raises in a thread that is not the main one."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args, **kwargs).result()


@contextlib.contextmanager
def in_time(seconds: int = 20):
    """Raise TimeoutError if the block takes longer: a test of what could wait for ever fails instead."""

    def late(signum, frame):
        raise TimeoutError(f"it took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def recorded_calls(model, run):
    """Arguments of each forward of the model while ``run()`` runs it."""
    calls = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, dict(kwargs))), with_kwargs=True
    )
    try:
        run()
    finally:
        handle.remove()
    return calls


def made_once(make):
    """Call a function once for the same arguments, and return deep copies of what it made."""
    known = {}

    @functools.wraps(make)
    def copied(*args, **kwargs):
        key = repr((args, kwargs))
        if key not in known:
            known[key] = make(*args, **kwargs)
        torch.manual_seed(0)  # whether it was made now or before
        return copy.deepcopy(known[key])

    return copied


def make_dit(num_layers: int = 3, heads: int = 2, head_dim: int = 16, sample_size: int = 8, **changes):
    """A small random DiT whose every path carries signal (the library leaves nothing at zero, so neither do we)."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=4,
        out_channels=4,
        num_layers=num_layers,
        sample_size=sample_size,
        **changes,
    )
    return model.eval()


@pytest.fixture
def dit():
    return make_dit()


@pytest.fixture
def dit_inputs(seeded: torch.Generator) -> dict[str, torch.Tensor]:
    return {
        "hidden_states": torch.randn(4, 4, 8, 8, generator=seeded),
        "timestep": torch.tensor([500]).expand(4),
        "class_labels": torch.tensor([1, 2, 1000, 1000]),
    }


@pytest.fixture(scope="session")
def flux_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small FLUX.1 with text encoders, as ``save_pretrained`` writes it."""
    pytest.importorskip("transformers")
    from tests.tiny_pipelines import make_pipeline

    path = tmp_path_factory.mktemp("pipeline") / "tiny-flux"
    make_pipeline("FluxPipeline").save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def pipeline_dir(tmp_path_factory: pytest.TempPathFactory):
    """A tiny random DiT pipeline saved by diffusers: every structure of the real one, nothing of its quality."""
    from diffusers import AutoencoderKL, DDPMScheduler, DiTPipeline

    torch.manual_seed(0)
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        sample_size=16,
    )
    path = tmp_path_factory.mktemp("pipeline") / "tiny-dit"
    DiTPipeline(make_dit(), vae, DDPMScheduler(clip_sample=False)).save_pretrained(path)
    return path
