# SPDX-License-Identifier: Apache-2.0
"""The prefill of `kvsplice bench kernels`: what it hands to the serving path, and that a wrong chunk is not timed."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from test_bench_kernels import CPU, job

from vllm_kvsplice.bench import kernels_build, kernels_data, kernels_prefill
from vllm_kvsplice.codec import reference


def reference_write(codec, cache, key, value, slots):
    sides = ((key, codec.k_encode, codec.k_mean), (value, codec.v_encode, codec.v_mean))
    for (x, encode, mean), plan in zip(sides, codec.plans(cache.shape[2]), strict=True):
        reference.write_side(cache, reference.encode(x.float(), encode, mean), plan, slots, torch.bfloat16)


def reference_serve(scale):
    def serve(codec, shape, batch, cache, fresh):
        def call(table):
            if shape.context == shape.query_len:
                for r in range(shape.batch):
                    own = slice(r * shape.query_len, (r + 1) * shape.query_len)
                    key, value = (x[own] for x in fresh)
                    batch.out[own] = kernels_data.exact_attention(batch.query[own], key, value, shape.scale) * scale
            else:
                batch.out[:] = reference.paged_attention(
                    batch.query, cache, codec.layout, codec.k_decode, codec.k_mean, codec.v_decode, codec.v_mean,
                    table, batch.seq_lens, batch.query_start_loc, shape.scale,
                ) * scale  # fmt: skip

        slots = kernels_prefill._new_slots(batch, shape)
        writes = [lambda s=s: reference_write(codec, cache, *fresh, s) for s in slots]
        attends = [lambda table=table: call(table) for table in batch.tables]
        both = [lambda w=w, a=a: (w(), a()) for w, a in zip(writes, attends, strict=True)]
        return kernels_prefill.Served(both, writes, attends)

    return serve


@pytest.mark.parametrize("context", [10, 33], ids=["first-chunk", "continued"])
@pytest.mark.parametrize("scale, kind", [(1.0, "ok"), (1.03, "failed")])
def test_prefill_is_checked_by_the_chunk_s_last_rows(monkeypatch, context, scale, kind):
    monkeypatch.setattr(kernels_prefill, "serve", reference_serve(scale))
    outcome = kernels_build.attempt(job(what="prefill", context=context, query_len=10), CPU, timed=True)
    assert outcome.kind == kind, outcome.text
    if kind == "ok":
        assert [stage.name for stage in outcome.stages] == ["cache_write", "attention"]


def test_prefill_gives_the_serving_path_what_the_backend_gives_it(monkeypatch):
    seen, written = [], []
    module = types.SimpleNamespace(
        prefill=lambda *args: seen.append(args), write=lambda *args: written.append(args), Tensors=lambda *parts: parts
    )
    monkeypatch.setattr("vllm_kvsplice.serving.triton_path", module, raising=False)
    monkeypatch.setitem(sys.modules, "vllm_kvsplice.serving.triton_path", module)
    at = job(what="prefill", context=33, query_len=10)
    codec = kernels_prefill.make_codec(at.layout, 2, "cpu")
    batch = kernels_data.make_batch(at.shape, 2, "cpu")
    cache = torch.zeros(0)
    served = kernels_prefill.serve(codec, at.shape, batch, cache, (batch.query, batch.query))
    for call in (*served.both, *served.writes, *served.attends):
        call()
    (layer, (bases, prepared), _, own, _, _, step, out), other, *alone = seen
    assert own[0] is batch.query and own[2].shape == (20,) and [args[3] for args in alone] == [None, None]
    assert [args[6] for args in alone] == [step, other[6]]
    assert (layer.num_heads, layer.num_kv_heads, layer.layout) == (4, 2, codec.layout) and out is batch.out
    assert bases.k_decode is codec.k_decode and bases.v_mean is codec.v_mean and prepared is codec.prepared
    assert (step.num_reqs, step.num_tokens, step.max_query_len, step.max_seq_len) == (2, 20, 10, 33)
    assert step.first_chunk == [False, False] and step.query_start_loc_cpu.tolist() == [0, 10, 20]
    assert step.block_table is batch.tables[0] and other[6].block_table is batch.tables[1]
    assert [args[-1] for args in written] == [step.shared, other[6].shared] and written[0][-1] is step.shared
    assert written[0][0] is layer and written[0][4] is cache and written[0][5].shape == (20,)
