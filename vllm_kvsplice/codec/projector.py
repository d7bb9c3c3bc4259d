# SPDX-License-Identifier: Apache-2.0
"""The projector: per layer and KV head the bases, means and tiers that ``calibrate`` found and the backend serves with.

One safetensors file, read as untrusted: the header is checked against the file's size, the metadata against a schema
and every tensor's shape against the layout before anything is allocated. Never pickle, never code.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vllm_kvsplice.codec.bases import hadamard
from vllm_kvsplice.codec.fingerprint import Line, ModelShape, model_shape
from vllm_kvsplice.codec.layout import SIDES, LatentLayout, Ratios, Side, Tier, ratios
from vllm_kvsplice.errors import KVSpliceError

FORMAT = "kvsplice/1"
FILE_NAME = "kvsplice.safetensors"  # looked for beside a model's weights
MAX_HEADER_BYTES = 16 << 20  # safetensors allows 100 MB; ours holds a few kilobytes per layer
MAX_LAYERS, MAX_KV_HEADS = 1024, 1024
_PARTS = ("encode", "decode", "mean", "sigma")


class Folded(NamedTuple):
    """A basis with sigma folded in, as the runtime uses it."""

    encode: Tensor  # [H, rank, head_dim]
    decode: Tensor  # [H, head_dim, rank]
    mean: Tensor  # [H, head_dim]


@dataclass(frozen=True)
class Basis:
    """Encoder and decoder of one side (K or V) of one layer, fp32, for H KV heads.

    A vector x has the latent z = encode (x - mean) / sigma and is read back as decode (sigma z) + mean.
    """

    encode: Tensor  # [H, rank, head_dim]
    decode: Tensor  # [H, head_dim, rank]
    mean: Tensor  # [H, head_dim]
    sigma: Tensor  # [H, rank], positive

    def folded(self) -> Folded:
        """Sigma divided out of the encoder and multiplied into the decoder."""
        return Folded(self.encode / self.sigma[..., None], self.decode * self.sigma[:, None, :], self.mean)

    def heads(self, start: int, stop: int) -> Basis:
        """The KV heads [start, stop), as one tensor-parallel rank needs them."""
        return Basis(*(getattr(self, part)[start:stop] for part in _PARTS))

    @classmethod
    def orthogonal(cls, encode: Tensor, mean: Tensor | None = None) -> Basis:
        """A basis of orthonormal rows [H, rank, head_dim]: decode = encode^T, sigma 1."""
        mean = torch.zeros(encode.shape[0], encode.shape[2]) if mean is None else mean
        encode = encode.float().contiguous()
        return cls(encode, encode.transpose(1, 2).contiguous(), mean.float(), torch.ones(encode.shape[:2]))


@dataclass(frozen=True)
class LayerProjector:
    """Layout and bases of one attention layer, all KV heads of the model."""

    layout: LatentLayout
    k: Basis
    v: Basis

    def side(self, side: Side) -> Basis:
        """The basis of "k" or "v"."""
        return self.k if side == "k" else self.v


class Calibration(BaseModel):
    """What a projector was calibrated on."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    text: Line
    text_sha256: Line
    tokens: int
    samples: int
    seq_len: int
    seed: int


