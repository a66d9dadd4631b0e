"""Record each call of a transformer while its own pipeline draws: candidates to calibrate with, for any family.

Text embeddings, masks and tables of positions are given to every call of a run and stored once: a tensor is named by
the hash of its values.
"""

from __future__ import annotations

import inspect
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from qandc.cache import get_cache
from qandc.errors import ConfigError, DataError
from qandc.method.pool import chosen_samples
from qandc.models.family import arguments_of, forward_of
from qandc.quantization.observe import TIMESTEP_NAMES
from qandc.sampling.pipelines import fingerprint
from qandc.support.arguments import Integers, Model, check_fields, checked
from qandc.support.attach import eager
from qandc.support.files import FileKind, content_digest, keep_settings, read_json
from qandc.tap import CLUSTERERS, TapConfig, select_samples

__all__ = ["RunPool", "pool_from_run"]

SETTINGS = "runs.json"
LOOKS = 1 << 14  # numbers that are compared of a call; latents of more are projected to so many
PLAIN = (type(None), bool, int, float, str)


class RecordedCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Hold one call: its timestep, and its arguments by name, latents first, tensors by the name they are stored by."""

    timestep: float
    arguments: dict[str, Any]


SHARD = FileKind("recorded run", 1, list[RecordedCall], "delete it to have it recorded again", DataError)


def _flat(value: Any, keep: Callable[[torch.Tensor], str], name: str) -> Any:
    """Describe an argument in JSON; its tensors go to ``keep``, which names them."""
    if isinstance(value, torch.Tensor):
        return {"tensor": keep(value)}
    if isinstance(value, list | tuple):
        return {"list" if isinstance(value, list) else "tuple": [_flat(part, keep, name) for part in value]}
    if isinstance(value, dict):
        return {"dict": [[key, _flat(part, keep, name)] for key, part in value.items()]}
    if type(value) not in PLAIN:
        raise DataError(
            f"the model was given {name} with a {type(value).__name__}; tensors, numbers, strings, None, and lists, "
            "tuples and dictionaries of these can be recorded (run without it, or calibrate on a run itself)"
        )
    return value


def _restored(value: Any, tensors: Mapping[str, torch.Tensor], device: torch.device | str) -> Any:
    """Undo :func:`_flat`, with tensors on a device."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content].to(device)
    if kind == "dict":
        return {key: _restored(part, tensors, device) for key, part in content}
    return {"list": list, "tuple": tuple}[kind](_restored(part, tensors, device) for part in content)


