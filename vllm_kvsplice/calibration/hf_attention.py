# SPDX-License-Identifier: Apache-2.0
"""A transformers model whose keys and values can be watched or replaced, without modifying the model.

In: a Hugging Face id or folder. Out: the model, and ``transformed_kv``, which hands every attention layer's queries,
keys and values after RoPE to a function. ``calibrate`` watches through it, the offline scoring replaces through it.
Built on https://huggingface.co/docs/transformers/attention_interface.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.pytorch_utils import Conv1D

from vllm_kvsplice.errors import KVSpliceError

NAME = "kvsplice_observed"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OUTPUT_NAMES = ("o_proj", "out_proj", "c_proj", "dense", "wo")  # an attention layer's output projection
Replaced = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]
Transform = Callable[[int, Tensor, Tensor, Tensor], Replaced]

_transforms: WeakKeyDictionary[nn.Module, Transform] = WeakKeyDictionary()  # by module of a model inside transformed_kv


def load_model(model: str, device: str = "auto", dtype: str | torch.dtype = "auto") -> tuple[Any, Any]:
    """Load a causal language model in eval mode, and its tokenizer.

    Args:
        model: Hugging Face id or folder. device: "auto" is the first CUDA device, else the CPU.
        dtype: "float32", "bfloat16", "float16" or a torch dtype; "auto" is the checkpoint's own on a GPU, and float32 on
            the CPU, where 16-bit arithmetic is slow.
    Raises:
        KVSpliceError: no such model, an architecture that transformers does not know, or a bad device or dtype.
    """
    place = _device(device)
    path = Path(model)
    if (path.is_absolute() or path.exists()) and not (path / "config.json").is_file():
        raise KVSpliceError(
            f"model folder {model} has no config.json: give a Hugging Face id or a folder that save_pretrained wrote."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=_dtype(dtype, place))
    except (OSError, ValueError, KeyError, ImportError) as error:
        if isinstance(error, KVSpliceError):
            raise
        reason = next((line.strip(" .:") for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise KVSpliceError(
            f"model {model!r} cannot be loaded by transformers ({reason}): give a Hugging Face id or a folder with a "
            "causal language model and its tokenizer."
        ) from None
    return loaded.to(place).eval(), tokenizer


@contextmanager
def transformed_kv(model: Any, fn: Transform) -> Iterator[None]:
    """Inside the context every decoder attention layer of ``model`` attends to what ``fn`` returns.

    ``fn(layer_idx, q, k, v) -> (k, v)`` is called once per layer and forward, after RoPE, with q [B, num_heads, T,
    head_dim] and k, v [B, num_kv_heads, S, head_dim] (S > T when the forward continues a cache, which holds the
    untransformed k, v); what it returns must have the shapes of k and v. Encoders and cross attention are left alone.
    On exit the model has the attention implementation that it had.

    ``fn`` may return a third tensor, bool and broadcast to [B, num_heads, T, n * S]: which of the keys a query sees,
    besides what the model's own mask leaves of them. Then k and v may be n versions of the sequence, one after another.

    Raises:
        KVSpliceError: the model's attention does not go through the interface, or has attention sinks.
    """
    before = _implementations(model)
    calls = 0

    def counted(layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> Replaced:
        nonlocal calls
        calls += 1
        return fn(layer_idx, q, k, v)

    def require_calls(module: nn.Module, args: Any, output: Any) -> None:
        if not calls:
            raise _refusal(model)

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    hook = model.register_forward_hook(require_calls)
    try:
        _switch(model, NAME)
        _transforms.update(dict.fromkeys(model.modules(), counted))
        yield
    finally:
        hook.remove()
        for module in model.modules():
            _transforms.pop(module, None)
        model.set_attn_implementation(before)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """An attention function of transformers' interface: transform key and value, then attend as sdpa does."""
    fn = _transforms.get(module)
    decoder = kwargs.get("is_causal", getattr(module, "is_causal", True)) is not False
    layer_idx = getattr(module, "layer_idx", None)
    if fn is not None and decoder and isinstance(layer_idx, int):
        new_key, new_value, *seen = fn(layer_idx, query, key, value)
        versions = seen[0].shape[-1] // key.shape[2] if seen else 1
        if new_key.shape != _versions(key, versions) or new_value.shape != _versions(value, versions):
            raise ValueError(
                f"transformed k, v: expected {[*_versions(key, versions)]} and {[*_versions(value, versions)]}, got {[*new_key.shape]} and {[*new_value.shape]}"
            )
        if seen:
            attention_mask = _also_seen(attention_mask, query, key, seen[0])
        key, value = new_key.to(key.dtype), new_value.to(value.dtype)
    if kwargs.get("s_aux") is not None:
        raise KVSpliceError(
            f"{type(module).__name__} has attention sinks, which KVSplice does not support: use a model without sinks."
        )
    soft_cap = kwargs.pop("softcap", None)
    if soft_cap:
        return _soft_capped(module, query, key, value, attention_mask, soft_cap, kwargs.get("scaling"))
    output: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return output


