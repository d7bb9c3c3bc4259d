# SPDX-License-Identifier: Apache-2.0
"""The attention implementation of one layer: refuses, loads, and routes a step's rows to the write and read paths."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vllm_kvsplice.codec import projector_source
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.serving import attention_layer, refusals, startup
from vllm_kvsplice.serving.attention_layer import LayerCodec, Limits
from vllm_kvsplice.serving.metadata import KVSpliceMetadata
from vllm_kvsplice.serving.settings import read_settings
from vllm_kvsplice.serving.vllm_compat import (
    AttentionImpl,
    AttentionType,
    attention_layers,
    batch_invariant,
    device_kind,
    draft_slots,
    get_current_vllm_config,
    is_draft,
    tensor_parallel,
)


class KVSpliceImpl(AttentionImpl[KVSpliceMetadata]):
    """Built by vLLM with the layer; ready after ``process_weights_after_loading``. Holds nothing of a step."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **extra: Any,
    ) -> None:
        self.vllm_config = get_current_vllm_config()
        refusals.check_layer(head_size, alibi_slopes, kv_cache_dtype, attn_type, extra)
        refusals.check_engine(self.vllm_config, batch_invariant(), device_kind())
        self.settings = read_settings(self.vllm_config.additional_config)
        refusals.check_kernels(self.settings.prefill, head_size, device_kind())
        if self.settings.projector is None and self.vllm_config.model_config is not None:
            projector_source.check_beside(self.vllm_config.model_config.model)
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.sliding_window, self.soft_cap = sliding_window, logits_soft_cap or None
        self.kv_cache_dtype = kv_cache_dtype
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        # A KV-sharing layer gets no keys and values of its own that mean anything.
        self.exact_prefill = self.settings.prefill == "exact" and kv_sharing_target_layer_name is None
        self.path = _path()
        self.codec: LayerCodec | None = None
        self.windows: set[int | None] = set()
        self.loads_last = False

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Take this layer's part of the projector; again after a weight reload, with the same result."""
        name, layer = attention_layer.find_layer(self.vllm_config, self)
        attention_layer.check_kind(name, layer)
        model = self.vllm_config.model_config
        tp_rank, tp_size = tensor_parallel()
        projector = None  # of a draft's layers, which the target's file does not know: int8
        if not is_draft(self.vllm_config, name):
            projector = projector_source.for_engine(self.settings.projector, model.model, model.revision, tp_rank == 0)
        if projector is not None:
            projector.verify(model.hf_text_config)
        heads = attention_layer.local_kv_heads(model.get_total_num_kv_heads(), tp_rank, tp_size)
        found = attention_layer.projector_layer(
            projector, self.kv_sharing_target_layer_name or name, self.head_size, self.num_kv_heads, heads
        )
        if self.codec is None:  # when weights are loaded again, layers of a draft are among these
            layers = attention_layers(self.vllm_config)
            self.windows = {getattr(other, "sliding_window", None) for other in layers.values()}
            self.loads_last = name == next(reversed(layers))
        wide = layer.kv_cache_torch_dtype if layer.kv_cache_torch_dtype.itemsize == 2 else torch.bfloat16
        codec = LayerCodec(
            found.layout,
            attention_layer.cell_bytes(found.layout, projector, self.windows),
            wide,
            self.num_heads,
            self.num_kv_heads,
            self.scale,
            self.sliding_window,
            self.soft_cap,
            draft_slots(self.vllm_config, name),
        )
        if self.codec is not None and self.codec != codec:
            raise KVSpliceError(
                f"the projector now has {codec.layout} for {name}, whose cache holds {self.codec.layout}: restart the server."
            )
        self.codec = attention_layer.one_codec(codec)
        attention_layer.attach(layer, found, layer._k_scale.device)
        layer.attn_backend = attention_layer.backend_with_bytes(layer.attn_backend, self.codec.bytes_per_token_head)
        startup.reserve(self.vllm_config, self.path, self.codec, layer._k_scale.device)
        if self.loads_last:  # the last layer has taken its part; a reload reads the file anew
            projector_source.forget()

    def warm_up(
        self, block_size: int, dtype: torch.dtype, device: torch.device, decode_query_len: int, limits: Limits
    ) -> None:
        """Compile what the steps of this layer's codec need; on a GPU, once for all layers with the same codec."""
        from vllm_kvsplice.serving import warm_up

        warm_up.warm_up(self._codec(), block_size, dtype, device, decode_query_len, limits)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: KVSpliceMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Write the step's keys and values, then attend; rows of ``output`` beyond the step's tokens are left alone.

        No metadata: a profiling run. KV-sharing layers write nothing, their target has.
        """
        if output_scale is not None or output_block_scale is not None:
            raise KVSpliceError(
                "kvsplice does not support fused output quantisation: serve without that compilation pass."
            )
        if attn_metadata is None:
            return output.fill_(0)
        codec, tensors = self._codec(), self.path.tensors_of(layer)
        decodes, prefills, slots = attn_metadata.decodes, attn_metadata.prefills, attn_metadata.slot_mapping
        start, written = decodes.num_tokens, None
        tokens = start + (prefills.num_tokens if prefills is not None else 0)  # rows past them are padding
        if not self.kv_sharing_target_layer_name:
            written = (key, value, slots[:tokens])
            # Who attends stores them, where it can in a launch that it has anyway; of two, neither has them all to itself.
            if start and prefills is not None:
                self.path.write(codec, tensors, *written[:2], kv_cache, slots[:tokens], decodes.shared)
                written = None
        if start:
            self.path.decode(codec, tensors, query[:start], written, kv_cache, decodes, output[:start])
        if prefills is not None:
            rows = slice(start, tokens)
            fresh = (key[rows], value[rows]) if self.exact_prefill else None
            self.path.prefill(codec, tensors, query[rows], written, fresh, kv_cache, prefills, output[rows])
        return output

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Store keys and values; DFlash drafts call it outside of forward for the context that they compute ahead."""
        tensors = self.path.tensors_of(layer)
        self.path.write(self._codec(), tensors, key, value, kv_cache, slot_mapping[: key.shape[0]])

    def _codec(self) -> LayerCodec:
        if self.codec is None:
            raise KVSpliceError("kvsplice ran before its projector was loaded: load the model with vLLM's own loaders.")
        return self.codec


def _path() -> ModuleType:
    """torch on a CPU, Triton on CUDA; refusals.check_engine has turned other devices away."""
    if device_kind() == "cpu":
        from vllm_kvsplice.serving import torch_path

        return torch_path
    from vllm_kvsplice.serving import triton_path

    return triton_path
