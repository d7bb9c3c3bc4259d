# SPDX-License-Identifier: Apache-2.0
"""What kvsplice cannot serve, refused by name while the model is being built.

On CUDA vLLM asks the backend's ``supports_*`` first; on CPU it asks nothing, and special layers skip the question on
CUDA too. So the implementation's constructor asks here, on every platform.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from vllm_kvsplice.codec.layout import BLOCK_MULTIPLE, MAX_HEAD_DIM, TIER_MULTIPLE
from vllm_kvsplice.errors import KVSpliceError

FLASH_HEAD_DIM = 256  # FlashAttention's largest on the GPUs that run these kernels
KV_CACHE_DTYPES = ("auto", "float16", "bfloat16")


def _refuse(what: str, instead: str = "serve this model without --attention-backend kvsplice") -> NoReturn:
    raise KVSpliceError(f"kvsplice does not support {what}: {instead}.")


def check_layer(
    head_dim: int,
    alibi_slopes: Any,
    kv_cache_dtype: str,
    attn_type: str,
    extra: dict[str, Any],
) -> None:
    """Refuse a layer by the arguments that vLLM builds its implementation with; ``extra`` are the unnamed ones."""
    if attn_type != "decoder":
        _refuse(f"{attn_type} attention")
    if alibi_slopes is not None:
        _refuse("ALiBi position biases")
    if extra.get("sinks") is not None:
        _refuse("attention sinks")
    unknown = [name for name, value in extra.items() if value is not None and value is not False]
    if unknown:
        _refuse(f"attention layers with {', '.join(sorted(unknown))}")
    if kv_cache_dtype not in KV_CACHE_DTYPES:
        _refuse(
            f"a {kv_cache_dtype} KV cache, whose codes it replaces",
            "use --kv-cache-dtype bfloat16 (or auto, where the checkpoint does not ask for another)",
        )
    if head_dim % TIER_MULTIPLE or not 0 < head_dim <= MAX_HEAD_DIM:
        _refuse(f"head_dim {head_dim}, only multiples of {TIER_MULTIPLE} up to {MAX_HEAD_DIM}")


def check_engine(config: Any, batch_invariant: bool, device_type: str) -> None:
    """Refuse an engine by its VllmConfig."""
    parallel, cache, model = config.parallel_config, config.cache_config, config.model_config
    transfer = config.kv_transfer_config
    if device_type not in ("cpu", "cuda"):
        _refuse(f"{device_type} devices")
    if parallel.decode_context_parallel_size > 1:
        _refuse("decode context parallelism", "drop --decode-context-parallel-size")
    if parallel.prefill_context_parallel_size > 1:
        _refuse("prefill context parallelism", "drop --prefill-context-parallel-size")
    if transfer is not None and transfer.is_kv_transfer_instance:
        _refuse("KV connectors, whose stores do not know its page format", "drop --kv-transfer-config")
    if parallel.use_ubatching:
        _refuse("micro-batches, whose scratch it does not reserve", "drop --enable-dbo and --ubatch-size")
    if cache.kv_cache_dtype_skip_layers:
        _refuse("layers left out of a quantised KV cache", "drop --kv-cache-dtype-skip-layers")
    if batch_invariant:
        _refuse("batch-invariant mode", "unset VLLM_BATCH_INVARIANT")
    if config.attention_config.use_non_causal:
        _refuse("non-causal attention")
    drafts = getattr(config.speculative_config, "use_gemma4_mtp", None)
    if drafts is not None and drafts():
        _refuse("Gemma 4 MTP drafts, which read the target's cache by themselves", "drop --speculative-config")
    if cache.block_size is not None and cache.block_size % BLOCK_MULTIPLE:
        _refuse(f"block size {cache.block_size}", f"use --block-size with a multiple of {BLOCK_MULTIPLE}")
    if model is not None:
        _check_model(model, device_type)


def check_kernels(prefill: str, head_dim: int, device_type: str) -> None:
    """Refuse what no GPU kernel does: exact prefill of wide heads."""
    if prefill == "exact" and device_type == "cuda" and head_dim > FLASH_HEAD_DIM:
        _refuse(f"exact prefill at head_dim {head_dim}", "use --additional-config.kvsplice.prefill latent")


def _check_model(model: Any, device_type: str) -> None:
    if model.use_mla:
        _refuse("multi-head latent attention (MLA)")
    if model.is_mm_prefix_lm:
        _refuse("bidirectional attention over multimodal prefixes")
    if model.rswa_window is not None:
        _refuse("reference sliding window attention (R-SWA)")
    if model.is_hybrid:
        _refuse("models that mix attention with Mamba or linear-attention layers")
    if device_type == "cuda" and model.dtype == torch.float32:
        _refuse("float32 models on CUDA", "use --dtype bfloat16 or float16")
