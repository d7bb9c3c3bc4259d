# SPDX-License-Identifier: Apache-2.0
"""The decode kernel alone on an NVIDIA GPU, twice, for a profiler. Needs torch and triton alone.

``ncu --set full -k decode_kernel -s 1 -c 1 --page source --csv python tests/gpu_profile.py`` reads the second launch:
16 requests of 32,768 tokens, near_lossless at head_dim 128, 28/4 heads, bf16, pages of 16 tokens in random order.
``--shape 64x4096`` and ``--block-size 64`` for others, ``--query-len 5`` for as many new tokens a request, ``--rows`` with
queries as rows.
"""

from __future__ import annotations

import argparse

import torch
from gpu_check import HEAD_DIM, LAYOUT, NUM_HEADS, H, make_cache
from kernel_cases import attention, decode

from kvsplice_kernels.launch import Launch


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--query-len", type=int, default=1)
    parser.add_argument("--rows", action="store_true")
    parser.add_argument("--shape", default="16x32768", help="requests x tokens of each")
    parser.add_argument("--block-size", type=int, default=16)
    given = parser.parse_args()
    reqs, context = map(int, given.shape.split("x"))
    new, block_size, launch = given.query_len, given.block_size, Launch(4, programs=2, rows=64) if given.rows else None
    per_seq = -(-context // block_size)
    cache = make_cache(reqs * per_seq, block_size)
    table = torch.randperm(reqs * per_seq, device="cuda").int().view(reqs, per_seq)
    lens = torch.full((reqs,), context, dtype=torch.int32, device="cuda")
    starts = new * torch.arange(reqs + 1, dtype=torch.int32, device="cuda")
    splits = attention.choose_num_splits(
        reqs, H, context, torch.cuda.get_device_properties(0).multi_processor_count, launch
    )
    ranks = attention.latent_ranks(LAYOUT.plan("k", block_size), LAYOUT.plan("v", block_size), launch)
    shapes = attention.workspace_shapes(reqs * new, NUM_HEADS, *ranks, splits)
    work = attention.Workspace(*(torch.randn(s, device="cuda") for s in shapes))
    plans = LAYOUT.plan("k", block_size), LAYOUT.plan("v", block_size)
    for _ in range(2):
        decode.decode(
            work.q_latent, work.q_bias, cache, *plans, table, lens, starts, work.latent, work.lse, HEAD_DIM**-0.5, new,
            launch=launch,
        )  # fmt: skip
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
