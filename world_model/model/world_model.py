"""WorldModel: tokens, draft, memory and flow behind ``initial``, ``observe`` and ``imagine``."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from world_model.conformal import ConformalBound
from world_model.contract import Imagined, Spec
from world_model.episodes import StartStates
from world_model.model.checkpoint import Checkpoint, find_checkpoint
from world_model.model.config import WorldModelConfig
from world_model.model.draft import Draft, RewardHead
from world_model.model.scaling import Scaling
from world_model.model.tokens import Tokens
from world_model.model.transformer import Memory, Trunk
from world_model.noise import normal
from world_model.ops.dispatch import no_autocast
from world_model.ops.flow import euler, shift_factor
from world_model.ops.layout import Layout
from world_model.runtime.compiled_step import compiled_step
from world_model.runtime.cuda_graph import cuda_graphs
from world_model.runtime.weight_cache import invalidate
from world_model.state import LatentState

EVIDENCE_FRAMES = 32  # the most that one pass of ``observe`` takes


class DraftPrediction(NamedTuple):
    """The draft's prediction of a chunk, without the memory; in normalised units, all [...,K,O]."""

    mean: Tensor
    change: Tensor  # of the mean since the chunk's start, over ``step_std``
    spread: Tensor  # log of its std over the draft's RMS error at that step of the chunk
    scale: Tensor  # the unit of the residual that the flow predicts


