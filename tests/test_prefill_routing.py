# SPDX-License-Identifier: Apache-2.0
"""Which keys a prefill reads in which call, how much scratch it takes, and which path serves it: host numbers, no kernel."""

from __future__ import annotations

from dataclasses import replace as changed
from types import SimpleNamespace
from typing import Any

import kernel_cases as cases
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("vllm")

from prefill_cases import attention, codec_of, num_bytes, requests_of
from result_files import RESULTS

from kvsplice_kernels.expand_cached import START_MULTIPLE
from kvsplice_kernels.launch import Launch
from kvsplice_kernels.reduce_expand import reduce_tiles
from vllm_kvsplice.serving import cached_prefill, fallback_attention, routes, triton_path, warm_up
from vllm_kvsplice.serving.attention_layer import Limits
from vllm_kvsplice.serving.cached_prefill import scratch_shapes, scratch_tokens
from vllm_kvsplice.serving.metadata import Prefills
from vllm_kvsplice.serving.spans import cut

# ---------------------------------------------------------------- host numbers
lengths = st.lists(st.tuples(st.integers(0, 90), st.integers(0, 700)), min_size=1, max_size=12)


@given(lengths, st.none() | st.integers(1, 60), st.integers(3, 9))
def test_every_visible_key_lies_in_one_span(requests: list[tuple[int, int]], window: int | None, blocks: int) -> None:
    capacity = blocks * START_MULTIPLE
    query_lens = np.array([q for q, _ in requests])
    seq_lens = query_lens + [context for _, context in requests]
    spans = cut(query_lens, seq_lens, window, capacity)
    seen: dict[int, list[tuple[int, int]]] = {b: [] for b in range(len(requests))}
    for span in spans:
        assert 0 <= (span.stops - span.starts).sum() <= capacity and not (span.starts % START_MULTIPLE).any()
        assert span.merged is not span.causal
        for b, start, first, stop in zip(
            range(span.first, span.last), span.starts, span.firsts, span.stops, strict=True
        ):
            assert start <= first <= stop or start == first
            assert stop == seq_lens[b] if span.causal else stop <= seq_lens[b] - query_lens[b]
            assert not span.causal or first <= seq_lens[b] - query_lens[b]  # its own tokens are whole
            seen[b].append((int(first), int(stop)))
    for b, (q, n) in enumerate(zip(query_lens, seq_lens, strict=True)):
        bounds = sorted(seen[b])
        wanted = max(0, n - q - window + 1) if window else 0
        assert bounds[0][0] == wanted and bounds[-1][1] == n
        assert all(a[1] == c[0] for a, c in zip(bounds, bounds[1:], strict=False))
    keys = sum(int((span.stops - span.starts).sum()) for span in spans)
    assert len(spans) <= 2 * keys // capacity + 2  # of chunks, whatever the number of requests


def test_a_window_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(ValueError, match="^capacity: expected room for a window of 500"):
        cut(np.array([8]), np.array([900]), 500, 256)


