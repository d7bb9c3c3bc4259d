# SPDX-License-Identifier: Apache-2.0
"""Which kernels are measured at which shapes, one job each.

In: the request. Out: jobs, in the order of the table. Next: ``kernels_build`` makes calls of a job.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

from vllm_kvsplice.bench.kernels_data import Shape
from vllm_kvsplice.bench.kernels_layouts import FileLayout, named_layouts
from vllm_kvsplice.bench.kernels_request import KernelsRequest
from vllm_kvsplice.calibration.presets import resolve
from vllm_kvsplice.codec.layout import PREFERRED_BLOCK_SIZE, LatentLayout
from vllm_kvsplice.errors import KVSpliceError

if TYPE_CHECKING:
    from kvsplice_kernels.launch import Launch

OURS = "kvsplice"
BASELINE = ("flash-attention-3", "bf16")
VLLM_BLOCK_SIZE = 16  # of peers; ours write and prefill into pages of PREFERRED_BLOCK_SIZE, as they are served
# Peers: (kernel, preset) -> block sizes for decode. FlashAttention-3 also with the pages that suit it best: the baseline.
DECODE_PEERS = {
    BASELINE: (16, 128),
    ("flash-attention-3", "fp8"): (16, 128),
    ("vllm-triton", "bf16"): (16,),
    ("vllm-triton", "int8"): (16,),
    ("vllm-triton", "int4"): (16,),
    ("turboquant", "k8v4"): (16,),
    ("turboquant", "4bit_nc"): (16,),
    ("xformers-splitk", "int4"): (64,),  # its pages are multiples of 64
}
WRITE_PEERS = {peer: (VLLM_BLOCK_SIZE,) for peer in DECODE_PEERS if peer[0] != "xformers-splitk"}
# The others take one query token of each request.
PREFILL_PEERS = dict.fromkeys(list(DECODE_PEERS)[:4], (VLLM_BLOCK_SIZE,))
Layouts = Sequence[tuple[str, FileLayout | None]]  # name, layout of a file or None for a preset
PEER_NAMES = tuple(dict.fromkeys(kernel for kernel, _ in DECODE_PEERS))


@dataclass(frozen=True)
class Job:
    """One kernel at one shape. ``context`` counts the ``query_len`` new tokens in; ``num_splits`` and ``launch``
    None: as served.

    A "write" stores ``query_len`` tokens. A "prefill" stores a chunk and attends it to its ``context``.
    ``of_file``: the layout, where it is a projector file's and ``preset`` only its name in the table.
    """

    what: str
    kernel: str
    preset: str
    heads: tuple[int, int]
    head_dim: int
    batch: int
    context: int
    query_len: int
    block_size: int
    num_splits: int | None = None
    launch: Launch | None = None
    of_file: FileLayout | None = None

    @property
    def shape(self) -> Shape:
        """The batch that this job is about."""
        return Shape(*self.heads, self.head_dim, self.batch, self.context, self.query_len, self.block_size)

    @property
    def layout(self) -> LatentLayout:
        """What our kernels store; of our own jobs alone."""
        return self.of_file.layout if self.of_file else resolve(self.preset, self.head_dim)[0]

    @property
    def point(self) -> tuple[str, tuple[int, int], int, int, int]:
        """What the jobs of one block of the table have in common."""
        return self.what, self.heads, self.batch, self.context, self.query_len

    @property
    def group(self) -> tuple[object, ...]:
        """What the jobs that are rehearsed in one process have in common: compiled kernels, or launch parameters."""
        return (self.kernel, self.launch) if self.launch else (self.kernel, self.preset, self.heads, self.block_size)


def list_jobs(request: KernelsRequest, num_sms: int) -> list[Job]:
    """Every job of a request, ordered by heads, kind and shape.

    Raises:
        KVSpliceError: a layout cannot be read or is of another head_dim, or a peer is not known.
    """
    ours = named_layouts(request.presets, request.head_dim)
    jobs: list[Job] = []
    for heads in request.heads:
        if "decode" in request.what:
            jobs += _decode_jobs(request, ours, heads, num_sms)
        if "write" in request.what:
            jobs += _write_jobs(request, ours, heads)
        if "prefill" in request.what:
            jobs += _prefill_jobs(request, ours, heads)
    return jobs


def _chosen(
    request: KernelsRequest, peers: Mapping[tuple[str, str], tuple[int, ...]]
) -> dict[tuple[str, str], tuple[int, ...]]:
    """The peers that a request asks for: all, those named, or none."""
    unknown = [name for name in request.peer if name not in PEER_NAMES]
    if unknown:
        raise KVSpliceError(f"--peer {unknown[0]} is not known: expected some of {', '.join(PEER_NAMES)}.")
    names = (request.peer or PEER_NAMES) if request.peers else ()
    return {peer: sizes for peer, sizes in peers.items() if peer[0] in names}


def _decode_jobs(request: KernelsRequest, ours: Layouts, heads: tuple[int, int], num_sms: int) -> Iterator[Job]:
    for (batch, context), query_len in product(request.shapes, request.query_lens):
        peers = DECODE_PEERS if query_len == 1 else {peer: DECODE_PEERS[peer] for peer in PREFILL_PEERS}
        for (kernel, preset), sizes in _chosen(request, peers).items():
            for block_size in sizes:
                yield Job("decode", kernel, preset, heads, request.head_dim, batch, context, query_len, block_size)
        for preset, of_file in ours:
            for block_size in request.block_sizes:
                at = OURS, preset, heads, request.head_dim, batch, context, query_len, block_size
                for splits in _split_counts(request, batch, heads[1], context, num_sms):
                    yield Job("decode", *at, splits, of_file=of_file)


def _split_counts(
    request: KernelsRequest, batch: int, num_kv_heads: int, context: int, num_sms: int
) -> list[int] | tuple[None]:
    if request.splits == "chosen":
        return (None,)
    from kvsplice_kernels.attention import choose_num_splits

    chosen = choose_num_splits(batch, num_kv_heads, context, num_sms)
    return sorted({max(1, chosen // 4), max(1, chosen // 2), chosen, chosen * 2, chosen * 4})


def _write_jobs(request: KernelsRequest, ours: Layouts, heads: tuple[int, int]) -> Iterator[Job]:
    for tokens in request.write_tokens:
        sizes = heads, request.head_dim, 1, tokens, tokens
        for kernel, preset in _chosen(request, WRITE_PEERS):
            yield Job("write", kernel, preset, *sizes, VLLM_BLOCK_SIZE)
        for preset, of_file in ours:
            yield Job("write", OURS, preset, *sizes, PREFERRED_BLOCK_SIZE, of_file=of_file)


def _prefill_jobs(request: KernelsRequest, ours: Layouts, heads: tuple[int, int]) -> Iterator[Job]:
    for batch, query_len, cached in request.chunks:
        sizes = heads, request.head_dim, batch, cached + query_len, query_len
        for kernel, preset in _chosen(request, PREFILL_PEERS):
            yield Job("prefill", kernel, preset, *sizes, VLLM_BLOCK_SIZE)
        for preset, of_file in ours:
            yield Job("prefill", OURS, preset, *sizes, PREFERRED_BLOCK_SIZE, of_file=of_file)
