"""A bound on a dream's error, which holds with a stated confidence (split conformal prediction, arXiv 2107.07511).

The error of a dream after h steps without evidence is the RMS over dimensions of (dreamed - real) / unit. Its bound is
q_h(confidence) * u. The uncertainty u grows along the dream's path by a small learned network; q_h is the quantile of
error / u among held-out dreams of h steps. The network decides only how sharp the bound is. That it holds follows from
the quantiles, for dreams like those they were taken from: new draws of the same kind of episodes and actions. (Windows
of one episode count as independent draws, which they are not quite.)

The network's inputs are a step's observation and action, and their distance from the nearest of some steps that the
model was trained on. Without that distance it would learn what the calibration's policies do, and underestimate the
error where no data are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

LEVELS = torch.arange(100, 200) / 200  # 0.5 to 0.995
HIDDEN = 32  # width of the network's hidden layers
REFERENCES = 256  # steps of the training data from which distances are measured
MIN_DISTANCE = 0.05  # smaller distances are mostly rounding
INPUT_NOISE = 0.3  # std, added to the inputs in training, so that the network doesn't memorise policies
INPUT_CLIP = 5.0  # std
MAX_UNCERTAINTY = 2.0  # two unrelated states are about 1.4 apart
QUANTILE = 0.9  # of the error, which the network learns to predict: the usual confidence


@dataclass(frozen=True)
class ConformalBound:
    """The uncertainty u' = min(growth * u + injection, MAX_UNCERTAINTY), and the quantiles of error / u."""

    model: Tensor  # uint8 [n], the fingerprint of the weights that it was calibrated with
    mean: Tensor  # [O+A], of the observations and actions that the model was trained on
    unit: Tensor  # [O+A], 1 / their std; 0 for dimensions that are constant
    reference: Tensor  # [R,O+A], some of them, in these units
    in_weight: Tensor  # [O+A+1,D]
    in_bias: Tensor  # [D]
    hidden_weight: Tensor  # [D,D]
    hidden_bias: Tensor
    out_weight: Tensor  # [D,2]
    out_bias: Tensor
    initial_log: Tensor  # [2], log of u before the first step: after one real frame, and after more
    quantiles: Tensor  # [2,Q,H] of error / u, dreamed step by step and in the longest chunks; infinite where too few
    counts: Tensor  # int64 [H], how many dreams lasted that long

    # The logarithms of growth and injection lie within centre +- reach, so u changes by at most e^0.5 a step.
    centre: ClassVar[Tensor] = torch.tensor([0.0, -8.0])
    reach: ClassVar[Tensor] = torch.tensor([0.5, 7.5])

    @property
    def horizon(self) -> int:
        """H, the length in steps of the longest dream that was calibrated."""
        return self.quantiles.shape[-1]

    def check_confidence(self, confidence: float) -> None:
        """Raises ValueError for a ``confidence`` that this calibration has too few dreams for, even after one step."""
        if not 0.5 <= confidence <= 0.995:
            raise ValueError(f"confidence must be 0.5 to 0.995, got {confidence}")
        if not bool(self.quantile(confidence)[0].isfinite()):
            raise ValueError(
                f"confidence {confidence} needs more than the {int(self.counts[0])} dreams that this model was "
                "calibrated on: ask for less, or kairos calibrate with more episodes"
            )

    def initial(self, seen: Tensor) -> Tensor:
        """The uncertainty of B dreams that have just observed ``seen`` real frames, int64 [B] -> [B]."""
        return self.initial_log[seen.clamp_max(2) - 1].exp()

    def propagate(self, uncertainty: Any, before: Any, actions: Any) -> Any:
        """The uncertainty after each of K steps from ``before`` [B,K,O] with actions [B,K,A] -> [B,K].

        Arguments are all tensors, or all numpy arrays, which is faster for few dreams.
        """
        xp, own = (torch, self) if isinstance(uncertainty, Tensor) else (np, self._in_numpy)
        return _grow(xp, own, uncertainty, _inputs(xp, own, xp.concatenate([before, actions], -1)))

    def distance(self, before: Tensor, actions: Tensor) -> Tensor:
        """The distance of steps from ``before`` [B,K,O] with actions [B,K,A] to the nearest reference step -> [B,K].

        The RMS over observations and actions, each over its std in the training data.
        """
        raw = torch.cat([before, actions], -1)
        return (_normalise(torch, self, raw)[1].clamp_min(0) / raw.shape[-1]).sqrt().view(raw.shape[:-1])

    def transfer(self, fingerprint: str, reference: Tensor, *, seed: int = 0) -> ConformalBound:
        """The same network for another model, trained on the steps ``reference`` [S,O+A] -> ConformalBound.

        The quantiles hold for that model as long as it is no worse than the one they were measured with.
        """
        rows = torch.randperm(len(reference), generator=torch.Generator().manual_seed(seed))[:REFERENCES]
        return replace(self, model=_as_bytes(fingerprint), reference=(reference[rows] - self.mean) * self.unit)

    @cached_property
    def toward(self) -> Tensor:
        """-2 ``reference``^T [O+A,R]: |x - r|^2 = |x|^2 + x . toward + square."""
        return (-2 * self.reference.T).contiguous()

    @cached_property
    def square(self) -> Tensor:
        """[R], the squared length of ``reference``."""
        return self.reference.square().sum(-1)

    @cached_property
    def _in_numpy(self) -> Any:
        derived = {"toward": self.toward, "square": self.square, "centre": self.centre, "reach": self.reach}
        tensors = self.tensors() | derived
        return SimpleNamespace(**{name: t.numpy() for name, t in tensors.items()})

    def quantile(self, confidence: float, chunk: int = 1) -> Tensor:
        """The factor of u that bounds the error after each step -> [H+1]; the last is infinite: no bound beyond H.

        chunk: how many steps are dreamed at once.
        """
        level = min(math.ceil(200 * confidence - 1e-6) - 100, len(LEVELS) - 1)  # the lowest that suffices
        single, longest = self.quantiles[:, level]
        return torch.cat([single if chunk == 1 else torch.maximum(single, longest), torch.full((1,), torch.inf)])

    def tensors(self) -> dict[str, Tensor]:
        """All fields by name, as a checkpoint stores them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def load(cls, path: Path) -> ConformalBound:
        """Read a safetensors file. Raises ValueError where it is damaged."""
        try:
            bound = cls(**load_file(path))
            if not all(bool(t.isfinite().all()) for name, t in bound.tensors().items() if name != "quantiles"):
                raise ValueError("it holds numbers that are not finite")
        except Exception as error:
            raise ValueError(f"{path} is damaged or from another version: {error}") from error
        return bound


# These three run at every step of an env, so they use few operations; ``xp`` is torch or numpy.


def _normalise(xp: Any, own: Any, raw: Any) -> tuple[Any, Any]:
    """Observations and actions [B,K,O+A] -> the same over their std, x [B*K,O+A], and min |x - reference|^2 [B*K]."""
    x = ((raw - own.mean) * own.unit).reshape(-1, raw.shape[-1])
    return x, xp.amin(x @ own.toward + own.square, 1) + (x * x).sum(-1)


def _inputs(xp: Any, own: Any, raw: Any) -> Any:
    """Observations and actions [B,K,O+A] -> the network's inputs, [B,K,O+A+1]."""
    x, square = _normalise(xp, own, raw)
    log_distance = 0.5 * xp.log(square.clip(MIN_DISTANCE**2, None))[:, None]
    return xp.concatenate([x, log_distance], 1).clip(-INPUT_CLIP, INPUT_CLIP).reshape(*raw.shape[:-1], -1)


