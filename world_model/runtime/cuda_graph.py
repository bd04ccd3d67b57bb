"""A whole ``imagine`` on a GPU as one CUDA graph, since launching its kernels takes longer than running them."""

from __future__ import annotations

import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from world_model.contract import Imagined
from world_model.ops.constants import held
from world_model.ops.dispatch import kernel_choice, needs_grad, under_transform
from world_model.runtime.weight_cache import WeightCache, caches, invalidate
from world_model.state import LatentState

MAX_GRAPHS = 8  # of a model: each has its own memory for a whole pass

T = TypeVar("T")
_lock = Lock()  # a graph reads and writes fixed buffers, and two captures at once are an error
_failed: list[Any] = []  # graphs whose capture failed: torch's allocator still uses them, and can't capture others


def cuda_graphs(model: Any, state: LatentState, actions: Tensor) -> CudaGraphs | None:
    """The graphs of a model's ``imagine``; None where each kernel has to be launched.

    That is with ``KAIROS_KERNELS=eager`` or ``torch``, where weights aren't frozen or a gradient is needed, for a state
    that isn't this model's, under torch.compile, forward-mode AD and torch.func's transforms, and once a capture has
    failed. Weights may be written in place. A graph keeps the settings of torch at its capture, such as TF32, until an
    ``invalidate``.
    """
    if not actions.is_cuda or _failed or torch.compiler.is_compiling() or under_transform():
        return None
    if kernel_choice() in ("eager", "torch") or needs_grad(actions, *state.tensors.values()):
        return None
    cache = caches.get(model)
    if not isinstance(cache, CudaGraphs) or cache.stale(model):
        invalidate(model)
        if any(p.requires_grad for p in model.parameters()):
            return None
        cache = caches[model] = CudaGraphs(model)
    return cache if cache.accepts(state) else None


class CaptureCache(Generic[T]):
    """A least-recently-used cache of ``capacity`` values that are too costly to make for a single use.

    ``get`` makes a value at the 2nd, 4th, 8th, ... miss of its key, and gives None at the others: a caller that cycles
    through more than ``capacity`` keys would otherwise spend its time making values.
    """

    def __init__(self, capacity: int):
        self._capacity, self._misses, self._entries = capacity, Counter[Hashable](), OrderedDict[Hashable, T]()

    def get(self, key: Hashable, make: Callable[[], T]) -> T | None:
        if key in self._entries:
            self._entries.move_to_end(key)
            return self._entries[key]
        self._misses[key] += 1
        misses = self._misses[key]
        if misses == 1 or misses & (misses - 1):
            return None
        while len(self._entries) >= self._capacity:  # evict first: the new value needs the memory
            self._entries.popitem(last=False)
        self._entries[key] = make()
        return self._entries[key]


class CudaGraphs(WeightCache):
    """One model's graphs, by batch, K, sampling, Euler steps and autocast dtype."""

    def __init__(self, model: Any):
        super().__init__(model)
        self._graphs = CaptureCache[CudaGraph | None](MAX_GRAPHS)

    def imagine(
        self, model: Any, state: LatentState, actions: Tensor, *, decode: bool, sampled: bool, flow_steps: int
    ) -> tuple[LatentState, Imagined] | None:
        """As ``WorldModel.imagine``, or None where there is no graph, or the model wouldn't accept the inputs."""
        autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        key = (*actions.shape[:2], sampled, flow_steps, autocast)
        with _lock, torch.cuda.device(actions.device):
            graph = self._graphs.get(key, lambda: _capture(model, state, actions, sampled, flow_steps, autocast))
            if graph is None or (result := graph.replay(state, actions)) is None:
                return None
        state, imagined = result
        return state, imagined if decode else imagined._replace(obs=None)


def _capture(model: Any, *args: Any) -> CudaGraph | None:
    """None, and no further capture, after an error; one of the model's own is raised again without a graph."""
    graph = torch.cuda.CUDAGraph()
    try:
        return CudaGraph(graph, model, *args)
    except Exception as error:
        _failed.append(graph)
        print(f"kairos_gym dreams without CUDA graphs, which is slower: {error}", file=sys.stderr)
        return None


class CudaGraph:
    """One captured ``imagine``, with the buffers that it reads and writes."""

    @torch.inference_mode(False)  # inference tensors could only be written in inference mode
    @torch.no_grad()
    def __init__(
        self,
        graph: torch.cuda.CUDAGraph,
        model: Any,
        state: LatentState,
        actions: Tensor,
        sampled: bool,
        flow_steps: int,
        autocast: torch.dtype | None,
    ):
        self._state = LatentState(
            {name: t.clone(memory_format=torch.contiguous_format) for name, t in state.tensors.items()}
        )
        self._actions = actions.clone(memory_format=torch.contiguous_format)
        self._graph, side = graph, torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        # The contexts restore stream and autocast also where the capture fails. Autocast caches no casts of weights,
        # which would hide later writes to the weights. "thread_local": other threads may use the GPU meanwhile.
        with (
            torch.cuda.stream(side),
            torch.autocast("cuda", dtype=autocast, enabled=autocast is not None, cache_enabled=False),
            held() as self._constants,
        ):
            # Warm up: what libraries initialise at their first call can't be captured.
            model.imagine_unchecked(self._state, self._actions, sampled, flow_steps)
            with torch.cuda.graph(self._graph, stream=side, capture_error_mode="thread_local"):
                self._accepted = model.accepts(self._state, self._actions)
                self._after, self._imagined = model.imagine_unchecked(self._state, self._actions, sampled, flow_steps)
        torch.cuda.current_stream().wait_stream(side)

    def replay(self, state: LatentState, actions: Tensor) -> tuple[LatentState, Imagined] | None:
        """``imagine`` of inputs of the captured shapes; None where the model wouldn't accept them."""
        for name, buffer in self._state.tensors.items():
            buffer.copy_(state[name])
        self._actions.copy_(actions)
        self._graph.replay()
        after = LatentState({name: t.clone() for name, t in self._after.tensors.items()})
        obs, reward, terminated, _ = self._imagined
        imagined = Imagined(obs.clone(), reward.clone(), terminated.clone())
        # bool() waits for the copies too, so the next call, on any stream, may overwrite the graph's tensors.
        return (after, imagined) if bool(self._accepted) else None
