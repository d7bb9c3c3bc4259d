# SPDX-License-Identifier: Apache-2.0
"""The studies: each a pure function from a model's geometry to the variants that it compares.

In: a ``Geometry``. Out: ``Variant``s, which ``study`` calibrates, scores and makes rows of, and ``study_report`` prints
and draws along the axes that are named here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple, get_args

from vllm_kvsplice.calibration.presets import MODES, Recipe, SideRecipe, TierShare, load_preset, tier_dims
from vllm_kvsplice.codec.bases import EQUALISE
from vllm_kvsplice.codec.layout import TIER_MULTIPLE
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.lab.codec import Codec, Geometry
from vllm_kvsplice.lab.joint import joint_codec
from vllm_kvsplice.lab.norms import folded_gain
from vllm_kvsplice.lab.nullspace import nullspace_codec
from vllm_kvsplice.lab.ours import preset_codec, recipe_codec
from vllm_kvsplice.lab.refined import Refinement, refined_codec

RANKS = (256, 192, 128, 96, 80, 64, 56, 48, 32, 24, 16)
BITS: tuple[Literal[16, 8, 4, 2], ...] = (16, 8, 4, 2)
SIDES = ("V", "K", "K+V")
SAMPLES = (1, 2, 4, 8, 16, 32)
DROPS = "orthogonal_int8"  # a preset that drops dimensions, beside those that drop none
DENSE = SideRecipe(tiers=(TierShare(bits=16),))
JOINT_PRESETS = {"orthogonal": 16, "orthogonal_int8": 8, "orthogonal_int4": 4}  # bits of latents at a sixth of the rank

At = dict[str, str | int]
Source = Literal["given", "english", "code"]  # of a text: what the request names, or built in
Change = Callable[[Any], AbstractContextManager[None]]


class Variant(NamedTuple):
    """One row of a study.

    at: its place on the study's axes. calibration, scored: which texts. samples: windows of calibration, None for the
    request's. stability: whether to calibrate once for each of the request's seeds. change: a context in which the model is
    another one, calibrated and scored so, and compared with the unchanged one. products: multiplications of one query head
    with one cached token, K and V together.
    """

    at: At
    codec: Codec
    calibration: Source = "given"
    scored: Source = "given"
    samples: int | None = None
    stability: bool = False
    change: Change = nullcontext
    products: int | None = None


class Study(NamedTuple):
    """A question, its variants, and the axis (of ``Variant.at``) that is drawn; the others make the series."""

    name: str
    about: str
    axis: str
    variants: Callable[[Geometry], list[Variant]]


def choose(names: Sequence[str]) -> list[Study]:
    """The studies of these names, all if there are none; KVSpliceError for a name that nothing has."""
    known = {study.name: study for study in STUDIES}
    for name in names:
        if name not in known:
            raise KVSpliceError(f"study {name!r} is not known: expected some of {', '.join(known)}.")
    return [known[name] for name in dict.fromkeys(names or known)]


# ---------------------------------------------------------------- recipes
def one_tier(bits: int, rank: int, head_dim: int, side: str, metric: str | None = None) -> SideRecipe:
    """``rank`` dimensions in one tier, the rest dropped, in the metric of the presets for that side unless another is named."""
    tiers = [TierShare(bits=bits, share=rank / head_dim)]  # type: ignore[arg-type]
    if rank < head_dim:
        tiers.append(TierShare(bits=0))
    aware = "query-aware" if side == "K" else "output-aware"
    return SideRecipe(metric=metric or aware, tiers=tuple(tiers))  # type: ignore[arg-type]


def recipe(sides: str, k: SideRecipe, v: SideRecipe) -> Recipe:
    """k and v for the sides that are named ("K", "V", "K+V"), 16 bits for the other."""
    return Recipe(description="a variant of a study", k=k if "K" in sides else DENSE, v=v if "V" in sides else DENSE)


def uniform(sides: str, bits: int, rank: int, head_dim: int, metric: str | None = None) -> Codec:
    """One tier of one width."""
    k, v = (one_tier(bits, rank, head_dim, side, metric) for side in "KV")
    name = f"{sides} {rank} x {bits}" + (f" {metric}" if metric else "")
    return recipe_codec(name, recipe(sides, k, v))


def of_preset(sides: str, preset: str) -> Codec:
    """A preset's tiers on some sides."""
    found = load_preset(preset)
    return recipe_codec(preset if sides == "K+V" else f"{preset} {sides}", recipe(sides, found.k, found.v))


