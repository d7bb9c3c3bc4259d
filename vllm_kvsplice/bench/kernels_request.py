# SPDX-License-Identifier: Apache-2.0
"""What `kvsplice bench kernels` is asked for, and what it refuses. Next: ``kernels``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vllm_kvsplice.errors import KVSpliceError

KINDS = ("decode", "write", "prefill")


@dataclass(frozen=True)
class KernelsRequest:
    """A run of the kernel benchmark.

    Args:
        presets: names or .toml files, as `kvsplice calibrate --preset` takes them, or projector files (.safetensors), of
            which every distinct layout is measured, and their mean over the file's layers; bases are random.
        heads: (query heads, KV heads). shapes: (requests, tokens of each) of the decode kernel.
        what: "decode", "write" and "prefill". peers: other kernels beside ours, where they can be imported; peer: those of
            these names alone, for example "flash-attention-3".
        json: file for the result. splits: the count that serving would choose, or a "sweep" around the
            one of the default launch.
        block_sizes: of our decode kernel. write_tokens: tokens of a cache write.
        chunks: (requests, new tokens of each, tokens that each has in the cache before) of a prefill.
        query_lens: new tokens of each request in a decode step, those that a draft proposed among them.
    """

    presets: tuple[str, ...] = ("near_lossless", "int8", "v_only")
    heads: tuple[tuple[int, int], ...] = ((28, 4),)
    head_dim: int = 128
    shapes: tuple[tuple[int, int], ...] = ((64, 4096), (256, 2048), (16, 32768), (8, 8192), (1, 32768))
    what: tuple[str, ...] = KINDS
    peers: bool = True
    peer: tuple[str, ...] = ()
    json: str | None = None
    splits: Literal["chosen", "sweep"] = "chosen"
    block_sizes: tuple[int, ...] = (16, 64)
    write_tokens: tuple[int, ...] = (1, 64, 256, 2048, 8192)
    chunks: tuple[tuple[int, int, int], ...] = ((4, 2048, 0), (1, 8192, 0), (1, 8192, 32768), (1, 16, 32768))
    query_lens: tuple[int, ...] = (1,)

    def check(self) -> None:
        """Raise KVSpliceError for what cannot be measured; presets and the file to write are checked where they are read."""
        unknown = [what for what in self.what if what not in KINDS]
        if unknown or not self.what:
            raise KVSpliceError(
                f"nothing is known to measure as {unknown or 'no name'}: give some of {', '.join(KINDS)}."
            )
        for query_heads, kv_heads in self.heads:
            if kv_heads < 1 or query_heads < 1 or query_heads % kv_heads:
                raise KVSpliceError(
                    f"heads {query_heads}/{kv_heads} do not fit: expected query heads that are a multiple of the KV heads."
                )
        sizes = (*self.shapes, *self.chunks, self.write_tokens)
        if any(n < 1 for shape in self.shapes for n in shape) or any(n < 1 for n in self.write_tokens):
            raise KVSpliceError(f"sizes {sizes} are not all positive: expected requests and tokens of at least 1.")
        if not self.query_lens or any(q < 1 or q > n for q in self.query_lens for _, n in self.shapes):
            raise KVSpliceError(
                f"query lengths {self.query_lens} do not fit: expected 1 to the tokens of a request, for example 5."
            )
        if any(batch < 1 or query_len < 1 or cached < 0 for batch, query_len, cached in self.chunks):
            raise KVSpliceError(f"chunks {self.chunks} do not fit: expected (requests, new tokens, cached tokens).")
        if self.splits not in ("chosen", "sweep"):
            raise KVSpliceError(f"splits {self.splits!r} is not known: expected chosen or sweep.")
