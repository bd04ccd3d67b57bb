"""Search: the state of one search for a plan, and the operations that planners share."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from gymnasium import spaces
from torch import Tensor

from planners.plan import Plan, SearchTrace
from planners.problem import Problem
from planners.scoring import Scores, score
from world_model.contract import Spec


class Search:
    """One search for a ``Problem``: the bounds, the start, each row's own noise, ``score``, and the best so far.

    Candidates may lie beyond the action bounds; their projection onto the bounds is dreamed, and becomes the plan. So a
    normal that is refit to the candidates can move beyond a bound, until most of its samples are projected onto it,
    where many control tasks have their optimum. With ``repeat``, a chunk's K steps share one action, and all sequences
    here have K=1 where the plan and the dynamics have K.
    """

    def __init__(self, problem: Problem, shape: tuple[int, int], *, repeat: bool = False):
        """shape: (H, K). Raises ValueError where the problem's parts don't fit each other."""
        self._start_time = time.perf_counter()
        self.problem, state, warm = problem, problem.state, problem.warm
        dynamics = problem.dynamics
        device = state.device
        low, high = bounds(dynamics.spec, device)
        self._chunk, self._repeat = shape[1], repeat
        expected = (state.batch, *shape, low.shape[0])
        if warm is None:
            self.mean = ((low + high) / 2).expand(expected)  # [B,H,K,A], to search around
        elif warm.actions.shape == expected:
            self.mean = warm.actions.to(low)
            if not ((self.mean >= low) & (self.mean <= high)).all():
                raise ValueError(
                    f"warm.actions must lie within {dynamics.spec.action_space}, got {self.mean.min()} to "
                    f"{self.mean.max()}"
                )
        else:
            raise ValueError(f"warm.actions must be [B,H,K,A] = {list(expected)}, got {list(warm.actions.shape)}")
        self.warm_candidates = self.mean[:, None][:, :0]  # [B,E,H,K,A], the elites of the warm plan; NaN: unknown
        if warm is not None and (elites := warm.elites) is not None:
            fits = elites.ndim == 5 and (elites.shape[0], *elites.shape[2:]) == expected
            if not fits or ((elites < low) | (elites > high)).any():
                raise ValueError(
                    f"warm.elites must be [B,E,H,K,A] with {list(expected)} but for E, within "
                    f"{dynamics.spec.action_space} or NaN, got {list(elites.shape)}"
                )
            self.warm_candidates = elites.to(low)
        if repeat:
            self.mean, self.warm_candidates = self.mean[..., :1, :], self.warm_candidates[..., :1, :]
        seeds = torch.as_tensor(problem.seed)
        if seeds.shape not in ((), (state.batch,)):
            raise ValueError(f"seed must be one int or int64 [B] with B={state.batch}, got shape {list(seeds.shape)}")
        self._generators = [torch.Generator(device).manual_seed(s) for s in seeds.expand(state.batch).tolist()]
        # Expanded to the candidates' shape: clamping to such bounds takes a fraction of the time.
        self.low, self.high = (bound.expand(self.mean.shape[1:]).contiguous() for bound in (low, high))  # [H,K,A]
        self._row = torch.arange(state.batch, device=device)
        self._rounds: list[tuple[Tensor, Scores]] = []  # candidates [B,N,H,K,A] and their scores [B,N]

    @property
    def half_range(self) -> Tensor:
        """[H,K,A], the unit in which planners state their noise, so that one default fits every action space."""
        return (self.high - self.low) / 2

    def score(self, samples: Tensor, *, gradients: bool = False) -> Scores:
        """Dream candidates [B,N,H,K,A] and record their scores."""
        actions = self._project(samples)
        scores = score(
            self.problem.dynamics,
            self.problem.state,
            actions,
            self.problem.objective,
            obs=self.problem.obs,
            futures=self.problem.keep_trace,
            gradients=gradients,
        )
        self._rounds.append((actions.detach(), scores.each(Tensor.detach)) if gradients else (actions, scores))
        return scores

    @property
    def best(self) -> Plan:
        """The best sequence ever dreamed for each row; of equals the first."""
        actions, round_best = [], []
        for candidates, scores in self._rounds:  # at the end, since right after a dream these operations are slow
            at = scores.best(1)
            actions.append(candidates[self._row, at[:, 0]])
            violation = None if scores.violation is None else scores.violation.gather(1, at)
            round_best.append(Scores(scores.value.gather(1, at), violation))
        joined = Scores.join(round_best, 1)
        best = self._row, joined.best(1)[:, 0]
        violation = None if joined.violation is None else joined.violation[best]
        return Plan(torch.stack(actions, 1)[best], joined.value[best], violation=violation)

    def elites(self, samples: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """``score`` samples -> the n best of each row [B,n,H,K,A], best first, and their returns [B,n]."""
        scores = self.score(samples)
        order = scores.best(n)
        return samples[self._row[:, None], order], scores.value.gather(1, order)

    def finalise(self, actions: Tensor) -> Plan:
        """The plan of actions [B,H,K,A], dreamed once more for its return.

        In rows where that isn't finite, or exceeds the limits by more than ``best`` does, ``best`` is the plan.
        """
        scores, best = self.score(actions[:, None]), self.best
        value, violation = scores.value[:, 0], None
        worse = ~value.isfinite()
        if scores.violation is not None and best.violation is not None:
            worse |= scores.violation[:, 0] > best.violation
            violation = torch.where(worse, best.violation, scores.violation[:, 0])
        actions = torch.where(worse[:, None, None, None], best.actions, self._project(actions))
        return Plan(actions, torch.where(worse, best.value, value), violation=violation)

    def finish(self, plan: Plan) -> Plan:
        """The plan with this search's statistics and, with ``keep_trace``, all its candidates."""
        candidates, scores = zip(*self._rounds, strict=True)
        return plan._replace(
            elites=None if plan.elites is None else self._project(plan.elites),
            evaluations=sum(actions.shape[1] for actions in candidates),
            seconds=time.perf_counter() - self._start_time,
            trace=SearchTrace(torch.cat(candidates, 1), Scores.join(scores, 1)) if self.problem.keep_trace else None,
        )

    def around(self, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        """Candidates mean + std * noise [B,N,H,K,A], the first without noise; in the first round ``with_warm``."""
        samples = torch.addcmul(mean[:, None], std[:, None], noise)
        samples[:, 0] = mean
        return samples if self._rounds else self.with_warm(samples)

    def with_warm(self, samples: Tensor) -> Tensor:
        """Samples [B,N,H,K,A], the last of them replaced by the warm plan's elites where these are known.

        The first sample stays.
        """
        warm = self.warm_candidates[:, max(0, 1 + self.warm_candidates.shape[1] - samples.shape[1]) :]
        if n := warm.shape[1]:
            samples[:, -n:] = torch.where(warm.isnan(), samples[:, -n:], warm)
        return samples

    def normal(self, n: int) -> Tensor:
        """Standard normal noise [B,n,H,K,A]; row b is drawn from generator b alone."""
        return self._draw(n, Tensor.normal_)

    def uniform(self, n: int) -> Tensor:
        """Noise uniform in [0,1), [B,n,H,K,A]; row b is drawn from generator b alone."""
        return self._draw(n, Tensor.uniform_)

    def _draw(self, n: int, fill: Callable[..., Tensor]) -> Tensor:
        noise = self.mean.new_empty(len(self._generators), n, *self.mean.shape[1:])
        for row, generator in zip(noise, self._generators, strict=True):
            fill(row, generator=generator)
        return noise

    def coloured(self, n: int, exponent: float) -> Tensor:
        """Normal noise [B,n,H,K,A] of unit variance; along the H*K steps its power at frequency f is ~ f**-exponent."""
        white = self.normal(n).flatten(2, 3)
        frequency = torch.fft.rfftfreq(white.shape[2], device=white.device)
        frequency[0] = frequency[1] if len(frequency) > 1 else 1.0
        weight = frequency ** (-exponent / 2)
        # In the two-sided spectrum each frequency counts twice, but the first, and the last of an even number of steps.
        power = torch.cat([weight, weight[1 : (white.shape[2] + 1) // 2]]).square().mean()
        spectrum = torch.fft.rfft(white, dim=2) * (weight / power.sqrt())[:, None]
        return torch.fft.irfft(spectrum, n=white.shape[2], dim=2).unflatten(2, self.mean.shape[1:3])

    def _project(self, actions: Tensor) -> Tensor:
        """Clip [...,H,K,A] to the bounds; with ``repeat``, expand the one action of a chunk to its K steps."""
        actions = actions.clamp(self.low, self.high)
        return actions.expand(*actions.shape[:-2], self._chunk, -1) if self._repeat else actions


def refit(elites: Tensor, values: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Fit a normal to the best candidates [B,E,H,K,A], whose returns are ``values`` [B,E] -> mean and std [B,H,K,A].

    Where some returns aren't finite, only elites with finite ones determine the mean (without any it stays ``mean``),
    but all determine the std, which would otherwise collapse around the first few.
    """
    average = elites.mean(1)
    std = (elites - average[:, None]).square_().mean(1).sqrt_()  # in a sixth of the time of Tensor.std
    finite = values.isfinite()
    if not finite.all():
        count = finite.sum(1)[:, None, None, None]
        total = torch.einsum("be,behka->bhka", finite.to(elites.dtype), elites)
        average = torch.where(count > 0, total / count, mean)
    return average, std


def bounds(spec: Spec, device: torch.device) -> tuple[Tensor, Tensor]:
    """The action bounds, low [A] and high [A], float32. Raises ValueError for infinite bounds or discrete actions."""
    if isinstance(spec.action_space, spaces.Discrete):
        raise ValueError(f"planners search among real numbers; {spec.action_space} has choices instead")
    if not spec.action_box.is_bounded():
        raise ValueError(
            f"planners sample within the action bounds, but {spec.action_box} has infinite ones: bound it first"
        )
    low, high = spec.action_bounds
    return torch.from_numpy(low).to(device), torch.from_numpy(high).to(device)
