# SPDX-License-Identifier: Apache-2.0
"""The write and read paths below the implementation: torch against fp64, Triton (interpreted on a CPU) against torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm")

from kvsplice_kernels.encode import prepare
from vllm_kvsplice.codec.layout import LatentLayout
from vllm_kvsplice.serving import torch_path, triton_path, warm_up
from vllm_kvsplice.serving.attention_layer import Bases, LayerCodec, Limits
from vllm_kvsplice.serving.metadata import Prefills, Requests
from vllm_kvsplice.serving.routes import LATENT_TOKENS, PREFILL_SPLITS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADS, KV_HEADS, DIM, BLOCK = 4, 2, 32, 16
LAYOUT = LatentLayout.of(DIM, k=[(16, 8), (8, 24)], v=[(8, 8), (4, 16), (0, 8)])


def codec(**changes: Any) -> LayerCodec:
    arguments: dict[str, Any] = dict(
        layout=LAYOUT, bytes_per_token_head=LAYOUT.bytes_per_token_head + 4, wide_dtype=torch.bfloat16, num_heads=HEADS,
        num_kv_heads=KV_HEADS, scale=0.3, sliding_window=None, soft_cap=None,
    )  # fmt: skip
    return LayerCodec(**(arguments | changes))


def bases() -> Bases:
    def side(rank: int) -> tuple[Tensor, Tensor, Tensor]:
        rows = torch.linalg.qr(torch.randn(KV_HEADS, DIM, DIM))[0][:, :rank].contiguous()
        return rows, rows.transpose(1, 2).contiguous(), torch.randn(KV_HEADS, DIM)

    return Bases(*(x.to(DEVICE) for x in (*side(LAYOUT.rank("k")), *side(LAYOUT.rank("v")))))


class Step:
    """Requests of given context and new tokens in a poisoned cache of shuffled pages; pages wider than the layout."""

    def __init__(self, contexts: list[int], new: list[int], cell: int) -> None:
        total = [c + n for c, n in zip(contexts, new, strict=True)]
        need = [-(-t // BLOCK) for t in total]
        pages = torch.randperm(sum(need) + 3)
        self.kv_cache = torch.full((len(pages), KV_HEADS, BLOCK, cell), 0xFF, dtype=torch.uint8, device=DEVICE)
        table = torch.zeros(len(total), max(need), dtype=torch.int32)
        for b, n in enumerate(need):
            table[b, :n] = pages[sum(need[:b]) : sum(need[:b]) + n]
        self.block_table, self.contexts, self.total = table.to(DEVICE), contexts, total
        self.key, self.value = (torch.randn(2, sum(total), KV_HEADS, DIM, device=DEVICE) * 2 - 0.5).unbind()
        self.query = torch.randn(sum(new), HEADS, DIM, device=DEVICE)
        slots = [table[b, p // BLOCK] * BLOCK + p % BLOCK for b, t in enumerate(total) for p in range(t)]
        self.slots = torch.tensor(slots, dtype=torch.int64, device=DEVICE)
        self.starts = torch.tensor([0, *new]).cumsum(0).int()
        rows = [sum(total[:b]) + p for b, t in enumerate(total) for p in range(contexts[b], t)]
        self.fresh = self.key[rows], self.value[rows]

    def requests(self) -> Prefills:
        lens = torch.tensor(self.total, dtype=torch.int32, device=DEVICE)
        longest = int((self.starts[1:] - self.starts[:-1]).max())
        first = [c == 0 for c in self.contexts]
        return Prefills(len(self.total), int(self.starts[-1]), longest, max(self.total), self.starts.to(DEVICE), lens,
                        self.block_table, self.starts, first)  # fmt: skip


def dense(query: Tensor, key: Tensor, value: Tensor, c: LayerCodec) -> Tensor:
    """Causal attention of one sequence, fp64, written out."""
    q, k, v = (x.double().cpu() for x in (query, key, value))
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    logits = torch.einsum("thd,shd->hts", q, k) * c.scale
    if c.soft_cap:
        logits = c.soft_cap * torch.tanh(logits / c.soft_cap)
    T = len(q)
    distance = torch.arange(T)[:, None] - torch.arange(T)[None]
    seen = (distance >= 0) & (distance < (c.sliding_window or T))
    return torch.einsum("hts,shd->thd", logits.masked_fill(~seen, float("-inf")).softmax(-1), v)


CASES = [
    pytest.param(dict(), id="plain"),
    pytest.param(dict(sliding_window=5), id="window"),
    pytest.param(dict(soft_cap=1.5), id="soft-cap"),
    pytest.param(dict(sliding_window=300, soft_cap=1.5), id="window-across-query-blocks"),
]


@pytest.mark.parametrize("changes", CASES)
@pytest.mark.parametrize("length", [1, 5, 301], ids=lambda n: f"{n}-tokens")
def test_fresh_attention_is_attention(changes: dict[str, Any], length: int) -> None:
    c, step = codec(**changes), Step([0], [length], LAYOUT.bytes_per_token_head)
    exact = dense(step.query, step.key, step.value, c)
    out = torch_path.fresh_attention(c, step.query.cpu(), step.key.cpu(), step.value.cpu())
    assert (out - exact).abs().max() <= 64 * torch.finfo(torch.float32).eps * exact.abs().max()


def test_exact_prefill_differs_from_latent_by_the_codec_only_and_only_in_first_chunks() -> None:
    c, b, step = codec(), bases(), Step([0, 19, 0], [17, 6, 1], LAYOUT.bytes_per_token_head)
    b, step.kv_cache = Bases(*(x.cpu() for x in b)), step.kv_cache.cpu()
    torch_path.write(c, b, step.key.cpu(), step.value.cpu(), step.kv_cache, step.slots.cpu())
    requests = step.requests()
    for name in ("seq_lens", "block_table", "query_start_loc"):
        setattr(requests, name, getattr(requests, name).cpu())
    query, fresh = step.query.cpu(), (step.fresh[0].cpu(), step.fresh[1].cpu())
    exact, latent = (torch.full_like(query, float("nan")) for _ in range(2))
    torch_path.prefill(c, b, query, None, fresh, step.kv_cache, requests, exact)
    torch_path.prefill(c, b, query, None, None, step.kv_cache, requests, latent)
    assert torch.equal(exact[17:23], latent[17:23]) and exact.isfinite().all()
    assert (exact[:17] - dense(query[:17], *(x[:17] for x in fresh), c)).abs().max() < 1e-5
    assert (exact[:17] - latent[:17]).abs().max() > 1e-3  # 8 dimensions of V are dropped


# ---------------------------------------------------------------- Triton
def triton(b: Bases) -> triton_path.Tensors:
    return triton_path.Tensors(b, prepare(*b))


def run(path: Any, c: LayerCodec, b: Bases, step: Step, fresh: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Write everything, then prefill; on ``device``, for torch_path's sake always the CPU."""
    cache = step.kv_cache.clone().to(device)
    b, requests = Bases(*(x.to(device) for x in b)), step.requests()
    for name in ("seq_lens", "block_table", "query_start_loc"):
        setattr(requests, name, getattr(requests, name).to(device))
    tensors: Any = triton(b) if path is triton_path else b
    path.write(c, tensors, step.key.to(device), step.value.to(device), cache, step.slots.to(device))
    out = torch.full_like(step.query, float("nan"), device=device)
    own = tuple(x.to(device) for x in step.fresh) if fresh else None
    path.prefill(c, tensors, step.query.to(device), None, own, cache, requests, out)
    return cache.cpu(), out.cpu()


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Where there is no FlashAttention, stand in for it; returns the number of requests of each call."""
    calls: list[int] = []
    real = triton_path.flash_attends

    def stand_in(q: Tensor, k: Tensor, v: Tensor, out: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
                 max_seqlen_k: int, softmax_scale: float, causal: bool, window_size: list[int], softcap: float,
                 fa_version: int) -> None:  # fmt: skip
        assert causal and torch.equal(cu_seqlens_q, cu_seqlens_k)
        calls.append(len(cu_seqlens_q) - 1)
        c = codec(scale=softmax_scale, sliding_window=window_size[0] + 1 or None, soft_cap=softcap or None)
        bounds = cu_seqlens_q.tolist()
        assert max(e - a for a, e in zip(bounds, bounds[1:], strict=False)) <= max_seqlen_q == max_seqlen_k
        for a, e in zip(bounds, bounds[1:], strict=False):
            out[a:e] = dense(q[a:e], k[a:e], v[a:e], c).to(out)

    def chosen(head_dim: int, soft_cap: float | None) -> Any:
        if DEVICE.type == "cpu":
            return stand_in, 3
        fn, version = real(head_dim, soft_cap)
        return lambda **kw: calls.append(len(kw["cu_seqlens_q"]) - 1) or fn(**kw), version

    monkeypatch.setattr(triton_path, "flash_attends", chosen)
    return calls


@pytest.mark.parametrize("changes", CASES)
def test_triton_reads_and_writes_as_torch_does(changes: dict[str, Any]) -> None:
    c, b, step = codec(**changes), bases(), Step([0, 37, 3], [20, 3, 1], LAYOUT.bytes_per_token_head + 4)
    cache, out = run(triton_path, c, b, step, False, DEVICE)
    expected_cache, expected = run(torch_path, c, b, step, False, torch.device("cpu"))
    # Projections are rounded by different summation orders, so a code may land on its neighbour; most do not.
    assert (cache != expected_cache).float().mean() < 0.01
    assert (out - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize(
    "contexts, calls",
    [
        pytest.param([0, 0], [2], id="all-first-chunks"),
        pytest.param([0, 18], [2], id="mixed"),
        pytest.param([18, 5], [], id="none"),
    ],
)
def test_triton_gives_first_chunks_to_flash_attention(contexts: list[int], calls: list[int], flash: list[int]) -> None:
    c, b, step = codec(), bases(), Step(contexts, [9, 4], LAYOUT.bytes_per_token_head)
    if DEVICE.type == "cuda":
        step.query, step.fresh = step.query.bfloat16(), (step.fresh[0].bfloat16(), step.fresh[1].bfloat16())
    _, out = run(triton_path, c, b, step, True, DEVICE)
    _, expected = run(torch_path, c, b, step, True, torch.device("cpu"))
    assert flash == calls
    assert (out - expected).abs().max() < 0.02 * expected.abs().max()


def test_triton_decodes_with_splits() -> None:
    c, b, step = codec(), bases(), Step([70, 1], [2, 2], LAYOUT.bytes_per_token_head)
    cache, _ = run(triton_path, c, b, step, False, DEVICE)
    got, expected = (torch.full_like(step.query, float("nan"), device=d) for d in (DEVICE, "cpu"))
    requests = Requests(
        2, 4, 2, 4096, *(getattr(step.requests(), n) for n in ("query_start_loc", "seq_lens", "block_table"))
    )
    triton_path.decode(c, triton(b), step.query, None, cache.to(DEVICE), requests, got)
    on_cpu = Requests(
        2, 4, 2, 4096, *(getattr(requests, n).cpu() for n in ("query_start_loc", "seq_lens", "block_table"))
    )
    torch_path.decode(c, Bases(*(x.cpu() for x in b)), step.query.cpu(), None, cache, on_cpu, expected)
    assert (got.cpu() - expected).abs().max() < 0.01 * expected.abs().max()


@pytest.mark.parametrize("changes", CASES[:3])
def test_warming_up_launches_every_kernel_and_leaves_no_trace(changes: dict[str, Any]) -> None:
    warm_up.warm_up(codec(**changes), 48, torch.bfloat16, DEVICE, 2, Limits(3, 40, 300))


def test_decode_steps_are_one_for_each_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few; of every query length; and the split counts that serving would choose are among theirs, to a power of two."""
    monkeypatch.setattr(triton_path, "multiprocessors", lambda device: 132)
    c, limits = codec(), Limits(256, 8192, 32768)
    steps = warm_up.decode_steps(c, 16, 5, limits, DEVICE)
    assert len(steps) < 60 and {query_len for _, query_len in steps} >= {1, 2, 3, 5}

    def rounded(num_reqs: int) -> int:
        return (triton_path.num_splits(c, num_reqs, 1, limits.max_model_len, DEVICE) - 1).bit_length()

    warm = {rounded(num_reqs) for num_reqs, query_len in steps if query_len == 1}
    assert warm >= {rounded(n) for n in range(1, 257)}


