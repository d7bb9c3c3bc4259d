# SPDX-License-Identifier: Apache-2.0
"""The decode kernel alone on an NVIDIA GPU, twice, for a profiler. Needs torch and triton alone.

``ncu --set full -k decode_kernel -s 1 -c 1 --page source --csv python tests/gpu_profile.py`` reads the second launch:
16 requests of 32,768 tokens, near_lossless at head_dim 128, 28/4 heads, bf16, pages of 16 tokens in random order.
``--query-len 5`` for as many new tokens a request, ``--rows`` with queries as rows.
"""

from __future__ import annotations

import argparse

import torch
from gpu_check import HEAD_DIM, LAYOUT, NUM_HEADS, H, make_cache
from kernel_cases import attention, decode

from kvsplice_kernels.launch import Launch

REQUESTS, CONTEXT, BLOCK_SIZE = 16, 32768, 16


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--query-len", type=int, default=1)
    parser.add_argument("--rows", action="store_true")
    given = parser.parse_args()
    new, launch = given.query_len, Launch(4, programs=2, rows=64) if given.rows else None
    per_seq = CONTEXT // BLOCK_SIZE
    cache = make_cache(REQUESTS * per_seq, BLOCK_SIZE)
    table = torch.randperm(REQUESTS * per_seq, device="cuda").int().view(REQUESTS, per_seq)
    lens = torch.full((REQUESTS,), CONTEXT, dtype=torch.int32, device="cuda")
    starts = new * torch.arange(REQUESTS + 1, dtype=torch.int32, device="cuda")
    splits = attention.choose_num_splits(
        REQUESTS, H, CONTEXT, torch.cuda.get_device_properties(0).multi_processor_count, launch
    )
    shapes = attention.workspace_shapes(REQUESTS * new, NUM_HEADS, HEAD_DIM, HEAD_DIM, splits)
    work = attention.Workspace(*(torch.randn(s, device="cuda") for s in shapes))
    plans = LAYOUT.plan("k", BLOCK_SIZE), LAYOUT.plan("v", BLOCK_SIZE)
    for _ in range(2):
        decode.decode(
            work.q_latent, work.q_bias, cache, *plans, table, lens, starts, work.latent, work.lse, HEAD_DIM**-0.5, new,
            launch=launch,
        )  # fmt: skip
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
