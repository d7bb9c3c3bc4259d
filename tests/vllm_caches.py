# SPDX-License-Identifier: Apache-2.0
"""What vLLM's own cache kernels make of keys and values, run by Triton's interpreter, in a process of their own.

`python tests/vllm_caches.py IN OUT`: IN holds {"k", "v"} [T, H, d] and a head_dim; OUT gets {cache dtype: (k^, v^)} and the
bytes that vLLM counts for each.
"""

# ruff: noqa: E402  # Triton and vLLM are set up before they are imported

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"  # read by @triton.jit

import torch
import triton
import triton.language as tl
import vllm.triton_utils

# Where there is no GPU vLLM puts a stand-in for Triton there; the interpreter needs none.
vllm.triton_utils.triton, vllm.triton_utils.tl = triton, tl

from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids
from vllm.model_executor.layers.quantization.turboquant.config import TQ_PRESETS, TurboQuantConfig
from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import ref_nvfp4_quant_dequant
from vllm.utils.torch_utils import nvfp4_kv_cache_full_dim
from vllm.v1.attention.ops import int4_per_token_head, triton_turboquant_decode
from vllm.v1.attention.ops.triton_reshape_and_cache_flash import triton_reshape_and_cache_flash_per_token_head_quant
from vllm.v1.attention.ops.triton_turboquant_store import triton_turboquant_store
from vllm.v1.kv_cache_interface import KVQuantMode

BLOCK_SIZE = 16


def hadamard(d):
    """Sylvester's matrix as turboquant_attn builds it; that module costs seconds to import."""
    H = torch.ones(1, 1)
    while len(H) < d:
        H = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), H)
    return H / d**0.5


def per_token_head(k, v, mode, dtype):
    """int8 and fp8: codes times scale."""
    T, H, d = k.shape
    blocks = -(-T // BLOCK_SIZE)
    cache = [torch.zeros(blocks, BLOCK_SIZE, H, d, dtype=dtype) for _ in "kv"]
    scales = [torch.zeros(blocks, BLOCK_SIZE, H) for _ in "kv"]
    triton_reshape_and_cache_flash_per_token_head_quant(k, v, *cache, *scales, torch.arange(T), mode)
    return tuple((c.float() * s[..., None]).flatten(0, 1)[:T] for c, s in zip(cache, scales, strict=True))


def int4(k, v):
    """Nibbles, minus the zero point in the scale's low bits, times the scale, rotated back."""
    T, H, d = k.shape
    blocks = -(-T // BLOCK_SIZE)
    cache = [torch.zeros(blocks, BLOCK_SIZE, H, d // 2, dtype=torch.uint8) for _ in "kv"]
    scales = [torch.zeros(blocks, BLOCK_SIZE, H) for _ in "kv"]
    int4_per_token_head.reshape_and_cache_int4(
        k, v, *cache, torch.arange(T), k_scale_cache=scales[0], v_scale_cache=scales[1]
    )
    found = []
    for codes, scale in zip(cache, scales, strict=True):
        bits = scale.view(torch.int32)
        nibbles = torch.stack([codes & 15, codes >> 4], -1).flatten(-2).float()
        z = (nibbles - (bits & 15)[..., None]) * (bits & -16).view(torch.float32)[..., None]
        x = int4_per_token_head.single_rht(z, inverse=True) / (d & -d)
        found.append(x.flatten(0, 1)[:T])
    return tuple(found)


def nvfp4(k, v):
    one = torch.ones((), dtype=torch.float32)
    return tuple(ref_nvfp4_quant_dequant(x.flatten(0, 1), one, 16).view_as(x) for x in (k, v))


def turboquant(k, v, name):
    """Store kernel, bulk decode kernel, keys rotated back."""
    T, H, d = k.shape
    config = TurboQuantConfig.from_cache_dtype(name, d)
    blocks = -(-T // BLOCK_SIZE)
    cache = torch.zeros(blocks, BLOCK_SIZE, H, config.slot_size_aligned, dtype=torch.uint8)
    rotation, centroids = hadamard(d), get_centroids(d, config.centroid_bits)
    midpoints = (centroids[1:] + centroids[:-1]) / 2
    arguments = (config.mse_bits, config.key_packed_size, config.value_quant_bits, config.key_fp8)
    triton_turboquant_store(k, v, cache, torch.arange(T, dtype=torch.int32), rotation, midpoints, *arguments)
    out_k, out_v = (torch.zeros(1, H, T, d, dtype=torch.float16) for _ in "kv")
    sizes = triton_turboquant_decode._get_layout(d, config.mse_bits, config.value_quant_bits, config.key_packed_size)
    triton_turboquant_decode._tq_full_dequant_kv[(T, H)](
        cache,
        torch.arange(blocks, dtype=torch.int32)[None],
        centroids,
        out_k,
        out_v,
        *out_k.stride()[:3],
        *out_v.stride()[:3],
        *cache.stride()[:3],
        blocks,
        HEAD_DIM=d,
        BLOCK_SIZE=BLOCK_SIZE,
        NUM_KV_HEADS=H,
        MSE_BYTES=sizes["mse_bytes"],
        KPS=config.key_packed_size,
        VQB=config.value_quant_bits,
        VAL_DATA_BYTES=sizes["val_data_bytes"],
        MSE_BITS=config.mse_bits,
        KEY_FP8=int(config.key_fp8),
        BLOCK_D=sizes["BLOCK_D"],
        NORM_CORRECTION=int(config.norm_correction),
    )
    k_hat, v_hat = (x[0].transpose(0, 1).float() for x in (out_k, out_v))
    return k_hat if config.key_fp8 else k_hat @ rotation, v_hat


def main(source, target):
    given = torch.load(source)
    k, v = given["k"], given["v"]
    d = k.shape[-1]
    decoded = {
        "int8_per_token_head": per_token_head(k, v, KVQuantMode.INT8_PER_TOKEN_HEAD, torch.int8),
        "fp8_per_token_head": per_token_head(k, v, KVQuantMode.FP8_PER_TOKEN_HEAD, torch.float8_e4m3fn),
        "int4_per_token_head": int4(k, v),
        "nvfp4": nvfp4(k, v),
    } | {name: turboquant(k, v, name) for name in TQ_PRESETS}
    counted = {name: TurboQuantConfig.from_cache_dtype(name, d).slot_size for name in TQ_PRESETS}
    counted["nvfp4"] = 2 * nvfp4_kv_cache_full_dim(d)
    torch.save({"decoded": decoded, "bytes": counted, "centroids": get_centroids(d, 3)}, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
