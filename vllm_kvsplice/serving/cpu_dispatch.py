# SPDX-License-Identifier: Apache-2.0
"""Stands where vLLM's CPU platform looks for its attention backends, and answers per engine.

The CPU platform takes the path of CPU_ATTN (CPU_MLA or AMX_MLA for latent-attention models) whatever backend was
selected. These paths are overridden with attributes of this module: an engine that selected KVSPLICE gets ours, any
other engine the very class that stood there before.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from vllm_kvsplice.errors import KVSpliceError

stock_paths: dict[str, str] = {}  # enum member name -> class path before registration


def __getattr__(name: str) -> Any:
    if name not in stock_paths:
        raise AttributeError(name)
    if not _selected():
        return _load(stock_paths[name])
    if name != "CPU_ATTN":
        raise KVSpliceError(
            "kvsplice does not support multi-head latent attention (MLA): serve this model without --attention-backend kvsplice."
        )
    import vllm

    from vllm_kvsplice.serving.registration import BACKEND, UNSUPPORTED, logger, version_refusal

    backend = _load(UNSUPPORTED if version_refusal(vllm.__version__) else BACKEND)
    logger.info(
        "kvsplice is active on this CPU, in the place of CPU_ATTN: vLLM's line 'Cannot use KVSPLICE backend on CPU' does not hold."
    )
    return backend


def _selected() -> bool:
    """Whether the engine being built selected KVSPLICE; a map by kind of layer cannot be told apart here."""
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    attention = getattr(config, "attention_config", None)
    chosen = getattr(getattr(attention, "backend", None), "name", None)
    by_kind = {getattr(b, "name", None) for b in (getattr(attention, "backend_per_kind", None) or {}).values()}
    if by_kind and "KVSPLICE" in by_kind | {chosen}:
        raise KVSpliceError(
            "kvsplice on CPU serves all layers or none: use --attention-backend kvsplice without backend_per_kind."
        )
    return chosen == "KVSPLICE"


def _load(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)
