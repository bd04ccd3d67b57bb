"""A whole imagine on a GPU as one CUDA graph, since to launch its kernels takes longer than to run them."""

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
from world_model.runtime.weight_cache import WeightCache, forget, made
from world_model.state import LatentState

MOST = 8  # graphs a model: each has memory of its own for a whole pass

T = TypeVar("T")
_lock = Lock()  # a graph reads and writes memory of its own, and two captures at once are an error
_failed: list[Any] = []  # captures that broke off: torch's allocator goes on asking them, and is in no state for more


def cuda_graphs(model: Any, state: LatentState, actions: Tensor) -> CudaGraphs | None:
    """The graphs of a model's imagine; None where each kernel has to be launched.

    That is with ``KAIROS_KERNELS=eager`` or ``torch``, where weights aren't frozen or somebody wants a gradient, for a
    state that isn't this model's, under torch.compile, forward-mode AD and torch.func's transforms, and once a capture
    has failed.
    Weights may be written in place. Other settings of torch, such as TF32, stay as they were when a graph was captured,
    until a ``forget``.
    """
    if not actions.is_cuda or _failed or torch.compiler.is_compiling() or under_transform():
        return None
    if kernel_choice() in ("eager", "torch") or needs_grad(actions, *state.tensors.values()):
        return None
    form = made.get(model)
    if not isinstance(form, CudaGraphs) or form.stale(model):
        forget(model)
        if any(p.requires_grad for p in model.parameters()):
            return None
        form = made[model] = CudaGraphs(model)
    return form if form.takes(state) else None


class CaptureCache(Generic[T]):
    """What is worth its making only for who comes again, of the last ``most`` keys that were asked for.

    It is made the second time that a key finds it missing; and the 4th, the 8th, ...: who goes round more than ``most``
    keys would do little else.
    """

    def __init__(self, most: int):
        self._most, self._missed, self._made = most, Counter[Hashable](), OrderedDict[Hashable, T]()

    def get(self, key: Hashable, make: Callable[[], T]) -> T | None:
        if key in self._made:
            self._made.move_to_end(key)
            return self._made[key]
        self._missed[key] += 1
        missed = self._missed[key]
        if missed == 1 or missed & (missed - 1):
            return None
        while len(self._made) >= self._most:  # before there is a new one, which wants the memory
            self._made.popitem(last=False)
        self._made[key] = make()
        return self._made[key]


class CudaGraphs(WeightCache):
    """One model's graphs, by batch, K, kind of dream and precision."""

    def __init__(self, model: Any):
        super().__init__(model)
        self._graphs = CaptureCache[CudaGraph | None](MOST)

    def imagine(
        self, model: Any, state: LatentState, actions: Tensor, *, decode: bool, sampled: bool, flow_steps: int
    ) -> tuple[LatentState, Imagined] | None:
        """As ``WorldModel.imagine``, or None where no graph has it or something isn't as it must be."""
        low = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        key = (*actions.shape[:2], sampled, flow_steps, low)
        with _lock, torch.cuda.device(actions.device):
            graph = self._graphs.get(key, lambda: _captured(model, state, actions, sampled, flow_steps, low))
            if graph is None or (done := graph.replay(state, actions)) is None:
                return None
        state, imagined = done
        return state, imagined if decode else imagined._replace(obs=None)


def _captured(model: Any, *args: Any) -> CudaGraph | None:
    """None, and none ever after, where it can't be; if more is wrong, launching each kernel will say so."""
    graph = torch.cuda.CUDAGraph()
    try:
        return CudaGraph(graph, model, *args)
    except Exception as error:
        _failed.append(graph)
        print(f"kairos_gym dreams without CUDA graphs, which is slower: {error}", file=sys.stderr)
        return None


class CudaGraph:
    """One imagine with all that it reads and writes, captured."""

    @torch.inference_mode(False)  # its tensors serve whoever replays it: others are written in inference mode only
    @torch.no_grad()
    def __init__(
        self,
        graph: torch.cuda.CUDAGraph,
        model: Any,
        state: LatentState,
        actions: Tensor,
        sampled: bool,
        flow_steps: int,
        low: torch.dtype | None,
    ):
        self._state = LatentState(
            {name: t.clone(memory_format=torch.contiguous_format) for name, t in state.tensors.items()}
        )
        self._actions = actions.clone(memory_format=torch.contiguous_format)
        self._graph, side = graph, torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        # What is begun here ends here, also where a capture fails half-way. A cast of weights that autocast kept would
        # not see them change. Other threads may do as they like meanwhile.
        with (
            torch.cuda.stream(side),
            torch.autocast("cuda", dtype=low, enabled=low is not None, cache_enabled=False),
            held() as self._constants,
        ):
            model.imagine_unchecked(
                self._state, self._actions, sampled, flow_steps
            )  # what libraries do at first can't be captured
            with torch.cuda.graph(self._graph, stream=side, capture_error_mode="thread_local"):
                self._ready = model.accepts(self._state, self._actions)
                self._after, self._imagined = model.imagine_unchecked(self._state, self._actions, sampled, flow_steps)
        torch.cuda.current_stream().wait_stream(side)

    def replay(self, state: LatentState, actions: Tensor) -> tuple[LatentState, Imagined] | None:
        """Of others of the same form; None where they are not ready."""
        for name, own in self._state.tensors.items():
            own.copy_(state[name])
        self._actions.copy_(actions)
        self._graph.replay()
        after = LatentState({name: t.clone() for name, t in self._after.tensors.items()})
        obs, reward, terminated, _ = self._imagined
        imagined = Imagined(obs.clone(), reward.clone(), terminated.clone())
        # This waits for the copies too, so whoever is next, on whatever stream, finds the graph's tensors free.
        return (after, imagined) if bool(self._ready) else None