class Metadata(BaseModel):
    """How a projector introduces itself. ``quality`` holds measured scores, if any were written into the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: Literal["kvsplice/1"] = "kvsplice/1"
    model: ModelShape
    model_digest: Line
    model_name: Line = ""
    preset: Line
    recipe: dict[str, Any] = Field(default_factory=dict)
    calibration: Calibration | None = None
    versions: dict[Line, Line] = Field(default_factory=dict)
    quality: dict[str, Any] | None = None


@dataclass(frozen=True)
class Projector:
    """Layers by transformer layer index, with the metadata of the file."""

    metadata: Metadata
    layers: dict[int, LayerProjector]

    @property
    def bytes_per_token_head(self) -> float:
        """All-in bytes per token and KV head, K+V, mean over layers."""
        return sum(layer.layout.bytes_per_token_head for layer in self.layers.values()) / len(self.layers)

    def ratios(self, dtype_bytes: int = 2) -> Ratios:
        """All-in compression of K, V and K+V over all layers against a dense cache."""
        return ratios((layer.layout for layer in self.layers.values()), dtype_bytes)

    def verify(self, config: Any) -> None:
        """Raise KVSpliceError unless this projector belongs to a model with this transformers config."""
        wanted = model_shape(config)
        if self.metadata.model != wanted:
            raise KVSpliceError(
                f"the projector was calibrated for another model ({'; '.join(self.metadata.model.differences(wanted))}): "
                "make one for this model with `kvsplice calibrate MODEL --out FILE`."
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file; equal projectors give equal bytes."""
        tensors = {
            f"layers.{i}.{side}.{part}": getattr(layer.side(side), part).float().contiguous().clone()
            for i, layer in sorted(self.layers.items())
            for side in SIDES
            for part in _PARTS
        }
        layouts = {str(i): layer.layout.to_json() for i, layer in sorted(self.layers.items())}
        # One JSON string: safetensors orders several metadata keys at random, which would change the bytes.
        meta = {"metadata": self.metadata.model_dump(mode="json"), "layouts": layouts}
        save_file(tensors, path, metadata={"kvsplice": json.dumps(meta, sort_keys=True)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Projector:
        """Read a projector file; raises KVSpliceError with one sentence on anything that is not a sound one."""
        header = _read_header(Path(path))
        metadata, layouts = _parse_metadata(Path(path), header)
        _check_tensors(Path(path), header, metadata, layouts)
        try:
            with safe_open(path, framework="pt") as f:
                layers = {
                    i: LayerProjector(
                        layout, *(Basis(*(f.get_tensor(f"layers.{i}.{s}.{p}") for p in _PARTS)) for s in SIDES)
                    )
                    for i, layout in layouts.items()
                }
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise _refusal(path, str(error).splitlines()[0]) from None
        for i, layer in layers.items():
            _check_values(Path(path), i, layer)
        return cls(metadata, layers)


def default_layer(head_dim: int, num_kv_heads: int) -> LayerProjector:
    """The calibration-free codec: full-rank Hadamard rotation, K and V in one 8-bit tier each."""
    basis = Basis.orthogonal(hadamard(head_dim).expand(num_kv_heads, -1, -1))
    tiers = (Tier(8, head_dim),)
    return LayerProjector(LatentLayout(head_dim, tiers, tiers), basis, basis)


# ---------------------------------------------------------------- reading an untrusted file
def _refusal(path: str | os.PathLike[str], why: str) -> KVSpliceError:
    return KVSpliceError(
        f"{os.fspath(path)} is not a usable projector file ({why}): make one with `kvsplice calibrate MODEL --out FILE`."
    )


def _read_header(path: Path) -> dict[str, Any]:
    """The safetensors header as JSON, its length checked against the file before it is read."""
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if size < 10 or length > size - 8:
                raise _refusal(path, f"{size} bytes is shorter than its header says")
            if length > MAX_HEADER_BYTES:
                raise _refusal(path, f"its header of {length} bytes is over {MAX_HEADER_BYTES}")
            header = json.loads(f.read(length))
    except FileNotFoundError:
        raise KVSpliceError(
            f"projector file {path} does not exist: make it with `kvsplice calibrate MODEL --out {path}`."
        ) from None
    except OSError as error:
        raise _refusal(path, f"it cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, KVSpliceError):
            raise
        raise _refusal(path, "its safetensors header is not JSON") from None
    if not isinstance(header, dict):
        raise _refusal(path, "its safetensors header is not an object")
    return header


def _parse_metadata(path: Path, header: dict[str, Any]) -> tuple[Metadata, dict[int, LatentLayout]]:
    raw = header.get("__metadata__")
    try:
        meta = json.loads(raw["kvsplice"])  # type: ignore[index]
        version = meta["metadata"]["format"]
        layouts = meta["layouts"].items()
    except (TypeError, KeyError, ValueError, AttributeError, RecursionError):
        raise _refusal(path, "it has no kvsplice metadata") from None
    if version != FORMAT:
        raise KVSpliceError(
            f"{path} has projector format {str(version)[:40]!r}, this version reads {FORMAT!r}: make it again with `kvsplice calibrate MODEL --out FILE`."
        )
    try:
        metadata = Metadata.model_validate(meta["metadata"])
    except ValidationError as error:
        first = error.errors()[0]
        raise _refusal(path, f"metadata {'.'.join(str(p) for p in first['loc'])}: {first['msg']}") from None
    return metadata, {_layer_index(path, i): LatentLayout.from_json(layout) for i, layout in layouts}


def _layer_index(path: Path, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 4 and int(text) < MAX_LAYERS):
        raise _refusal(path, f"layer index {text[:20]!r} is not a number below {MAX_LAYERS}")
    return int(text)


def _shapes(layout: LatentLayout, side: Side, num_kv_heads: int) -> Iterable[tuple[str, list[int]]]:
    H, rank, head_dim = num_kv_heads, layout.rank(side), layout.head_dim
    return zip(_PARTS, ([H, rank, head_dim], [H, head_dim, rank], [H, head_dim], [H, rank]), strict=True)


def _check_tensors(path: Path, header: dict[str, Any], metadata: Metadata, layouts: dict[int, LatentLayout]) -> None:
    """Names, dtypes and shapes of all tensors against the layouts, before any is read."""
    model = metadata.model
    if metadata.model_digest != model.digest:
        raise _refusal(path, f"its model digest {metadata.model_digest[:20]!r} does not match its model fields")
    if not (0 < model.num_hidden_layers <= MAX_LAYERS):
        raise _refusal(path, f"{model.num_hidden_layers} layers is not between 1 and {MAX_LAYERS}")
    if not (0 < model.num_kv_heads <= MAX_KV_HEADS):
        raise _refusal(path, f"{model.num_kv_heads} KV heads is not between 1 and {MAX_KV_HEADS}")
    if any(layout.head_dim != model.head_dim for layout in layouts.values()):
        raise _refusal(path, f"its layouts are not all of its model's head_dim {model.head_dim}")
    if not layouts or max(layouts) >= model.num_hidden_layers:
        raise _refusal(path, f"its layers are {sorted(layouts)[:4]}..., its model has {model.num_hidden_layers}")
    wanted = {
        f"layers.{i}.{side}.{part}": shape
        for i, layout in layouts.items()
        for side in SIDES
        for part, shape in _shapes(layout, side, model.num_kv_heads)
    }
    found = {name: entry for name, entry in header.items() if name != "__metadata__"}
    if wanted.keys() != found.keys():
        odd = sorted(wanted.keys() ^ found.keys())[0]
        raise _refusal(path, f"tensor {odd[:60]!r} is {'missing' if odd in wanted else 'not expected'}")
    for name, shape in wanted.items():
        entry = found[name] if isinstance(found[name], dict) else {}
        if entry.get("dtype") != "F32" or entry.get("shape") != shape:
            raise _refusal(path, f"tensor {name} is {entry.get('dtype')} {entry.get('shape')}, expected F32 {shape}")


def _check_values(path: Path, index: int, layer: LayerProjector) -> None:
    for side in SIDES:
        basis = layer.side(side)
        for part in _PARTS:
            if not torch.isfinite(getattr(basis, part)).all():
                raise _refusal(path, f"layers.{index}.{side}.{part} holds numbers that are not finite")
        if not (basis.sigma > 0).all():
            raise _refusal(path, f"layers.{index}.{side}.sigma holds numbers that are not positive")
        if not all(torch.isfinite(part).all() for part in basis.folded()):
            raise _refusal(path, f"layers.{index}.{side} has a sigma that its bases cannot be scaled by")


def build_metadata(config: Any, preset: str, **fields: Any) -> Metadata:
    """Metadata for a model with this transformers config; ``fields`` are further Metadata fields."""
    shape = model_shape(config)
    return Metadata(model=shape, model_digest=shape.digest, preset=preset, **fields)