def multiple(dims: float) -> int:
    """The nearest number of dimensions that a tier can have."""
    return max(TIER_MULTIPLE, TIER_MULTIPLE * round(dims / TIER_MULTIPLE))


# ---------------------------------------------------------------- studies
def rank(geometry: Geometry) -> list[Variant]:
    """All ranks that the model has, of V and of K, in 16, 8 and 4 bits."""
    full = geometry.head_dim
    ranks = [full, *(r for r in RANKS if r < full)]
    return [
        Variant({"sides": sides, "bits": bits, "rank": r}, uniform(sides, bits, r, full))
        for sides in ("V", "K")
        for bits in (16, 8, 4)
        for r in ranks
    ]


def bits(geometry: Geometry) -> list[Variant]:
    """Every dimension in one width."""
    full = geometry.head_dim
    return [Variant({"sides": s, "bits": b}, uniform(s, b, full, full)) for s in SIDES for b in BITS]


def sides(geometry: Geometry) -> list[Variant]:
    """The tiers of one side on K alone, on V alone and on both."""
    full = geometry.head_dim
    cut = multiple(full * 3 / 4)
    found = []
    for s in SIDES:
        presets = [Variant({"sides": s, "tiers": p}, of_preset(s, p)) for p in ("near_lossless", "balanced", "max")]
        found += [*presets, Variant({"sides": s, "tiers": f"rank {cut} int8"}, uniform(s, 8, cut, full))]
    return found


def nullspace(geometry: Geometry) -> list[Variant]:
    """One number less per head, as published, and one less of all heads together."""
    return [
        Variant({"sides": s, "scope": scope}, nullspace_codec(scope, s)) for scope in ("head", "joint") for s in SIDES
    ]


def gamma(geometry: Geometry) -> list[Variant]:
    """How variances are evened out before quantisation; and the norm's gain in the norm or in the projections."""
    full, found = geometry.head_dim, []
    tiers = {
        "int8": recipe("K+V", one_tier(8, full, full, "K"), one_tier(8, full, full, "V")),
        "int4": recipe("K+V", one_tier(4, full, full, "K"), one_tier(4, full, full, "V")),
        "near_lossless": load_preset("near_lossless"),
    }
    for name, one in tiers.items():
        for equalise in EQUALISE:
            k, v = (side.model_copy(update={"equalise": equalise}) for side in (one.k, one.v))
            codec = recipe_codec(f"{name} {equalise}", recipe("K+V", k, v))
            found.append(Variant({"tiers": name, "equalise": equalise, "gain": "in the norm"}, codec))
        codec = recipe_codec(f"{name} gamma", one)
        found.append(Variant({"tiers": name, "equalise": "gamma", "gain": "folded"}, codec, change=folded_gain))
    return found


def calibration(geometry: Geometry) -> list[Variant]:
    """How much text calibration takes."""
    presets = (preset_codec("near_lossless"), preset_codec("balanced"), preset_codec(DROPS))
    return [Variant({"preset": c.name, "samples": n}, c, samples=n) for c in presets for n in SAMPLES]


def domain(geometry: Geometry) -> list[Variant]:
    """Calibrated on the text that the request names, the built-in English or code; scored on its text and on code."""
    presets = (preset_codec("near_lossless"), preset_codec("balanced"), preset_codec(DROPS))
    sources: tuple[Source, ...] = ("given", "english", "code")
    scored: tuple[Source, ...] = ("given", "code")
    return [
        Variant({"preset": c.name, "scored": to, "calibrated": source}, c, calibration=source, scored=to)
        for c in presets
        for to in scored
        for source in sources
    ]


