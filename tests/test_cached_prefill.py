# SPDX-License-Identifier: Apache-2.0
"""Prefill over cached context: kernels interpreted on a CPU, FlashAttention emulated in torch, against the fp64 reference."""

from __future__ import annotations

from dataclasses import replace as changed
from typing import Any

import kernel_cases as cases
import kernel_checks as checks
import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm")

from prefill_cases import Flash, attention, codec_of, forget_below_windows, limits_of, num_bytes, requests_of, run

from vllm_kvsplice.serving import cached_prefill, routes
from vllm_kvsplice.serving.attention_layer import Bases
from vllm_kvsplice.serving.cached_prefill import scratch_shapes

A8_4 = cases.A8_4


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Scratch full of NaN; returns the bytes of every request for it. Contexts beyond 128 tokens do not fit it."""
    asked: list[int] = []

    def workspace(*shapes: tuple[tuple[int, ...], torch.dtype]) -> list[Tensor]:
        asked.append(num_bytes(shapes))
        return [torch.full(s, float("nan"), dtype=d, device=cases.DEVICE) for s, d in shapes]

    monkeypatch.setattr(cached_prefill, "workspace", workspace)
    monkeypatch.setattr(cached_prefill, "CONTEXT_TOKENS", 128)
    monkeypatch.setattr(routes, "latent_is_faster", lambda *args: False)
    return asked


# Case, calls of FlashAttention it should take. One request has room for 128 tokens, or for what the step needs.
CASES = {
    "ragged": (cases.Case(seq_lens=(37, 5, 64, 3), query_lens=(9, 2, 30, 3), k=A8_4, v=A8_4), 1),
    "runs-of-requests": (cases.Case(seq_lens=(70, 50, 100, 20, 8), query_lens=(4, 3, 5, 2, 2)), 2),
    "context-in-three-pieces": (cases.Case(seq_lens=(300,), query_lens=(20,), k=A8_4, v=A8_4), 3),
    "long-between-short": (
        cases.Case(seq_lens=(30, 400, 40, 5), query_lens=(3, 7, 8, 5), num_kv_heads=1, group=3), 6
    ),
    "exactly-full": (cases.Case(seq_lens=(128, 128), query_lens=(5, 6), num_kv_heads=1), 2),
    "one-token-too-many": (cases.Case(seq_lens=(129,), query_lens=(5,), num_kv_heads=1), 2),
    "no-context": (cases.Case(seq_lens=(40, 9), query_lens=(40, 9), v=((4, 40), (0, 24))), 1),
    "rows-without-tokens": (cases.Case(seq_lens=(60, 0, 0), query_lens=(6, 0, 0)), 1),
    "window": (
        cases.Case(seq_lens=(300, 90, 20), query_lens=(20, 5, 20), window=33, k=A8_4, v=A8_4), 2
    ),
    "window-of-large-blocks": (
        cases.Case(seq_lens=(290, 200), query_lens=(4, 6), window=21, block_size=64, num_kv_heads=1), 1
    ),
    "window-beyond-all": (cases.Case(seq_lens=(150,), query_lens=(4,), window=190, num_kv_heads=1), 1),
    "soft-cap-in-pieces": (cases.Case(seq_lens=(280,), query_lens=(9,), soft_cap=3.0, q_magnitude=4.0), 3),
    "block-528": (cases.Case(seq_lens=(540,), query_lens=(8,), block_size=528, num_kv_heads=1), 5),
    "near-lossless-128": (changed(cases.ATTENTION["near-lossless-128"], seq_lens=(190, 30), query_lens=(12, 30)), 3),
    "wide-keys": (cases.Case(k=((16, 64),), v=((8, 48), (0, 16)), seq_lens=(50,), query_lens=(5,)), 1),
    "fp16-head-dim-80": (
        changed(cases.ATTENTION["four-tiers-not-powers-of-two"], seq_lens=(200,), query_lens=(4,)), 2
    ),
    "head-dim-256": (changed(cases.ATTENTION["head-dim-256"], seq_lens=(40,), query_lens=(9,)), 1),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_attention_to_expanded_codes_is_the_reference(name: str, scratch: list[int]) -> None:
    case, calls = CASES[name]
    batch, flash = cases.make_batch(case), Flash()
    exact, low = (checks.run_reference(batch, dtype) for dtype in (torch.float64, case.dtype))
    forget_below_windows(batch)
    out = run(batch, None, flash)
    checks.assert_within(out, exact, low, torch.finfo(case.dtype).eps, name)
    assert len(flash.calls) == calls
    assert sum(not call["causal"] for call in flash.calls) == sum(call["lse"] for call in flash.calls) - (
        any(call["lse"] for call in flash.calls)
    )  # an lse is asked for where pieces are merged, and nowhere else
    limits = limits_of(case)
    assert max(scratch) <= num_bytes(scratch_shapes(codec_of(case), limits, case.dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in CASES if CASES[name][0].dtype != torch.float32])
def test_flash_attention_itself_is_the_reference(name: str, scratch: list[int]) -> None:
    """The same with vLLM's FlashAttention and its merging of pieces, and no wait for the GPU."""
    from vllm_kvsplice.serving.vllm_compat import flash_attention

    case = CASES[name][0]
    batch, flash = cases.make_batch(case), flash_attention(case.head_dim, case.soft_cap)
    assert flash is not None
    exact, low = (checks.run_reference(batch, dtype) for dtype in (torch.float64, case.dtype))
    forget_below_windows(batch)
    run(batch, None, *flash)  # kernels are compiled
    requests = requests_of(batch, limits_of(case))
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = run(batch, None, *flash, requests)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    checks.assert_within(out, exact, low, torch.finfo(case.dtype).eps, name)


