# SPDX-License-Identifier: Apache-2.0
"""Gives one vLLM attention layer its part of the projector: buffers on the layer, bytes per token on its backend class.

In comes the layer after its weights were loaded; out goes a LayerCodec. Next: impl, and vLLM, which asks the layer's
backend class for the page size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kvsplice_kernels.encode import Prepared, prepare
from vllm_kvsplice.codec.layout import BLOCK_MULTIPLE, SIDES, LatentLayout
from vllm_kvsplice.codec.projector import LayerProjector, Projector, default_layer
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.serving.vllm_compat import attention_layers, is_plain_attention, layer_index

# Fields of Prepared -> names of the buffers that hold them; means are those of Bases.
PREPARED = {
    "k_encode": "k_encode_planes",
    "k_offset": "k_offset",
    "v_encode": "v_encode_planes",
    "v_offset": "v_offset",
    "k_decode": "k_decode_planes",
    "k_mean": "k_mean",
    "v_decode": "v_decode_planes",
    "v_mean": "v_mean",
    "k_columns": "k_columns",
    "v_columns": "v_columns",
}


@dataclass(frozen=True)
class LayerCodec:
    """What the read and write paths need to know of a layer besides its tensors."""

    layout: LatentLayout
    bytes_per_token_head: int  # of the cache; more than the layout's where a hybrid model pads to one page size
    wide_dtype: torch.dtype  # of 16-bit tiers
    num_heads: int
    num_kv_heads: int
    scale: float
    sliding_window: int | None
    soft_cap: float | None
    draft_slots: int = 0  # query tokens that vLLM adds to each request of a speculative draft: see metadata

    def __hash__(
        self,
    ) -> int:  # what layers share is kept by codec, and the hash of a layout takes the host microseconds
        return hash((self.bytes_per_token_head, self.num_heads, self.num_kv_heads, self.scale, self.sliding_window))


@lru_cache(maxsize=256)
def one_codec(codec: LayerCodec) -> LayerCodec:
    """The same object for all layers of one kind: what they share is then found without comparing fields."""
    return codec


class Limits(NamedTuple):
    """The most that a step can hold, fixed when the engine starts."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int


class Bases(NamedTuple):
    """A layer's projector tensors for this worker's KV heads, fp32, sigma folded in."""

    k_encode: Tensor  # [H, k_rank, head_dim]
    k_decode: Tensor  # [H, head_dim, k_rank]
    k_mean: Tensor  # [H, head_dim]
    v_encode: Tensor
    v_decode: Tensor
    v_mean: Tensor


def bases_of(layer: nn.Module) -> Bases:
    """The tensors that ``attach`` put on a layer, read from it each time: vLLM may move or restore them.

    From the dict: nn.Module's getattr takes the host a microsecond for each of them, in every layer of every step.
    """
    return Bases._make(_BASES(layer._buffers))


def prepared_of(layer: nn.Module) -> Prepared:
    """The same bases as the writing kernels want them, likewise read from the layer each time."""
    return Prepared._make(_PREPARED(layer._buffers))


def local_kv_heads(total: int, tp_rank: int, tp_size: int) -> tuple[int, int]:
    """KV heads [start, stop) of a tensor-parallel rank, as vLLM's QKVParallelLinear deals them: slices, or replicas."""
    if total >= tp_size:
        per_rank = total // tp_size
        return tp_rank * per_rank, (tp_rank + 1) * per_rank
    head = tp_rank // (tp_size // total)
    return head, head + 1


def check_kind(name: str, layer: Any) -> None:
    """Refuse a layer that ours cannot stand for: vLLM builds some kinds without asking a backend."""
    if not is_plain_attention(layer):
        raise KVSpliceError(
            f"layer {name} is a {type(layer).__name__}, which kvsplice does not support: "
            "serve this model without --attention-backend kvsplice."
        )
    if layer.head_size_v != layer.head_size:
        raise KVSpliceError(
            f"layer {name} has keys of {layer.head_size} and values of {layer.head_size_v} dimensions, which kvsplice "
            "does not support: serve this model without --attention-backend kvsplice."
        )


