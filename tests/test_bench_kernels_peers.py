# SPDX-License-Identifier: Apache-2.0
"""The calls of `kvsplice bench kernels` to its peers, against the signatures of the installed vLLM, read from its source:
most of those modules can be imported on a GPU alone. FlashAttention-3 is stood in for by torch, to see what it is given."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
import types
from functools import cache
from pathlib import Path

import pytest
import torch

from vllm_kvsplice.bench import kernels_build, kernels_data
from vllm_kvsplice.bench.kernels_jobs import Job
from vllm_kvsplice.bench.kernels_timing import Device
from vllm_kvsplice.bench.peers_xformers import quantize

CPU = Device("cpu", cold_bytes=1e4, replays=2)
FA3 = "flash-attention-3"
VLLM = Path(importlib.util.find_spec("vllm").submodule_search_locations[0])  # found, not imported


def job(kernel: str, preset: str, what: str = "decode", context: int = 40, query_len: int = 1) -> Job:
    return Job(what, kernel, preset, (4, 2), 32, 2, context, query_len, 16)


@cache
def source_of(module: str) -> ast.Module:
    return ast.parse((VLLM / (module.replace(".", "/") + ".py")).read_text())


def signature_of(module: str, name: str) -> inspect.Signature:
    """Of a function of the installed vLLM, read from its source: most of these modules import on a GPU alone."""
    (node,) = [n for n in source_of(module).body if isinstance(n, ast.FunctionDef) and n.name == name]
    args = node.args
    assert args.vararg is None and args.kwarg is None
    plain = [*args.posonlyargs, *args.args]
    defaults = [inspect.Parameter.empty] * (len(plain) - len(args.defaults)) + [None] * len(args.defaults)
    parameters = [
        inspect.Parameter(a.arg, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=d)
        for a, d in zip(plain, defaults, strict=True)
    ]
    return inspect.Signature(parameters)


class FakeVLLM:
    """Modules under their vLLM names whose functions take only what the real ones take; ``calls`` holds the arguments."""

    def __init__(self, monkeypatch):
        self.monkeypatch, self.calls = monkeypatch, []
        self.module("vllm")

    def module(self, name: str, **members):
        module = sys.modules.get(name) if isinstance(sys.modules.get(name), types.SimpleNamespace) else None
        module = module or types.SimpleNamespace(__path__=[], __spec__=None)
        vars(module).update(members)
        self.monkeypatch.setitem(sys.modules, name, module)
        return module

    def function(self, module: str, name: str, body=lambda **_: None, source: str | None = None):
        signature = signature_of(source or module, name)

        def call(*args, **kwargs):
            bound = signature.bind(*args, **kwargs).arguments
            self.calls.append((name, bound))
            return body(**bound)

        self.module(f"vllm.{module}", **{name: call})


def paged_flash_attention(q, k, v, out, cu_seqlens_q, seqused_k, block_table, softmax_scale, **_):
    for r in range(len(seqused_k)):
        rows, length = slice(int(cu_seqlens_q[r]), int(cu_seqlens_q[r + 1])), int(seqused_k[r])
        key, value = (x[block_table[r].long()].flatten(0, 1)[:length].float() for x in (k, v))
        out[rows] = kernels_data.exact_attention(q[rows].float(), key, value, softmax_scale).to(out.dtype)


def store(key, value, key_cache, value_cache, slot_mapping, kv_cache_dtype, **_):
    for x, pages in ((key, key_cache), (value, value_cache)):
        x = x.to(torch.float8_e4m3fn).view(torch.uint8) if kv_cache_dtype == "fp8" else x
        pages[slot_mapping // pages.shape[1], slot_mapping % pages.shape[1]] = x


@pytest.fixture
def vllm(monkeypatch):
    return FakeVLLM(monkeypatch)


@pytest.mark.parametrize("preset", ["bf16", "fp8"])
@pytest.mark.parametrize("what, context, query_len", [("decode", 40, 1), ("write", 5, 5), ("prefill", 40, 9)])
def test_flash_attention_3_is_called_as_vllm_declares_it(vllm, preset, what, context, query_len):
    flash, source = "vllm_flash_attn", "vllm_flash_attn.flash_attn_interface"
    vllm.module(
        f"vllm.{flash}", is_fa_version_supported=lambda version: version == 3, fa_version_unsupported_reason=str
    )
    vllm.function(flash, "flash_attn_varlen_func", paged_flash_attention, source)
    vllm.function(flash, "get_scheduler_metadata", source=source)
    vllm.function("_custom_ops", "reshape_and_cache_flash", store)
    outcome = kernels_build.attempt(job(FA3, preset, what, context, query_len), CPU, timed=True)
    assert outcome.kind == "ok", outcome.text
    calls = dict(vllm.calls)
    assert calls["flash_attn_varlen_func"]["fa_version"] == 3 and calls["flash_attn_varlen_func"]["causal"] is True
    assert calls["get_scheduler_metadata"]["num_heads_kv"] == 2
    assert ("q_descale" in calls["flash_attn_varlen_func"]) == (preset == "fp8")


def test_flash_attention_3_that_this_gpu_cannot_run_is_absent(vllm):
    vllm.module(
        "vllm.vllm_flash_attn",
        is_fa_version_supported=lambda version: False,
        fa_version_unsupported_reason=lambda version: "compute capability 9.x only",
    )
    outcome = kernels_build.attempt(job(kernel=FA3, preset="bf16"), CPU, timed=False)
    assert outcome.kind == "absent" and "9.x only" in outcome.text


@pytest.mark.parametrize("what, query_len", [("decode", 1), ("write", 5), ("prefill", 9)])
@pytest.mark.parametrize("preset", ["bf16", "int8", "int4"])
def test_unified_attention_is_called_as_vllm_declares_it(vllm, what, query_len, preset):
    ops = "v1.attention.ops"
    modes = source_of("v1.kv_cache_interface")
    (enum,) = [n for n in modes.body if isinstance(n, ast.ClassDef) and n.name == "KVQuantMode"]
    names = {t.id: t.id for n in enum.body if isinstance(n, ast.Assign) for t in n.targets}
    vllm.module("vllm.triton_utils", HAS_TRITON=True)
    vllm.module("vllm.v1.kv_cache_interface", KVQuantMode=names)
    vllm.function(f"{ops}.triton_unified_attention", "unified_attention")
    for writer in ("", "_per_token_head_quant"):
        vllm.function(f"{ops}.triton_reshape_and_cache_flash", f"triton_reshape_and_cache_flash{writer}")
    at = job("vllm-triton", preset, what, query_len=query_len)
    kernels_build.build(at, CPU, 1).check()
    calls = dict(vllm.calls)
    scales = calls["unified_attention"].get("k_scale_cache")
    assert calls["unified_attention"]["k"].shape[1:3] == (16, 2) and (scales is None) == (preset == "bf16")
    if scales is not None:  # the last word of K's share of every head
        assert scales.shape == calls["unified_attention"]["k"].shape[:3]
        side = calls["unified_attention"]["k"].shape[3]
        assert scales.storage_offset() * 4 == side - 4 and scales.stride(2) * 4 == 2 * side


@pytest.mark.parametrize("preset", ["k8v4", "4bit_nc"])
def test_turboquant_is_called_as_vllm_declares_it(vllm, preset):
    fp8 = preset == "k8v4"
    config = types.SimpleNamespace(
        slot_size_aligned=32, centroid_bits=4, key_mse_bits=0 if fp8 else 4, key_packed_size=18, key_fp8=fp8,
        effective_value_quant_bits=4, norm_correction=not fp8,
    )  # fmt: skip
    layers, ops = "model_executor.layers.quantization.turboquant", "v1.attention.ops"
    vllm.module("vllm.triton_utils", HAS_TRITON=True)
    known = types.SimpleNamespace(
        from_cache_dtype=lambda name, head_dim: config if name == f"turboquant_{preset}" else None
    )
    vllm.module(f"vllm.{layers}.config", TurboQuantConfig=known)
    vllm.function(f"{layers}.centroids", "get_centroids", lambda d, bits: torch.linspace(-1, 1, 2**bits))
    vllm.function(f"{ops}.triton_turboquant_store", "triton_turboquant_store")
    vllm.function(f"{ops}.triton_turboquant_decode", "triton_turboquant_decode_attention")
    kernels_build.build(job(kernel="turboquant", preset=preset), CPU, 1).check()
    rotation = dict(vllm.calls)["triton_turboquant_decode_attention"]["Pi"]
    torch.testing.assert_close(rotation @ rotation, torch.eye(32))
    assert dict(vllm.calls)["triton_turboquant_store"]["midpoints"].shape == (15,)


def test_xformers_rows_hold_what_was_quantised():
    x = torch.randn(5, 2, 32)
    rows = quantize(x)
    assert rows.dtype == torch.int32 and rows.shape == (5, 2, 5)
    scale, shift = rows[..., :1].contiguous().view(torch.float16).float().split(1, dim=-1)
    codes = torch.stack([(rows[..., 1:] >> (4 * i)) & 15 for i in range(8)], dim=-1).flatten(-2)
    assert ((codes * scale + shift - x).abs() <= 0.51 * scale + 1e-3).all()
