"""LatentState: select, expand, bytes and back, and nothing that changes it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from world_model.contract import State
from world_model.state import LatentState


def some_state(batch: int = 3) -> LatentState:
    x = torch.arange(batch * 4.0).reshape(2, 2, batch).permute(2, 0, 1)  # not contiguous
    odd = torch.tensor([float("nan"), -0.0, float("inf")]).repeat(batch)[:batch].double()
    return LatentState({"x": x, "odd": odd, "seed": torch.arange(batch) - 2**62, "on": torch.arange(batch) % 2 == 0})


def same_bits(a: LatentState, b: LatentState) -> bool:
    def raw(t: torch.Tensor) -> bytes:
        return t.contiguous().numpy().tobytes()

    return a.tensors.keys() == b.tensors.keys() and all(
        t.dtype == b[name].dtype and t.shape == b[name].shape and raw(t) == raw(b[name])
        for name, t in a.tensors.items()
    )


def test_keeps_the_contract() -> None:
    state = some_state(3)
    assert isinstance(state, State)
    assert state.batch == 3
    assert state.nbytes == 3 * (4 * 4 + 8 + 8 + 1)


@given(st.integers(1, 5), st.lists(st.integers(0, 4), max_size=7))
def test_select_takes_rows_in_order_with_repeats(batch: int, rows: list[int]) -> None:
    rows = [row % batch for row in rows]
    state = some_state(batch)
    taken = state.select(torch.tensor(rows, dtype=torch.int64))
    assert taken.batch == len(rows)
    for name, t in taken.tensors.items():
        for place, row in enumerate(rows):
            torch.testing.assert_close(t[place], state[name][row], rtol=0, atol=0, equal_nan=True)


@given(st.integers(1, 4), st.integers(1, 4))
def test_expand_repeats_each_dream_in_a_row(batch: int, n: int) -> None:
    state = some_state(batch)
    rows = [b for b in range(batch) for _ in range(n)]
    assert same_bits(state.expand(n), state.select(torch.tensor(rows)))
    assert state.expand(n).nbytes == n * state.nbytes


def test_a_copy_is_no_window_onto_the_original() -> None:
    state = some_state()
    before = LatentState.from_bytes(state.to_bytes())
    for copy in (state.select(torch.tensor([0, 1, 2])), state.expand(1), LatentState.from_bytes(state.to_bytes())):
        for t in copy.tensors.values():
            t.zero_()
    assert same_bits(state, before)


def test_is_immutable() -> None:
    tensors = {"x": torch.zeros(2)}
    state = LatentState(tensors)
    tensors["y"] = torch.zeros(5)
    assert set(state.tensors) == {"x"}
    with pytest.raises(AttributeError, match="immutable"):
        state.tensors = {}
    with pytest.raises(TypeError):
        state.tensors["x"] = torch.ones(2)  # type: ignore[index]
    newer = state.replace(x=torch.ones(2))
    assert newer["x"].sum() == 2 and state["x"].sum() == 0


@given(st.integers(1, 5), st.data())
def test_put_exchanges_rows(batch: int, data: st.DataObject) -> None:
    state, other = some_state(batch), some_state(batch)
    other = LatentState({name: ~t if t.dtype == torch.bool else t + 1 for name, t in other.tensors.items()})
    rows = torch.tensor(data.draw(st.lists(st.integers(0, batch - 1), min_size=1, unique=True)))
    both, before = state.put(rows, other.select(rows)), some_state(batch)
    for b in range(batch):
        want = other if b in rows.tolist() else before
        assert same_bits(both.select(torch.tensor([b])), want.select(torch.tensor([b])))
    assert same_bits(state, before), "the old state is as it was"


@given(st.integers(1, 5))
def test_bytes_and_back_bit_for_bit(batch: int) -> None:
    state = some_state(batch)
    assert same_bits(LatentState.from_bytes(state.to_bytes()), state)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 40, -1])
def test_truncated_bytes_are_refused(keep: int) -> None:
    with pytest.raises(ValueError, match="not a whole saved state"):
        LatentState.from_bytes(some_state().to_bytes()[:keep])


@pytest.mark.parametrize(
    "blob",
    [
        b"no state at all, just a sentence",
        save({}),
        save({"x": torch.zeros(2), "y": torch.zeros(3)}),
        save({"x": torch.zeros(())}),
    ],
    ids=["text", "nothing", "two batches", "no batch"],
)
def test_bytes_of_something_else_are_refused(blob: bytes) -> None:
    with pytest.raises(ValueError, match="not a whole saved state"):
        LatentState.from_bytes(blob)


def test_tensors_must_agree_on_the_batch() -> None:
    with pytest.raises(ValueError, match=r"'x': \(2,\), 'y': \(3, 2\)"):
        LatentState({"x": torch.zeros(2), "y": torch.zeros(3, 2)})
