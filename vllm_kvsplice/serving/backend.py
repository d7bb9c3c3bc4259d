# SPDX-License-Identifier: Apache-2.0
"""The attention backend as vLLM sees it: what it supports, and the size of a cache page. Next: metadata and impl."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch

from vllm_kvsplice.codec.layout import BLOCK_MULTIPLE, MAX_HEAD_DIM, PREFERRED_BLOCK_SIZE, TIER_MULTIPLE
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.serving.registration import NAME
from vllm_kvsplice.serving.vllm_compat import (
    AttentionBackend,
    AttentionSpec,
    AttentionType,
    FullAttentionSpec,
    KVCacheLayout,
    MultipleOf,
    SlidingWindowSpec,
    get_current_vllm_config_or_none,
)


class KVSpliceBackend(AttentionBackend):
    """Attention over compressed pages. vLLM resolves this class by its path; layers then get subclasses of it, see below."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16"]
    forward_includes_kv_cache_update: bool = True  # a decode step writes in the launch that projects its queries
    bytes_per_token_head: ClassVar[int | None] = None  # set on a layer's subclass once its projector is known

    @staticmethod
    def get_name() -> str:
        return NAME  # vLLM looks its enum member up by this

    @staticmethod
    def get_impl_cls() -> type[Any]:
        from vllm_kvsplice.serving.impl import KVSpliceImpl

        return KVSpliceImpl

    @staticmethod
    def get_builder_cls() -> type[Any]:
        from vllm_kvsplice.serving.metadata import KVSpliceMetadataBuilder

        return KVSpliceMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Tokens of a page. vLLM asks without a spec, and with a current config, when it chooses a size that nobody gave: where layers have
        pages of several sizes in bytes, and so several backend classes, what these allow is all that it goes by."""
        config = None if kv_cache_spec is not None else get_current_vllm_config_or_none()
        chosen = config is None or config.cache_config.user_specified_block_size
        return [MultipleOf(BLOCK_MULTIPLE if chosen else PREFERRED_BLOCK_SIZE)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Head-major inside a block: then a (block, head) page is one run of bytes that we may divide as we like."""
        return (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC)

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size % TIER_MULTIPLE == 0 and 0 < head_size <= MAX_HEAD_DIM

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == AttentionType.DECODER

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """Stores outside the engine do not key on our page format, and would mix pages of different projectors."""
        return False

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        return bool(capability.major >= 8)  # bf16 tensor cores

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Replace a dense cache spec by ours: ``bytes_per_token_head`` bytes of uint8 per token and KV head.

        vLLM calls it more than once on one spec, on probes of one token, and sometimes without a current config; so the
        size is carried by the class.
        """
        if spec.state_content_bytes is not None:
            return spec
        if type(spec) not in (FullAttentionSpec, SlidingWindowSpec):
            raise KVSpliceError(
                f"kvsplice does not support a {type(spec).__name__} cache: serve this model without --attention-backend kvsplice."
            )
        if spec.head_size_v != spec.head_size or cls.bytes_per_token_head is None:
            raise KVSpliceError(
                f"kvsplice has no page size for a layer with head_dim {spec.head_size} (values {spec.head_size_v}) that was "
                "not loaded: serve this model without --attention-backend kvsplice."
            )
        return replace(spec, dtype=torch.uint8, state_content_bytes=cls.bytes_per_token_head)
