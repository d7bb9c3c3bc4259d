# SPDX-License-Identifier: Apache-2.0
"""Which model a projector belongs to: the part of a transformers config that shapes its keys and values."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict


class ModelShape(BaseModel):
    """Structural fields of a model's text config. Two models with equal shapes have projectors of equal form."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def digest(self) -> str:
        """First 16 hex digits of the SHA-256 of the fields."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]

    def differences(self, other: ModelShape) -> list[str]:
        """Fields that differ, as ``name mine, not theirs``."""
        mine, theirs = self.model_dump(), other.model_dump()
        return [f"{name} {mine[name]}, not {theirs[name]}" for name in mine if mine[name] != theirs[name]]


def model_shape(config: Any) -> ModelShape:
    """Read the shape off a transformers config (a multimodal one answers with its text part)."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = text.num_attention_heads
    return ModelShape(
        model_type=text.model_type,
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=heads,
        num_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
    )


def shown_name(model: str) -> str:
    """A model's id, or its folder's own name: in a file that travels the folder's path is nobody's business."""
    folder = Path(model)
    return folder.resolve().name if folder.is_dir() else model
