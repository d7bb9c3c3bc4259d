# SPDX-License-Identifier: Apache-2.0
"""What a user can set: ``--additional-config '{"kvsplice": {...}}'`` or ``--additional-config.kvsplice.projector FILE``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from vllm_kvsplice.errors import KVSpliceError


class Settings(BaseModel):
    """Settings of one engine."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    # A projector file, a folder that holds kvsplice.safetensors, or a Hugging Face repo id that does. None: look beside
    # the model's weights, else serve the calibration-free int8 codec.
    projector: str | None = None
    # What the first chunk of a prompt attends to: its own fresh keys and values, or their codes as decoding will.
    prefill: Literal["exact", "latent"] = "exact"


def parse_settings(given: Any) -> Settings:
    """Validate the ``kvsplice`` entry of additional_config; raises KVSpliceError with one sentence."""
    known = ", ".join(Settings.model_fields)
    if not isinstance(given, dict):
        raise KVSpliceError(
            f"additional_config kvsplice is {type(given).__name__} {str(given)[:60]!r}: expected an object with some of {known}."
        )
    unknown = [str(key) for key in given if key not in Settings.model_fields]
    if unknown:
        raise KVSpliceError(f"kvsplice has no setting {', '.join(map(repr, unknown))}: the known ones are {known}.")
    try:
        return Settings.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        name = first["loc"][0] if first["loc"] else "?"
        raise KVSpliceError(
            f"kvsplice setting {name} is {str(first['input'])[:60]!r}: {first['msg'][0].lower()}{first['msg'][1:]}."
        ) from None


def read_settings(additional_config: Any) -> Settings:
    """Settings from vLLM's ``additional_config``, which other code shares with us."""
    shared = additional_config if isinstance(additional_config, dict) else {}
    return parse_settings(shared.get("kvsplice", {}))
