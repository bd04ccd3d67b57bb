"""Trust: how wrong a dream may be by now, as a bound that holds with a stated confidence.

A dream's error after h steps without evidence is the RMS over dimensions of (dreamed - real) / unit. Its bound is
q_h(confidence) * u: u is the dream's own doubt, which grows along its path by a small learned rule, and q_h the
quantile of error / u among held-out dreams of h steps (split conformal prediction, arXiv 2107.07511). So the rule only
decides how sharp the bound is; that it holds comes from the quantiles, for dreams like those it was calibrated on: a
new draw of the same kind of episodes and actions. Windows of one episode count as draws of their own, though they
aren't quite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

LEVELS = torch.arange(100, 200) / 200  # 0.5 to 0.995
WIDTH = 48  # of the rule's hidden layers
FASTEST = 0.5  # logarithm of the most by which a doubt grows, or shrinks, in a step
FULL = 2.0  # where a doubt stops growing: two states drawn apart from each other are about 1.4 apart
QUANTILE = 0.9  # what the rule is taught to be: the bound that most will ask for


@dataclass(frozen=True)
class Trust:
    """The rule v = growth(o, a) * u + injection(o, a), u' = v / (1 + v / FULL), and the quantiles."""

    model: Tensor  # uint8 [n], the fingerprint of the weights that it was calibrated with
    mean: Tensor  # [O], [A] and [O], [A]: the rule's inputs in units of their own
    std: Tensor
    action_mean: Tensor
    action_std: Tensor
    enter: Tensor  # [O+A+1,D]
    middle: Tensor  # [D+1,D]
    leave: Tensor  # [D+1,2]
    first: Tensor  # [2], log of the doubt before the first step: after one real frame, and after more
    quantiles: Tensor  # [Q,H] of error / u; infinite where too few dreams lived that long
    counts: Tensor  # int64 [H], how many did

    @property
    def horizon(self) -> int:
        """H, the longest dream that was calibrated."""
        return self.quantiles.shape[1]

    def expect(self, confidence: float) -> None:
        """Raises ValueError for a ``confidence`` that this calibration can't give even after one step."""
        if not 0.5 <= confidence <= 0.995:
            raise ValueError(f"confidence must be 0.5 to 0.995, got {confidence}")
        if not bool(self.quantiles[self._level(confidence), 0].isfinite()):
            raise ValueError(
                f"confidence {confidence} needs more than the {int(self.counts[0])} dreams that this model was "
                "calibrated on: ask for less, or kairos calibrate with more episodes"
            )

    def begin(self, batch: int, seen: int) -> Tensor:
        """The doubt of B dreams that have just seen ``seen`` real frames -> [B]."""
        return self.first[min(seen, 2) - 1].exp().expand(batch)

    def follow(self, doubt: Tensor, before: Tensor, actions: Tensor) -> Tensor:
        """The doubt [B] after each of K steps that began at ``before`` [B,K,O] and played [B,K,A] -> [B,K]."""
        growth, injection = self._rule(before, actions)
        after = []
        for k in range(actions.shape[1]):
            doubt = growth[:, k] * doubt + injection[:, k]
            doubt = doubt / (1 + doubt / FULL)
            after.append(doubt)
        return torch.stack(after, 1)

    def bound(self, doubt: Tensor, steps: Tensor, confidence: float) -> Tensor:
        """What the error after ``steps`` (int64, 1 is the first) won't pass, of dreams with that ``doubt``: all [...].

        Infinite beyond ``horizon``.
        """
        h = (steps - 1).clamp(0, self.horizon - 1)
        bound = self.quantiles[self._level(confidence)].to(doubt.device)[h] * doubt
        return torch.where(steps > self.horizon, torch.inf, bound)

    def _level(self, confidence: float) -> int:
        """The first level that is at least ``confidence``."""
        return min(math.ceil(200 * confidence - 1e-6) - 100, len(LEVELS) - 1)

    def _rule(self, before: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        seen = torch.cat([(before - self.mean) / self.std, (actions - self.action_mean) / self.action_std], -1)
        x = torch.tanh(_affine(seen.clamp(-8, 8), self.enter))
        x = _affine(torch.tanh(_affine(x, self.middle)), self.leave)
        return torch.exp(FASTEST * torch.tanh(x[..., 0])), torch.exp(-6 + 8 * torch.tanh(x[..., 1] / 4))

    def to(self, device: torch.device) -> Trust:
        """The same on another device."""
        return Trust(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def tensors(self) -> dict[str, Tensor]:
        """All of it, as a checkpoint keeps it."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def load(cls, path: Path) -> Trust:
        """Raises ValueError where the file is damaged."""
        try:
            found = cls(**load_file(path))
            if not all(bool(t.isfinite().all()) for name, t in found.tensors().items() if name != "quantiles"):
                raise ValueError("it holds numbers that are not finite")
        except Exception as error:
            raise ValueError(f"{path} is damaged or from another version: {error}") from error
        return found


def fit_trust(
    fingerprint: str, before: Tensor, actions: Tensor, error: Tensor, seen: Tensor, *, seed: int = 0, updates: int = 600
) -> Trust:
    """Learn the rule from a third of W dreams of H steps, and take the quantiles from the others -> Trust.

    before: [W,H,O], the observation that each step began at, the first one real, the others dreamed; actions: [W,H,A];
    error: [W,H], NaN where the real episode had ended; seen: int64 [W], real frames before. Windows of one episode
    must stand together: the first third teaches.
    """
    cut = len(error) // 3
    generator = torch.Generator().manual_seed(seed)
    trust = _untaught(fingerprint, before, actions, error, generator)
    _teach(trust, before[:cut], actions[:cut], error[:cut], seen[:cut], generator, updates)
    with torch.no_grad():
        doubt = trust.follow(trust.first[seen.clamp_max(2) - 1].exp(), before, actions)
    quantiles, counts = conformal(error[cut:] / doubt[cut:])
    kept = {name: t.detach() for name, t in trust.tensors().items()}
    return Trust(**{**kept, "quantiles": quantiles, "counts": counts})


def conformal(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [N,H], NaN where there is none -> their quantiles at LEVELS, [Q,H], and how many scores there are, [H].

    The n scores' k-th smallest with k = ceil((n + 1) level): a fresh score lies at or below it with a chance of at
    least that level. Infinite where k > n.
    """
    counts = (~scores.isnan()).sum(0)
    ordered = scores.nan_to_num(torch.inf, torch.inf).sort(0).values
    k = torch.ceil((counts + 1) * LEVELS[:, None] - 1e-6).long()  # [Q,H]
    found = ordered.gather(0, (k - 1).clamp(0, len(scores) - 1))
    return torch.where(k > counts, torch.inf, found), counts


def _untaught(fingerprint: str, before: Tensor, actions: Tensor, error: Tensor, generator: torch.Generator) -> Trust:
    flat, played = before.flatten(0, 1), actions.flatten(0, 1)
    flat = flat[flat.isfinite().all(-1)]
    inputs = flat.shape[1] + played.shape[1]
    begin = error[:, 0].nan_to_num(1.0, 1.0).clamp_min(1e-7).log().median()
    return Trust(
        torch.frombuffer(bytearray(fingerprint.encode()), dtype=torch.uint8),
        flat.mean(0),
        flat.std(0).clamp_min(1e-6),
        played.mean(0),
        played.std(0).clamp_min(1e-6),
        torch.randn(inputs + 1, WIDTH, generator=generator) / inputs**0.5,
        torch.randn(WIDTH + 1, WIDTH, generator=generator) / WIDTH**0.5,
        0.1 * torch.randn(WIDTH + 1, 2, generator=generator) / WIDTH**0.5,
        torch.stack([begin, begin]),
        torch.full((len(LEVELS), error.shape[1]), torch.inf),
        torch.zeros(error.shape[1], dtype=torch.int64),
    )


def _teach(
    trust: Trust, before: Tensor, actions: Tensor, error: Tensor, seen: Tensor, generator: torch.Generator, updates: int
) -> None:
    """Make the doubt after every step the 90% quantile of the error there: the pinball loss on logarithms."""
    learned = [trust.enter, trust.middle, trust.leave, trust.first]
    for tensor in learned:
        tensor.requires_grad_()
    optimiser = torch.optim.AdamW(learned, lr=5e-3, weight_decay=1e-4)
    valid = ~error.isnan()
    target = error.nan_to_num(1.0, 1e3).clamp(1e-8, 1e3).log()
    before = before.nan_to_num(0.0, 0.0, 0.0)
    for update in range(updates):
        optimiser.param_groups[0]["lr"] = 5e-3 * (0.5 + 0.5 * math.cos(math.pi * update / updates))
        rows = torch.randint(len(error), (128,), generator=generator)
        doubt = trust.follow(trust.first[seen[rows].clamp_max(2) - 1].exp(), before[rows], actions[rows])
        short = target[rows] - doubt.clamp_min(1e-12).log()
        loss = torch.maximum(QUANTILE * short, (QUANTILE - 1) * short)
        loss = (loss * valid[rows]).sum() / valid[rows].sum().clamp_min(1)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimiser.step()
    for tensor in learned:
        tensor.requires_grad_(False)


def _affine(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight[:-1].mT, weight[-1])
