"""Who sees whom in the windows, against the rule written as a loop; and attention against torch's own."""

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from world_model.ops.layout import Layout
from world_model.ops.window_attention import attend, visible


@given(
    clean=st.integers(0, 7),
    starts=st.sets(st.integers(0, 7), max_size=3),
    chunk=st.integers(1, 3),
    stride=st.integers(1, 3),
    taps=st.integers(1, 3),
    remembers=st.booleans(),
    group=st.integers(1, 3),
)
@settings(max_examples=60)
def test_visible_is_the_rule(
    clean: int, starts: set[int], chunk: int, stride: int, taps: int, remembers: bool, group: int
) -> None:
    assume(clean or starts)
    layout = Layout(clean, tuple(sorted(starts)), chunk)
    reach, ahead = stride * taps, chunk - 1
    past = reach if remembers else 0
    # A frame is (time, the chunk it is denoised in or None); memory and evidence are clean.
    own = [(t, None) for t in range(clean)] + [(start + i, start) for start in layout.starts for i in range(chunk)]
    keys = [(t, None) for t in range(-past, 0)] + own
    select, mask = visible(layout, past, stride, reach, group, ahead, torch.device("cpu"), torch.float32)
    assert layout.frames == len(own)
    assert mask.shape == (len(own) * group, len(keys) * group) and select.shape == (reach + ahead + 1, mask.numel())
    select = select.unflatten(-1, mask.shape)
    for r, (now, noisy) in enumerate(own):
        for m, (then, noisy_key) in enumerate(keys):
            if noisy_key is not None or (then == now and noisy is None):  # itself, a noisy one its whole chunk
                seen = noisy_key == noisy
            else:
                before = now if noisy is None else noisy
                seen = then < before and (now - then) in range(stride, reach + 1, stride)
            rows, columns = slice(r * group, (r + 1) * group), slice(m * group, (m + 1) * group)
            assert (mask[rows, columns] == (0.0 if seen else -torch.inf)).all(), (now, noisy, then, noisy_key)
            expected = torch.zeros(reach + ahead + 1)
            if seen:
                expected[min(now - then, reach) + ahead] = 1  # a chunk longer than the window shares a bias there
            assert (select[:, rows, columns] == expected[:, None, None]).all(), (now, noisy, then, noisy_key)


def test_attend_is_softmax_attention_over_past_and_own() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v, past_k, past_v = (torch.randn(2, 3, n, 4, generator=g, dtype=torch.float64) for n in (5, 5, 5, 7, 7))
    bias = torch.randn(3, 5, 12, generator=g, dtype=torch.float64)
    expected = F.scaled_dot_product_attention(q, torch.cat([past_k, k], 2), torch.cat([past_v, v], 2), attn_mask=bias)
    torch.testing.assert_close(attend(q, k, v, bias, (past_k, past_v)), expected)
    own = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[..., 7:])
    torch.testing.assert_close(attend(q, k, v, bias[..., 7:]), own)
