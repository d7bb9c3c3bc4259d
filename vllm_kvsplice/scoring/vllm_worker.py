# SPDX-License-Identifier: Apache-2.0
"""One vLLM engine in a process of its own: python -m vllm_kvsplice.scoring.vllm_worker JOB.

In: a job file (``Job`` as JSON). Out, in the job's folder: ``window-NNNNN.npz`` with what the engine reports about the
prompt's tokens, then ``done.json`` with the needles' answers and the capacity of the cache. ``vllm_engine`` starts two
of these, stock and kvsplice, and compares the files.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 8  # windows whose top-k lists are held at a time


@dataclass(frozen=True)
class Job:
    """What one engine does. ``engine`` are arguments of ``vllm.LLM``; ``needles`` pairs of prompt and answer length."""

    engine: dict[str, Any]
    windows: list[list[int]]
    needles: list[tuple[list[int], int]]
    topk: int
    folder: str

    def save(self) -> Path:
        """Write the job into its folder and return the file."""
        path = Path(self.folder) / "job.json"
        path.write_text(json.dumps(asdict(self)))
        return path


def window_file(folder: str | Path, index: int) -> Path:
    """Where window ``index`` is written: arrays ids [T - 1, k], logprobs [T - 1, k] and targets [T - 1]."""
    return Path(folder) / f"window-{index:05d}.npz"


def run(job: Job) -> None:
    """Start the engine, score the windows, answer the needles, write the files."""
    from vllm import LLM

    llm = LLM(**job.engine)
    for start in range(0, len(job.windows), BATCH):
        _score(llm, job, start)
    cache = llm.llm_engine.vllm_config.cache_config
    facts = {"tokens": cache.kv_cache_size_tokens, "blocks": cache.num_gpu_blocks, "block_size": cache.block_size}
    done = {"answers": _answers(llm, job), "cache": facts}
    (Path(job.folder) / "done.json").write_text(json.dumps(done))


def _score(llm: Any, job: Job, start: int) -> None:
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0.0, max_tokens=1, prompt_logprobs=job.topk, flat_logprobs=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": ids} for ids in job.windows[start : start + BATCH]]
    for i, output in enumerate(llm.generate(prompts, params, use_tqdm=False), start):
        # Of every token but the first: its own log-probability, then the k most likely ones in falling order.
        shape = (len(output.prompt_token_ids) - 1, job.topk + 1)
        flat = output.prompt_logprobs
        ids = np.array(flat.token_ids, dtype=np.int32).reshape(shape)
        logprobs = np.array(flat.logprobs, dtype=np.float32).reshape(shape)
        _save(window_file(job.folder, i), ids=ids[:, 1:], logprobs=logprobs[:, 1:], targets=logprobs[:, 0])


def _save(path: Path, **arrays: Any) -> None:
    """Write and rename, so that a file that exists is whole."""
    part = path.with_suffix(".part")
    with part.open("wb") as f:
        np.savez(f, **arrays)
    part.rename(path)


def _answers(llm: Any, job: Job) -> list[list[int]]:
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": prompt} for prompt, _ in job.needles]
    params = [
        SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False) for _, count in job.needles
    ]
    if not prompts:
        return []
    return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, params, use_tqdm=False)]


if __name__ == "__main__":
    run(Job(**json.loads(Path(sys.argv[1]).read_text())))
