# SPDX-License-Identifier: Apache-2.0
"""The laboratory's vLLM codecs against vLLM's own cache kernels, run by Triton's interpreter in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vllm_kvsplice.lab import nvfp4, per_token, registry, turboquant
from vllm_kvsplice.lab.codec import Geometry

T, H, D = 8, 2, 64
SCRIPT = Path(__file__).with_name("vllm_caches.py")


@pytest.fixture(scope="module")
def given():
    """Keys with an outlier channel and a token of zeros, values with an offset."""
    k, v = torch.randn(2, T, H, D, generator=torch.Generator().manual_seed(0))
    k[:, :, 3] *= 9
    k[5] = 0
    return k, 0.3 * v + 0.05


@pytest.fixture(scope="module")
def vllm(given, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm")
    torch.save(dict(k=given[0], v=given[1]), folder / "in.pt")
    done = subprocess.run(
        [sys.executable, SCRIPT, folder / "in.pt", folder / "out.pt"], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "out.pt")


@pytest.mark.parametrize(
    "name, mine",
    [
        ("int8_per_token_head", per_token.int8_per_token_head),
        ("int4_per_token_head", per_token.int4_per_token_head),
        ("nvfp4", nvfp4.nvfp4),
    ],
)
def test_decoded_as_vllm_decodes(name, mine, given, vllm):
    for x, theirs in zip(given, vllm["decoded"][name], strict=True):
        # fp32 sums of 64 terms in another order; one code more or less would be a hundred times as much.
        torch.testing.assert_close(mine(x), theirs, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", turboquant.PRESETS)
def test_turboquant_as_vllm_decodes(name, given, vllm):
    k, v = given
    k_bits, v_bits, correction = turboquant.PRESETS[name]
    theirs_k, theirs_v = vllm["decoded"][name]
    torch.testing.assert_close(turboquant.uniform(v, v_bits), theirs_v, atol=1e-3, rtol=0)  # theirs leaves in fp16
    if k_bits == 8:
        return  # e4m3: the interpreter's own conversion is off, see test_lab_codecs for ours
    mine = turboquant.lloyd_max_direction(k, k_bits, correction)
    # Theirs solves for centroids with 200 trapezia up to 10.5 sigma: outer ones differ by 1e-3, and so do the edges of the
    # bins, so that a coordinate in hundreds falls into the next one.
    error, theirs_error = ((x - k).square().sum().sqrt() for x in (mine, theirs_k))
    assert (mine - theirs_k).norm() < 0.15 * theirs_error
    assert error == pytest.approx(float(theirs_error), rel=0.01)


def test_centroids_are_vllms(vllm):
    mine = turboquant.lloyd_max(3).float() / D**0.5
    torch.testing.assert_close(mine, vllm["centroids"], rtol=1e-3, atol=0)


def test_bytes_are_those_that_vllm_counts(vllm):
    geometry = Geometry(num_layers=8, num_kv_heads=H, head_dim=D, seq_len=2048)
    mine = {c.name: sum(c.bytes(geometry)) for c in registry.RIVALS}
    assert len(vllm["bytes"]) == 5
    assert {name: mine[name] for name in vllm["bytes"]} == vllm["bytes"]
