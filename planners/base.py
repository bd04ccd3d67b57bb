"""What every planner shares: the plan, the protocol, and ``score``, the one place where candidates are dreamed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from world_model.contract import Dynamics, Spec
from world_model.state import LatentState

RewardFn = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``reward_fn(obs [...,O], action [...,A], next_obs [...,O]) -> reward [...]``, instead of the model's own."""

COST = "cost"
"""A state's tensor [B,K]: what the steps of its last chunk cost beside their reward, in dynamics that have such."""

# Dreamed side by side by one ``imagine`` call; more candidates take turns. That bounds the memory, and on a CPU keeps
# their states in its caches from one chunk to the next.
MAX_DREAMS = 256  # on a CPU, 64 times as many elsewhere


class Plan(NamedTuple):
    """An action sequence for each of B rows, and the return it was imagined to earn (-inf: not finite, or unknown)."""

    actions: Tensor  # [B,H,K,A], in the units of spec.action_space and within its bounds
    value: Tensor  # [B]
    elites: Tensor | None = None  # [B,E,H,K,A], good candidates, from planners that go on with them (NaN: unknown)

    def shifted(self, last: Tensor) -> Plan:
        """The plan one chunk later: the first chunk is gone, action ``last`` [A] fills the one that comes in.

        MPC fills in the middle of the bounds: on the toys it serves CEM 1 to 5% better than to hold the old last
        chunk, and makes no difference elsewhere.
        """

        def later(actions: Tensor) -> Tensor:
            return torch.cat([actions[..., 1:, :, :], last.expand_as(actions[..., :1, :, :])], dim=-3)

        elites = None if self.elites is None else later(self.elites)
        return Plan(later(self.actions), torch.full_like(self.value, -torch.inf), elites)

    def or_better(self, actions: Tensor, value: Tensor) -> Plan:
        """In each row these actions [B,H,K,A] where their value [B] is higher, else this plan's."""
        better = value > self.value
        return self._replace(
            actions=torch.where(better[:, None, None, None], actions, self.actions),
            value=torch.where(better, value, self.value),
        )


class Planner(Protocol):
    """Anything that turns a dreamed state into a plan. Holds settings only, never a state or a generator."""

    def plan(
        self,
        dynamics: Dynamics,
        state: LatentState,
        *,
        warm: Plan | None = None,
        seed: int | Tensor = 0,
        obs: Tensor | None = None,
        reward_fn: RewardFn | None = None,
    ) -> Plan:
        """Plan for each of the B rows of ``state``, independently -> Plan of actions [B,H,K,A].

        warm: a plan that starts now (``last_plan.shifted(...)``), to search around; None searches around the middle
        of the action bounds. seed: int64 [B], one for each row, or one int that every row uses. obs: [B,O], the present
        observation; needed with ``reward_fn`` only.

        A pure function of its arguments: row b of a batch is what row b alone gives with its own seed, up to the
        rounding of the dynamics. Candidates that are imagined to earn something non-finite are never preferred.
        Raises ValueError where the shapes don't fit the dynamics or the action space is unbounded.
        """
        ...


def score(
    dynamics: Dynamics,
    state: LatentState,
    candidates: Tensor,
    *,
    discount: float = 1.0,
    obs: Tensor | None = None,
    reward_fn: RewardFn | None = None,
) -> Tensor:
    """Dream every candidate [B,N,H,K,A] from its row of ``state`` -> returns [B,N].

    A return is the sum of discount**t times the reward of inner step t = 0..H*K-1, up to and including the step that
    terminates; a return that is not finite becomes -inf. With ``reward_fn``, rewards come from the predicted
    observations, beginning with ``obs`` [B,O], the present one. No gradients. Raises ValueError on shapes that don't
    fit.
    """
    with torch.no_grad():
        return returns(dynamics, state, candidates, discount=discount, obs=obs, reward_fn=reward_fn)