def _grow(xp: Any, own: Any, uncertainty: Any, inputs: Any) -> Any:
    """The uncertainty before K steps [B], and their inputs [B,K,O+A+1] -> after each step [B,K]."""
    x = xp.tanh(inputs @ own.in_weight + own.in_bias)
    x = xp.tanh(x @ own.hidden_weight + own.hidden_bias)
    rates = xp.exp(own.centre + own.reach * xp.tanh(x @ own.out_weight + own.out_bias))
    after = []
    for k in range(inputs.shape[1]):
        uncertainty = (rates[:, k, 0] * uncertainty + rates[:, k, 1]).clip(None, MAX_UNCERTAINTY)
        after.append(uncertainty)
    return after[0][:, None] if len(after) == 1 else xp.stack(after, 1)


class DreamErrors(NamedTuple):
    """W dreams of H steps and their errors, as ``ConformalBound`` is fitted to them."""

    before: Tensor  # [W,H,O] the observation before each step: the first one real, the others dreamed
    actions: Tensor  # [W,H,A]
    error: Tensor  # [W,H] NaN where the real episode had ended, infinite where the dream is not finite
    seen: Tensor  # int64 [W], real frames observed before the dream

    def part(self, rows: Tensor | slice) -> DreamErrors:
        """The dreams at ``rows``."""
        return DreamErrors(*(x[rows] for x in self))

    def uncertainty(self, trust: ConformalBound) -> Tensor:
        """The uncertainty along each dream -> [W,H]."""
        return trust.propagate(trust.initial(self.seen), self.before, self.actions)

    def bound(self, trust: ConformalBound, confidence: float, chunk: int = 1) -> Tensor:
        """The bound of each dream after each step -> [W,H]."""
        steps = torch.arange(self.error.shape[1]).clamp_max(trust.horizon)
        return self.uncertainty(trust) * trust.quantile(confidence, chunk)[steps]

    def scores(self, trust: ConformalBound) -> Tensor:
        """Error over uncertainty -> [W,H]; NaN where the error is."""
        score = (self.error / self.uncertainty(trust)).nan_to_num(torch.inf, torch.inf)
        return torch.where(self.error.isnan(), torch.nan, score)


