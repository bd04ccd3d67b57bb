"""A whole step of a small world model on the CPU in one call of compiled code, with the results of the torch form."""

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
from world_model.runtime.weight_cache import WeightCache, caches, invalidate
from world_model.state import LatentState

_SIZES = (
    *("obs_dim", "action_dim", "chunk", "tokens", "width", "action_width", "heads", "head_dim", "expand", "window"),
    *("dilation", "taps"),
)
_version = attrgetter("_version")


def compiled_step(model: Any, state: LatentState, *inputs: Tensor) -> CompiledStep | None:
    """The compiled ``observe`` and ``imagine`` of a model; None where torch has to compute them.

    That is where weights aren't frozen or a gradient is needed, on a GPU, in a precision other than float32, for a
    state that isn't this model's, and where ``native_library`` gives None. Writes that autograd doesn't count, through
    ``p.data`` or numpy, and weights, units or modules replaced by assignment need an ``invalidate``. Hooks of
    submodules aren't called.
    """
    if inputs and not inputs[0].is_cpu:
        return None
    if needs_grad(*state.tensors.values(), *inputs):
        return None
    library = native_library("dream")
    if library is None:
        return None
    cache = caches.get(model)
    if not isinstance(cache, CompiledStep) or cache.stale(model):
        weights = [*_tensors(model), model.terminates]
        if any(t.requires_grad or t.is_inference() for t in weights):
            invalidate(model)
            return None  # they may be written without a new version number, which `stale` would miss
        if any(t.device.type != "cpu" or t.dtype != torch.float32 for t in weights[:-1]):
            return None
        cache = caches[model] = CompiledStep(model, library)
    return cache if cache.accepts(state) else None


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
    """The weights of one WorldModel as they were when it was constructed, packed for dream.cpp."""

    def __init__(self, model: Any, library: ctypes.CDLL):
        super().__init__(model)
        self.config, self._lib = model.config, library
        self._last_state: Callable[[], LatentState | None] = lambda: None  # weak: the state that it returned last
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

    def _signature(self) -> tuple[Any, ...]:
        """With versions: packing copied the weights, so one that was written in place has changed too."""
        return list(map(_version, self._weights)), *super()._signature()

    def accepts(self, state: LatentState) -> bool:
        return self._last_state() is state or super().accepts(state)

    def __del__(self) -> None:
        if handle := getattr(self, "_handle", None):
            self._lib.dream_close(handle)

    def imagine(
        self, state: LatentState, actions: Tensor, *, decode: bool, sampled: bool, flow_steps: int
    ) -> tuple[LatentState, Imagined] | None:
        """As ``WorldModel.imagine``, or None where the model wouldn't accept the actions or the state."""
        batch, k, _ = actions.shape
        obs = actions.new_empty(batch, k, self.config.obs_dim)
        reward, terminated = actions.new_empty(batch, k), actions.new_empty(batch, k, dtype=torch.bool)
        grid = _grid(flow_steps, shift_factor(k, self.config.tokens))
        noise = None
        if sampled:
            step = state["age"][:, None] + torch.arange(k, device="cpu")
            noise = normal(state["seed"][:, None].expand_as(step), step, self.config.obs_dim)
        call, after, _alive = self._call(state, actions, k)
        call.steps, call.grid = flow_steps, grid.data_ptr()
        call.noise = None if noise is None else noise.data_ptr()
        call.obs_out, call.reward, call.terminated = obs.data_ptr(), reward.data_ptr(), terminated.data_ptr()
        if self._lib.dream_imagine(self._handle, ctypes.byref(call), torch.get_num_threads()):
            return None
        return after, Imagined(obs if decode else None, reward, terminated)

    def observe(self, state: LatentState, obs: Tensor, actions: Tensor) -> LatentState:
        """As ``WorldModel.observe``, of checked frames: obs [B,T,O], actions [B,T,A]."""
        for frames, act in zip(obs.split(self.config.chunk, 1), actions.split(self.config.chunk, 1), strict=True):
            frames = frames.contiguous()
            call, state, _alive = self._call(state, act, frames.shape[1])
            call.seen = frames.data_ptr()
            self._lib.dream_observe(self._handle, ctypes.byref(call), torch.get_num_threads())
        return state

    def _call(self, state: LatentState, actions: Tensor, frames: int) -> tuple[_Call, LatentState, Any]:
        """The fields that all calls share, the state that the call fills, and what its pointers refer to."""
        old = state.tensors
        if self._last_state() is not state:
            old = {name: t.contiguous() for name, t in old.items()}
        new = {name: t if name == "seed" else torch.empty_like(t) for name, t in old.items()}
        memory, written = (self._Pointers(*[x[name].data_ptr() for name in self._layers]) for x in (old, new))
        call = _Call(state.batch, frames)
        call.age, call.age_out = old["age"].data_ptr(), new["age"].data_ptr()
        call.obs, call.last = old["obs"].data_ptr(), new["obs"].data_ptr()
        call.memory, call.written = ctypes.addressof(memory), ctypes.addressof(written)
        if self.config.draft_frames > 1:
            call.before, call.before_out = old["before"].data_ptr(), new["before"].data_ptr()
        actions = actions.contiguous()
        call.actions = actions.data_ptr()
        after = LatentState(new)
        self._last_state = ref(after)
        return call, after, (old, memory, written, actions)


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
    reward_head = model.reward_head.layers
    out += both(model.memory_reward_head, reward_head[0], reward_head[2], reward_head[4])
    if model.draft is not None:
        out += both(model.draft.in_proj)
        for block in model.draft.blocks:
            out += both(block.norm, block.in_proj, block.out_proj)
        out += both(model.draft.out_proj)
    out += [scaling.obs_mean, scaling.obs_std, scaling.step_std, scaling.obs_low, scaling.obs_high]
    return [*out, scaling.action_low, scaling.action_high, scaling.reward_mean, scaling.reward_std, model.draft_error]
