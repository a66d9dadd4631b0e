"""Train one model of several: learning rate, moving average, checkpoints, progress, a CUDA graph of the step."""

from __future__ import annotations

import copy
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # first imported in a group it keeps it, and the process can abort at its exit
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from qandc_kernels import capturing

CHECKPOINT_SECONDS = 60
Shapes = tuple[torch.Size, ...]


class Stage:
    """Train with warm-up and cosine decay, a moving average of the weights, checkpoints and a progress bar.

    On a GPU the third step on is replayed from CUDA graphs: these models are small, and launching their kernels one by
    one takes three times as long as running them. In a process group each process draws a batch of its own, and the
    gradients are averaged.

    Args:
        draw: ``draw(generator) -> batch``, a tuple of tensors; each set of shapes is captured once.
        loss: ``loss(model, *batch) -> scalar``, without host synchronization.
        settings: what decides the result, ``"seed"`` among it: a checkpoint made with other settings is refused.
        decay_steps: when the cosine ends; None: with the training.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        draw: Callable[[torch.Generator], tuple[torch.Tensor, ...]],
        loss: Callable[..., torch.Tensor],
        settings: Mapping[str, int | float],
        work: Path,
        *,
        steps: int,
        ema_decay: float,
        learning_rate: float = 2e-3,
        decay_steps: int | None = None,
    ) -> None:
        self.name, self.model, self.draw, self.loss, self.steps = name, model, draw, loss, steps
        self.learning_rate, self.ema_decay, self.settings = learning_rate, ema_decay, settings
        self.decay_steps = decay_steps or steps
        self.path = work / f"{name}.pt"
        self.ema = copy.deepcopy(model).requires_grad_(False).eval()
        self.device = next(model.parameters()).device
        cuda = self.device.type == "cuda"
        # all weights in one tensor, their gradients and averages in others: a step on them is few launches
        self.weights, self.averages = nn.Parameter(flatten(model)), flatten(self.ema)
        self.gradient = torch.zeros_like(self.averages)
        for parameter, part in zip(model.parameters(), split_like(self.gradient, model), strict=True):
            parameter.grad = part
        self.weights.grad = self.gradient
        rate = torch.tensor(learning_rate, device=self.device)  # a tensor, so that a captured step sees it change
        self.optimizer = torch.optim.AdamW(
            [self.weights], lr=rate, betas=(0.9, 0.99), weight_decay=0.0, fused=cuda, capturable=cuda
        )
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.seen: Counter[Shapes] = Counter()
        self.captured: dict[Shapes, tuple[torch.cuda.CUDAGraph, tuple[torch.Tensor, ...], torch.Tensor]] = {}
        self.updating: torch.cuda.CUDAGraph | None = None
        self.value = torch.zeros(())
        self.step = 0
        self.seconds = 0.0

    def save(self) -> None:
        """Write the checkpoint; a crash in between leaves the old one. At the end only the average matters."""
        state = {
            "settings": dict(self.settings),
            "step": self.step,
            "seconds": self.seconds,
            "ema": self.ema.state_dict(),
        }
        if self.step < self.steps:
            state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.path)

    def resume(self) -> None:
        """Go on from the checkpoint if there is one; one of another training is refused in one line."""
        if not self.path.exists():
            return
        try:
            state = torch.load(self.path, map_location=self.device, weights_only=True)
            theirs, ours, finished = state["settings"], dict(self.settings), "optimizer" not in state
            if state["step"] > self.steps or (finished and state["step"] < self.steps):
                theirs, ours = {**theirs, "steps": state["step"]}, {**ours, "steps": self.steps}
            different = {
                name: (theirs.get(name), ours.get(name)) for name in theirs | ours if theirs.get(name) != ours.get(name)
            }
            if not different:
                self.ema.load_state_dict(state["ema"])
                if not finished:
                    self.model.load_state_dict(state["model"])
                    self.optimizer.load_state_dict(state["optimizer"])
                self.step, self.seconds = state["step"], state["seconds"]
        except (AttributeError, EOFError, KeyError, RuntimeError, TypeError, ValueError, UnpicklingError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split()):.120}"
            raise SystemExit(
                f"{self.path} is no checkpoint of this model ({reason}); delete it or give another --work"
            ) from None
        if different:
            raise SystemExit(f"{self.path} was made with other settings {different}; delete it or give another --work")

    @torch.no_grad()
    def update_ema(self) -> None:
        """Average the weights: ``ema += (1 - decay) · (weights - ema)``."""
        # the average follows quickly at first, so that it does not remember the initial weights
        decay = min(self.ema_decay, (1 + self.step) / (10 + self.step))
        self.averages.lerp_(self.weights, 1 - decay)
        for ours, theirs in zip(self.ema.buffers(), self.model.buffers(), strict=True):
            ours.copy_(theirs)  # batch-norm statistics are averages already

    def backward(self, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Compute the loss of a batch, and its gradient in ``self.gradient``."""
        self.gradient.zero_()
        value = self.loss(self.model, *batch)
        value.backward()
        return value.detach()

    def update(self) -> None:
        """Take one step of the optimizer with the gradient, scaled down to a norm of 1."""
        self.gradient.mul_((1 / self.gradient.norm()).clamp(max=1))
        self.optimizer.step()

    def train_step(self, batch: tuple[torch.Tensor, ...]) -> None:
        """Optimize on a batch; on a GPU eagerly the first two times that its shapes are seen, then from graphs."""
        shapes = tuple(x.shape for x in batch)
        self.seen[shapes] += 1
        if self.device.type != "cuda":
            self.value = self.backward(batch)
        elif shapes in self.captured:
            graph, inputs, self.value = self.captured[shapes]
            for ours, theirs in zip(inputs, batch, strict=True):
                ours.copy_(theirs)
            graph.replay()
        elif self.seen[shapes] == 3:
            graph = torch.cuda.CUDAGraph()
            with capturing(graph):
                self.value = self.backward(batch)
            self.captured[shapes] = graph, batch, self.value
            graph.replay()  # capturing alone computes nothing
        else:
            side = torch.cuda.Stream()  # as capture asks of its warm-up
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self.value = self.backward(batch)
            torch.cuda.current_stream().wait_stream(side)
        if self.world > 1:
            dist.all_reduce(self.gradient.div_(self.world))
        if self.updating is not None:
            self.updating.replay()
            return
        self.update()
        if self.captured:  # the optimizer has made its state by now
            self.updating = torch.cuda.CUDAGraph()
            with capturing(self.updating):
                self.update()

    def run(self) -> nn.Module:
        """Train to the end and return the averaged model."""
        self.resume()
        stream = (int(self.settings["seed"]), sum(self.name.encode()), self.rank)
        generator = torch.Generator(self.device)
        warmup = min(500, self.steps // 10 + 1)
        started = saved = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, refresh_per_second=0.2, disable=self.rank > 0) as progress:
            task = progress.add_task(self.name, total=self.steps, completed=self.step)
            while self.step < self.steps:
                rate = self.learning_rate * min(
                    (self.step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * self.step / self.decay_steps)) + 1e-3
                )
                for group in self.optimizer.param_groups:
                    group["lr"].fill_(rate)
                # a CPU's generator takes 32 bits
                generator.manual_seed(int(np.random.SeedSequence((*stream, self.step)).generate_state(1)[0]))
                self.train_step(self.draw(generator))
                self.step += 1
                self.update_ema()
                if self.step % 100 == 0 or self.step == self.steps:
                    number = self.value.item()
                    if not math.isfinite(number):
                        raise SystemExit(f"{self.name}: loss is {number} at step {self.step}; lower the learning rate")
                    now = time.monotonic()
                    progress.update(task, completed=self.step, description=f"{self.name} loss {number:.4f}")
                    if now - saved > CHECKPOINT_SECONDS or self.step == self.steps:
                        self.seconds += now - started
                        started = saved = now
                        if self.rank == 0:
                            self.save()
                            progress.console.log(f"{self.name} step {self.step} loss {number:.4f} {self.seconds:.0f} s")
        return self.ema


def split_like(flat: torch.Tensor, model: nn.Module) -> list[torch.Tensor]:
    parameters = list(model.parameters())
    return [part.view_as(p) for part, p in zip(flat.split([p.numel() for p in parameters]), parameters, strict=True)]


@torch.no_grad()
def flatten(model: nn.Module) -> torch.Tensor:
    """Move the parameters of a model into one tensor, of which each is a view from now on."""
    flat = torch.cat([parameter.flatten() for parameter in model.parameters()])
    for parameter, part in zip(model.parameters(), split_like(flat, model), strict=True):
        parameter.data = part
    return flat


def pick(generator: torch.Generator, images: torch.Tensor, count: int) -> torch.Tensor:
    return torch.randint(len(images), (count,), generator=generator, device=images.device)


def autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)  # cached casts do not outlive a capture
