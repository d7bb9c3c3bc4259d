# SPDX-License-Identifier: Apache-2.0
"""Hadamard rotations, made once per size and device."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from vllm_kvsplice.codec import bases


@lru_cache(maxsize=128)
def hadamard(dims: int, device: torch.device) -> Tensor:
    """``bases.hadamard`` in fp32 on a device: orthogonal [dims, dims]."""
    return bases.hadamard(dims).float().to(device)
