# SPDX-License-Identifier: Apache-2.0
"""Every name that we take from inside vLLM but for the registry, and nothing else: the one file to read when vLLM changes.

Written against vLLM 0.32 (V1 and V2 model runners) and the sources of 0.33. Names whose import is heavy or depends on the
platform are functions, so that registering stays cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.config import VllmConfig, get_current_vllm_config, get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheLayout, SlidingWindowSpec

if TYPE_CHECKING:
    from vllm.model_executor.layers.attention import Attention

__all__ = [
    "AttentionBackend",
    "AttentionCGSupport",
    "AttentionImpl",
    "AttentionMetadata",
    "AttentionMetadataBuilder",
    "AttentionSpec",
    "AttentionType",
    "CommonAttentionMetadata",
    "FullAttentionSpec",
    "KVCacheLayout",
    "MultipleOf",
    "SlidingWindowSpec",
    "VllmConfig",
    "attention_layers",
    "batch_invariant",
    "current_platform",
    "device_kind",
    "decode_query_len",
    "flash_attention",
    "get_current_vllm_config",
    "get_current_vllm_config_or_none",
    "init_logger",
    "draft_slots",
    "is_draft",
    "is_plain_attention",
    "layer_index",
    "merge_attn_states",
    "split_decodes_and_prefills",
    "tensor_parallel",
    "to_device",
    "workspace",
]


def attention_layers(vllm_config: VllmConfig) -> dict[str, Attention]:
    """Every attention layer of this worker by name, in the order of execution, whatever its backend."""
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    layers = vllm_config.compilation_config.static_forward_context
    return {name: layer for name, layer in layers.items() if isinstance(layer, AttentionLayerBase)}


def is_plain_attention(layer: object) -> bool:
    """True for vLLM's ``Attention`` itself; its subclasses (sinks, chunked, encoder, prefix LM ...) attend otherwise."""
    from vllm.model_executor.layers.attention import Attention

    return type(layer) is Attention


def layer_index(layer_name: str) -> int:
    """Transformer layer index in a layer's name; raises ValueError or AssertionError where there is none."""
    from vllm.model_executor.models.utils import extract_layer_index

    return int(extract_layer_index(layer_name))


def is_draft(vllm_config: VllmConfig, layer_name: str) -> bool:
    """Whether a layer is of a speculative draft, under the config that the layer was built with.

    A draft model stands in the target's place in its config; heads (EAGLE, MTP) keep the target's and count their layers on
    from its last, or lie under "mtp". N-gram drafts have no layers, and the target's config for a draft's.
    """
    drafts = vllm_config.speculative_config
    if drafts is None:
        return False
    model = vllm_config.model_config
    own_model = model is drafts.draft_model_config and model is not drafts.target_model_config
    if own_model or "mtp" in layer_name.split("."):
        return True
    try:
        return layer_index(layer_name) >= model.get_total_num_hidden_layers()
    except (AssertionError, ValueError):
        return False


def draft_slots(vllm_config: VllmConfig, layer_name: str) -> int:
    """Query tokens that vLLM adds to every request before a draft's layer sees them: 0 of the target and of most heads, 1 of a
    draft model, more where all tokens are drafted in parallel."""
    if not is_draft(vllm_config, layer_name):
        return 0
    return int(getattr(vllm_config.speculative_config, "max_num_new_slots_for_drafting", 1))


def tensor_parallel() -> tuple[int, int]:
    """(rank, size) of this worker's tensor-parallel group."""
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

    return get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()


def decode_query_len(vllm_config: VllmConfig) -> int:
    """Most query tokens of a request that vLLM counts as a decode: 1, or 1 + draft tokens under speculative decoding."""
    from vllm.v1.attention.backend import max_decode_query_len

    return int(max_decode_query_len(vllm_config))


def device_kind() -> str:
    """ "cpu", "cuda" (NVIDIA only; vLLM calls ROCm devices so too), or what else vLLM runs on."""
    return "rocm" if current_platform.is_rocm() else str(current_platform.device_type)


def batch_invariant() -> bool:
    """Whether VLLM_BATCH_INVARIANT is on."""
    import vllm.envs as envs

    return bool(envs.VLLM_BATCH_INVARIANT)


def split_decodes_and_prefills(metadata: CommonAttentionMetadata, threshold: int) -> tuple[int, int, int, int]:
    """(decodes, prefills, decode tokens, prefill tokens) of a batch whose decodes, of at most ``threshold`` tokens, lead."""
    from vllm.v1.attention.backends.utils import split_decodes_and_prefills as split

    return split(metadata, decode_threshold=threshold)


def flash_attention(head_dim: int, soft_cap: float | None) -> tuple[Any, int] | None:
    """(flash_attn_varlen_func, version to pass as ``fa_version``), or None where vLLM has none for this GPU."""
    try:
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version
    except ImportError:
        return None
    version = get_flash_attn_version(head_size=head_dim, requires_softcap=bool(soft_cap))
    return None if version is None else (flash_attn_varlen_func, version)


def merge_attn_states(
    out: torch.Tensor,
    out_lse: torch.Tensor,
    lse: torch.Tensor,
    part: torch.Tensor,
    part_lse: torch.Tensor,
) -> None:
    """Merge attention over other keys into ``out`` [T, num_heads, head_dim]; lse [num_heads, T] fp32, natural log.

    ``out`` is read and written; ``out_lse`` must not be ``lse``, which other threads still read.
    """
    from vllm.v1.attention.ops.merge_attn_states import merge_attn_states as merge

    merge(out, out, lse, part, part_lse, out_lse)


def to_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on ``device`` that the host does not wait for."""
    if device.type != "cpu" and current_platform.is_pin_memory_available():
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def workspace(*shapes: tuple[tuple[int, ...], torch.dtype]) -> list[torch.Tensor]:
    """Scratch tensors that live together until the next call, from vLLM's workspace manager where it runs one."""
    from vllm.v1.worker.workspace import current_workspace_manager, is_workspace_manager_initialized

    if is_workspace_manager_initialized():
        return list(current_workspace_manager().get_simultaneous(*shapes))
    return [torch.empty(shape, dtype=dtype, device=current_platform.device_type) for shape, dtype in shapes]