def returns(
    dynamics: Dynamics,
    state: LatentState,
    candidates: Tensor,
    *,
    discount: float,
    obs: Tensor | None,
    reward_fn: RewardFn | None,
) -> Tensor:
    """``score`` with the gradients that the dynamics pass on to the candidates."""
    actions_dim = dynamics.spec.action_box.shape[0]
    if candidates.ndim != 5 or candidates.shape[0] != state.batch or candidates.shape[-1] != actions_dim:
        raise ValueError(
            f"candidates must be [B,N,H,K,A] with B={state.batch} (the state's batch) and A={actions_dim}, "
            f"got {list(candidates.shape)}"
        )
    if not 1 <= candidates.shape[3] <= dynamics.spec.chunk:
        raise ValueError(f"candidates have chunks of K={candidates.shape[3]}; give 1 <= K <= {dynamics.spec.chunk}")
    if reward_fn is not None:
        expected = (state.batch, dynamics.spec.observation_box.shape[0])
        if obs is None or obs.shape != expected:
            got = "None" if obs is None else list(obs.shape)
            raise ValueError(f"with reward_fn, pass the present observations as obs {list(expected)}, got {got}")

    n, most = candidates.shape[1], MAX_DREAMS if candidates.device.type == "cpu" else 64 * MAX_DREAMS
    rows = torch.arange(state.batch, device=candidates.device).repeat_interleave(n)
    earned = [
        _dream(dynamics, state.select(at), actions, discount, None if obs is None else obs[at], reward_fn)
        for at, actions in zip(rows.split(most), candidates.flatten(0, 1).split(most), strict=True)
    ]
    return torch.cat(earned).view(-1, n)


def _dream(
    dynamics: Dynamics,
    state: LatentState,
    actions: Tensor,
    discount: float,
    obs: Tensor | None,
    reward_fn: RewardFn | None,
) -> Tensor:
    """Dream actions [R,H,K,A], one sequence for each row of ``state`` -> returns [R]."""
    rewards, ends = [], []
    for chunk in actions.unbind(1):
        state, imagined = dynamics.imagine(state, chunk, decode=reward_fn is not None)
        reward = imagined.reward
        if reward_fn is not None:
            if obs is None or imagined.obs is None:
                raise ValueError("reward_fn needs observations, but imagine(decode=True) gave None")
            before = torch.cat([obs[:, None], imagined.obs[:, :-1]], dim=1)
            reward, obs = reward_fn(before, chunk, imagined.obs), imagined.obs[:, -1]
            if reward.shape != imagined.reward.shape:
                raise ValueError(
                    f"reward_fn must drop the last dimension of its arguments: expected a reward of shape "
                    f"{list(imagined.reward.shape)}, got {list(reward.shape)}"
                )
            if COST in state.tensors:  # of which reward_fn knows nothing
                reward = reward - state[COST]
        rewards.append(reward)
        ends.append(imagined.terminated)
    reward, ended = torch.cat(rewards, dim=1), torch.cat(ends, dim=1)
    counts = ended.cumsum(1) == ended  # no termination before this step; the terminating step itself still counts
    weight = discount ** torch.arange(reward.shape[1], device=reward.device, dtype=reward.dtype)
    # Masked before it is weighed: what follows a termination is meaningless and may well be NaN.
    earned = torch.where(counts, reward, 0.0) @ weight
    return torch.where(earned.isfinite(), earned, -torch.inf)