def test_the_reservation_covers_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    reserved: list[int] = []

    def workspace(*shapes: tuple[tuple[int, ...], torch.dtype]) -> list[Tensor]:
        asked.append(sum(-(-torch.Size(s).numel() * d.itemsize // 256) * 256 for s, d in shapes))
        return [torch.empty(s, dtype=d) for s, d in shapes]

    monkeypatch.setattr(triton_path, "workspace", workspace)
    monkeypatch.setattr(triton_path, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(triton_path, "bind_attention", lambda *args: (lambda *tensors: None, ()))
    c, b = codec(), bases()
    triton_path.reserve(c, 40, 3, 64, 100_000, DEVICE)
    reserved, asked[:] = asked[:], []
    none: Any = None
    out = torch.empty(0, HEADS, DIM)
    cache = torch.empty(1, KV_HEADS, BLOCK, 64, dtype=torch.uint8)
    for reqs in range(1, 41):
        tokens = min(reqs * 3, 64)
        triton_path.decode(
            c, triton(b), torch.empty(tokens, HEADS, DIM), None, cache,
            Requests(reqs, tokens, 3, 100_000, none, none, none), out,
        )  # fmt: skip
    for splits in PREFILL_SPLITS:
        tokens = min(64, LATENT_TOKENS // splits)
        triton_path.attend_codes(
            c, triton(b), torch.empty(tokens, HEADS, DIM), None, cache, Requests(1, tokens, 64, 9, none, none, none), out,
            splits, False, 64,
        )  # fmt: skip
    triton_path.attend_codes(
        c,
        triton(b),
        torch.empty(64, HEADS, DIM),
        None,
        cache,
        Requests(1, 64, 64, 9, none, none, none),
        out,
        1,
        False,
        64,
    )
    assert len(reserved) == 1 and max(asked) <= reserved[0]
    assert reserved[0] < 4 << 20  # bounded by the batch, not by the context
