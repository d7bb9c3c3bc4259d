# SPDX-License-Identifier: Apache-2.0
"""One step's batch as the read path needs it: decode requests first, prefill requests after. Built without a device sync."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from vllm_kvsplice.codec import projector_source
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.serving.attention_layer import Limits
from vllm_kvsplice.serving.vllm_compat import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    VllmConfig,
    split_decodes_and_prefills,
)

Found = TypeVar("Found")


def like(*tensors: Tensor) -> list[Any]:
    """What the launches of other layers' tensors must have in common with these, to be kept in ``Requests.shared``."""
    return [x for tensor in tensors for x in (tensor.shape, tensor.stride())]


def once(shared: dict[Any, Any], key: tuple[Any, ...], make: Callable[[], Found]) -> Found:
    """What ``Requests.shared`` has under a key, made when it is asked for first."""
    try:
        found: Found = shared[key]
    except KeyError:
        found = shared[key] = make()
    return found


@dataclass
class Requests:
    """A run of requests of one step, its tokens numbered from 0."""

    num_reqs: int
    num_tokens: int
    max_query_len: int  # upper bounds, on the host
    max_seq_len: int
    query_start_loc: Tensor  # [num_reqs + 1] int32
    seq_lens: Tensor  # [num_reqs] int32, new tokens included; 0 in padding rows
    block_table: Tensor  # [num_reqs, max_blocks] int32
    # What layers of one kind have in common in this step, by keys that say what makes them so; the host's time is dear.
    # vLLM may give one such object to several passes, with the host numbers unchanged. Views of its workspace live as long:
    # were it to grow between two layers, which it is reserved not to, the old one would be held until the step ends. One
    # object is of one micro-batch: the workspace has a buffer for each.
    shared: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)


@dataclass
class Prefills(Requests):
    """Requests with more new tokens than a decode step has."""

    query_start_loc_cpu: Tensor
    first_chunk: list[bool]  # [num_reqs]: nothing of the request was in the cache before this step
    seq_lens_cpu: Tensor | None = None  # [num_reqs], exact; None where vLLM does not know them on the host
    limits: Limits | None = None  # of the engine; None outside one, where no scratch was reserved


@dataclass
class KVSpliceMetadata(AttentionMetadata):
    """Decode requests lead the batch; either part may be empty."""

    num_actual_tokens: int
    slot_mapping: Tensor  # [>= num_actual_tokens] int64; negative in padding rows
    decodes: Requests
    prefills: Prefills | None


class KVSpliceMetadataBuilder(AttentionMetadataBuilder[KVSpliceMetadata]):
    """Splits vLLM's batch. Rows of up to 1 + num_speculative_tokens tokens are decodes, captured in full CUDA graphs.

    The first step of a draft model has ``draft_slots`` more tokens in each request than the target's had, and lengths that say
    so on the device, but not on the host (StandaloneARSpeculator._prefill, extend_all_queries_by_N): its rows go by the lengths
    on the device, through kernels that read them there.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    limits: Limits | None = None
    draft_slots = 0

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        scheduler, model = vllm_config.scheduler_config, vllm_config.model_config
        self.limits = Limits(scheduler.max_num_seqs, scheduler.max_num_batched_tokens, model.max_model_len)
        projector_source.forget()
        from vllm_kvsplice.serving import startup

        startup.prepare(vllm_config, layer_names, kv_cache_spec.block_size, device)
        self.draft_slots = startup.draft_slots_of(vllm_config, layer_names)

    @property
    def _decode_query_len(self) -> int:
        return (self.reorder_batch_threshold or 1) + self.draft_slots

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> KVSpliceMetadata:
        m = common_attn_metadata
        if m.causal is not True:
            raise KVSpliceError(
                "kvsplice does not support non-causal attention: serve this model without --attention-backend kvsplice."
            )
        num_decodes, num_prefills, decode_tokens, prefill_tokens = split_decodes_and_prefills(m, self._decode_query_len)
        decodes = Requests(
            num_decodes,
            decode_tokens,
            min(m.max_query_len, self._decode_query_len),
            self.vllm_config.model_config.max_model_len,  # not the batch's: see triton_path.num_splits
            m.query_start_loc[: num_decodes + 1],
            m.seq_lens[:num_decodes],
            m.block_table_tensor[:num_decodes],
        )
        prefills = None
        if num_prefills:
            known = None if self.draft_slots else m.seq_lens_cpu_upper_bound  # exact for prefill rows
            prefills = _prefills(m, known, num_decodes, num_prefills, decode_tokens, prefill_tokens)
            prefills.limits = self.limits
        return KVSpliceMetadata(m.num_actual_tokens, m.slot_mapping, decodes, prefills)

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> KVSpliceMetadata:
        """Capture over sequences that hold their own query only."""
        metadata = self.build(0, common_attn_metadata)
        metadata.decodes.seq_lens.fill_(common_attn_metadata.max_query_len)  # read again when the graph is replayed
        return metadata


def _prefills(
    m: CommonAttentionMetadata, known: Tensor | None, skip: int, num_reqs: int, skip_tokens: int, num_tokens: int
) -> Prefills:
    """``known``: the batch's lengths on the host, None where there are none to go by."""
    stop = skip + num_reqs
    starts = m.query_start_loc_cpu[skip : stop + 1] - skip_tokens
    query_lens = starts[1:] - starts[:-1]
    first = [False] * num_reqs if known is None else (known[skip:stop] == query_lens).tolist()
    return Prefills(
        num_reqs,
        num_tokens,
        m.max_query_len,
        m.max_seq_len,
        m.query_start_loc[skip : stop + 1] - skip_tokens,
        m.seq_lens[skip:stop],
        m.block_table_tensor[skip:stop],
        starts,
        first,
        None if known is None else known[skip:stop].clone(),  # the runner's own buffer, which it fills again
    )
