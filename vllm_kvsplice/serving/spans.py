# SPDX-License-Identifier: Apache-2.0
"""A step's prefills over cached context cut into spans whose keys fit the scratch, by host numbers alone.

In: lengths of the requests. Out: spans, runs of whole requests, or parts of one that does not fit. Next: ``cached_prefill``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvsplice_kernels.expand_cached import START_MULTIPLE

Ints = NDArray[np.int64]


class Span(NamedTuple):
    """A piece as host numbers: requests [first, last) of the step with some keys of each."""

    first: int
    last: int
    starts: Ints  # [last - first] first token that gets a row of scratch
    firsts: Ints  # first token that is read
    stops: Ints  # one past the last
    causal: bool  # whether the requests' own tokens are among the keys
    merged: bool  # whether earlier pieces hold other keys of the same request


def cut(query_lens: Ints, seq_lens: Ints, window: int | None, capacity: int) -> list[Span]:
    """Cut a step into spans of at most ``capacity`` keys, a multiple of START_MULTIPLE. The loop is over spans.

    Args:
        query_lens, seq_lens: [B], new tokens and all tokens of each request.
        window: a query sees keys at distance < window; a request's visible keys must fit then, see scratch_tokens.
    """
    firsts = np.maximum(seq_lens - query_lens - window + 1, 0) if window else np.zeros_like(seq_lens)
    starts = firsts // START_MULTIPLE * START_MULTIPLE
    total = np.concatenate([[0], np.cumsum(seq_lens - starts)])
    spans: list[Span] = []
    first = 0
    while first < len(seq_lens):
        last = int(np.searchsorted(total, total[first] + capacity, side="right")) - 1
        if last > first:
            part = slice(first, last)
            spans.append(Span(first, last, starts[part], firsts[part], seq_lens[part], True, False))
        elif window:
            raise ValueError(f"capacity: expected room for a window of {window} and the query tokens, got {capacity}")
        else:
            last = first + 1
            spans += _cut_long(first, int(seq_lens[first]), capacity)
        first = last
    return spans


def _cut_long(request: int, seq_len: int, capacity: int) -> list[Span]:
    """One request with more keys than fit: the last ones, its own tokens among them, then the context before those."""
    split = round_up(seq_len - capacity)
    bounds = [(split, seq_len), *((a, min(a + capacity, split)) for a in range(0, split, capacity))]
    spans = []
    for a, b in bounds:
        start, stop = np.array([a]), np.array([b])
        spans.append(Span(request, request + 1, start, start, stop, b == seq_len, b != seq_len))
    return spans


def round_up(tokens: int) -> int:
    """To a multiple of START_MULTIPLE."""
    return -(-tokens // START_MULTIPLE) * START_MULTIPLE
