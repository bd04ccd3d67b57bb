"""In which order the reads of a delta rule that is written by chunks are answered."""

from __future__ import annotations

from collections.abc import Sequence


def reads_by_chunk(at: Sequence[int], chunks: int, size: int) -> tuple[list[int], list[int], list[int]]:
    """Reads after ``at[r]`` keys -> order [R], seen [R], first [chunks+1].

    order: which they are, in the order of time. seen: how many keys of its chunk each sees, in that order. first: from
    which one on they are a chunk's. Chunks have ``size`` keys; a read belongs to the chunk whose last key it saw, those
    before any key to the first.
    """
    of = [max(n - 1, 0) // size for n in at]
    order = sorted(range(len(at)), key=at.__getitem__)
    seen = [at[r] - of[r] * size for r in order]
    return order, seen, [sum(c < chunk for c in of) for chunk in range(chunks + 1)]
