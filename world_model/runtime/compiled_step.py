"""A whole step of a small world model on the CPU in one call of compiled code, beside the torch form that it equals."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from operator import attrgetter
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from world_model.contract import Imagined
from world_model.noise import normal
from world_model.ops.dispatch import native_library, needs_grad
from world_model.ops.flow import shift, shift_factor
from world_model.runtime.weight_cache import WeightCache, forget, made
from world_model.state import LatentState

_SIZES = (
    *("obs_dim", "action_dim", "chunk", "tokens", "width", "action_width", "heads", "head_dim", "expand", "window"),
    *("dilation", "taps"),
)
_version = attrgetter("_version")


def compiled_step(model: Any, state: LatentState, *inputs: Tensor) -> CompiledStep | None:
    """The compiled form of a model's verbs; None where torch has to do it.

    That is where weights aren't frozen or somebody wants a gradient, on a GPU, in another precision, for a state that
    isn't this model's, and where ``native.available`` says so. Weights that are written behind autograd's back, through
    ``p.data`` or numpy, and weights, units or parts that are exchanged for others by assignment need a ``forget``.
    Hooks on parts aren't called.
    """
    if inputs and not inputs[0].is_cpu:
        return None
    if needs_grad(*state.tensors.values(), *inputs):
        return None
    library = native_library("dream")
    if library is None:
        return None
    form = made.get(model)
    if not isinstance(form, CompiledStep) or form.stale(model):
        weights = [*_tensors(model), model.terminates]
        if any(t.requires_grad or t.is_inference() for t in weights):
            forget(model)
            return None  # an optimiser may write them, or anybody, without a count of it
        if any(t.device.type != "cpu" or t.dtype != torch.float32 for t in weights[:-1]):
            return None
        form = made[model] = CompiledStep(model, library)
    return form if form.takes(state) else None


@lru_cache
def _grid(flow_steps: int, c: float) -> Tensor:
    return shift(torch.linspace(1, 0, flow_steps + 1, dtype=torch.float32, device="cpu"), c)


class _Call(ctypes.Structure):
    """The struct Call of dream.cpp."""

    _fields_ = [
        ("batch", ctypes.c_int64),
        ("frames", ctypes.c_int64),
        ("steps", ctypes.c_int),
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("grid", "age", "obs", "before", "actions", "noise", "seen", "memory", "written", "obs_out", "reward"),
                *("terminated", "last", "before_out", "age_out"),
            )
        ),
    ]


class CompiledStep(WeightCache):
    """The weights of one WorldModel as they are when it is made, packed for dream.cpp."""

    def __init__(self, model: Any, library: ctypes.CDLL):
        super().__init__(model)
        self.config, self._lib = model.config, library
        self._made: Callable[[], LatentState | None] = lambda: None  # the state that it made last, while that lives
        config, flat = self.config, [t.detach().contiguous() for t in _tensors(model)]
        sizes = [getattr(config, name) for name in _SIZES]
        sizes += [len(config.pattern), int(config.draft), config.draft_frames, config.draft_width, config.draft_blocks]
        sizes.append(int(model.terminates))
        library.dream_open.restype = ctypes.c_void_p
        self._handle = ctypes.c_void_p(
            library.dream_open(
                (ctypes.c_int32 * len(sizes))(*sizes),
                config.pattern.encode(),
                (ctypes.c_void_p * len(flat))(*(t.data_ptr() for t in flat)),
            )
        )
        self._layers = [
            f"{i}.{name}" for i, kind in enumerate(config.pattern) for name in (("S",) if kind == "G" else ("k", "v"))
        ]
        self._Pointers = ctypes.c_void_p * len(self._layers)

    def _signs(self) -> tuple[Any, ...]:
        """Weights were copied when they were packed, so those that are written since are others too."""
        return list(map(_version, self._weights)), *super()._signs()

    def takes(self, state: LatentState) -> bool:
        return self._made() is state or super().takes(state)

    def __del__(self) -> None:
        if handle := getattr(self, "_handle", None):
            self._lib.dream_close(handle)

    def imagine(
        self, state: LatentState, actions: Tensor, *, decode: bool, sampled: bool, flow_steps: int
    ) -> tuple[LatentState, Imagined] | None:
        """As ``WorldModel.imagine``, or None where the actions or the state are not as they must be."""
        batch, k, _ = actions.shape
        obs = actions.new_empty(batch, k, self.config.obs_dim)
        reward, terminated = actions.new_empty(batch, k), actions.new_empty(batch, k, dtype=torch.bool)
        grid = _grid(flow_steps, shift_factor(k, self.config.tokens))
        noise = None
        if sampled:
            step = state["age"][:, None] + torch.arange(k, device="cpu")
            noise = normal(state["seed"][:, None].expand_as(step), step, self.config.obs_dim)
        call, after, _kept = self._call(state, actions, k)
        call.steps, call.grid = flow_steps, grid.data_ptr()
        call.noise = None if noise is None else noise.data_ptr()
        call.obs_out, call.reward, call.terminated = obs.data_ptr(), reward.data_ptr(), terminated.data_ptr()
        if self._lib.dream_imagine(self._handle, ctypes.byref(call), torch.get_num_threads()):
            return None
        return after, Imagined(obs if decode else None, reward, terminated)

    def observe(self, state: LatentState, obs: Tensor, actions: Tensor) -> LatentState:
        """As ``WorldModel.observe``, of frames that have been looked at: obs [B,T,O], actions [B,T,A]."""
        for seen, played in zip(obs.split(self.config.chunk, 1), actions.split(self.config.chunk, 1), strict=True):
            seen = seen.contiguous()
            call, state, _kept = self._call(state, played, seen.shape[1])
            call.seen = seen.data_ptr()
            self._lib.dream_observe(self._handle, ctypes.byref(call), torch.get_num_threads())
        return state

    def _call(self, state: LatentState, actions: Tensor, frames: int) -> tuple[_Call, LatentState, Any]:
        """The call without what is particular to a verb, the state that it fills, and what must live as long."""
        have = state.tensors
        if self._made() is not state:
            have = {name: t.contiguous() for name, t in have.items()}
        new = {name: t if name == "seed" else torch.empty_like(t) for name, t in have.items()}
        memory, written = (self._Pointers(*[x[name].data_ptr() for name in self._layers]) for x in (have, new))
        call = _Call(state.batch, frames)
        call.age, call.age_out = have["age"].data_ptr(), new["age"].data_ptr()
        call.obs, call.last = have["obs"].data_ptr(), new["obs"].data_ptr()
        call.memory, call.written = ctypes.addressof(memory), ctypes.addressof(written)
        if self.config.draft_frames > 1:
            call.before, call.before_out = have["before"].data_ptr(), new["before"].data_ptr()
        actions = actions.contiguous()
        call.actions = actions.data_ptr()
        after = LatentState(new)
        self._made = ref(after)
        return call, after, (have, memory, written, actions)


def _tensors(model: Any) -> list[Tensor]:
    """All weights and units, in the order in which dream.cpp reads them."""

    def both(*layers: Any) -> list[Tensor]:
        return [t for layer in layers for t in (layer.weight, layer.bias)]

    tokens, scaling = model.tokens, model.scaling
    out = [
        *both(tokens.clean_in, tokens.noisy_in, tokens.level_in),
        tokens.position,
        *both(tokens.action_in),
        tokens.no_action,
    ]
    out += both(tokens.norm, tokens.out)
    for block in model.trunk.blocks:
        out += both(
            block.world.norm, block.world.in_proj, block.world.out_proj, block.action.norm, block.action.in_proj
        )
        out += [] if block.last else both(block.action.out_proj)
        out.append(block.mixing.log_rate if block.kind == "G" else block.mixing.relative_bias)
    predict_reward = model.reward_head.layers
    out += both(model.memory_reward_head, predict_reward[0], predict_reward[2], predict_reward[4])
    if model.draft is not None:
        out += both(model.draft.in_proj)
        for block in model.draft.blocks:
            out += both(block.norm, block.in_proj, block.out_proj)
        out += both(model.draft.out_proj)
    out += [scaling.obs_mean, scaling.obs_std, scaling.step_std, scaling.obs_low, scaling.obs_high]
    return [*out, scaling.action_low, scaling.action_high, scaling.reward_mean, scaling.reward_std, model.draft_error]
