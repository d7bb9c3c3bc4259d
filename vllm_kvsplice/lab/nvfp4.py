# SPDX-License-Identifier: Apache-2.0
"""NVFP4: e2m1 elements in blocks of 16 with an e4m3 scale each, under one fp32 scale per tensor, as vLLM's ``nvfp4`` caches.

vLLM takes the tensor scale from the checkpoint and has 1 where there is none; ``nvfp4_calibrated`` sets it so that the
largest magnitude of the calibration text uses the whole range. ``nvfp4_4over6`` (arXiv 2512.02010) maps a block's largest
element to 6 or to 4, whichever loses less.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.lab.codec import Attach, Bytes, Codec, Geometry, Setup, each_side, on_cache

BLOCK = 16
LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Midpoints that round up, and those that round down: to the level whose last mantissa bit is 0.
UP, DOWN = (0.75, 1.75, 3.5), (0.25, 1.25, 2.5, 5.0)
PAPER = "NVFP4, arXiv 2509.25149"


def e2m1(x: Tensor) -> Tensor:
    """The nearest of the 15 e2m1 numbers, ties to even, saturating at 6; fp32."""
    magnitude = x.abs()
    level = sum((magnitude >= edge).int() for edge in UP) + sum((magnitude > edge).int() for edge in DOWN)
    return torch.tensor(LEVELS, device=x.device)[level] * x.sign()


def nvfp4(x: Tensor, scale: float = 1.0, largest: float = 6.0) -> Tensor:
    """Quantise and dequantise x [..., d] with d a multiple of 16; a block's largest element becomes ``largest``."""
    blocks = x.float().unflatten(-1, (-1, BLOCK))
    block_scale = (blocks.abs().amax(-1, keepdim=True) / largest / scale).clamp(max=448.0)
    step = block_scale.to(torch.float8_e4m3fn).float() * scale
    codes = e2m1(torch.where(step > 0, blocks / torch.where(step > 0, step, 1.0), 0.0))
    return (codes * step).flatten(-2)


def four_over_six(x: Tensor) -> Tensor:
    """The better, block by block in squared error, of scaling to 6 and to 4."""
    x = x.float()
    choices = [nvfp4(x, largest=largest).unflatten(-1, (-1, BLOCK)) for largest in (6.0, 4.0)]
    errors = [(c - x.unflatten(-1, (-1, BLOCK))).square().sum(-1, keepdim=True) for c in choices]
    return torch.where(errors[1] < errors[0], choices[1], choices[0]).flatten(-2)


def _bytes(geometry: Geometry) -> Bytes:
    d = geometry.head_dim
    if d % BLOCK:
        raise KVSpliceError(f"nvfp4 cannot store head_dim {d}: expected a multiple of {BLOCK}.")
    return Bytes(d / 2 + d / BLOCK, d / 2 + d / BLOCK)


def _calibrated(setup: Setup) -> Attach:
    full = 448.0 * 6.0
    scales = {i: (s.k_amax.max().item() / full, s.v_amax.max().item() / full) for i, s in setup.statistics.items()}
    return on_cache(lambda i, k, v: (nvfp4(k, scales[i][0]), nvfp4(v, scales[i][1])))


CODECS = [
    Codec("nvfp4", "NVFP4", PAPER, _bytes, each_side(nvfp4)),
    Codec("nvfp4_calibrated", "NVFP4", PAPER, _bytes, _calibrated, needs="calibration"),
    Codec("nvfp4_4over6", "NVFP4", "Four over six, arXiv 2512.02010", _bytes, each_side(four_over_six)),
]
