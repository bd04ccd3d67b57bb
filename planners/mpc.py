"""MPC: observe, plan, return the first chunk of actions, warm-start the next plan."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from planners.base import Planner
from planners.objective import Objective
from planners.plan import Plan
from planners.search import bounds
from world_model.contract import Dynamics
from world_model.state import LatentState

Array = TypeVar("Array", np.ndarray, Tensor)


class MPC:
    """Model-predictive control of B real environments at once.

    Unlike the planners it has a state: between two decisions it keeps the memory and the rest of the plan.

        mpc, done = MPC(model, CEM()), False
        obs, info = env.reset()
        while not done:
            obs, reward, terminated, truncated, info = env.step(mpc.act(obs))
            done = terminated or truncated
        mpc.reset()  # before the next episode

    Row b of ``MPC(..., seed=s)`` decides as ``MPC(..., seed=s + b)`` would alone, and ``reset`` restarts the same
    sequence of decisions. ``plan`` is the last plan, None before the first; with ``keep_trace`` it has a trace of all
    candidates. ``predict`` is ``act`` with the signature of Stable-Baselines3's policies, for ``evaluate_policy`` and
    the like.
    """

    def __init__(
        self,
        dynamics: Dynamics,
        planner: Planner,
        objective: Objective = Objective(),
        *,
        seed: int = 0,
        keep_trace: bool = False,
    ):
        self.dynamics, self.planner, self.objective, self.seed = dynamics, planner, objective, seed
        self.keep_trace = keep_trace
        self.reset()

    def reset(self, batch: int = 1) -> None:
        """Start again: the next ``act`` gets the first observations of ``batch`` episodes."""
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        self.plan: Plan | None = None
        self._state: LatentState | None = None
        self._fresh = torch.ones(batch, dtype=torch.bool)  # [B], the rows that start an episode
        self._seeds = self.seed + torch.arange(batch)
        self._decisions = 0

    def reset_rows(self, done: np.ndarray | Tensor) -> None:
        """Reset the rows where ``done`` (bool [B]) is True: the next ``act`` gets their first observations."""
        done = torch.as_tensor(done).cpu()
        if done.shape != self._fresh.shape or done.dtype != torch.bool:
            raise ValueError(f"done must be bool [{len(self._fresh)}], got {done.dtype} {list(done.shape)}")
        self._fresh = self._fresh | done

    def act(self, obs: Array, *, inner_obs: Array | None = None, state: LatentState | None = None) -> Array:
        """The present observations [B,O] -> the next actions [B,K,A].

        With one row obs may be [O]: then B is dropped from all arguments and results. With chunks of K=1 the K is
        dropped, so that a real environment's ``step`` takes the actions. Numpy arrays give numpy arrays (in the action
        space's dtype), tensors give tensors.

        inner_obs: [B,K,O], all observations during the last chunk, ``obs`` last. Pass it where K > 1, so that the
        memory sees every step. Without it, the dynamics' predictions stand in for the K-1 missing frames, since
        without them the memory, which counts steps, would date ``obs`` wrongly. Rows that start an episode ignore it.

        state: plan from this state of B rows instead of the remembered one, which it replaces (such as
        ``capture(env)`` of ``ExactDynamics``).

        Raises TypeError or ValueError where an argument has the wrong type or shape, isn't finite, or ``inner_obs``
        doesn't end with ``obs``; FloatingPointError where a row has no finite imagined return. The MPC is then as it
        was before the call.
        """
        batch = len(self._fresh)
        single = batch == 1 and isinstance(obs, np.ndarray | Tensor) and obs.ndim == 1
        current = self._checked("obs", obs, single)
        if state is None:
            state = self._observe(current, inner_obs, single)
        elif inner_obs is not None:
            raise ValueError("pass inner_obs or state, not both: a state has already seen everything")
        elif state.batch != batch:
            raise ValueError(f"state has {state.batch} rows, but this MPC controls {batch}: reset(batch) comes first")

        plan = self.planner.plan(
            self.dynamics,
            state,
            warm=self._warm(),
            seed=self._seeds * 1_000_003 + self._decisions,  # distinct for all rows and decisions
            obs=current.to(state.device),
            objective=self.objective,
            keep_trace=self.keep_trace,
        )
        failed = (~plan.value.isfinite()).nonzero().flatten().tolist()
        if failed:
            raise FloatingPointError(
                f"nothing that was imagined for rows {failed} earns a finite return: check that these observations are "
                "like those the model was trained on, or plan over a shorter horizon"
            )
        self.plan, self._state, self._decisions = plan, state, self._decisions + 1
        self._fresh = torch.zeros_like(self._fresh)

        actions = plan.actions[:, 0]
        actions = actions[:, 0] if actions.shape[1] == 1 else actions
        actions = actions[0] if single else actions
        if isinstance(obs, Tensor):
            return actions.to(obs.device)
        return actions.cpu().numpy().astype(self.dynamics.spec.action_space.dtype)

    def predict(
        self,
        observation: Array,
        state: None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
    ) -> tuple[Array, None]:
        """``act`` as Stable-Baselines3 calls a policy: obs [B,O] or [O] -> (actions [B,A] or [A], None).

        episode_start: bool [B], the rows that start an episode; where None, only those after a reset do. Another number
        of rows resets all. The memory is the MPC's own, so ``state`` is ignored; a plan is always ``deterministic``.
        A planner of chunks K > 1 gives [B,K,A], for an environment that takes them (``envs.ChunkedActions``).
        """
        shape: tuple[int, ...] = np.shape(observation)
        row: tuple[int, ...] = self.dynamics.spec.observation_box.shape
        batch = shape[0] if shape[1:] == row else 1
        if shape in (row, (batch, *row)) and batch != len(self._fresh):
            self.reset(batch)
        if episode_start is not None:
            self.reset_rows(np.asarray(episode_start, bool))
        return self.act(observation), None

    @torch.no_grad()
    def _observe(self, obs: Tensor, inner_obs: np.ndarray | Tensor | None, single: bool) -> LatentState:
        """The updated memory: new episodes observe one frame, the others all frames since the last decision."""
        new, old = self._fresh.nonzero().flatten(), (~self._fresh).nonzero().flatten()
        parts: list[LatentState] = []
        if len(new):
            fresh = self.dynamics.initial(len(new), self._seeds[new])
            parts.append(self.dynamics.observe(fresh, obs[new, None].to(fresh.device)))
        if len(old):
            assert self._state is not None and self.plan is not None  # set by the call of act that made the row old
            rows = old.to(self._state.device)
            before, actions = self._state.select(rows), self.plan.actions[rows, 0]
            if inner_obs is None:
                frames = self._fill_in(before, actions, obs[old].to(rows.device))
            else:
                frames = self._checked("inner_obs", inner_obs, single, old, actions.shape[1]).to(rows.device)
                if not torch.equal(frames[:, -1], obs[old].to(rows.device)):
                    raise ValueError("inner_obs must end with obs: if an episode has ended, call reset_rows first")
            parts.append(self.dynamics.observe(before, frames, actions))
        if len(parts) == 1:
            return parts[0]
        order = torch.cat([new, old]).argsort().to(parts[0].device)
        return LatentState({k: torch.cat([part[k] for part in parts])[order] for k in parts[0].tensors})

    def _fill_in(self, before: LatentState, actions: Tensor, obs: Tensor) -> Tensor:
        """The K frames [R,K,O] of a chunk of which only the last one, ``obs`` [R,O], was observed."""
        if actions.shape[1] == 1:
            return obs[:, None]
        _, imagined = self.dynamics.imagine(before, actions, decode=True)
        if imagined.obs is None:
            raise ValueError("these dynamics predict no observations, so inner_obs can't be filled in: pass it")
        return torch.cat([imagined.obs[:, :-1], obs[:, None]], dim=1)

    def _warm(self) -> Plan | None:
        """The rest of the last plan; rows that start an episode have the middle of the bounds instead."""
        if self.plan is None or bool(self._fresh.all()):
            return None
        low, high = bounds(self.dynamics.spec, self.plan.actions.device)
        middle = (low + high) / 2
        warm = self.plan.shifted(middle)
        fresh = self._fresh.to(low.device)[:, None, None, None]
        elites = None if warm.elites is None else torch.where(fresh[:, None], torch.nan, warm.elites)
        return warm._replace(actions=torch.where(fresh, middle, warm.actions), elites=elites)

    def _checked(
        self, name: str, values: object, single: bool, rows: Tensor | None = None, steps: int | None = None
    ) -> Tensor:
        """Check observations of all B rows -> those of ``rows``, float32 [R,(K,)O], as a copy on the CPU."""
        if not isinstance(values, np.ndarray | Tensor):
            raise TypeError(f"{name} must be a numpy array or a tensor, got {type(values).__name__}")
        space = self.dynamics.spec.observation_box
        shape = (() if single else (len(self._fresh),)) + (() if steps is None else (steps,)) + space.shape
        if tuple(values.shape) != shape:
            raise ValueError(
                f"{name} must have shape {list(shape)}, got {list(values.shape)}: this MPC controls "
                f"{len(self._fresh)} environment(s) (see reset(batch)) with observations {space}"
            )
        # A copy, since many environments write their next observation into the same memory.
        copy = torch.from_numpy(values.copy()) if isinstance(values, np.ndarray) else values.detach().clone()
        checked = copy.to("cpu", torch.float32)
        checked = checked[None] if single else checked
        checked = checked if rows is None else checked[rows]
        if not checked.isfinite().all():
            place = (~checked.isfinite()).nonzero()[0].tolist()
            raise ValueError(f"{name} must be finite, got {checked[tuple(place)].item()} at {place}")
        return checked