def _versions(x: Tensor, n: int) -> tuple[int, int, int, int]:
    """The shape of n versions of k or v."""
    return (x.shape[0], x.shape[1], n * x.shape[2], x.shape[3])


def _also_seen(mask: Tensor | None, query: Tensor, key: Tensor, seen: Tensor) -> Tensor:
    """The model's mask, plain causal if None, repeated for every version of the keys and narrowed to ``seen``."""
    T, S = query.shape[2], key.shape[2]
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=query.device).tril(S - T)[None, None]
    versions = mask.repeat(1, 1, 1, seen.shape[-1] // S)
    if mask.dtype == torch.bool:
        return versions & seen
    return versions.masked_fill(~seen, torch.finfo(mask.dtype).min)


def _soft_capped(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    soft_cap: float,
    scaling: float | None,
) -> tuple[Tensor, None]:
    """Attention with logits cap * tanh(logit / cap), which sdpa has no argument for; returns [B, T, num_heads, head_dim]."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    logits = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    logits = soft_cap * torch.tanh(logits / soft_cap)
    if mask is None:  # sdpa_mask leaves out a mask that is plain causal
        T, S = logits.shape[-2:]
        mask = torch.ones(T, S, dtype=torch.bool, device=logits.device).tril(S - T)
    if mask.dtype == torch.bool:  # finite, as eager attention has it: a row of padding sees no key at all
        mask = torch.zeros_like(mask, dtype=logits.dtype).masked_fill(~mask, torch.finfo(logits.dtype).min)
    logits = logits + mask
    weights = logits.softmax(-1, dtype=torch.float32).to(value.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), None


def _implementations(model: Any) -> dict[str, str | None]:
    """Attention implementations of a model and its sub-models, as ``set_attn_implementation`` takes them."""
    config = model.config
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    return {"": config._attn_implementation} | {n: c._attn_implementation for n, c in parts.items() if c is not None}


def _switch(model: Any, name: str) -> None:
    if not hasattr(model, "set_attn_implementation") or not model._can_set_attn_implementation():
        raise _refusal(model)
    model.set_attn_implementation(name)
    if model.config.get_text_config()._attn_implementation != name:
        raise _refusal(model)


def _refusal(model: Any) -> KVSpliceError:
    return KVSpliceError(
        f"{type(model).__name__} does not run its attention through transformers' AttentionInterface, so its keys and "
        "values cannot be watched: use a model that does (Llama, Qwen, Mistral, Gemma, Phi and most others)."
    )


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        raise KVSpliceError(f"device {device!r} is not known: expected auto, cpu, cuda or cuda:N.") from None
    try:
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0].rstrip(".")
        raise KVSpliceError(f"device {device!r} cannot be used here ({why}): pass --device auto or cpu.") from None
    return place


def _dtype(dtype: str | torch.dtype, device: torch.device) -> str | torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if dtype not in DTYPES:
        raise KVSpliceError(f"dtype {dtype!r} is not known: expected auto, {', '.join(DTYPES)}.")
    return DTYPES[dtype]


def output_weights(model: Any) -> dict[int, Tensor]:
    """Weights [hidden, num_heads * head_dim] of the attention layers' output projections, by layer index, detached.

    Layers whose projection has an unknown name, or is not a plain matrix, are missing.
    """
    found: dict[int, Tensor] = {}
    for module in model.modules():
        layer_idx = getattr(module, "layer_idx", None)
        if not isinstance(layer_idx, int):
            continue
        for name in OUTPUT_NAMES:
            weight = getattr(getattr(module, name, None), "weight", None)
            if isinstance(weight, Tensor) and weight.is_floating_point() and weight.dim() == 2:
                found.setdefault(
                    layer_idx, weight.detach().T if isinstance(getattr(module, name), Conv1D) else weight.detach()
                )
    return found
