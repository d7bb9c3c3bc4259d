# SPDX-License-Identifier: Apache-2.0
"""What happens once before serving: scratch reserved, kernels compiled, and the lines that say what was gained."""

from __future__ import annotations

import logging
from collections import Counter
from types import ModuleType
from typing import Any, NamedTuple

import torch

from vllm_kvsplice.codec.layout import LatentLayout, dense_bytes
from vllm_kvsplice.serving.attention_layer import LayerCodec, Limits
from vllm_kvsplice.serving.vllm_compat import VllmConfig, attention_layers, decode_query_len, tensor_parallel

logger = logging.getLogger("vllm.kvsplice")


class LayerFacts(NamedTuple):
    """One layer that has a cache of its own; ``layout`` None where another backend serves it uncompressed."""

    layout: LatentLayout | None
    num_kv_heads: int
    head_dim: int
    dtype_bytes: int  # of the dense cache that vLLM would have
    cell_bytes: int  # per token and KV head, all in


def reserve(vllm_config: VllmConfig, path: ModuleType, codec: LayerCodec, device: torch.device) -> None:
    """Grow vLLM's workspace to the most a step can ask for, before vLLM measures how much memory is left for the cache."""
    if device.type != "cuda":
        return
    limits = limits_of(vllm_config, codec.draft_slots)
    path.reserve(
        codec,
        limits.max_num_seqs,
        decode_query_len(vllm_config) + codec.draft_slots,
        limits.max_num_batched_tokens,
        limits.max_model_len,
        device,
    )


def limits_of(vllm_config: VllmConfig, draft_slots: int) -> Limits:
    """The most that a step can hold, ``draft_slots`` more query tokens in each request than the target's step has."""
    scheduler = vllm_config.scheduler_config
    tokens = scheduler.max_num_batched_tokens + draft_slots * scheduler.max_num_seqs
    return Limits(scheduler.max_num_seqs, tokens, vllm_config.model_config.max_model_len)


def draft_slots_of(vllm_config: VllmConfig, layer_names: list[str]) -> int:
    """``LayerCodec.draft_slots`` of a group of layers that are all of one draft; 0 of any other."""
    layers = attention_layers(vllm_config)
    codecs = [_codec(layers.get(name)) for name in layer_names]
    return min((codec.draft_slots if isinstance(codec, LayerCodec) else 0 for codec in codecs), default=0)


def prepare(vllm_config: VllmConfig, layer_names: list[str], block_size: int, device: torch.device) -> None:
    """Before the first step of a group of layers: scratch again, where vLLM has a workspace only by now, and kernels."""
    layers = attention_layers(vllm_config)
    if device.type == "cuda":
        for codec, impl in {_codec(layers[name]): layers[name].impl for name in layer_names}.items():
            reserve(vllm_config, impl.path, codec, device)
            limits = limits_of(vllm_config, codec.draft_slots)
            query_len = decode_query_len(vllm_config) + codec.draft_slots
            impl.warm_up(block_size, vllm_config.model_config.dtype, device, query_len, limits)
    _announce(layers, layer_names)


def _announce(layers: dict[str, Any], layer_names: list[str]) -> None:
    """Log the gain once per engine: by the builder whose group holds our first layer, on the first rank."""
    ours = [name for name, layer in layers.items() if isinstance(_codec(layer), LayerCodec)]
    if not ours or ours[0] not in layer_names or tensor_parallel()[0] != 0:
        return
    own = [layer for layer in layers.values() if not getattr(layer, "kv_sharing_target_layer_name", None)]
    logger.info("kvsplice: %s", summary([_facts(layer) for layer in own], len(ours), len(layers)))
    if layers[ours[0]].impl.path.__name__.endswith("torch_path"):
        logger.warning(
            "kvsplice: no Triton on this device: attention runs in plain torch, fp32. Right, not fast; use a GPU for speed."
        )


def summary(facts: list[LayerFacts], active: int, total: int) -> str:
    """The codec, its all-in bytes against dense and its ratios, over layers that have a cache.

    Ratios count padding and uncompressed layers. K and V alone are of the compressed layers.
    """
    packed = [f for f in facts if f.layout is not None]
    codecs = Counter(str(f.layout) for f in packed)
    codec, _ = codecs.most_common(1)[0]
    more = f" (and {len(codecs) - 1} other codecs)" if len(codecs) > 1 else ""
    dense = [2 * dense_bytes(f.head_dim, f.dtype_bytes) * f.num_kv_heads for f in facts]
    stored = [f.cell_bytes * f.num_kv_heads for f in facts]
    heads = sum(f.num_kv_heads for f in facts)
    sides = {
        side: sum(dense_bytes(f.head_dim, f.dtype_bytes) * f.num_kv_heads for f in packed)
        / sum(f.layout.side_bytes(side) * f.num_kv_heads for f in packed if f.layout)
        for side in ("v", "k")
    }
    padding = sum((f.cell_bytes - f.layout.bytes_per_token_head) * f.num_kv_heads for f in packed if f.layout)
    padded = f", {padding / heads:.1f} of them padding to one page size" if padding else ""
    return (
        f"{codec}{more}: {sum(stored) / heads:.1f} bytes per token and KV head all in{padded}, dense {sum(dense) / heads:.1f}; "
        f"ratio V {sides['v']:.2f}x, K {sides['k']:.2f}x, K+V {sum(dense) / sum(stored):.2f}x; "
        f"active on {active} of {total} attention layers"
    )


def _codec(layer: Any) -> Any:
    return getattr(getattr(layer, "impl", None), "codec", None)


def _facts(layer: Any) -> LayerFacts:
    codec, dtype_bytes = _codec(layer), layer.kv_cache_torch_dtype.itemsize
    if not isinstance(codec, LayerCodec):
        cell = 2 * dense_bytes(layer.head_size, dtype_bytes)
        return LayerFacts(None, layer.num_kv_heads, layer.head_size, dtype_bytes, cell)
    return LayerFacts(codec.layout, layer.num_kv_heads, layer.head_size, dtype_bytes, codec.bytes_per_token_head)
