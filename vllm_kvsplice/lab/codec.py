# SPDX-License-Identifier: Apache-2.0
"""What a codec of the laboratory is: a name, a paper, its bytes, and a way to make a model attend to decoded keys and values.

Most codecs are one pure function of the keys and values of one layer (``on_cache``). Those that need more say so: the
layer before or after (MiniCache), the vectors before RoPE (Palu), or that a query sees other keys than the next one
(KIVI's residual, eviction). Bytes are all-in: codes, scales, zero points, indices of what is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor

from vllm_kvsplice.calibration.hf_attention import transformed_kv
from vllm_kvsplice.lab.statistics import LayerStatistics

KV = tuple[Tensor, Tensor]
Needs = Literal["nothing", "calibration", "gradients", "joint", "vectors"]
# (layer, k, v) -> (k^, v^): [B, num_kv_heads, T, head_dim] each, after RoPE; any float dtype may come back.
CacheFunction = Callable[[int, Tensor, Tensor], KV]


class Geometry(NamedTuple):
    """What bytes depend on. ``seq_len``: tokens in the cache when they are counted, the scored length."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    seq_len: int


class Bytes(NamedTuple):
    """All-in bytes per token and KV head, mean over layers."""

    k: float
    v: float


class Run(NamedTuple):
    """The forward that a codec takes part in.

    prefill: number of tokens that were read, uncompressed, before the cache was compressed once; None: the cache is
    compressed all along. base: keys and values [1, num_kv_heads, T, head_dim] of the uncompressed run by layer, for codecs
    with ``needs_base``.
    """

    prefill: int | None
    base: Mapping[int, KV]


class Setup(NamedTuple):
    """What a codec is prepared from. ``statistics`` by layer, of the calibration text's windows of one seed."""

    model: Any
    geometry: Geometry
    statistics: Mapping[int, LayerStatistics]


Attach = Callable[
    [Any, Run], AbstractContextManager[None]
]  # (model, run) -> a context in which the model is compressed


@dataclass(frozen=True)
class Codec:
    """One row of the comparison.

    needs: "nothing"; or "calibration" where the result depends on the calibration sample, so that it is scored with
    several; or "gradients" of the loss on that sample too, "joint" moments of all heads, or "vectors" themselves. bytes may raise KVSpliceError
    for a geometry that the codec cannot store.
    """

    name: str
    family: str
    paper: str
    bytes: Callable[[Geometry], Bytes]
    prepare: Callable[[Setup], Attach]
    needs: Needs = "nothing"
    needs_base: bool = False


def on_cache(fn: CacheFunction) -> Attach:
    """Attach a pure function of one layer's keys and values."""

    def transform(layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> KV:
        return fn(layer_idx, k, v)

    return lambda model, run: transformed_kv(model, transform)


def each_side(fn: Callable[[Tensor], Tensor]) -> Callable[[Setup], Attach]:
    """``prepare`` of a codec that treats K and V alike, layer by layer, and needs nothing else."""
    return lambda setup: on_cache(lambda layer_idx, k, v: (fn(k), fn(v)))


def same_bytes(count: Callable[[int], float]) -> Callable[[Geometry], Bytes]:
    """``bytes`` of a codec whose sides cost alike, as a function of head_dim."""
    return lambda geometry: Bytes(count(geometry.head_dim), count(geometry.head_dim))
