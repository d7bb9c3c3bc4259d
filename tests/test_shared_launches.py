# SPDX-License-Identifier: Apache-2.0
"""Layers of one kind share a step's launches: each still writes its own cache and attends to its own tensors.

Every layer is served twice: with launches that earlier layers of the step bound, and with a step of its own. Both are the same
kernels on the same tensors, so both are equal to the bit; what they mean is tested elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import kernel_cases as cases
import kernel_checks as checks
import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm")

from prefill_cases import Flash, codec_of, requests_of

from kvsplice_kernels import dispatch
from kvsplice_kernels.encode import prepare
from vllm_kvsplice.serving import cached_prefill, routes, triton_path
from vllm_kvsplice.serving.attention_layer import Bases, LayerCodec
from vllm_kvsplice.serving.metadata import Prefills, Requests

CASE = cases.Case(head_dim=32, group=1, k=((8, 32),), v=((4, 32),), seq_lens=(20, 3), query_lens=(2, 3))


class Layer(NamedTuple):
    codec: LayerCodec
    tensors: triton_path.Tensors
    query: Tensor
    fresh: tuple[Tensor, Tensor]
    kv_cache: Tensor


def layer(batch: cases.Batch, seed: int, **changes: Any) -> Layer:
    """A layer of its own projector, activations and cache, under the block table of ``batch``."""
    g = torch.Generator().manual_seed(seed)
    sides = {side: cases.make_basis(CASE, batch.layout.rank(side), g, cases.DEVICE) for side in ("k", "v")}
    bases = Bases(*sides["k"], *sides["v"])
    rows = sum(CASE.query_lens)

    def draw(heads: int) -> Tensor:
        return torch.randn(rows, heads, CASE.head_dim, generator=g).to(CASE.dtype).to(cases.DEVICE)

    kv_cache = torch.randint(0, 120, batch.kv_cache.shape, generator=g, dtype=torch.uint8).to(cases.DEVICE)
    codec = replace(codec_of(CASE), **changes)
    heads = CASE.num_kv_heads
    return Layer(
        codec,
        triton_path.Tensors(bases, prepare(*bases)),
        draw(heads * CASE.group),
        (draw(heads), draw(heads)),
        kv_cache,
    )


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The kernels that were bound so far."""
    seen: list[str] = []
    original = dispatch.Bound.__init__

    def init(self: dispatch.Bound, kernel: Any, *args: Any, **constants: Any) -> None:
        seen.append(kernel.__name__)
        original(self, kernel, *args, **constants)

    monkeypatch.setattr(dispatch.Bound, "__init__", init)
    yield seen


def new_slots(batch: cases.Batch) -> Tensor:
    """Slots of each request's last query_len tokens."""
    ends = torch.tensor(CASE.seq_lens).cumsum(0).tolist()
    return torch.cat([batch.slot_mapping[end - q : end] for end, q in zip(ends, CASE.query_lens, strict=True)])


def decode(x: Layer, batch: cases.Batch, requests: Requests, written: bool) -> tuple[Tensor, Tensor]:
    cache, out = x.kv_cache.clone(), torch.full_like(x.query, float("nan"))
    own = (*x.fresh, new_slots(batch)) if written else None
    triton_path.decode(x.codec, x.tensors, x.query, own, cache, requests, out)
    return cache, out


def prefill(x: Layer, batch: cases.Batch, requests: Prefills, written: bool) -> tuple[Tensor, Tensor]:
    """The latent kernel, which writes as well, or a write before it."""
    cache, out = x.kv_cache.clone(), torch.full_like(x.query, float("nan"))
    own = (*x.fresh, new_slots(batch))
    if not written:
        triton_path.write(x.codec, x.tensors, *own[:2], cache, own[2], requests.shared)
    longest = max(CASE.query_lens)
    given = own if written else None
    triton_path.attend_codes(x.codec, x.tensors, x.query, given, cache, requests, out, 2, False, longest)
    return cache, out


def expand(x: Layer, batch: cases.Batch, requests: Prefills) -> tuple[Tensor, Tensor]:
    """Expanded codes beside the first chunk's fresh keys and values."""
    out = torch.full_like(x.query, float("nan"))
    pieces = cached_prefill.plan(x.codec, requests, True, x.query.device)
    assert pieces is not None
    flash: Any = (Flash(), 3)
    cached_prefill.attend(x.codec, x.tensors.bases, x.query, x.fresh, x.kv_cache, requests, out, pieces, flash)
    return x.kv_cache, out


SERVES: dict[str, Any] = {
    "decode": (lambda x, batch, requests: decode(x, batch, requests, False), 3),
    "write-and-decode": (lambda x, batch, requests: decode(x, batch, requests, True), 3),
    "latent-after-write": (lambda x, batch, requests: prefill(x, batch, requests, False), 4),
    "write-and-latent": (lambda x, batch, requests: prefill(x, batch, requests, True), 3),
    "expanded": (expand, 2),
}


@pytest.mark.parametrize("name", SERVES)
def test_a_layer_gets_what_it_would_get_alone(name: str, bound: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "latent_is_faster", lambda *args: False)
    monkeypatch.setattr(triton_path, "workspace", nan_workspace)
    monkeypatch.setattr(cached_prefill, "workspace", nan_workspace)
    serve, launches = SERVES[name]
    batch = cases.make_batch(CASE, filled=False)
    first, second = layer(batch, 1), layer(batch, 2)
    # The third layer is of another kind by its codec, the fourth by its tensors' strides and the fifth by its cache's.
    third = layer(batch, 3, scale=0.5)
    fourth = layer(batch, 4)
    query, *fresh = (checks.with_gaps(x)[:-1] for x in (fourth.query, *fourth.fresh))
    fourth = fourth._replace(query=query, fresh=tuple(fresh))
    fifth = layer(batch, 5)
    fifth = fifth._replace(kv_cache=fifth.kv_cache.transpose(0, 1).contiguous().transpose(0, 1))
    step, counts, answers = requests_of(batch), [], []
    for x in (first, second, third, fourth, fifth, second):
        before = len(bound)
        cache, out = serve(x, batch, step)
        counts.append(len(bound) - before)
        alone = serve(x, batch, requests_of(batch))
        assert torch.equal(cache, alone[0]) and torch.equal(out, alone[1]) and out.isfinite().all()
        answers.append(out)
    assert counts == [launches, 0, launches, launches, launches, 0]
    assert not torch.equal(answers[0], answers[1]) and torch.equal(answers[1], answers[5])


def test_a_layer_that_reads_another_s_cache_shares_nothing_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has neither a write nor fresh keys of its own, in a step in which the others have both."""
    monkeypatch.setattr(triton_path, "workspace", nan_workspace)
    batch = cases.make_batch(CASE, filled=False)
    step, x = requests_of(batch), layer(batch, 1)
    cache, out = decode(x, batch, step, True)
    sharing = x._replace(kv_cache=cache)
    untouched, again = decode(sharing, batch, step, False)
    assert torch.equal(untouched, cache) and torch.equal(again, out)
    assert torch.equal(decode(x, batch, step, True)[1], out)


def nan_workspace(*shapes: tuple[tuple[int, ...], torch.dtype]) -> list[Tensor]:
    return [torch.full(s, float("nan"), dtype=d, device=cases.DEVICE) for s, d in shapes]