def test_expansion_loses_nothing_in_fp32(scratch: list[int]) -> None:
    """Were the tolerance of bf16 to hide a wrong key: an fp32 model's output is right to the operands' 22 bits."""
    case = cases.Case(seq_lens=(300, 33), query_lens=(20, 33), k=A8_4, v=A8_4, dtype=torch.float32)
    batch = cases.make_batch(case)
    exact, out = checks.run_reference(batch, torch.float64), run(batch, None, Flash())
    assert (out - exact).abs().max() <= 2**-18 * exact.abs().max()


@pytest.mark.parametrize("window", [None, 25], ids=["plain", "window"])
def test_first_chunks_keep_their_fresh_keys_among_others(window: int | None, scratch: list[int]) -> None:
    """Fresh rows equal attention to fresh keys, continued rows attention to codes, in any order of requests."""
    case = cases.Case(
        seq_lens=(20, 150, 70, 31, 40),
        query_lens=(20, 5, 70, 9, 40),
        window=window,
        k=A8_4,
        v=A8_4,
        dtype=torch.float16,
    )
    batch, flash = cases.make_batch(case), Flash()
    exact, low = (checks.run_reference(batch, dtype) for dtype in (torch.float64, torch.float16))
    rows = torch.cat([torch.arange(sum(case.seq_lens[:b]) + n - q, sum(case.seq_lens[: b + 1]))
                      for b, (n, q) in enumerate(zip(case.seq_lens, case.query_lens, strict=True))])  # fmt: skip
    fresh = batch.key[rows.to(batch.key.device)], checks.with_gaps(batch.value[rows.to(batch.key.device)])
    ends = batch.query_start_loc.tolist()
    for a, b, first in zip(ends, ends[1:], requests_of(batch).first_chunk, strict=False):
        if first:
            side = [window - 1, 0] if window else [-1, -1]
            exact[a:b] = attention(batch.query[a:b], *(x[a:b] for x in fresh), case.head_dim**-0.5, True, side, 0.0)[0]
            low[a:b] = exact[a:b].half()  # no codec error here: the tolerance must not hide one
    forget_below_windows(batch)
    checks.assert_within(run(batch, fresh, flash), exact, low, torch.finfo(torch.float16).eps, "mixed step")
    assert len(flash.calls) < len(case.seq_lens)  # runs of requests, not one call for each


def test_many_requests_take_few_launches(scratch: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cached_prefill, "CONTEXT_TOKENS", 4096)
    case = cases.Case(seq_lens=(24,) * 40, query_lens=(2,) * 40, num_kv_heads=1, group=1)
    flash = Flash()
    run(cases.make_batch(case), None, flash)
    assert len(flash.calls) == 1 and flash.calls[0]["requests"] == 40


def test_warming_up_covers_what_is_launched(scratch: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel variant (its compile-time arguments) of a step was launched before."""
    variants: list[tuple[str, str]] = []

    class Recorded:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **options: (variants.append((self.kernel.__name__, str(sorted(options.items(), key=str)))),
                                             self.kernel[grid](*args, **options))  # fmt: skip

    for name in ("expand_cached_kernel", "copy_fresh_kernel"):
        monkeypatch.setattr(cases.expand_cached, name, Recorded(getattr(cases.expand_cached, name)))
    batch = cases.make_batch(cases.Case(seq_lens=(30, 300, 20), query_lens=(30, 9, 5), k=A8_4, v=A8_4))
    bases = Bases(*batch.bases["k"], *batch.bases["v"])
    cached_prefill.warm_up(codec_of(batch.case), bases, batch.kv_cache, batch.case.dtype)
    warmed, variants[:] = set(variants), []
    run(batch, (batch.key[:44], batch.value[:44]), Flash())
    assert len(warmed) == 2 and set(variants) <= warmed  # expansion and copy


def test_reference_is_what_the_cpu_serves() -> None:
    """torch_path.prefill over codes is reference.paged_attention, so both say the same of a request's own tokens."""
    from vllm_kvsplice.serving import torch_path

    batch = cases.make_batch(cases.Case(seq_lens=(40, 9), query_lens=(7, 9), dtype=torch.float32), "cpu")
    out = torch.empty_like(batch.query)
    bases = Bases(*batch.bases["k"], *batch.bases["v"])
    torch_path.prefill(codec_of(batch.case), bases, batch.query, None, None, batch.kv_cache, requests_of(batch), out)
    assert (out - checks.run_reference(batch, torch.float64)).abs().max() < 1e-5
