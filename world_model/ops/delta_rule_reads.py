"""The order in which a chunked delta rule serves its reads."""

from __future__ import annotations

from collections.abc import Sequence


def reads_by_chunk(at: Sequence[int], chunks: int, size: int) -> tuple[list[int], list[int], list[int]]:
    """Sort the reads, of which read r comes after ``at[r]`` keys -> order [R], counts [R], first [chunks+1].

    order: the reads' indices in time order. counts: how many keys of its chunk each of them sees. first: the position
    in ``order`` of each chunk's first read. A chunk has ``size`` keys; a read belongs to the chunk of the last key that
    it sees, or to the first chunk if it sees none.
    """
    chunk_of = [max(n - 1, 0) // size for n in at]
    order = sorted(range(len(at)), key=at.__getitem__)
    counts = [at[r] - chunk_of[r] * size for r in order]
    return order, counts, [sum(c < chunk for c in chunk_of) for chunk in range(chunks + 1)]