class WorldModel(nn.Module):
    """A streaming, action-conditioned world model (Kairos, arXiv 2606.16533), as ``Dynamics``.

    Denoising reads the memory; only clean frames write it, so noise can't pollute it.
    """

    draft_error: Tensor  # [K,O] RMS error of the draft at each step of a chunk, in normalised units
    terminates: Tensor  # bool [], whether the data ever ended an episode

    def __init__(self, config: WorldModelConfig, spec: Spec):
        super().__init__()
        for name, size, expected in (
            ("obs_dim", config.obs_dim, spec.observation_box.shape),
            ("action_dim", config.action_dim, spec.action_box.shape),
            ("chunk", config.chunk, (spec.chunk,)),
        ):
            if (size,) != expected:
                raise ValueError(f"config.{name}={size} doesn't fit the spec, which has {expected}")
        self.config, self.spec = config, spec
        self.card: dict[str, Any] = {}
        self.starts: StartStates | None = None
        self.trust: ConformalBound | None = None  # a bound on its error, if it was calibrated
        self.scaling = Scaling(spec)
        self.tokens = Tokens(config)
        self.trunk = Trunk(config)
        self.draft = (
            Draft(config.obs_dim, config.action_dim, config.draft_width, config.draft_blocks, config.draft_frames)
            if config.draft
            else None
        )
        self.reward_head = RewardHead(config.obs_dim, config.action_dim, config.draft_width)
        self.memory_reward_head = nn.Linear(config.tokens * config.width, 2)  # the memory's share of reward and end
        nn.init.zeros_(self.memory_reward_head.weight)
        nn.init.zeros_(self.memory_reward_head.bias)
        self.register_buffer("draft_error", torch.ones(config.chunk, config.obs_dim))
        self.register_buffer("terminates", torch.tensor(False))

    # -- the contract -------------------------------------------------------------------------------------------------

    def initial(self, batch: int, seeds: Tensor | None = None) -> LatentState:
        """B dreams that have observed nothing -> LatentState. seeds: int64 [B] or None; see ``Dynamics.initial``."""
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        like = self.draft_error
        if seeds is None:
            seeds = torch.zeros(batch, dtype=torch.int64, device=like.device)
        if seeds.shape != (batch,) or seeds.is_floating_point():
            raise ValueError(f"seeds must be int64 of shape ({batch},), got {tuple(seeds.shape)} of {seeds.dtype}")
        seeds = seeds.to(like.device, torch.int64, copy=True)
        own = {"seed": seeds, "age": torch.zeros_like(seeds), "obs": like.new_zeros(batch, self.config.obs_dim)}
        if self.config.draft_frames > 1:
            own["before"] = torch.zeros_like(own["obs"])
        return LatentState({**own, **self.trunk.empty(batch, like)})

    def observe(self, state: LatentState, obs: Tensor, actions: Tensor | None = None) -> LatentState:
        """Take in obs [B,T,O] and the actions that led there [B,T,A] -> LatentState. See ``Dynamics.observe``.

        Raises ValueError for other shapes, obs that aren't finite, and actions out of bounds.
        """
        self._expect("obs", obs, state.batch, None, self.config.obs_dim)
        if actions is None:
            if obs.shape[1] != 1 or bool((state["age"] > 0).any()):
                raise ValueError(
                    "observe needs the actions that led to each observation; only a dream's first frame has none"
                )
            actions = self.scaling.action_low.expand(*obs.shape[:2], -1)
        self._expect("actions", actions, state.batch, obs.shape[1], self.config.action_dim)
        if not bool(obs.isfinite().all()):
            raise ValueError("obs must be finite, got NaN or infinity")
        first = state["age"][:, None] + torch.arange(obs.shape[1], device=obs.device) == 0
        self._expect_within_bounds(actions, first)
        obs, actions = obs.to(self.draft_error), actions.to(self.draft_error)
        if fast := compiled_step(self, state, obs, actions):
            return fast.observe(state, obs, actions)
        # In parts, with the same result: the cost of one pass grows with the square of its frames.
        for frames, act in zip(obs.split(EVIDENCE_FRAMES, 1), actions.split(EVIDENCE_FRAMES, 1), strict=True):
            state = self._write(state, frames, self.scaling.obs(frames), self.scaling.action(act))
        return state

    def imagine(
        self, state: LatentState, actions: Tensor, *, decode: bool = True, sampled: bool = False, flow_steps: int = 1
    ) -> tuple[LatentState, Imagined]:
        """Dream the steps that actions [B,K,A] lead to -> (LatentState, Imagined). See ``Dynamics.imagine``.

        sampled: False starts the flow from zero and gives the mean dream; True starts from each dream's own noise.
        flow_steps: Euler steps (for the mean dream 1 is as good as 8; a sampled dream needs 4 or more). Raises
        ValueError for other shapes, actions out of bounds, and dreams that have observed nothing.
        """
        self._expect("actions", actions, state.batch, None, self.config.action_dim)
        if not 1 <= actions.shape[1] <= self.config.chunk:
            raise ValueError(f"a chunk has 1 to {self.config.chunk} actions for this model, got {actions.shape[1]}")
        if flow_steps < 1:
            raise ValueError(f"flow_steps must be at least 1, got {flow_steps}")
        actions = actions.to(self.draft_error)
        if (fast := compiled_step(self, state, actions)) and (
            result := fast.imagine(state, actions, decode=decode, sampled=sampled, flow_steps=flow_steps)
        ):
            return result
        if (graphs := cuda_graphs(self, state, actions)) and (
            result := graphs.imagine(self, state, actions, decode=decode, sampled=sampled, flow_steps=flow_steps)
        ):
            return result
        if not bool(self.accepts(state, actions)):
            self._expect_within_bounds(actions, None)
            raise ValueError("imagine needs a dream that has seen something: call observe first")
        state, imagined = self.imagine_unchecked(state, actions, sampled, flow_steps)
        return state, imagined if decode else imagined._replace(obs=None)

    def accepts(self, state: LatentState, actions: Tensor) -> Tensor:
        """Whether all dreams have observed something and all actions [B,K,A] are within their bounds -> bool []."""
        return (state["age"] != 0).all() & self._within_bounds(actions).all()

    def imagine_unchecked(
        self, state: LatentState, actions: Tensor, sampled: bool, flow_steps: int
    ) -> tuple[LatentState, Imagined]:
        """``imagine`` for inputs that pass ``accepts``.

        A CUDA graph can capture it: it copies nothing between host and device, and its shapes depend on shapes alone.
        """
        act, start = self.scaling.action(actions), self.scaling.obs(state["obs"])
        before = self.scaling.obs(state["before"]) if "before" in state.tensors else None
        k, age, memory = act.shape[1], state["age"], self._memory(state)
        draft = DraftPrediction(*(x[:, None] for x in self.predict_draft(start, act, before)))
        features = start  # replaced by the last denoising step's

        def denoise(z: Tensor, s: Tensor) -> Tensor:
            nonlocal features
            s, chunk = s.reshape(1, 1, 1, 1), Layout(0, (0,), k)
            residual, features, _ = self.refine(chunk, z, s, draft, act[:, None], memory=memory, age=age)
            return residual

        z = torch.zeros_like(draft.mean)
        if sampled:
            step = age[:, None] + torch.arange(k, device=act.device)
            z = normal(state["seed"][:, None].expand_as(step), step, self.config.obs_dim, dtype=z.dtype)[:, None]
        z = euler(denoise, z, flow_steps, shift_factor(k, self.config.tokens))
        scaled = self.scaling.limit(draft.mean + draft.scale * z)[:, 0]
        obs = self.scaling.raw_obs(scaled)
        before_steps = torch.cat([start[:, None], scaled[:, :-1]], 1)
        predicted = self.predict_reward(before_steps, act, scaled, features[:, 0])
        reward = predicted[..., 0] * self.scaling.reward_std + self.scaling.reward_mean
        terminated = (predicted[..., 1] > 0) & self.terminates
        return self._write(state, obs, scaled, act), Imagined(obs, reward, terminated)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:  # called by .to(), .double() and the like
        invalidate(self)
        return super()._apply(fn, recurse)

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        invalidate(self)
        return super().requires_grad_(requires_grad)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        invalidate(self)
        return super().load_state_dict(*args, **kwargs)

    # -- the parts, in normalised units; training and streaming both use them ------------------------------------------

    def predict_draft(self, start: Tensor, actions: Tensor, before: Tensor | None = None) -> DraftPrediction:
        """The draft's prediction of chunks from start [...,O] and actions [...,K,A]; without a draft, a constant.

        before [...,O]: the observations before the start; None where they are unknown.
        """
        if self.draft is None:
            k = actions.shape[-2]
            mean = start[..., None, :].expand(*start.shape[:-1], k, -1)
            return DraftPrediction(
                mean, torch.zeros_like(mean), torch.zeros_like(mean), self.draft_error[:k].expand_as(mean)
            )
        before = start if before is None else before
        mean, variance = self.draft.unroll(
            start.flatten(0, -2), actions.flatten(0, -3), before.flatten(0, -2), self.scaling
        )
        return self.draft_prediction(start, *(x.unflatten(0, start.shape[:-1]) for x in (mean, variance.sqrt())))

    def draft_prediction(self, start: Tensor, mean: Tensor, std: Tensor) -> DraftPrediction:
        """The prediction of chunks from start [...,O], given the draft's mean and std [...,K,O]."""
        error = self.draft_error[: mean.shape[-2]]
        # The scale is the geometric mean of the std that the draft predicts here and of its RMS error.
        return DraftPrediction(
            mean, (mean - start[..., None, :]) / self.scaling.step_std, (std / error).log(), (std * error).sqrt()
        )

    def refine(
        self,
        layout: Layout,
        z: Tensor,
        s: Tensor,
        draft: DraftPrediction,
        actions: Tensor,
        clean: tuple[Tensor, Tensor, Tensor] | None = None,
        memory: Memory | None = None,
        age: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Memory]:
        """One pass over clean frames and C noisy chunks -> residual [B,C,K,O], features [B,C,K,P*D], memory after.

        z [B,C,K,O] at noise level s [B or 1,C or 1,1,1], actions [B,C,K,A]; clean: obs [B,T,O], actions [B,T,A] and
        whether a frame is its dream's first [B,T].
        """
        world = self.tokens.noisy(z, s, draft.mean, draft.change, draft.spread).flatten(1, 2)
        action = self.tokens.actions(actions.flatten(1, 2))
        if clean is not None:
            world = torch.cat([self.tokens.clean(clean[0]), world], 1)
            action = torch.cat([self.tokens.actions(clean[1], clean[2]), action], 1)
        world, after = self.trunk(world, action, layout, memory, age)
        features = self.tokens.features(world).unflatten(1, z.shape[1:3])
        return self.tokens.out(features), features, after

    def predict_reward(self, before: Tensor, actions: Tensor, after: Tensor, features: Tensor | None) -> Tensor:
        """Normalised reward and logit of termination of steps from before to after [...,O] -> [...,2]."""
        with no_autocast(after):  # rewards are summed up
            predicted = self.reward_head(before, actions, (after - before) / self.scaling.step_std, after)
            return predicted if features is None else predicted + self.memory_reward_head(features.to(after.dtype))

    def _write(self, state: LatentState, obs: Tensor, scaled: Tensor, act: Tensor) -> LatentState:
        """Write clean frames into the memory; nothing else writes it."""
        frames = obs.shape[1]
        first = (state["age"][:, None] + torch.arange(frames, device=obs.device)) == 0
        world, action = self.tokens.clean(scaled), self.tokens.actions(act, first)
        _, memory = self.trunk(world, action, Layout(frames), self._memory(state), state["age"])
        own = {"seed": state["seed"], "age": state["age"] + frames, "obs": obs[:, -1].clone()}
        if "before" in state.tensors:  # a first frame is its own predecessor
            earlier = torch.where(first[:, :1], obs[:, 0], state["obs"])
            own["before"] = earlier if frames == 1 else obs[:, -2].clone()
        return LatentState({**own, **memory})

    @staticmethod
    def _memory(state: LatentState) -> Memory:
        return {name: t for name, t in state.tensors.items() if name not in ("seed", "age", "obs", "before")}

    def _expect(self, name: str, x: Tensor, batch: int, frames: int | None, size: int) -> None:
        good = isinstance(x, Tensor) and x.ndim == 3 and x.shape[0] == batch and x.shape[2] == size and x.shape[1] > 0
        if not good or (frames is not None and x.shape[1] != frames) or not x.is_floating_point():
            got = f"{tuple(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} must be a float tensor of shape ({batch}, {frames or 'T'}, {size}), got {got}")

    def _expect_within_bounds(self, actions: Tensor, first: Tensor | None) -> None:
        """first: bool [B,T] or None, the frames whose action is ignored."""
        good = self._within_bounds(actions)
        if not bool((good if first is None else good | first).all()):
            low, high = self.scaling.action_low, self.scaling.action_high
            raise ValueError(
                f"actions must be finite and within {low.tolist()} and {high.tolist()}, got {actions.min().item():.6g} "
                f"to {actions.max().item():.6g}; clip them yourself if that is what you mean"
            )

    def _within_bounds(self, actions: Tensor) -> Tensor:
        """[B,T,A] -> bool [B,T]."""
        low, high = self.scaling.action_low, self.scaling.action_high
        slack = 1e-6 * (high - low)  # bounds may be float64, these actions are float32
        return ((actions >= low - slack) & (actions <= high + slack)).all(-1)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """A short digest of the weights: equal for equal weights."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, model.safetensors, starts.safetensors, trust.safetensors and card.json into ``folder``.

        The files of starts and trust only where the model has them.
        """
        Checkpoint(self.config, self.spec, self.state_dict(), self.starts, self.trust, self.card).write(Path(folder))

    @classmethod
    def from_pretrained(cls, source: str | Path) -> WorldModel:
        """Load a folder that ``save_pretrained`` wrote, or a repository of that form on the Hugging Face hub.

        Nothing is unpickled. Raises FileNotFoundError where there is no such folder or a file is missing, ValueError
        where one is damaged or doesn't fit the config.
        """
        folder = find_checkpoint(source)
        try:
            saved = Checkpoint.read(folder)
            model = cls(saved.config, saved.spec)
            model.load_state_dict(saved.weights)
            model.starts, model.trust, model.card = saved.starts, saved.trust, saved.card
            if model.starts is not None:
                sizes = (model.starts.obs.shape[-1], model.starts.actions.shape[-1])
                if sizes != (model.config.obs_dim, model.config.action_dim):
                    raise ValueError(f"starts.safetensors has (O, A) = {sizes}, config.json another")
            if model.trust is not None and bytes(model.trust.model.numpy()).decode() != model.fingerprint():
                raise ValueError("trust.safetensors was calibrated with other weights: kairos calibrate it anew")
        except Exception as error:
            raise ValueError(f"the model in {folder} is damaged or from another version: {error}") from error
        return model.eval().requires_grad_(False)
