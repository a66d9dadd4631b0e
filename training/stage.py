"""Train one model of several: learning rate, moving average, checkpoints, progress, a CUDA graph of the step."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

CHECKPOINT_SECONDS = 60


class Stage:
    """Train with warm-up and cosine decay, a moving average of the weights, checkpoints and a progress bar.

    On a GPU the third step on is replayed as one CUDA graph: these models are small, and launching their kernels one by
    one takes three times as long as running them.

    Args:
        draw: ``draw(generator) -> batch``, a tuple of tensors of fixed shapes.
        loss: ``loss(model, *batch) -> scalar``, without host synchronization.
        settings: what decides the result, ``"seed"`` among it: a checkpoint made with other settings is refused.
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
    ) -> None:
        self.name, self.model, self.draw, self.loss, self.steps = name, model, draw, loss, steps
        self.learning_rate, self.ema_decay, self.settings = learning_rate, ema_decay, settings
        self.path = work / f"{name}.pt"
        self.ema = copy.deepcopy(model).requires_grad_(False).eval()
        self.device = next(model.parameters()).device
        cuda = self.device.type == "cuda"
        rate = torch.tensor(learning_rate, device=self.device)  # a tensor, so that a captured step sees it change
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.0, fused=cuda, capturable=cuda
        )
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: tuple[torch.Tensor, ...] = ()
        self.value = torch.zeros(())
        self.step = 0
        self.seconds = 0.0

    def save(self) -> None:
        """Write the checkpoint; a crash in between leaves the old one."""
        state = {
            "settings": dict(self.settings),
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.path)

    def resume(self) -> None:
        """Go on from the checkpoint if there is one; one made with other settings is refused."""
        if not self.path.exists():
            return
        state = torch.load(self.path, map_location=self.device, weights_only=True)
        different = {
            key: (state["settings"].get(key), value)
            for key, value in self.settings.items()
            if state["settings"].get(key) != value
        }
        if different:
            raise SystemExit(f"{self.path} was made with other settings {different}; delete it or give another --work")
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]

    @torch.no_grad()
    def update_ema(self) -> None:
        """Average the weights: ``ema += (1 - decay) · (weights - ema)``."""
        # the average follows quickly at first, so that it does not remember the initial weights
        decay = min(self.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)
        for ours, theirs in zip(self.ema.buffers(), self.model.buffers(), strict=True):
            ours.copy_(theirs)  # batch-norm statistics are averages already

    def optimize(self) -> None:
        """Take one step of the optimizer on ``self.inputs``; the loss goes to ``self.value``."""
        self.value = self.loss(self.model, *self.inputs)
        self.value.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=True)
        self.optimizer.step()

    def train_step(self, batch: tuple[torch.Tensor, ...], steps_here: int) -> None:
        """Optimize on ``batch``; on a GPU eagerly for three steps of this process, then by replaying one graph."""
        if self.graph is not None:
            for ours, theirs in zip(self.inputs, batch, strict=True):
                ours.copy_(theirs)
            self.graph.replay()
            return
        self.inputs = batch
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda" and steps_here == 3:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.optimize()
            self.graph.replay()  # capturing alone computes nothing
        elif self.device.type == "cuda":
            side = torch.cuda.Stream()  # as capture asks of its warm-up
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self.optimize()
            torch.cuda.current_stream().wait_stream(side)
        else:
            self.optimize()

    def run(self) -> nn.Module:
        """Train to the end and return the averaged model."""
        self.resume()
        first = self.step
        generator = torch.Generator(self.device)
        warmup = min(500, self.steps // 10 + 1)
        started = saved = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, refresh_per_second=0.2) as progress:
            task = progress.add_task(self.name, total=self.steps, completed=self.step)
            while self.step < self.steps:
                rate = self.learning_rate * min(
                    (self.step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * self.step / self.steps)) + 1e-3
                )
                for group in self.optimizer.param_groups:
                    group["lr"].fill_(rate)
                generator.manual_seed(int(self.settings["seed"]) << 40 | sum(self.name.encode()) << 24 | self.step)
                self.train_step(self.draw(generator), self.step - first)
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
                        self.save()
                        progress.console.log(f"{self.name} step {self.step} loss {number:.4f} {self.seconds:.0f} s")
        return self.ema


def pick(generator: torch.Generator, images: torch.Tensor, count: int) -> torch.Tensor:
    return torch.randint(len(images), (count,), generator=generator, device=images.device)


def autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)  # cached casts do not outlive a capture