def projector_layer(
    projector: Projector | None, name: str, head_dim: int, num_kv_heads: int, heads: tuple[int, int]
) -> LayerProjector:
    """The projector of one layer, cut to this worker's KV heads [start, stop).

    ``name`` is the layer whose cache is meant: for a KV-sharing layer its target's.
    """
    if projector is None:
        return default_layer(head_dim, num_kv_heads)
    try:
        index = layer_index(name)
        found = projector.layers[index]
    except (KeyError, ValueError, AssertionError):
        raise KVSpliceError(
            f"the projector has no layer for {name} (it has {len(projector.layers)}): make one for this model with "
            "`kvsplice calibrate MODEL --out FILE`."
        ) from None
    start, stop = heads
    if found.layout.head_dim != head_dim or stop - start != num_kv_heads:
        raise KVSpliceError(
            f"the projector has head_dim {found.layout.head_dim} and KV heads {start}..{stop - 1} for {name}, which has head_dim "
            f"{head_dim} and {num_kv_heads} KV heads on this worker: make one with `kvsplice calibrate MODEL --out FILE`."
        )
    return LayerProjector(found.layout, found.k.heads(*heads), found.v.heads(*heads))


def cell_bytes(layout: LatentLayout, projector: Projector | None, windows: set[int | None]) -> int:
    """Bytes per token and KV head that a layer's cache takes.

    A model with several window sizes keeps several page tables over one pool, and pages of unequal size would be padded
    by vLLM at the cost of the whole gain: there all layers take the size of the largest.
    """
    if projector is None or len(windows) < 2:
        return layout.bytes_per_token_head
    return max(layer.layout.bytes_per_token_head for layer in projector.layers.values())


def attach(layer: nn.Module, found: LayerProjector, device: torch.device) -> None:
    """Put a projector's tensors on the layer as non-persistent buffers, in place if they are there already.

    In place, since captured CUDA graphs hold the addresses; buffers, since sleep mode saves and restores those.
    """
    folded = [found.side(side).folded() for side in SIDES]
    parts = [x.to(device, torch.float32).contiguous() for side in folded for x in (side.encode, side.decode, side.mean)]
    bases = Bases(*parts)
    prepared = prepared_for(bases, found.layout, device)
    named = bases._asdict() | {name: getattr(prepared, field) for field, name in PREPARED.items()}
    for name, tensor in named.items():
        old = getattr(layer, _buffer(name), None)
        if isinstance(old, Tensor) and tensor is not None and old.shape == tensor.shape and old.device == tensor.device:
            old.copy_(tensor)
        else:
            layer.register_buffer(_buffer(name), tensor, persistent=False)


def prepared_for(bases: Bases, layout: LatentLayout, device: torch.device) -> Prepared:
    """Bases as the kernels want them; with those of launches with queries as rows on the GPUs that have such launches."""
    prepared = prepare(*bases)
    if device.type != "cuda":
        return prepared
    from kvsplice_kernels.row_operands import in_columns  # imports Triton, which a CPU need not have
    from vllm_kvsplice.launch import wants_rows

    return in_columns(prepared, *layout.plans(BLOCK_MULTIPLE)) if wants_rows(layout, device) else prepared


def find_layer(vllm_config: Any, impl: object) -> tuple[str, Any]:
    """Name and module of the layer that owns an implementation."""
    for name, layer in attention_layers(vllm_config).items():
        if getattr(layer, "impl", None) is impl:
            return name, layer
    raise KVSpliceError(
        "kvsplice was built for an attention layer that vLLM did not register: report the model's name."
    )


def _buffer(name: str) -> str:
    return f"_kvsplice_{name}"


_BASES = itemgetter(*map(_buffer, Bases._fields))
_PREPARED = itemgetter(*map(_buffer, PREPARED.values()))


def backend_with_bytes(current: type[Any], bytes_per_token_head: int) -> type[Any]:
    """The class for a layer whose class is ``current``: it knows its page size, and layers of one size share it.

    vLLM groups layers by class. After a weight reload ``current`` is such a class already.
    """
    return _sized(current if current.bytes_per_token_head is None else current.__bases__[0], bytes_per_token_head)


@lru_cache(maxsize=256)
def _sized(base: type[Any], bytes_per_token_head: int) -> type[Any]:
    name = f"{base.__name__}{bytes_per_token_head}"
    return type(name, (base,), {"bytes_per_token_head": bytes_per_token_head, "__module__": base.__module__})
