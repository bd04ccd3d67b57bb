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
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

LEVELS = torch.arange(100, 200) / 200  # 0.5 to 0.995
WIDTH = 32  # of the rule's hidden layers
# Logarithms of growth and injection lie this far around these: a doubt grows or shrinks by e^0.5 in a step at most.
CENTRE, REACH = torch.tensor([0.0, -8.0]), torch.tensor([0.5, 7.5])
FULL = 2.0  # where a doubt stops growing: two states drawn apart from each other are about 1.4 apart
QUANTILE = 0.9  # what the rule is taught to be: the bound that most will ask for


@dataclass(frozen=True)
class Trust:
    """The rule v = growth(o, a) * u + injection(o, a), u' = v / (1 + v / FULL), and the quantiles."""

    model: Tensor  # uint8 [n], the fingerprint of the weights that it was calibrated with
    enter: Tensor  # [O+A,D], of raw observations and actions
    enter_bias: Tensor  # [D]
    middle: Tensor  # [D,D]
    middle_bias: Tensor
    leave: Tensor  # [D,2]
    leave_bias: Tensor
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
        if not bool(self.widths(confidence)[0].isfinite()):
            raise ValueError(
                f"confidence {confidence} needs more than the {int(self.counts[0])} dreams that this model was "
                "calibrated on: ask for less, or kairos calibrate with more episodes"
            )

    def begin(self, batch: int, seen: int) -> Tensor:
        """The doubt of B dreams that have just seen ``seen`` real frames -> [B]."""
        return self.first[min(seen, 2) - 1].exp().expand(batch)

    def follow(self, doubt: Tensor, before: Tensor, actions: Tensor) -> Tensor:
        """The doubt [B] after each of K steps that began at ``before`` [B,K,O] and played [B,K,A] -> [B,K]."""
        growth, injection = self._rule(torch.cat([before, actions], -1)).unbind(-1)
        after = []
        for k in range(actions.shape[1]):
            doubt = torch.addcmul(injection[:, k], growth[:, k], doubt)
            doubt = doubt / (1 + doubt / FULL)
            after.append(doubt)
        return torch.stack(after, 1)

    def widths(self, confidence: float) -> Tensor:
        """By what the doubt is multiplied to bound the error, after each step -> [H+1], the last for all beyond H."""
        level = min(math.ceil(200 * confidence - 1e-6) - 100, len(LEVELS) - 1)  # the first that is enough
        return torch.cat([self.quantiles[level], torch.full((1,), torch.inf)])

    def _rule(self, seen: Tensor) -> Tensor:
        """Observations and actions [...,O+A] -> growth and injection [...,2]."""
        # Few and large operations: this runs at every step of an env.
        x = torch.addmm(self.enter_bias, seen.flatten(0, -2), self.enter).tanh_()
        x = torch.addmm(self.middle_bias, x, self.middle).tanh_()
        x = torch.addmm(self.leave_bias, x, self.leave).tanh_()
        return torch.addcmul(CENTRE, REACH, x).exp_().view(*seen.shape[:-1], 2)

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
    cut, inputs = len(error) // 3, torch.cat([before[:, 0], actions[:, 0]], -1)
    mean, std = inputs.mean(0), inputs.std(0)  # of real frames: dreams may have gone anywhere
    unit = torch.where(std > 1e-5, 1 / std.clamp_min(1e-5), 0.0)  # what never moves says nothing
    generator = torch.Generator().manual_seed(seed)
    trust = _untaught(fingerprint, len(mean), error, generator)
    o = before.shape[-1]
    scaled = (before[:cut] - mean[:o]) * unit[:o], (actions[:cut] - mean[o:]) * unit[o:]
    _teach(trust, *scaled, error[:cut], seen[:cut], generator, updates)
    # From here on it takes raw numbers: their units are a part of the first layer.
    enter = unit[:, None] * trust.enter
    trust = replace(trust, enter=enter, enter_bias=trust.enter_bias - mean @ enter)
    with torch.no_grad():
        doubt = trust.follow(trust.first[seen.clamp_max(2) - 1].exp(), before, actions)
    quantiles, counts = conformal(error[cut:] / doubt[cut:])
    return replace(trust, quantiles=quantiles, counts=counts)


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


def _untaught(fingerprint: str, inputs: int, error: Tensor, generator: torch.Generator) -> Trust:
    begin = error[:, 0].nan_to_num(1.0, 1.0).clamp_min(1e-7).log().median()
    return Trust(
        torch.frombuffer(bytearray(fingerprint.encode()), dtype=torch.uint8),
        torch.randn(inputs, WIDTH, generator=generator) / inputs**0.5,
        torch.zeros(WIDTH),
        torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5,
        torch.zeros(WIDTH),
        0.1 * torch.randn(WIDTH, 2, generator=generator) / WIDTH**0.5,
        torch.zeros(2),
        torch.stack([begin, begin]),
        torch.full((len(LEVELS), error.shape[1]), torch.inf),
        torch.zeros(error.shape[1], dtype=torch.int64),
    )


def _teach(
    trust: Trust, before: Tensor, actions: Tensor, error: Tensor, seen: Tensor, generator: torch.Generator, updates: int
) -> None:
    """Make the doubt after every step the 90% quantile of the error there: the pinball loss on logarithms."""
    learned = [t for name, t in trust.tensors().items() if name not in ("model", "quantiles", "counts")]
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
