# SPDX-License-Identifier: Apache-2.0
"""Presets: what to store of K and of V at any head_dim, as TOML files that users can copy and change.

In: a preset's name or a TOML file, a head_dim, and overrides. Out: a ``LatentLayout`` and the ``Recipe`` that
``calibrate`` solves bases by.
"""

from __future__ import annotations

import math
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_kvsplice.codec.bases import Equalise
from vllm_kvsplice.codec.fingerprint import one_line
from vllm_kvsplice.codec.layout import TIER_MULTIPLE, LatentLayout, Side
from vllm_kvsplice.config_files import installed
from vllm_kvsplice.errors import KVSpliceError

OVERRIDE_BITS = (16, 8, 4, 2)
# Names for what a preset is wanted for; each is that preset and nothing else.
MODES = {"default": "near_lossless", "high_compression": "balanced", "memory_emergency": "max"}


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TierShare(_Strict):
    """A tier as a share of head_dim, or what the other tiers leave ("rest")."""

    bits: Literal[16, 8, 4, 2, 0]
    share: Annotated[float, Field(gt=0, le=1)] | Literal["rest"] = "rest"


class SideRecipe(_Strict):
    """How one side is stored.

    basis: "calibrated" principal axes, or the fixed "hadamard" rotation, which metric and equalise do not touch.
    metric: what a lost dimension costs: "plain" squared error, or squared error of the logits ("query-aware", K only)
    or of the attention output ("output-aware", V only). equalise: see ``bases``.
    """

    basis: Literal["calibrated", "hadamard"] = "calibrated"
    metric: Literal["plain", "query-aware", "output-aware"] = "plain"
    equalise: Equalise = "gamma"
    tiers: tuple[TierShare, ...] = Field(min_length=1)

    @property
    def untouched(self) -> bool:
        """One 16-bit tier of every dimension: the identity basis."""
        return [(t.bits, t.share) for t in self.tiers] in ([(16, "rest")], [(16, 1.0)])


class Recipe(_Strict):
    """A preset as read: both sides, before a head_dim is known."""

    description: str
    k: SideRecipe
    v: SideRecipe

    @property
    def needs_text(self) -> bool:
        """Whether any basis is solved from calibration text."""
        return any(s.basis == "calibrated" and not s.untouched for s in (self.k, self.v))


def preset_names() -> list[str]:
    """Names of the presets that are installed."""
    return sorted(installed("*.toml"))


def load_preset(name_or_path: str) -> Recipe:
    """Read a preset by its name or a mode's, or a TOML file by a path that ends in .toml; KVSpliceError if there is none."""
    if name_or_path.endswith(".toml"):
        try:
            return _parse(name_or_path, Path(name_or_path).read_bytes())
        except OSError as error:
            raise KVSpliceError(
                f"preset file {name_or_path} cannot be read ({error.strerror}): give a TOML file or one of {', '.join(preset_names())}."
            ) from None
    presets = installed("*.toml")
    name = MODES.get(name_or_path, name_or_path)
    if name not in presets:
        raise KVSpliceError(
            f"preset {name!r} is not known: expected {', '.join(preset_names())}, a mode ({', '.join(MODES)}), or the path of a .toml file."
        )
    return _parse(name, presets[name].read_bytes())


def shown_preset(name_or_path: str) -> str:
    """What a projector file says that it was made by: a preset's own name, or the file's without its folder."""
    return (
        one_line(Path(name_or_path).stem) if name_or_path.endswith(".toml") else MODES.get(name_or_path, name_or_path)
    )


def resolve(
    name_or_path: str, head_dim: int, rank: int | None = None, v_bits: int | None = None, k_bits: int | None = None
) -> tuple[LatentLayout, Recipe]:
    """The layout of a preset at a head_dim, and its recipe with the overrides in it.

    Args:
        rank: V dimensions kept (a multiple of 8 up to head_dim), in V's one tier or shared among its tiers in
            proportion; the rest is dropped. v_bits, k_bits: 16, 8, 4 or 2; the side becomes one tier of that width over
            its kept dimensions, calibrated for its metric if it was untouched.
    Raises:
        KVSpliceError: no such preset, a bad override, or tiers that do not make a layout.
    """
    recipe = load_preset(name_or_path)
    k, v = _with_bits(recipe.k, "k", k_bits), _with_bits(recipe.v, "v", v_bits)
    if rank is not None:
        v = _with_rank(v, rank, head_dim)
    recipe = recipe.model_copy(update={"k": k, "v": v})
    return layout_of(recipe, head_dim), recipe