class Search(NamedTuple):
    """Where a search begins: the action bounds, the sequences to search around, and each row's own noise."""

    low: Tensor  # [A]
    high: Tensor  # [A]
    mean: Tensor  # [B,H,K,A]
    generators: list[torch.Generator]  # B

    @property
    def half_range(self) -> Tensor:
        """[A], the unit in which planners state their noise, so that one default fits every action space."""
        return (self.high - self.low) / 2

    @property
    def nothing_yet(self) -> Plan:
        """What any finite return is better than."""
        return Plan(self.mean, self.mean.new_full(self.mean.shape[:1], -torch.inf))

    def around(self, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        """Candidates mean + std * noise [B,N,H,K,A], put back onto the bounds."""
        return torch.addcmul(mean[:, None], std[:, None], noise).clamp_(self.low, self.high)

    def normal(self, n: int) -> Tensor:
        """Standard normal noise [B,n,H,K,A]; row b is drawn from generator b alone."""
        shape = (n, *self.mean.shape[1:])
        return torch.stack([torch.randn(shape, generator=g, device=g.device) for g in self.generators])

    def coloured(self, n: int, exponent: float) -> Tensor:
        """Normal noise of unit variance whose power over frequency f falls as f**-exponent along the H*K steps."""
        white = self.normal(n).flatten(2, 3)
        if n == 0:
            return white.unflatten(2, self.mean.shape[1:3])
        frequency = torch.fft.rfftfreq(white.shape[2], device=white.device)
        frequency[0] = frequency[1] if len(frequency) > 1 else 1.0
        weight = frequency ** (-exponent / 2)
        # By the spectrum of both signs: all frequencies but the first, and the last of an even number, stand for two.
        power = torch.cat([weight, weight[1 : (white.shape[2] + 1) // 2]]).square().mean()
        spectrum = torch.fft.rfft(white, dim=2) * (weight / power.sqrt())[:, None]
        return torch.fft.irfft(spectrum, n=white.shape[2], dim=2).unflatten(2, self.mean.shape[1:3])

    def uniform(self, n: int) -> Tensor:
        """Noise uniform in [0,1), [B,n,H,K,A]; row b is drawn from generator b alone."""
        shape = (n, *self.mean.shape[1:])
        return torch.stack([torch.rand(shape, generator=g, device=g.device) for g in self.generators])


def begin(
    dynamics: Dynamics, state: LatentState, horizon: int, chunk: int, warm: Plan | None, seed: int | Tensor
) -> Search:
    """The start of a search for plans of ``horizon`` chunks of ``chunk`` steps, around ``warm`` where there is one."""
    device = device_of(state)
    low, high = bounds(dynamics.spec, device)
    shape = (state.batch, horizon, chunk, low.shape[0])
    if warm is None:
        mean = ((low + high) / 2).expand(shape)
    elif warm.actions.shape == shape:
        mean = warm.actions
        if not ((mean >= low) & (mean <= high)).all():
            raise ValueError(
                f"warm.actions must lie within {dynamics.spec.action_space}, got {mean.min()} to {mean.max()}"
            )
    else:
        raise ValueError(f"warm.actions must be [B,H,K,A] = {list(shape)}, got {list(warm.actions.shape)}")
    if warm is not None and (elites := warm.elites) is not None:
        outside = (elites < low) | (elites > high)
        if elites.ndim != 5 or (elites.shape[0], *elites.shape[2:]) != shape or outside.any():
            raise ValueError(
                f"warm.elites must be [B,E,H,K,A] with {list(shape)} but for E, within {dynamics.spec.action_space} or "
                f"NaN, got {list(elites.shape)}"
            )
    seeds = torch.as_tensor(seed)
    if seeds.shape not in ((), (state.batch,)):
        raise ValueError(f"seed must be one int or int64 [B] with B={state.batch}, got shape {list(seeds.shape)}")
    generators = [torch.Generator(device).manual_seed(s) for s in seeds.expand(state.batch).tolist()]
    return Search(low, high, mean, generators)


def refit(elites: Tensor, values: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """The normal of the best candidates [B,E,H,K,A], whose returns are ``values`` [B,E] -> its mean and std [B,H,K,A].

    With fewer finite returns than elites, the finite ones alone set the mean (``mean`` stays where there is none), but
    all set the std: it would collapse around the first few finds.
    """
    finite = values.isfinite()
    count = finite.sum(1)[:, None, None, None]
    total = torch.einsum("be,behka->bhka", finite.to(elites.dtype), elites)
    return torch.where(count > 0, total / count, mean), elites.std(1, correction=0)


def bounds(spec: Spec, device: torch.device) -> tuple[Tensor, Tensor]:
    """The action bounds, low [A] and high [A], float32. Raises ValueError where one is infinite or none is meant."""
    if isinstance(spec.action_space, spaces.Discrete):
        raise ValueError(f"planners search among real numbers; {spec.action_space} has choices instead")
    space = spec.action_box
    if not space.is_bounded():
        raise ValueError(f"planners sample within the action bounds, but {space} has infinite ones: bound it first")
    low, high = space.low.astype(np.float32), space.high.astype(np.float32)
    # A float64 bound may round to a float32 just outside of it.
    low = np.where(low < space.low, np.nextafter(low, np.float32(np.inf)), low)
    high = np.where(high > space.high, np.nextafter(high, np.float32(-np.inf)), high)
    return torch.from_numpy(low).to(device), torch.from_numpy(high).to(device)


def device_of(state: LatentState) -> torch.device:
    """Where a state lives, and with it everything that is planned for it."""
    return next(iter(state.tensors.values())).device


def require_elites(*, elites: int, candidates: int, min_std: float, std: float) -> None:
    """Raises ValueError where as many elites, or as narrow a normal of them, can't be."""
    if not 2 <= elites <= candidates:
        raise ValueError(f"2 <= elites <= candidates must hold, got {elites} elites of {candidates}")
    if not 0 <= min_std <= std:
        raise ValueError(f"0 <= min_std <= std must hold, got min_std={min_std}, std={std}")


def require_positive(**settings: float) -> None:
    """Raises ValueError that names the first setting that is not above zero."""
    for name, value in settings.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
