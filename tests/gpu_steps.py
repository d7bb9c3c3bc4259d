# SPDX-License-Identifier: Apache-2.0
"""Where a decode step's time goes on a GPU: every kernel of CUDA graph steps of a real engine, from the torch profiler.

    python tests/gpu_steps.py PRESET [--shape qwen2.5-7b] [--batch 64] [--context 4096] [--json OUT]

PRESET is that of a projector with random bases, or "bf16" for stock vLLM; weights are dummy. A kernel's time is from the end of the one before
to its own end, since ours start while the one before still runs (programmatic dependent launch): those add up to the step.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the profiler sees its own process alone

import torch

from vllm_kvsplice.bench import dummy_model
from vllm_kvsplice.scoring.results import provenance

SETTLE, STEPS = 12, 6  # steps of all requests together before, and in the profile
OURS = ("write_and_project_kernel", "decode_kernel", "reduce_expand_kernel")


def make_engine(folder: Path, preset: str, shape: str, batch: int, context: int) -> Any:
    """A vLLM engine with full graphs for the batch."""
    from vllm import LLM

    model = folder / "model"
    dummy_model.write_model(model, folder / "tokenizer", shape, None)
    cache: dict[str, Any] = {}
    if preset != "bf16":
        file = dummy_model.write_projector(folder, model, preset)
        cache = dict(attention_backend="kvsplice", additional_config={"kvsplice": {"projector": str(file)}})
    graphs = dict(mode=0, cudagraph_mode="FULL_DECODE_ONLY", cudagraph_capture_sizes=[batch])
    llm = LLM(
        str(model), skip_tokenizer_init=True, load_format="dummy", dtype="bfloat16", max_model_len=context + 64,
        max_num_seqs=batch, compilation_config=graphs, enable_prefix_caching=False, seed=0, **cache,
    )  # fmt: skip
    return llm.llm_engine


def profiled(engine: Any, batch: int, context: int) -> list[tuple[str, float]]:
    """(name, end in us) of every kernel of STEPS steps in which all requests decode."""
    from torch.profiler import ProfilerActivity, profile
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=SETTLE + 4 * STEPS, ignore_eos=True, temperature=0, detokenize=False)
    generator = torch.Generator().manual_seed(0)
    for i in range(batch):
        ids = torch.randint(3, 10_000, (context,), generator=generator).tolist()
        engine.add_request(str(i), {"prompt_token_ids": ids}, params)
    made = dict.fromkeys(map(str, range(batch)), 0)
    while min(made.values()) < SETTLE:
        made |= {output.request_id: len(output.outputs[0].token_ids) for output in engine.step()}
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(STEPS):
            engine.step()
        torch.cuda.synchronize()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    return sorted(
        ((e["name"], e["ts"] + e["dur"]) for e in events if e.get("cat") == "kernel"), key=lambda kernel: kernel[1]
    )


def summary(kernels: list[tuple[str, float]], layers: int) -> dict[str, Any]:
    """Microseconds a layer, from end to end, by kernel; what is launched less often than once a layer is left out."""
    spans = defaultdict(list)
    for (_, before), (name, end) in pairwise(kernels):
        spans[name].append(end - before)
    often = {name: found for name, found in spans.items() if len(found) >= layers * STEPS // 2}
    # The median, times launches a layer: the host's own work between steps would be in the mean.
    us = {name[:80]: sorted(found)[len(found) // 2] * len(found) / (layers * STEPS) for name, found in often.items()}
    ours = [us[name] for name in OURS if name in us]
    return {
        "us_per_layer": us,
        "layer_us": sum(us.values()),
        "attention_us": sum(ours) if ours else max(v for k, v in us.items() if "flash" in k.lower()),
    }


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("preset")
    parser.add_argument("--shape", default="qwen2.5-7b")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    layers = dummy_model.SHAPES[given.shape]["num_hidden_layers"]
    with tempfile.TemporaryDirectory() as folder:
        engine = make_engine(Path(folder), given.preset, given.shape, given.batch, given.context)
        kernels = profiled(engine, given.batch, given.context)
    result = {
        "what": "kernels of a decode step in vLLM, CUDA graphs, dummy weights; microseconds a layer from the end of the kernel before to its own end",
        "setting": given.preset, "shape": given.shape, "batch": given.batch, "context": given.context,
    } | summary(kernels, layers) | provenance()  # fmt: skip
    result["command"] = shlex.join(["python", "tests/gpu_steps.py", *sys.argv[1:]])
    print(json.dumps(result, indent=1))
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
