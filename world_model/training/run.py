"""One training run: optimisers, averaged weights, learning rates and checkpoints, update by update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from world_model.episodes import Episodes
from world_model.files import save_atomically
from world_model.model.world_model import WorldModel
from world_model.ops.dispatch import single_thread_library
from world_model.ops.linear import Layer, PreallocatedMLP
from world_model.training.batches import Batches
from world_model.training.config import FitConfig
from world_model.training.losses import Losses, chunk_losses, plain_forward, transition_losses


class TrainingRun:
    """A model in training. Phase 0 trains the draft and the reward head, phase 1 the rest, with these frozen."""

    def __init__(self, model: WorldModel, episodes: Episodes, config: FitConfig, out: Path, recipe: str):
        self.model, self.config, self.out, self.recipe = model, config, out, recipe
        self.batches = Batches(model, episodes, config.frames)
        self.cpu_seconds = 0.0
        early = {"draft", "reward_head"}
        self.groups = [
            {name: p for name, p in model.named_parameters() if (name.split(".")[0] in early) == first}
            for first in (True, False)
        ]
        self.flat = [_flatten(list(group.values())) for group in self.groups]
        self.averages = [flat.detach().clone() for flat in self.flat]
        self.optimisers = [
            torch.optim.AdamW([flat], betas=(0.9, 0.99), weight_decay=config.weight_decay, fused=True)
            for flat in self.flat
        ]
        self.generator = torch.Generator()
        self._mlps: dict[str, PreallocatedMLP] = {}

    def update(self, step: int) -> Losses:
        """One optimiser step -> the losses before it. All randomness is a function of (seed, step)."""
        config = self.config
        self.generator.manual_seed((config.seed << 32) + step)
        if step == config.draft_steps:
            self._freeze_draft()
        if step < config.draft_steps:
            phase, done, length, lr, ema = 0, step, config.draft_steps, config.draft_lr, config.draft_ema
            batch = self.batches.transitions(config.draft_batch, self.generator)
            losses = transition_losses(self.model, batch, self._forward)
        else:
            phase, done, length, lr, ema = 1, step - config.draft_steps, config.steps, config.lr, config.ema
            losses = chunk_losses(
                self.model, self.batches.chunks(config.batch, self._chunk_length(step), self.generator)
            )
        optimiser, flat = self.optimisers[phase], self.flat[phase]
        assert flat.grad is not None
        flat.grad.zero_()
        self._backward(losses)
        flat.grad.mul_((1.0 / (flat.grad.norm() + 1e-6)).clamp_max(1.0))  # at most of length 1
        warmup = min(1.0, (done + 1) / min(100, length))
        optimiser.param_groups[0]["lr"] = lr * warmup * (0.5 + 0.5 * math.cos(math.pi * done / length))
        optimiser.step()
        self.averages[phase].lerp_(flat.detach(), 1 - min(ema, (done + 1) / (done + 10)))
        return losses

    def finish(self) -> None:
        """Replace the last weights by the averaged ones."""
        if self.config.steps == 0:
            self._freeze_draft()
        self._use_average(1)
        for group in self.groups:
            for p in group.values():  # no longer views of one tensor, or whoever copied one would copy all
                p.data, p.grad = p.data.clone(), None

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def save(self, step: int, cpu_seconds: float) -> None:
        """Write training.safetensors: all that the updates from ``step`` on depend on."""
        tensors = {f"model/{name}": t for name, t in self.model.state_dict().items()}
        for phase, (flat, optimiser) in enumerate(zip(self.flat, self.optimisers, strict=True)):
            tensors[f"average/{phase}"] = self.averages[phase]
            tensors |= {f"optimiser/{key}/{phase}": t for key, t in optimiser.state.get(flat, {}).items()}
        tensors["recipe"] = torch.frombuffer(bytearray(self.recipe.encode()), dtype=torch.uint8)
        tensors["step"], tensors["cpu"] = torch.tensor(step), torch.tensor(self.cpu_seconds + cpu_seconds)
        save_atomically(self.out / "training.safetensors", tensors)

    def resume(self) -> int:
        """Continue from the checkpoint in the folder, if there is one -> the step to continue with.

        Raises ValueError where it is damaged or another run's.
        """
        path = self.out / "training.safetensors"
        if not path.exists():
            return 0
        try:
            tensors: dict[str, Any] = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); delete it to start afresh") from error
        if bytes(tensors["recipe"].numpy()).decode() != self.recipe:
            raise ValueError(f"{path} belongs to another run: choose another folder, or delete it to start afresh")
        self.model.load_state_dict({name[6:]: t for name, t in tensors.items() if name.startswith("model/")})
        for phase, (flat, optimiser) in enumerate(zip(self.flat, self.optimisers, strict=True)):
            self.averages[phase] = tensors[f"average/{phase}"]
            state = {key: tensors.get(f"optimiser/{key}/{phase}") for key in ("step", "exp_avg", "exp_avg_sq")}
            if state["step"] is not None:
                optimiser.state[flat] = state
        self.cpu_seconds = float(tensors["cpu"])
        return int(tensors["step"])

    # -- inside --------------------------------------------------------------------------------------------------------

    def _forward(self, name: str, layers: Sequence[Layer], parts: list[Tensor]) -> Tensor:
        """An MLP of phase 0: compiled, with buffers that are allocated once, where that is to be had."""
        if name not in self._mlps:
            library = single_thread_library("dense", self.flat[0])
            if library is None:
                return plain_forward(name, layers, parts)
            self._mlps[name] = PreallocatedMLP(library, layers, len(parts[0]))
        return self._mlps[name].forward(parts)

    def _backward(self, losses: Losses) -> None:
        total: Tensor = sum(losses.values())  # type: ignore[assignment]
        total.backward()
        for mlp in self._mlps.values():
            mlp.backward()

    def _chunk_length(self, step: int) -> int:
        """1, 1, half and all of the longest in turn: one checkpoint serves every chunk length."""
        longest = self.model.config.chunk
        return (1, 1, max(1, longest // 2), longest)[step % 4]

    @torch.no_grad()
    def _freeze_draft(self) -> None:
        """End phase 0: the averaged weights stay, and the draft's error becomes the unit of the flow."""
        self._use_average(0)
        self._mlps.clear()
        generator = torch.Generator().manual_seed(self.config.seed)
        self.model.draft_error.copy_(self.batches.draft_error(4096, generator).clamp_min(1e-5))

    @torch.no_grad()
    def _use_average(self, phase: int) -> None:
        self.flat[phase].copy_(self.averages[phase])


def _flatten(parameters: list[torch.nn.Parameter]) -> torch.nn.Parameter:
    """Make all parameters, and their gradients, views of one long tensor [N]: one operation then updates them all."""
    flat = torch.nn.Parameter(torch.cat([p.detach().flatten() for p in parameters]))
    flat.grad = torch.zeros_like(flat)
    sizes = [p.numel() for p in parameters]
    for p, own, grad in zip(parameters, flat.detach().split(sizes), flat.grad.split(sizes), strict=True):
        p.data, p.grad = own.view_as(p), grad.view_as(p)
    return flat
