# SPDX-License-Identifier: Apache-2.0
"""Which model a projector belongs to: the part of a transformers config that shapes its keys and values, and names."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict

MAX_NAME = 500  # characters


def _check_line(text: str) -> str:
    if len(text) > MAX_NAME or not text.isprintable():
        raise ValueError(f"is not one line of at most {MAX_NAME} printable characters")
    return text


# A string of a file from outside that terminals and logs will show: no escapes, no second line.
Line = Annotated[str, AfterValidator(_check_line)]


class ModelShape(BaseModel):
    """Structural fields of a model's text config. Two models with equal shapes have projectors of equal form."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_type: Line
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
    return one_line(folder.resolve().name if folder.is_dir() else model)


def one_line(name: str) -> str:
    """A name as a ``Line``: what does not print is a question mark."""
    return "".join(c if c.isprintable() else "?" for c in name)[:MAX_NAME]