def fit_bound(
    fingerprint: str,
    reference: Tensor,
    teaching: DreamErrors,
    single: DreamErrors,
    longest: DreamErrors,
    *,
    seed: int = 0,
    updates: int = 600,
) -> ConformalBound:
    """Train the network on the dreams ``teaching``, and take the quantiles from others -> ConformalBound.

    fingerprint: of the model that dreamed. reference: [S,O+A], the steps that it was trained on. single, longest:
    dreams step by step, and in the longest chunks.
    """
    generator = torch.Generator().manual_seed(seed)
    trust = _initial_bound(fingerprint, reference, teaching.error, generator)
    inputs = _inputs(torch, trust, torch.cat([teaching.before, teaching.actions], -1).nan_to_num(0.0, 1e6, -1e6))
    _train_growth(trust, inputs, teaching.error, teaching.seen, generator, updates)
    (quantiles, counts), (chunked, _) = (conformal(dreams.scores(trust)) for dreams in (single, longest))
    return replace(trust, quantiles=torch.stack([quantiles, chunked]), counts=counts)


def conformal(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [N,H], NaN where there is none -> their quantiles at LEVELS, [Q,H], and how many scores there are, [H].

    A quantile is the k-th smallest of n scores, k = ceil((n + 1) level): with a probability of at least that level a
    new score lies at or below it (arXiv 2107.07511). Infinite where k > n.
    """
    counts = (~scores.isnan()).sum(0)
    ordered = scores.nan_to_num(torch.inf, torch.inf).sort(0).values
    k = torch.ceil((counts + 1) * LEVELS[:, None] - 1e-6).long()  # [Q,H]
    quantiles = ordered.gather(0, (k - 1).clamp(0, len(scores) - 1))
    return torch.where(k > counts, torch.inf, quantiles), counts


def _as_bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _initial_bound(fingerprint: str, reference: Tensor, error: Tensor, generator: torch.Generator) -> ConformalBound:
    initial = error[:, 0].nan_to_num(1.0, 1.0).clamp_min(1e-7).log().median()
    mean, std, inputs = reference.mean(0), reference.std(0), reference.shape[1]
    unit = torch.where(std > 1e-5, 1 / std.clamp_min(1e-5), 0.0)
    rows = torch.randperm(len(reference), generator=generator)[:REFERENCES]
    return ConformalBound(
        _as_bytes(fingerprint),
        mean,
        unit,
        (reference[rows] - mean) * unit,
        torch.randn(inputs + 1, HIDDEN, generator=generator) / (inputs + 1) ** 0.5,
        torch.zeros(HIDDEN),
        torch.randn(HIDDEN, HIDDEN, generator=generator) / HIDDEN**0.5,
        torch.zeros(HIDDEN),
        0.1 * torch.randn(HIDDEN, 2, generator=generator) / HIDDEN**0.5,
        torch.zeros(2),
        torch.stack([initial, initial]),
        torch.full((2, len(LEVELS), error.shape[1]), torch.inf),
        torch.zeros(error.shape[1], dtype=torch.int64),
    )


def _train_growth(
    trust: ConformalBound, inputs: Tensor, error: Tensor, seen: Tensor, generator: torch.Generator, updates: int
) -> None:
    """Train u after every step to be the 90% quantile of the error: the pinball loss of their logarithms."""
    fixed = ("model", "mean", "unit", "reference", "quantiles", "counts")
    learned = [t for name, t in trust.tensors().items() if name not in fixed]
    for tensor in learned:
        tensor.requires_grad_()
    optimiser = torch.optim.AdamW(learned, lr=5e-3, weight_decay=1e-4)
    valid = ~error.isnan()
    target = error.nan_to_num(1.0, 1e3).clamp(1e-8, 1e3).log()
    for update in range(updates):
        optimiser.param_groups[0]["lr"] = 5e-3 * (0.5 + 0.5 * math.cos(math.pi * update / updates))
        rows = torch.randint(len(error), (128,), generator=generator)
        noise = INPUT_NOISE * torch.randn(len(rows), *inputs.shape[1:], generator=generator)
        uncertainty = _grow(torch, trust, trust.initial(seen[rows]), inputs[rows] + noise)
        residual = target[rows] - uncertainty.clamp_min(1e-12).log()
        loss = torch.maximum(QUANTILE * residual, (QUANTILE - 1) * residual)
        loss = (loss * valid[rows]).sum() / valid[rows].sum().clamp_min(1)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimiser.step()
    for tensor in learned:
        tensor.requires_grad_(False)