def test_scratch_is_bounded_by_the_batch_and_not_by_the_context() -> None:
    codec = codec_of(changed(cases.ATTENTION["near-lossless-128"], num_kv_heads=4))

    def tokens(window: int | None = None, seqs: int = 256, batched: int = 8192, length: int = 131072) -> int:
        return scratch_tokens(changed(codec, sliding_window=window), Limits(seqs, batched, length))

    assert tokens() == tokens(length=10**7) == tokens(window=4096) == 32768
    assert tokens(batched=65536) == 65536 + START_MULTIPLE  # a step's own tokens
    assert tokens(window=30000) == -(-(30000 + 8192 + START_MULTIPLE) // 64) * 64  # and what its window sees
    assert tokens(seqs=2, length=1000) == 2 * 1024  # never more than the engine can hold
    bf16 = torch.bfloat16
    assert num_bytes(scratch_shapes(codec, Limits(256, 8192, 32768), bf16)) == 64 << 20  # K and V alone
    merges = num_bytes(scratch_shapes(codec, Limits(256, 8192, 131072), bf16)) - (64 << 20)
    assert merges == 8192 * 28 * (128 * 2 + 4)  # and one chunk's partial output and lse


# ---------------------------------------------------------------- which path
@pytest.fixture
def an_h200(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(routes, "tuned", lambda *args: Launch(4, rows=64, programs=2))


@pytest.fixture
def columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(routes, "tuned", lambda *args: None)


def expanded(query: int, context: int, group: int = 7, copies: int = 1, first: int = 0) -> bool:
    """Whether requests of ``query`` tokens over a context, and one whose ``first`` tokens are all it has, are expanded."""
    query_lens = [query] * copies + [first] * bool(first)
    lens = torch.tensor([query + context] * copies + [first] * bool(first))
    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    codec = codec_of(cases.Case(seq_lens=(1,), query_lens=(1,), num_kv_heads=4, group=group))
    fresh = [False] * copies + [True] * bool(first)
    requests = Prefills(len(query_lens), int(starts[-1]), max(query_lens), query + context, starts, lens, starts[None],
                        starts, fresh, lens, Limits(99, 8192, 10**6))  # fmt: skip
    return cached_prefill.plan(codec, requests, True, torch.device("cpu")) is not None


def test_on_hopper_short_ends_stay_latent(an_h200: None) -> None:
    assert not expanded(16, 32768) and not expanded(64, 32768) and not expanded(128, 8192)
    assert expanded(256, 8192) and expanded(512, 8192) and not expanded(64, 8192, group=1)
    assert not expanded(16, 2048) and not expanded(16, 8192, copies=4) and not expanded(16, 2048, copies=8)
    assert expanded(8, 2048, copies=200)  # above the tokens that the latent kernel has scratch for
    assert expanded(16, 32768, first=900) and not expanded(16, 32768, first=40)  # beside 900 there is none for splits


def test_the_faster_way_is_taken_wherever_both_were_measured(an_h200: None) -> None:
    us = {(r["chunk"], r["way"]): r["graph_us"] for r in RESULTS["prefill-ways-h200"]["rows"]}
    chunks = [chunk for chunk, way in us if way == "latent"]
    assert len(chunks) == 12
    for chunk in chunks:
        copies, query, context = map(int, chunk.split("x"))
        assert expanded(query, context, copies=copies) == (us[chunk, "expanded"] < us[chunk, "latent"]), chunk


def test_elsewhere_few_rows_stay_latent(columns: None) -> None:
    assert not expanded(16, 32768) and expanded(64, 32768) and not expanded(36, 1024)
    assert not expanded(8, 8192, group=1) and expanded(128, 8192, group=1)


def splits(query: int, context: int, copies: int = 1, heads: int = 4, known: bool = True) -> int:
    starts = torch.arange(0, query * copies + 1, query, dtype=torch.int32)
    lens = torch.full((copies,), query + context)
    requests = Prefills(copies, query * copies, query, 10**6, starts, lens, starts[None], starts, [False] * copies,
                        lens if known else None)  # fmt: skip
    codec = codec_of(cases.Case(seq_lens=(1,), query_lens=(1,), num_kv_heads=heads, group=7))
    return routes.cut_keys(codec, requests, False, torch.device("cpu")).splits


def test_first_chunks_count_where_they_are_not_skipped(an_h200: None) -> None:
    starts = torch.tensor([0, *range(8, 8 + 29 * 9, 9)], dtype=torch.int32)
    lens, first = torch.tensor([2056] + [9] * 28), [False] + [True] * 28
    requests = Prefills(29, int(starts[-1]), 9, 2056, starts, lens, starts[None], starts, first, lens)
    codec = codec_of(cases.Case(seq_lens=(1,), query_lens=(1,), num_kv_heads=4, group=7))
    skipped, whole = (routes.cut_keys(codec, requests, with_fresh, torch.device("cpu")) for with_fresh in (True, False))
    assert (skipped.splits, whole.splits) == (1, 1) and whole.fill == 29 * skipped.fill == 29 * 4 / 264


def test_few_rows_over_long_context_split_the_keys(columns: None) -> None:
    assert splits(8, 32768) == 64 and splits(37, 32768) == 16  # 1 and 5 tiles of 9 tokens
    assert splits(8, 500) == 1 and splits(8, 504) == 4 and splits(8, 1100) == 8  # four tiles of keys or more in each
    assert splits(8, 1000, known=False) == 64
    assert splits(8, 32768, heads=128) == 4 and splits(8, 32768, heads=128, copies=2) == 1  # the GPU is full without
    assert splits(256, 32768) == 4 and splits(257, 32768) == 1  # more latents than scratch holds


def test_on_hopper_the_splits_are_what_two_programs_of_a_multiprocessor_hold(an_h200: None) -> None:
    assert splits(8, 32768) == 64 and splits(16, 32768) == 32 and splits(37, 32768) == 8
    assert splits(36, 32768) == 16 and splits(16, 32768, heads=16) == 8
    assert splits(8, 1015) == 1 and splits(8, 1016) == 4 and splits(8, 2048) == 8  # tiles of 64 keys


def test_a_step_that_fills_the_gpu_several_times_takes_as_long(an_h200: None) -> None:
    work, key_us = routes.Work(longest=4096, keys=4096, row_keys=10**6, pieces=1), routes.ROWS_KEY_US
    faster = [routes.latent_is_faster(routes.Cut(1, fill, key_us), work, 4) for fill in (0.1, 1.0, 4.0)]
    assert faster == [False, False, False]
    work = work._replace(row_keys=10**8)
    faster = [routes.latent_is_faster(routes.Cut(1, fill, key_us), work, 4) for fill in (0.1, 1.0, 4.0, 8.0)]
    assert faster == [True, True, True, False]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("heads", [1, 4])
def test_every_variant_of_a_split_prefill_is_compiled_before_the_first_request(head_dim: int, heads: int) -> None:
    """Over all steps that cut_keys may cut: reduce_expand's variants are its split count and its tiles."""
    codec = codec_of(
        cases.Case(
            seq_lens=(1,),
            query_lens=(1,),
            num_kv_heads=heads,
            group=7,
            head_dim=head_dim,
            k=((8, head_dim),),
            v=((8, head_dim),),
        )
    )

    def variant(tokens: int, splits: int) -> Any:
        tiles = reduce_tiles(tokens * codec.num_heads, 7, routes.LONG_STEP, head_dim, head_dim, splits, False)
        return splits, tiles

    steps = warm_up.split_steps(codec, 8192, torch.device("cpu"))
    compiled = {variant(*step) for step in steps}
    most = routes.LATENT_TOKENS
    assert compiled == {variant(t, s) for s in (1, *routes.PREFILL_SPLITS) for t in range(1, most // s + 1)}
    assert len(steps) <= 21


class TestRouting:
    """triton_path.prefill: what it hands to FlashAttention, to expanded codes and to the latent kernel."""

    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        seen: list[Any] = []
        monkeypatch.setattr(triton_path, "flash_attends", lambda *args: ("flash", 3))
        monkeypatch.setattr(triton_path, "write", lambda *args: seen.append("write"))
        monkeypatch.setattr(triton_path, "fresh_attention", lambda *args: seen.append("fresh"))
        monkeypatch.setattr(cached_prefill, "attend", lambda *args: seen.append(("expanded", args[3] is not None)))

        def attend_codes(*args: Any, **kw: Any) -> None:
            assert args[3] is not None  # it stores the step's keys and values itself
            seen.append(("latent", kw["skip_first_chunks"]))

        monkeypatch.setattr(triton_path, "attend_codes", attend_codes)
        return seen

    def prefill(self, fresh: bool, seq_lens: tuple[int, ...], query_lens: tuple[int, ...], **changes: Any) -> None:
        batch = cases.make_batch(cases.Case(seq_lens=seq_lens, query_lens=query_lens), filled=False)
        requests = requests_of(batch)
        for name, value in changes.items():
            setattr(requests, name, value)
        own: Any = (batch.key, batch.value) if fresh else None
        triton_path.prefill(
            codec_of(batch.case),
            triton_path.Tensors(None, None),
            batch.query,
            (batch.key, batch.value, batch.slot_mapping),
            own,
            batch.kv_cache,
            requests,
            batch.query,
        )  # type: ignore[arg-type]

    def test_first_chunks_alone_are_flash_attention(self, calls: list[Any]) -> None:
        self.prefill(True, (200, 30), (200, 30))
        assert calls == ["write", "fresh"]

    def test_latent_prefill_expands_first_chunks_too(self, calls: list[Any]) -> None:
        self.prefill(False, (200, 30), (200, 30))
        assert calls == ["write", ("expanded", False)]

    def test_mixed_steps_take_one_way(self, calls: list[Any]) -> None:
        self.prefill(True, (400, 30), (200, 30))
        assert calls == ["write", ("expanded", True)]

    def test_a_few_rows_beside_first_chunks_are_written_over_them(self, calls: list[Any]) -> None:
        self.prefill(True, (80, 30), (2, 30))
        assert calls == ["fresh", ("latent", True)]

    def test_without_host_lengths_codes_are_attended(self, calls: list[Any]) -> None:
        self.prefill(True, (400, 30), (200, 30), seq_lens_cpu=None, first_chunk=[False, False])
        assert calls == [("latent", False)]

    def test_without_flash_attention_codes_are_attended(
        self, calls: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(triton_path, "flash_attends", lambda *args: None)
        self.prefill(True, (400, 30), (200, 30))
        assert calls == ["fresh", ("latent", True)]


def test_layers_of_a_kind_share_one_plan() -> None:
    batch = cases.make_batch(cases.Case(seq_lens=(700,), query_lens=(300,)), filled=False)
    requests, codec = requests_of(batch), codec_of(batch.case)
    first = cached_prefill.plan(codec, requests, False, batch.query.device)
    assert first is not None and cached_prefill.plan(codec, requests, False, batch.query.device) is first
    windowed = cached_prefill.plan(changed(codec, sliding_window=33), requests, False, batch.query.device)
    assert windowed is not None and windowed[0].num_keys < first[0].num_keys


def test_heads_wider_than_flash_attention_s_stay_latent() -> None:
    case = cases.Case(head_dim=264, k=((8, 264),), v=((8, 264),), seq_lens=(700,), query_lens=(300,))
    batch = cases.make_batch(case, filled=False)
    assert cached_prefill.plan(codec_of(case), requests_of(batch), False, batch.query.device) is None


# ---------------------------------------------------------------- no FlashAttention
@pytest.mark.parametrize("changes", [dict(), dict(window=7), dict(soft_cap=2.0)], ids=["plain", "window", "soft-cap"])
def test_first_chunks_without_flash_attention(changes: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    fallback_attention.xformers_ops.cache_clear()
    case = cases.Case(seq_lens=(40, 30, 9), query_lens=(40, 4, 9), dtype=torch.float32, **changes)
    batch = cases.make_batch(case, "cpu", filled=False)
    T, requests = len(batch.query), requests_of(batch)
    fresh, out = (batch.key[:T], batch.value[:T]), torch.full_like(batch.query, float("nan"))
    with caplog.at_level("WARNING", "vllm.kvsplice"):
        for _ in range(2):
            fallback_attention.attend_first_chunks(codec_of(case), batch.query, *fresh, requests, out)
    assert caplog.text.count("vLLM has no FlashAttention") == 1 and "request by request" in caplog.text
    window = [case.window - 1, 0] if case.window else [-1, -1]
    for a, b in ((0, 40), (44, 53)):
        exact = attention(
            batch.query[a:b], *(x[a:b] for x in fresh), case.head_dim**-0.5, True, window, case.soft_cap or 0
        )[0]
        assert (out[a:b] - exact).abs().max() <= 64 * torch.finfo(torch.float32).eps * exact.abs().max()


def test_xformers_gets_grouped_heads_and_block_diagonal_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mask:
        def __init__(self, lens: list[int], window: int = 0) -> None:
            self.lens, self.window = lens, window

        def make_local_attention(self, window: int) -> Mask:
            return Mask(self.lens, window)

    def forward(q: Tensor, k: Tensor, v: Tensor, attn_bias: Mask, scale: float) -> Tensor:
        out, a = torch.empty_like(q), 0
        assert q.shape == k.shape == v.shape and q.shape[0] == 1
        for n in attn_bias.lens:
            rows = slice(a, a + n)
            flat = (x[0, rows].flatten(1, 2) for x in (q, k, v))
            out[0, rows] = attention(*flat, scale, True, [attn_bias.window - 1, 0], 0.0)[0].view(q[0, rows].shape).to(q)
            a += n
        return out

    made = SimpleNamespace(BlockDiagonalCausalMask=SimpleNamespace(from_seqlens=lambda lens, device: Mask(lens)))
    ops = SimpleNamespace(fmha=SimpleNamespace(attn_bias=made), memory_efficient_attention_forward=forward)
    monkeypatch.setattr(fallback_attention, "xformers_ops", lambda *args: ops)
    case = cases.Case(seq_lens=(12, 30), query_lens=(12, 30), window=6, group=3, dtype=torch.float32)
    batch = cases.make_batch(case, "cpu", filled=False)
    out = torch.empty_like(batch.query)
    fallback_attention.attend_first_chunks(codec_of(case), batch.query, batch.key, batch.value, requests_of(batch), out)
    for rows in (slice(0, 12), slice(12, 42)):
        exact = attention(
            batch.query[rows], batch.key[rows], batch.value[rows], case.head_dim**-0.5, True, [5, 0], 0.0
        )[0]
        assert (out[rows] - exact).abs().max() <= 16 * torch.finfo(torch.float32).eps * exact.abs().max()
