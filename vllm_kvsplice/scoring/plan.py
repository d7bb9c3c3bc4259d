# SPDX-License-Identifier: Apache-2.0
"""How many tokens and users a GPU holds: dense, fp8 and kvsplice, from a model's config and weight headers alone.

In: a ``PlanRequest``. Out: a dict for ``plan_table``. Weights are never loaded: their bytes are read from safetensors
headers where the checkpoint is at hand, else parameters are counted on the meta device. What is not known is assumed,
and the assumptions are part of the result.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_kvsplice.codec.fingerprint import ModelShape, model_shape
from vllm_kvsplice.codec.layout import dense_bytes
from vllm_kvsplice.codec.projector import FILE_NAME, Projector
from vllm_kvsplice.codec.projector_source import locate
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.scoring.evaluate import read_config
from vllm_kvsplice.scoring.inspect_file import served_layouts, summary
from vllm_kvsplice.scoring.results import table

GIB = 2**30
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
BATCHED_TOKENS = 8192  # vLLM's default chunk of prefill on large GPUs: it sizes the activations
OVERHEAD_GIB = 1.0  # CUDA context, graphs, allocator slack


@dataclass(frozen=True)
class PlanRequest:
    """What to plan for. Memory in GiB per GPU; context in tokens per user; tp GPUs share each layer."""

    model: str
    gpu_memory: float
    context: int
    projector: str | None = None
    dtype: str = "auto"
    tp: int = 1
    utilization: float = 0.9

    def __post_init__(self) -> None:
        if self.gpu_memory <= 0 or self.context < 1 or self.tp < 1 or not 0 < self.utilization <= 1:
            raise KVSpliceError(
                f"nothing fits {self.gpu_memory} GiB, context {self.context}, tp {self.tp}, utilization {self.utilization}: "
                "expected positive numbers and a utilization of at most 1."
            )


def run(request: PlanRequest) -> dict[str, Any]:
    """Count weights, cache bytes, tokens and users; raises KVSpliceError on a bad model, projector or request."""
    config = read_config(request.model)
    text = config.get_text_config()
    windows = layer_windows(text)
    shape = model_shape(config)
    path = locate(request.projector, request.model)
    projector = Projector.load(path) if path else None
    if projector:
        projector.verify(config)
    dtype, dtype_bytes = _dtype(request.dtype, config)
    parameters, weight_bytes = count_weights(request.model, config, dtype_bytes if request.dtype != "auto" else None)
    heads = max(1, shape.num_kv_heads // request.tp)
    layouts = served_layouts(projector, shape)
    codecs = {
        dtype: [2 * dense_bytes(shape.head_dim, dtype_bytes)] * shape.num_hidden_layers,
        "fp8": [2 * dense_bytes(shape.head_dim, 1)] * shape.num_hidden_layers,
        "kvsplice": [layouts[i].bytes_per_token_head for i in range(shape.num_hidden_layers)],
    }
    activations = activation_bytes(text, dtype_bytes, request.tp)
    free = request.gpu_memory * GIB * request.utilization - weight_bytes / request.tp - activations
    return {
        "model": request.model,
        "parameters": parameters,
        "weights_gib": weight_bytes / GIB,
        "cache_gib": free / GIB,
        "codec": summary(layouts.values()),
        "preset": projector.metadata.preset if projector else "int8",
        "context": request.context,
        "caches": {name: capacity(sizes, windows, heads, free, request.context) for name, sizes in codecs.items()},
        "assumptions": _assumptions(request, activations, windows, heads, shape),
    }


def capacity(
    layer_bytes: Sequence[int], windows: Sequence[int | None], heads: int, free_bytes: float, context: int
) -> dict[str, float]:
    """Tokens and users of one cache on one GPU.

    Args:
        layer_bytes: K and V bytes per token and KV head of each layer. windows: sliding window of each layer, None
            where it sees the whole context. heads: KV heads per GPU.
    Returns:
        bytes_per_token of a context within all windows, tokens that fit at this context, whole users of it.
    """
    per_user = heads * sum(
        size * (context if window is None else min(context, window))
        for size, window in zip(layer_bytes, windows, strict=True)
    )
    fit = max(0.0, free_bytes) / per_user
    return {"bytes_per_token": heads * sum(layer_bytes), "tokens": int(fit * context), "users": math.floor(fit)}


def layer_windows(text_config: Any) -> list[int | None]:
    """The sliding window of each layer, None for full attention; raises KVSpliceError for layers of another kind."""
    count = text_config.num_hidden_layers
    window = getattr(text_config, "sliding_window", None)
    kinds = getattr(text_config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * count
    odd = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if odd or getattr(text_config, "kv_lora_rank", None):
        raise KVSpliceError(
            f"the cache of {text_config.model_type} cannot be planned: it has {', '.join(odd) or 'multi-head latent attention'}, "
            "expected full or sliding-window attention only."
        )
    return [window if kind == "sliding_attention" else None for kind in kinds]


def activation_bytes(text_config: Any, dtype_bytes: int, tp: int) -> float:
    """An estimate of what vLLM keeps free for a step: hidden states and the widest MLP of a prefill chunk, fp32 logits of
    256 sequences, and a fixed overhead."""
    hidden = text_config.hidden_size
    wide = 2 * (getattr(text_config, "intermediate_size", None) or 4 * hidden) / tp
    logits = 2 * 256 * text_config.vocab_size * 4
    return BATCHED_TOKENS * (4 * hidden + wide) * dtype_bytes + logits + OVERHEAD_GIB * GIB


def count_weights(model: str, config: Any, dtype_bytes: int | None = None) -> tuple[int, int]:
    """Parameters and bytes of a model without loading it.

    Args:
        dtype_bytes: bytes per parameter to serve with; None is the checkpoint's own.
    """
    files = sorted(Path(model).glob("*.safetensors")) if Path(model).is_dir() else []
    sizes = [size for file in files if file.name != FILE_NAME for size in _tensors(file)]
    if not sizes:
        parameters = _meta_parameters(config)
        return parameters, parameters * (dtype_bytes or _dtype("auto", config)[1])
    parameters = sum(count for count, _ in sizes)
    return parameters, parameters * dtype_bytes if dtype_bytes else sum(size for _, size in sizes)


def plan_table(plan: dict[str, Any]) -> str:
    """The human form of a plan."""
    rows = [["cache", "bytes per token", "tokens", f"users of {plan['context']:,}", "tokens, relative"]]
    dense = next(iter(plan["caches"].values()))["tokens"]
    for name, c in plan["caches"].items():
        relative = f"{c['tokens'] / dense:.2f} x" if dense else "-"
        rows.append([name, f"{c['bytes_per_token']:,}", f"{c['tokens']:,}", f"{c['users']:,}", relative])
    lines = [
        f"{plan['model']}: {plan['parameters'] / 1e9:.3f} B parameters, weights {plan['weights_gib']:.2f} GiB, "
        f"left for the cache of each GPU {plan['cache_gib']:.2f} GiB",
        f"codec {plan['preset']} ({plan['codec']})",
        "",
        table(rows),
        "",
        "assumed:",
        *(f"  {line}" for line in plan["assumptions"]),
    ]
    return "\n".join(lines)


def _assumptions(
    request: PlanRequest, activations: float, windows: Sequence[int | None], heads: int, shape: ModelShape
) -> list[str]:
    sliding = [w for w in windows if w is not None]
    lines = [
        f"gpu_memory_utilization {request.utilization} of {request.gpu_memory:g} GiB",
        f"activations and overhead {activations / GIB:.2f} GiB per GPU (estimate: chunks of {BATCHED_TOKENS} tokens, "
        f"256 sequences of logits, {OVERHEAD_GIB:g} GiB for context and graphs)",
        f"{request.tp} GPU(s), each {heads} of {shape.num_kv_heads} KV heads of every layer, weights split evenly",
    ]
    if sliding:
        lines.append(f"{len(sliding)} of {len(windows)} layers keep their window of {sliding[0]} tokens only")
    return lines


def _tensors(path: Path) -> list[tuple[int, int]]:
    """(elements, bytes) of each tensor, from a safetensors header."""
    try:
        with path.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if length > path.stat().st_size:
                raise ValueError
            header = json.loads(f.read(length))
        entries = [entry for name, entry in header.items() if name != "__metadata__"]
        return [(math.prod(e["shape"]), e["data_offsets"][1] - e["data_offsets"][0]) for e in entries]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise KVSpliceError(f"{path} is not a readable safetensors file: expected the weights of the model.") from None


def _meta_parameters(config: Any) -> int:
    """Parameters of a model built without storage; tied ones count once."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())


def _dtype(wanted: str, config: Any) -> tuple[str, int]:
    name = str(config.get_text_config().dtype or "bfloat16").removeprefix("torch.") if wanted == "auto" else wanted
    if wanted == "auto" and name == "float32":
        name = "bfloat16"  # vLLM serves fp32 checkpoints in 16 bits
    if name not in DTYPE_BYTES:
        raise KVSpliceError(f"dtype {name!r} is not known: expected auto, {', '.join(DTYPE_BYTES)}.")
    return name, DTYPE_BYTES[name]
