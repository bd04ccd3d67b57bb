"""The training loop: first the draft, then the memory that refines it; killed at any time, it resumes exactly."""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from world_model.contract import Spec
from world_model.episodes import Episodes, StartStates
from world_model.model.config import WorldModelConfig
from world_model.model.draft import beta_nll
from world_model.model.world_model import DraftPrediction, WorldModel, save_atomically
from world_model.ops.dispatch import single_thread_library
from world_model.ops.flow import corrupt, shift, shift_factor, velocity_loss
from world_model.ops.layout import Layout
from world_model.ops.linear import Layer, PreallocatedMLP, chain


@dataclass(frozen=True)
class FitConfig:
    """How a world model is trained. Steps are optimiser updates, ``frames`` the length of a training window."""

    draft_steps: int = 6000
    steps: int = 2500
    draft_batch: int = 256
    batch: int = 16
    frames: int = 16
    draft_lr: float = 6e-3
    lr: float = 2e-3
    draft_ema: float = 0.999
    ema: float = 0.998
    weight_decay: float = 1e-4  # of both phases; more of it keeps dreams from running away where no data are
    seed: int = 0
    save_every: int = 100

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            counts = ("draft_batch", "batch", "frames", "save_every")
            least = 1 if name in counts else 0
            if value < least or (name == "seed" and value >= 2**31):
                raise ValueError(f"{name} must be at least {least} (and a seed below 2**31), got {value}")


def fit(
    config: WorldModelConfig,
    spec: Spec,
    episodes: Episodes,
    train: FitConfig = FitConfig(),
    *,
    out: str | Path,
    begin: WorldModel | None = None,
    card: dict[str, Any] | None = None,
    progress: bool = True,
) -> WorldModel:
    """Train on ``episodes`` -> the trained WorldModel, also saved in the folder ``out``; ``card`` goes onto its card.

    begin: a model of the same config that training goes on from, as where there are more episodes than it was trained
        on; without it, from scratch.

    Everything drawn at random is a function of (seed, step), so the same call gives the same weights on the same
    machine, also when it was killed in between: called again as before it goes on from the last checkpoint in
    ``out`` (at most ``save_every`` updates are lost), and a finished model is loaded. Raises ValueError where ``out``
    holds another recipe's or the data don't fit, FloatingPointError where training diverges.
    """
    _check(config, spec, episodes, train)
    if begin is not None and begin.config != config:
        raise ValueError(f"training can't go on from a model of another config: {begin.config}, not {config}")
    recipe = _recipe(config, episodes, train, begin)
    out = Path(out)
    if (out / "model.safetensors").is_file() and not (out / "training.safetensors").is_file():
        model = WorldModel.from_pretrained(out)
        if model.card.get("fit", {}).get("recipe") != recipe:
            raise ValueError(f"{out} holds a model made otherwise: choose another folder, or delete it to start afresh")
        return model
    out.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(train.seed)
        model = WorldModel(config, spec)
    if begin is not None:
        model.load_state_dict(begin.state_dict())
    model.scaling.measure(episodes)
    model.terminates.copy_(torch.tensor(bool(episodes.terminated.any())))
    run = Run(model, episodes, train, out, recipe)
    started, cpu = run.resume(), time.process_time()
    if progress and started:
        print(f"Going on after update {started}", file=sys.stderr)
    elif progress:
        print(f"Training: if it is stopped, the same command goes on from {out}", file=sys.stderr)
    total = train.draft_steps + train.steps
    bar = tqdm(total=total, initial=started, disable=not progress, unit="update", desc="fit")
    log = SummaryWriter(str(out / "logs"), purge_step=started)
    try:
        for step in range(started, total):
            losses = run.update(step)
            if step % 100 == 0:
                _expect_finite(losses, step)
                for name, value in losses.items():
                    log.add_scalar(f"loss/{name}", value.item(), step)
                bar.set_postfix({name: f"{value.item():.4f}" for name, value in losses.items()})
            bar.update()
            if (step + 1) % train.save_every == 0 and step + 1 < total:
                _expect_finite(losses, step)
                run.save(step + 1, time.process_time() - cpu)
    except KeyboardInterrupt:
        print(f"\nStopped. The same command goes on from {out}", file=sys.stderr)
        raise
    finally:
        bar.close()
        log.close()
    run.finish()
    first = episodes.starts()
    model.starts = StartStates(episodes.obs[first][:256, None], episodes.action[first][:256, None])
    _expect_finite(dict(model.named_parameters()), total)
    model.card = {
        **(card or {}),
        "fit": {
            "recipe": recipe,
            "train": asdict(train),
            "frames_of_data": len(episodes.obs),
            "cpu_seconds": round(run.cpu_seconds + time.process_time() - cpu, 1),
        },
    }
    model.eval().requires_grad_(False)
    model.save_pretrained(out)
    (out / "training.safetensors").unlink(missing_ok=True)
    return model