def stability(geometry: Geometry) -> list[Variant]:
    """One calibration for every seed, each on other windows."""
    names = ("v_only", "near_lossless", "balanced", "max", DROPS)
    return [Variant({"preset": name}, preset_codec(name), stability=True) for name in names]


def joint(geometry: Geometry) -> list[Variant]:
    """A latent for each head or one for all, at equal bits, with dimensions dropped or in tiers; and a sixth of all heads'
    dimensions, GPT-2's 768 -> 128."""
    heads, full, found = geometry.num_kv_heads, geometry.head_dim, []
    for r in dict.fromkeys(multiple(full * share) for share in (0.75, 0.5, 0.25)):
        at: At = {"rank of all heads": heads * r, "tiers": "8 bits"}
        head = uniform("V", 8, r, full, "plain")
        found.append(Variant({"sides": "V", "scope": "head", **at}, head, products=full + r))
        both = joint_codec(f"joint V {heads * r} x 8", None, [(8, heads * r)])
        found.append(Variant({"sides": "V", "scope": "joint", **at}, both, products=full + heads * r))
    for preset in ("near_lossless", "balanced", "max"):
        plain = load_preset(preset).v.model_copy(update={"metric": "plain"})
        one = recipe("V", DENSE, plain)
        tiers = tier_dims(plain.tiers, full)
        at = {"rank of all heads": heads * full, "tiers": preset}
        head = recipe_codec(f"{preset} V plain", one)
        found.append(Variant({"sides": "V", "scope": "head", **at}, head, products=2 * full))
        both = joint_codec(f"joint V {preset}", None, [(width, heads * dims) for width, dims in tiers])
        found.append(Variant({"sides": "V", "scope": "joint", **at}, both, products=full + heads * full))
    sixth = multiple(heads * full / 6)
    for name, width in JOINT_PRESETS.items():
        for s in ("V", "K+V"):
            k = [(width, sixth)] if "K" in s else None
            codec = joint_codec(f"joint {s} {sixth} x {width}", k, [(width, sixth)])
            at = {"sides": s, "scope": f"joint {name}", "rank of all heads": sixth, "tiers": f"{width} bits"}
            found.append(Variant(at, codec, products=(sixth if k else full) + sixth))
    return found


def refinements(geometry: Geometry) -> list[Variant]:
    """One change of a preset's bases or bits at a time; 3 bits only where there are tiers to make them of."""
    found = []
    for preset in ("near_lossless", "balanced", "max"):
        one = load_preset(preset)
        for refinement in get_args(Refinement):
            if refinement != "3 bits" or preset != "near_lossless":
                codec = refined_codec(preset, one, refinement)
                found.append(Variant({"tiers": preset, "refinement": refinement}, codec))
    return found


def modes(geometry: Geometry) -> list[Variant]:
    """The presets that the modes stand for."""
    return [Variant({"mode": mode}, preset_codec(name)) for mode, name in MODES.items()]


STUDIES = (
    Study("rank", "perplexity against rank, V or K, in 16, 8 and 4 bits", "rank", rank),
    Study("bits", "one width for every dimension of V, K or both", "bits", bits),
    Study("sides", "the same tiers on K alone, V alone and both", "tiers", sides),
    Study("nullspace", "LayerNorm's nullspace: one number less", "sides", nullspace),
    Study(
        "gamma", "gamma-aware: variances evened out before quantisation, and where the norm's gain is", "tiers", gamma
    ),
    Study("calibration", "windows of calibration text", "samples", calibration),
    Study("domain", "calibrated on one kind of text, scored on another", "calibrated", domain),
    Study("seeds", "other windows of calibration text", "preset", stability),
    Study("joint", "one latent per head, or one for all heads of a layer", "rank of all heads", joint),
    Study("refinements", "other bases and bits at equal bytes", "tiers", refinements),
    Study("modes", "default, high_compression and memory_emergency", "mode", modes),
)
