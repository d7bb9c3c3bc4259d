# SPDX-License-Identifier: Apache-2.0
"""16-bit and 8-bit floats: the dense cache, and vLLM's ``--kv-cache-dtype fp8`` and ``fp8_per_token_head``.

What is simulated is the cache. vLLM's FlashAttention path also quantises queries and probabilities when the cache is fp8,
which would cost a little more than is shown here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_kvsplice.lab.codec import Attach, Codec, Setup, each_side, on_cache, same_bytes

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
VLLM = "vLLM, arXiv 2309.06180"
FORMATS = "FP8 formats, arXiv 2209.05433"


def bf16(x: Tensor) -> Tensor:
    """Rounded to bfloat16, or as it is where the model computes in 16 bits."""
    return x.bfloat16() if x.dtype == torch.float32 else x


def fp8(x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """e4m3 of x / scale, saturating, times scale. scale: of a whole tensor, vLLM's default is 1."""
    return (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8).float() * scale


def fp8_per_token_head(x: Tensor) -> Tensor:
    """e4m3 with one fp32 scale, amax / 448, for each row of the last axis."""
    x = x.float()
    scale = (x.abs().amax(-1, keepdim=True) / FP8_MAX).clamp_min(1e-6)
    return (x * (1.0 / scale)).clamp(-FP8_MAX, FP8_MAX).to(FP8).float() * scale


def _calibrated(setup: Setup) -> Attach:
    """One scale per layer and side, such that the largest magnitude of the calibration text is 448."""
    scales = {
        i: (s.k_amax.max().item() / FP8_MAX, s.v_amax.max().item() / FP8_MAX) for i, s in setup.statistics.items()
    }
    return on_cache(lambda i, k, v: (fp8(k, scales[i][0]), fp8(v, scales[i][1])))


CODECS = [
    Codec("bf16", "dense", VLLM, same_bytes(lambda d: 2.0 * d), each_side(bf16)),
    Codec("fp8", "fp8", FORMATS, same_bytes(float), each_side(fp8)),
    Codec("fp8_calibrated", "fp8", FORMATS, same_bytes(float), _calibrated, needs="calibration"),
    Codec("fp8_per_token_head", "fp8", FORMATS, same_bytes(lambda d: d + 4.0), each_side(fp8_per_token_head)),
]