def _expect_finite(tensors: dict[str, Tensor], step: int) -> None:
    bad = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if bad:
        raise FloatingPointError(
            f"training diverged before update {step}: {bad[0]} is not finite; lower the learning rate"
        )


def _recipe(config: WorldModelConfig, episodes: Episodes, train: FitConfig, begin: WorldModel | None) -> str:
    """A short digest of all that decides the weights."""
    origin = [] if begin is None else [begin.fingerprint()]
    text = json.dumps([asdict(config), asdict(train), episodes.fingerprint(), *origin], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check(config: WorldModelConfig, spec: Spec, episodes: Episodes, train: FitConfig) -> None:
    if train.frames < config.chunk:
        raise ValueError(f"frames={train.frames} must hold at least one chunk of the model's chunk={config.chunk}")
    have = (episodes.obs.shape[1], episodes.action.shape[1])
    if have != (config.obs_dim, config.action_dim):
        raise ValueError(f"the data have (O, A) = {have}, the config says {(config.obs_dim, config.action_dim)}")
    if not (episodes.index > 0).any():
        raise ValueError("the data hold no step, only first observations")
    longest = int(episodes.left.max())
    if longest < config.chunk:
        raise ValueError(f"no episode has the {config.chunk} steps of a chunk (the longest has {longest}): lower chunk")
    played, box = episodes.action[episodes.index > 0].numpy(), spec.action_box
    slack = 1e-6 * (box.high - box.low)
    if (played < box.low - slack).any() or (played > box.high + slack).any():
        raise ValueError(
            f"the data hold actions from {played.min():.6g} to {played.max():.6g}, outside {box}: clip them as the "
            "simulator did when they were recorded"
        )
    seen, box = episodes.obs.numpy(), spec.observation_box
    beyond = np.maximum(box.low - seen, seen - box.high).max(0)  # a dream would never go there
    if (beyond > 1e-4 * (1 + np.abs(seen).max(0))).any():
        worst = int(beyond.argmax())
        raise ValueError(
            f"the data hold observations outside {box}, by {beyond[worst]:.6g} in dimension {worst}: give the "
            "simulator a space that has room for all that it shows"
        )


def _joined(layers: list[Layer], parts: list[Tensor]) -> Tensor:
    return chain(torch.cat(parts, -1), layers)


def _side_by_side(parameters: list[torch.nn.Parameter]) -> torch.nn.Parameter:
    """Moves parameters, and their gradients, into one long tensor [N] each: what is done to all is done at once."""
    flat = torch.nn.Parameter(torch.cat([p.detach().flatten() for p in parameters]))
    flat.grad = torch.zeros_like(flat)
    sizes = [p.numel() for p in parameters]
    for p, own, grad in zip(parameters, flat.detach().split(sizes), flat.grad.split(sizes), strict=True):
        p.data, p.grad = own.view_as(p), grad.view_as(p)
    return flat


class Run:
    """A model in training: its optimisers, its averaged weights, and where it stands."""

    def __init__(self, model: WorldModel, episodes: Episodes, train: FitConfig, out: Path, recipe: str):
        self.model, self.episodes, self.train, self.out, self.recipe = model, episodes, train, out, recipe
        self.cpu_seconds = 0.0
        first = {"draft", "reward_head"}
        self.groups = [
            {name: p for name, p in model.named_parameters() if (name.split(".")[0] in first) == early}
            for early in (True, False)
        ]
        self.flat = [_side_by_side(list(group.values())) for group in self.groups]
        self.averages = [flat.detach().clone() for flat in self.flat]
        self.optimisers = [
            torch.optim.AdamW([flat], betas=(0.9, 0.99), weight_decay=train.weight_decay, fused=True)
            for flat in self.flat
        ]
        self.transitions = (episodes.index > 0).nonzero()[:, 0]
        # A window needs at least one step; one that would outlast its episode starts earlier where it can.
        room = episodes.left >= torch.minimum(torch.tensor(train.frames), episodes.index + episodes.left)
        self.windows = (room & (episodes.left > 0)).nonzero()[:, 0]
        self.generator = torch.Generator()
        self.scaled = replace(
            episodes, obs=model.scaling.obs(episodes.obs), action=model.scaling.action(episodes.action)
        )
        self.standing: dict[str, PreallocatedMLP | Callable[[list[Tensor]], Tensor]] = {}
        self.draft_cache: tuple[Tensor, Tensor] | None = None

    def update(self, step: int) -> dict[str, Tensor]:
        """One optimiser step; all it draws is a function of (seed, step)."""
        train = self.train
        self.generator.manual_seed((train.seed << 32) + step)
        early = step < train.draft_steps
        if step == train.draft_steps:
            self._freeze_draft()
        phase = 0 if early else 1
        done, length = (step, train.draft_steps) if early else (step - train.draft_steps, train.steps)
        optimiser, flat = self.optimisers[phase], self.flat[phase]
        losses = self._draft_losses() if early else self._memory_losses(self._chunk_length(step))
        assert flat.grad is not None
        flat.grad.zero_()
        self._backward(losses)
        flat.grad.mul_((1.0 / (flat.grad.norm() + 1e-6)).clamp_max(1.0))  # cut to length 1
        warm = min(1.0, (done + 1) / min(100, length))
        optimiser.param_groups[0]["lr"] = (
            (train.draft_lr if early else train.lr) * warm * (0.5 + 0.5 * math.cos(math.pi * done / length))
        )
        optimiser.step()
        decay = min(train.draft_ema if early else train.ema, (done + 1) / (done + 10))
        self.averages[phase].lerp_(flat.detach(), 1 - decay)
        return losses

    def _backward(self, losses: dict[str, Tensor]) -> None:
        total: Tensor = sum(losses.values())  # type: ignore[assignment]
        total.backward()
        for form in self.standing.values():
            if isinstance(form, PreallocatedMLP):
                form.backward()

    def _chunk_length(self, step: int) -> int:
        """Training takes 1, 1, half and all of the longest in turn: one checkpoint serves every chunk length."""
        longest = self.model.config.chunk
        return (1, 1, max(1, longest // 2), longest)[step % 4]

    def _draft_losses(self) -> dict[str, Tensor]:
        model, data = self.model, self.scaled
        rows = self.transitions[
            torch.randint(len(self.transitions), (self.train.draft_batch,), generator=self.generator)
        ]
        before, after = data.obs.index_select(0, rows - 1), data.obs.index_select(0, rows)
        action = data.action.index_select(0, rows)
        change = (after - before) / model.scaling.step_std
        reward_head = self._through("reward_head", [before, action, change, after])
        losses = self._reward_losses(reward_head, data.reward[rows], data.terminated[rows], torch.ones(len(rows)))
        if model.draft is not None:
            sees = [before, action]
            if model.draft.frames > 1:
                # Now and then what came before is kept back, since a dream may begin anywhere.
                known = (data.index[rows] > 1) & (torch.rand(len(rows), generator=self.generator) > 1 / 16)
                sees.append((before - data.obs[rows - 1 - known.long()]) / model.scaling.step_std)
            mean, log_var = model.draft.read(self._through("draft", sees))
            # What goes beyond a bound is cut off in a dream, so where the truth lies on the bound that is no error.
            # (Pendulum's velocity stops dead at its limit: without this the draft spends itself on that corner.)
            met = model.scaling.limit(before + model.scaling.step_std * mean) == after
            losses["draft"] = beta_nll(torch.where(met, change, mean), log_var, change)
        return losses

    def _through(self, name: str, parts: list[Tensor]) -> Tensor:
        """One of the first phase's nets; where it stands in compiled code, without a graph behind its output."""
        form = self.standing.get(name)
        if form is None:
            draft, reward_head = self.model.draft, self.model.reward_head
            layers = reward_head.chain() if name == "reward_head" or draft is None else draft.layers()
            library = single_thread_library("dense", self.flat[0])
            form = PreallocatedMLP(library, layers, len(parts[0])) if library else partial(_joined, layers)
            self.standing[name] = form
        return form.forward(parts) if isinstance(form, PreallocatedMLP) else form(parts)

    def _memory_losses(self, chunk: int) -> dict[str, Tensor]:
        train, model, g = self.train, self.model, self.generator
        at = self.windows[torch.randint(len(self.windows), (train.batch,), generator=g)]
        frames = train.frames // chunk * chunk
        obs, actions, reward, ended, valid = self.scaled.windows(at, frames + 1)
        layout = Layout(frames + 1, tuple(range(1, frames + 1, chunk)), chunk)
        # From here on the frames after the first are grouped in chunks: [B,C,K,...]
        target, before, play, gain, end, weight = (
            x.unflatten(1, (-1, chunk))
            for x in (obs[:, 1:], obs[:, :-1], actions[:, 1:], reward[:, 1:], ended[:, 1:], valid[:, 1:].float())
        )
        with torch.no_grad():
            predict_draft = self._guess(at, before[:, :, 0], play)
            clean = (target - predict_draft.mean) / predict_draft.scale
            # Half of the chunks practise the mean dream: all noise, but from zero, the noise's mean.
            mean = torch.rand(*clean.shape[:2], 1, 1, generator=g) < 0.5
            s = shift(torch.rand(mean.shape, generator=g), shift_factor(chunk, model.config.tokens)).masked_fill(
                mean, 1.0
            )
            eps = torch.randn(clean.shape, generator=g).masked_fill(mean, 0.0)
            z = corrupt(clean, eps, s)
        first = torch.zeros(obs.shape[:2], dtype=torch.bool)
        first[:, 0] = True
        residual, features, _ = model.refine(layout, z, s, predict_draft, play, (obs, actions, first))
        flow = (velocity_loss(residual, clean, s).mean(-1) * weight).sum() / weight.sum()
        with torch.no_grad():
            base = model.predict_reward(before, play, target, None)
        reward_head = base + model.memory_reward_head(features)
        return {"flow": flow, **self._reward_losses(reward_head, gain, end, weight)}

    def _guess(self, at: Tensor, start: Tensor, play: Tensor) -> DraftPrediction:
        """The draft's of the chunks of the windows at frames ``at`` [B], from ``start`` [B,C,O], playing [B,C,K,A]."""
        model, chunk = self.model, play.shape[2]
        if model.draft is None:
            return model.predict_draft(start, play)
        if self.draft_cache is None:
            self.draft_cache = self._predict_all(True)
            self.unled = self._predict_all(False) if model.config.draft_frames > 1 else self.draft_cache
        rows = torch.minimum(at[:, None] + chunk * torch.arange(play.shape[1]), (at + self.episodes.left[at])[:, None])
        mean, std = (x[rows, :chunk] for x in self.draft_cache)
        if model.config.draft_frames > 1:  # of what came before a window a dream knows nothing
            mean[:, 0], std[:, 0] = (x[at, :chunk] for x in self.unled)
        return model.draft_prediction(start, mean, std)

    @torch.no_grad()
    def _predict_all(self, led: bool) -> tuple[Tensor, Tensor]:
        """What the draft, which is frozen by now, says from every frame on -> mean, std [F,K,O].

        Told once, it need not be asked in every update. led: whether it knows the frame before.
        """
        model, data = self.model, self.scaled
        assert model.draft is not None
        told = []
        for at in torch.arange(len(data.obs)).split(4096):
            rows = torch.minimum(at[:, None] + 1 + torch.arange(model.config.chunk), (at + data.left[at])[:, None])
            start = data.obs[at]
            before = data.obs[at - (data.index[at] > 0).long()] if led else start
            told.append(model.draft.unroll(start, data.action[rows], before, model.scaling))
        means, variances = (torch.cat(x) for x in zip(*told, strict=True))
        return means, variances.sqrt_()

    def _reward_losses(self, reward_head: Tensor, reward: Tensor, ended: Tensor, weight: Tensor) -> dict[str, Tensor]:
        scaling = self.model.scaling
        wrong = (reward_head[..., 0] - (reward - scaling.reward_mean) / scaling.reward_std).square()
        losses = {"reward": (wrong * weight).sum() / weight.sum()}
        if self.model.terminates:
            cross = F.binary_cross_entropy_with_logits(reward_head[..., 1], ended.float(), reduction="none")
            losses["terminated"] = (cross * weight).sum() / weight.sum()
        return losses

    @torch.no_grad()
    def _freeze_draft(self) -> None:
        """End of the draft's training: its averaged weights stay, and what it gets wrong becomes the flow's unit."""
        model, data, k = self.model, self.episodes, self.model.config.chunk
        self._settle(0)
        self.standing.clear()
        g = torch.Generator().manual_seed(self.train.seed)
        at = self.windows[torch.randint(len(self.windows), (4096,), generator=g)]
        obs, actions, _, _, valid = data.windows(at, k + 1)
        obs = model.scaling.obs(obs)
        earlier = model.scaling.obs(data.obs[at - (data.index[at] > 0).long()])
        wrong = (
            obs[:, 1:] - model.predict_draft(obs[:, 0], model.scaling.action(actions[:, 1:]), earlier).mean
        ).square()
        weight = valid[:, 1:, None].float()
        model.draft_error.copy_(((wrong * weight).sum(0) / weight.sum(0)).sqrt().clamp_min(1e-5))

    @torch.no_grad()
    def _settle(self, phase: int) -> None:
        self.flat[phase].copy_(self.averages[phase])

    def finish(self) -> None:
        """Put the averaged weights in the place of the last ones."""
        if self.train.steps == 0:
            self._freeze_draft()
        self._settle(1)
        for group in self.groups:
            for p in group.values():  # each its own memory again, or whoever copies one copies all
                p.data, p.grad = p.data.clone(), None

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def save(self, step: int, cpu_seconds: float) -> None:
        tensors = {f"model/{name}": t for name, t in self.model.state_dict().items()}
        for phase, (flat, optimiser) in enumerate(zip(self.flat, self.optimisers, strict=True)):
            tensors[f"average/{phase}"] = self.averages[phase]
            tensors |= {f"optimiser/{key}/{phase}": t for key, t in optimiser.state.get(flat, {}).items()}
        tensors["recipe"] = torch.frombuffer(bytearray(self.recipe.encode()), dtype=torch.uint8)
        tensors["step"], tensors["cpu"] = torch.tensor(step), torch.tensor(self.cpu_seconds + cpu_seconds)
        save_atomically(self.out / "training.safetensors", tensors)

    def resume(self) -> int:
        """Go on from the checkpoint in the folder, if there is one -> the step to go on from."""
        path = self.out / "training.safetensors"
        if not path.exists():
            return 0
        try:
            tensors: dict[str, Any] = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); delete it to start afresh") from error
        was = bytes(tensors["recipe"].numpy()).decode()
        if was != self.recipe:
            raise ValueError(f"{path} belongs to another run: choose another folder, or delete it to start afresh")
        self.model.load_state_dict({name[6:]: t for name, t in tensors.items() if name.startswith("model/")})
        for phase, (flat, optimiser) in enumerate(zip(self.flat, self.optimisers, strict=True)):
            self.averages[phase] = tensors[f"average/{phase}"]
            state = {key: tensors.get(f"optimiser/{key}/{phase}") for key in ("step", "exp_avg", "exp_avg_sq")}
            if state["step"] is not None:
                optimiser.state[flat] = state
        self.cpu_seconds = float(tensors["cpu"])
        return int(tensors["step"])
