# SPDX-License-Identifier: Apache-2.0
"""The norm before attention and the projections that read it: what gain and LayerNorm's zero mean do to keys and values.

Of models whose attention reads a norm of its own: GPT-2, Llama, Mistral, Qwen2 and Qwen3. Others are refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from vllm_kvsplice.codec.fingerprint import model_shape
from vllm_kvsplice.codec.layout import Side
from vllm_kvsplice.errors import KVSpliceError

KNOWN = ("gpt2", "llama", "mistral", "qwen2", "qwen3")


class AttentionInput(NamedTuple):
    """One layer's norm, and the modules that read nothing else."""

    norm: Any  # module with weight [hidden], LayerNorm's with bias [hidden]
    readers: list[Any]  # q_proj, k_proj, v_proj, or GPT-2's c_attn


def attention_inputs(model: Any) -> dict[int, AttentionInput]:
    """By layer; KVSpliceError for a model of another kind."""
    kind = model_shape(model.config).model_type
    if kind not in KNOWN:
        raise KVSpliceError(
            f"{type(model).__name__} is not among the models whose norm before attention KVSplice knows: expected {', '.join(KNOWN)}."
        )
    found = {}
    for block in model.modules():
        if kind == "gpt2" and hasattr(block, "ln_1"):
            found[block.attn.layer_idx] = AttentionInput(block.ln_1, [block.attn.c_attn])
        elif hasattr(block, "input_layernorm"):
            attention = block.self_attn
            readers = [attention.q_proj, attention.k_proj, attention.v_proj]
            found[attention.layer_idx] = AttentionInput(block.input_layernorm, readers)
    return found


def projection(at: AttentionInput, side: Side) -> tuple[Tensor, Tensor]:
    """Weight [num_kv_heads * head_dim, hidden] and bias [num_kv_heads * head_dim] of keys or values, fp64."""
    if len(at.readers) == 1:
        weight, bias = at.readers[0].weight.detach().T, at.readers[0].bias.detach()
        third = weight.shape[0] // 3
        part = slice(third, 2 * third) if side == "k" else slice(2 * third, None)
        return weight[part].double(), bias[part].double()
    reader = at.readers[1 if side == "k" else 2]
    weight = reader.weight.detach().double()
    return weight, weight.new_zeros(weight.shape[0]) if reader.bias is None else reader.bias.detach().double()


@contextmanager
def folded_gain(model: Any) -> Iterator[None]:
    """Inside the context the gains of the norms before attention are 1, and are in the projections' weights instead.

    The same function of the input, so keys and values are the same up to rounding. LayerNorm's bias is divided by the gain.
    Raises KVSpliceError for a model whose norms are not known, or a gain of zero.
    """
    inputs = attention_inputs(model).values()
    touched = [p for at in inputs for m in (at.norm, *at.readers) for p in m.parameters()]
    before = [p.detach().clone() for p in touched]
    try:
        with torch.no_grad():
            for at in inputs:
                _fold(at)
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(touched, before, strict=True):
                p.copy_(value)


def _fold(at: AttentionInput) -> None:
    gain = at.norm.weight.detach().clone()
    if not gain.all():
        raise KVSpliceError(
            "a norm before attention has a gain of zero, which cannot be folded: leave out --study gamma."
        )
    for reader in at.readers:
        reader.weight.mul_(gain[:, None] if isinstance(reader, Conv1D) else gain)
    at.norm.weight.fill_(1.0)
    bias = getattr(at.norm, "bias", None)
    if bias is not None:
        bias.div_(gain)