def _leaves(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _leaves(part)


@dataclass(frozen=True)
class RunPool:
    """Read calls of a transformer that :func:`pool_from_run` has recorded; a sample is a call, all its rows.

    Conditional and unconditional rows that a pipeline computes in two calls are two samples. One run at a time is in
    memory.

    Attributes:
        directory: that holds them.
        timesteps: of all calls, ``[N] float64``.

    Raises:
        ConfigError: there is no pool.
        DataError: a run is missing or damaged.
    """

    directory: str | Path
    timesteps: np.ndarray = field(init=False)
    _calls: list[tuple[int, int]] = field(init=False, repr=False)  # of each sample its run, and which of it

    def __post_init__(self) -> None:
        check_fields(self)
        advice = "give a directory that pool_from_run has written"
        runs = read_json(Path(self.directory) / SETTINGS, "record of runs", advice, names=("runs",))["runs"]
        timesteps: list[float] = []
        calls: list[tuple[int, int]] = []
        for run in range(runs):
            found = SHARD.read_tensors(_path(self.directory, run))[1]
            timesteps += [call.timestep for call in found]
            calls += [(run, i) for i in range(len(found))]
        object.__setattr__(self, "timesteps", np.array(timesteps))
        object.__setattr__(self, "_calls", calls)

    def __len__(self) -> int:
        return len(self._calls)

    @checked
    def select(
        self, count: int = 800, config: TapConfig | None = None, *, method: str = "tap", seed: int = 0
    ) -> np.ndarray:
        """Choose the samples to calibrate with, by number: :func:`qandc.select_samples` on latents and steps.

        Latents of more than 16384 numbers are projected to so many by chance, which keeps cosines to about 0.01.

        Raises:
            ConfigError: as :func:`qandc.select_samples`.
            DataError: the latents have several sizes, which cannot be compared, or are not finite.
        """
        steps = np.unique(-self.timesteps, return_inverse=True)[1]
        looks = self._looks() if method in CLUSTERERS else np.zeros((len(self), 1))
        return select_samples(looks, steps, count, config, method=method, seed=seed)

    def _looks(self) -> np.ndarray:
        """Describe the latents of each sample, ``[N, D]``; D is at most ``LOOKS``."""
        found: list[torch.Tensor] = []
        sizes = None
        for arguments in self._arguments(range(len(self))):
            latents = list(_leaves(next(iter(arguments.values()))))
            x = torch.cat([part.float().flatten() for part in latents])
            shapes = [list(part.shape) for part in latents]
            if sizes is None:
                sizes = shapes
                generator = torch.Generator().manual_seed(0)
                places = torch.randint(LOOKS, x.shape, generator=generator)
                signs = torch.randint(2, x.shape, generator=generator).mul_(2).sub_(1)
            if sizes != shapes:
                raise DataError(
                    f"latents of a pool are compared, which needs one size; it has {sizes} and {shapes} (take method "
                    "'random' or 'uniform', or a pool for each size)"
                )
            # each number is added to one of LOOKS, or taken away: inner products stay on average (Charikar et al. 2002)
            found.append(x if len(x) <= LOOKS else torch.zeros(LOOKS).index_add_(0, places, x * signs))
        return torch.stack(found).numpy()

    @checked
    def batches(
        self, indices: Integers | None = None, *, device: torch.device | str = "cpu"
    ) -> Iterator[dict[str, Any]]:
        """Yield the arguments of these calls (by default of all), one call at a time, in the dtypes they had.

        Each is a batch as :func:`qandc.calibrate`, :func:`qandc.smoothing_factors` and :func:`qandc.input_hessians`
        take it, at one timestep, as :func:`qandc.calibrate_steps` needs it.

        Raises:
            ConfigError: an index that the pool does not have.
            DeviceError: the device is not here.
        """
        return self._arguments(chosen_samples(indices, len(self)).tolist(), device)

    def _arguments(self, chosen: Sequence[int], device: torch.device | str = "cpu") -> Iterator[dict[str, Any]]:
        last = None
        tensors: dict[str, torch.Tensor] = {}
        for run, place in (self._calls[i] for i in chosen):
            if run != last:
                tensors, calls = SHARD.read_tensors(_path(self.directory, run))
                last = run
            yield _restored({"dict": list(calls[place].arguments.items())}, tensors, device)


def _path(directory: str | Path, run: int) -> Path:
    return Path(directory) / f"run-{run:06d}.safetensors"


@checked
def pool_from_run(
    transformer: Model,
    run: Callable[[], Any] | Sequence[Callable[[], Any]],
    directory: str | Path | None = None,
    *,
    about: str = "",
) -> RunPool:
    """Record what a transformer is given while its own pipeline draws: the pool to choose calibration samples from.

    ``pool_from_run(pipe.transformer, [partial(pipe, prompt, num_inference_steps=28) for prompt in prompts])``.

    Args:
        transformer: as it is to be calibrated: with its cache attached, as the paper does it, or without. Compiled
            modules run uncompiled.
        run: draws some images; or several such functions. What one of them gives the model is held in memory, then
            stored.
        directory: where each run is stored as soon as it is over. Runs that are there already are not repeated, so that
            an interrupted recording goes on; one of another model, cache, number of runs or ``about`` is refused. By
            default a temporary one, removed with the pool.
        about: says what is drawn, to tell this recording from others: prompts, steps, seeds.

    Raises:
        DataError: a function did not run the model, or gave it what cannot be recorded.
        ConfigError: no function is given, or the directory holds another pool.
        OutputError: the directory cannot be written.
    """
    runs = list(run) if isinstance(run, Sequence) else [run]
    if not runs:
        raise ConfigError("run is an empty list; give at least one function that draws with the pipeline")
    model = getattr(transformer, "_orig_mod", transformer)
    folder = Path(tempfile.mkdtemp(prefix="qandc-pool-") if directory is None else directory)
    try:
        keep_settings(folder / SETTINGS, _settings(model, len(runs), about, directory is not None), "a pool")
        for number, draw in enumerate(runs):
            if not _path(folder, number).exists():
                calls, tensors = _record(model, draw)
                SHARD.write_tensors(_path(folder, number), tensors, calls)
                del tensors
        pool = RunPool(folder)
    except BaseException:
        if directory is None:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if directory is None:
        weakref.finalize(pool, shutil.rmtree, folder, ignore_errors=True)
    return pool


def _settings(model: Any, runs: int, about: str, others_may_follow: bool) -> dict[str, Any]:
    """Say what a recording goes on with: weights by their hash, unless they are offloaded or nobody will ask."""
    cache = get_cache(model)
    known = others_may_follow and not any(weight.is_meta for weight in model.parameters())
    return {
        "version": SHARD.version,
        "runs": runs,
        "about": about,
        "cache": None if cache is None else {"compensated": cache.compensation is not None, **asdict(cache.config)},
        "weights_sha256": fingerprint(model) if known else None,
    }


def _record(model: Any, draw: Callable[[], Any]) -> tuple[list[RecordedCall], dict[str, torch.Tensor]]:
    """Run the model; return its calls, and their tensors by name."""
    calls: list[RecordedCall] = []
    tensors: dict[str, torch.Tensor] = {}
    latents = tuple(inspect.signature(forward_of(model)).parameters)[1]

    def keep(tensor: torch.Tensor) -> str:
        found = tensor.detach().cpu()
        name = content_digest(b"", {"": found})[:32]
        if name not in tensors:
            tensors[name] = found.clone()  # what is on the CPU may be written to later
        return name

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = arguments_of(module, args, kwargs)
        timestep = next((given[name] for name in TIMESTEP_NAMES if given.get(name) is not None), None)
        if timestep is None or given.get(latents) is None:
            raise DataError(
                f"a call of this {type(module).__name__} without {latents} or one of {', '.join(TIMESTEP_NAMES)} is no "
                "step of a run; give pipe.transformer"
            )
        given = {latents: given[latents], **given}
        arguments = {name: _flat(value, keep, name) for name, value in given.items()}
        calls.append(RecordedCall(float(torch.as_tensor(timestep).max()), arguments))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.no_grad(), eager():
            draw()
    finally:
        handle.remove()
    if not calls:
        raise DataError(f"the function did not run this {type(model).__name__}; give one that draws with its pipeline")
    return calls, tensors