def layout_of(recipe: Recipe, head_dim: int) -> LatentLayout:
    """The layout of a recipe at a head_dim; KVSpliceError if its tiers do not make one."""
    return LatentLayout.of(head_dim, tier_dims(recipe.k.tiers, head_dim), tier_dims(recipe.v.tiers, head_dim))


def tier_dims(tiers: tuple[TierShare, ...], head_dim: int) -> list[tuple[int, int]]:
    """(bits, dims) of tiers: a share is rounded half up to a multiple of 8 and is at least 8; an empty rest is left out."""
    rests = sum(t.share == "rest" for t in tiers)
    if rests > 1:
        raise KVSpliceError(f"{rests} tiers have share 'rest': expected at most one.")
    dims = [0 if t.share == "rest" else _rounded(float(t.share) * head_dim) for t in tiers]
    left = head_dim - sum(dims)
    pairs = [(t.bits, left if t.share == "rest" else n) for t, n in zip(tiers, dims, strict=True)]
    return [(bits, n) for bits, n in pairs if n != 0]


def _rounded(dims: float) -> int:
    return max(TIER_MULTIPLE, TIER_MULTIPLE * math.floor(dims / TIER_MULTIPLE + 0.5))


def _with_bits(side: SideRecipe, name: Side, bits: int | None) -> SideRecipe:
    """One tier of ``bits`` over the kept dimensions of a side."""
    if bits is None:
        return side
    if bits not in OVERRIDE_BITS:
        raise KVSpliceError(
            f"--{name}-bits {bits} is not supported: expected one of {', '.join(map(str, OVERRIDE_BITS))}."
        )
    dropped = tuple(t for t in side.tiers if t.bits == 0)
    kept: float | Literal["rest"] = "rest"
    if dropped and dropped[0].share == "rest":
        kept = sum(float(t.share) for t in side.tiers if t.bits)
    changes: dict[str, Any] = {"tiers": (TierShare(bits=bits, share=kept), *dropped)}  # type: ignore[arg-type]
    if side.untouched:
        changes["metric"] = "query-aware" if name == "k" else "output-aware"
    return side.model_copy(update=changes)


def _with_rank(side: SideRecipe, rank: int, head_dim: int) -> SideRecipe:
    """V cut to ``rank`` dimensions, its tiers shrunk in proportion."""
    if not (0 < rank <= head_dim and rank % TIER_MULTIPLE == 0):
        raise KVSpliceError(
            f"--rank {rank} is not supported: expected a multiple of {TIER_MULTIPLE} up to head_dim {head_dim}."
        )
    if side.basis == "hadamard" and rank < head_dim:
        raise KVSpliceError(
            f"--rank {rank} needs a calibrated basis, and this preset has a fixed one: use another, for example orthogonal_int8."
        )
    now = [(bits, n) for bits, n in tier_dims(side.tiers, head_dim) if bits]
    kept = sum(n for _, n in now)
    dims = [_rounded(n * rank / kept) for _, n in now[:-1]]
    dims.append(rank - sum(dims))
    if dims[-1] <= 0:
        raise KVSpliceError(
            f"--rank {rank} is too small for {len(now)} tiers: expected at least {TIER_MULTIPLE * len(now)}."
        )
    sizes = [(bits, n) for (bits, _), n in zip(now, dims, strict=True)] + [(0, head_dim - rank)]
    tiers = tuple(TierShare(bits=bits, share=n / head_dim) for bits, n in sizes if n)  # type: ignore[arg-type]
    changes: dict[str, Any] = {"tiers": tiers}
    if side.untouched and rank < head_dim:
        changes["metric"] = "output-aware"
    return side.model_copy(update=changes)


def _parse(name: str, content: bytes) -> Recipe:
    try:
        recipe = Recipe.model_validate(tomllib.loads(content.decode()))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise KVSpliceError(f"preset {name} is not TOML ({error}): see the files in configs/.") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise KVSpliceError(f"preset {name} has a bad {where} ({first['msg']}): see the files in configs/.") from None
    for side, foreign in ((recipe.k, "output-aware"), (recipe.v, "query-aware")):
        if side.metric == foreign:
            raise KVSpliceError(f"preset {name} has metric {foreign!r} on the side that it does not belong to.")
    return recipe
