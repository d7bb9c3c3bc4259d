# SPDX-License-Identifier: Apache-2.0
"""Greedy answers of a real model, token for token: served eagerly and with CUDA graphs, and both again with everything else on.

    python tests/gpu_greedy.py MODEL PROJECTOR --text FILE [--vllm-args JSON] [--json OUT]

"Everything" is prefix caching, prompts in chunks of 512 tokens and n-gram drafts. All ways read codes in prefill, so that the plain-torch
simulation is the same for all. Where batches are cut differently, sums of floats come out differently in their last bits, and two
tokens may be as good as level: an answer may leave another's path only where the simulation says so.
--stock serves everything without KVSplice as well: what vLLM's own batches do to its answers.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine_models import GREEDY, Served, job, kvsplice, serve, simulate

from vllm_kvsplice.codec.projector import Projector
from vllm_kvsplice.scoring.results import provenance

COUNT, LONGEST, ANSWER = 12, 1500, 48
LEVEL = 0.2  # nats in the fp32 simulation between two tokens that bf16 and the codes' rounding may swap
BEHIND = 0.02  # nats, mean, of the tokens served behind the best of the simulation in fp32
DRAFTS = dict(method="ngram", num_speculative_tokens=3, prompt_lookup_max=3)
GRAPHS = dict(mode=0, cudagraph_mode="FULL_DECODE_ONLY")  # of the sizes that vLLM captures by itself
COMMON: dict[str, Any] = dict(
    dtype="bfloat16", kv_cache_memory_bytes=1 << 30, gpu_memory_utilization=0.15, max_model_len=2048, max_num_seqs=12,
    max_logprobs=1, block_size=None,
)  # fmt: skip
EAGER: dict[str, Any] = dict(enforce_eager=True)
CAPTURED: dict[str, Any] = dict(enforce_eager=False, compilation_config=GRAPHS)
PLAIN: dict[str, Any] = dict(enable_prefix_caching=False)
EVERYTHING: dict[str, Any] = dict(
    enable_prefix_caching=True, max_num_batched_tokens=512, speculative_config=DRAFTS
)  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {
    "eager": EAGER | PLAIN,
    "graphs": CAPTURED | PLAIN,
    "everything, eager": EAGER | EVERYTHING,
    "everything, graphs": CAPTURED | EVERYTHING,
}
STOCK = {f"stock, {name}": WAYS[name] for name in ("everything, eager", "everything, graphs")}
AGAINST = {
    "graphs": "eager",
    "everything, eager": "eager",
    "everything, graphs": "everything, eager",
    "stock, everything, graphs": "stock, everything, eager",
}


def make_prompts(ids: Sequence[int]) -> list[list[int]]:
    """Text of several lengths; every third prompt starts as the one before it, every second repeats its own beginning,
    which is what n-gram drafts find."""
    made: list[list[int]] = []
    longest = min(LONGEST, len(ids) // COUNT)
    for i in range(COUNT):
        length = longest * (15 - i) // 15
        prompt = list(ids[i * longest : i * longest + length])
        if i % 3 == 1:
            prompt = made[-1][: length // 2] + prompt[length // 2 :]
        if i % 2:
            prompt = prompt[: length // 2] + prompt[: length // 4]
        made.append(prompt)
    return made


def compare(ways: dict[str, Served], prompts: list[list[int]], rows: Any) -> dict[str, Any]:
    """Per way and pass: answers equal to those of the way in ``AGAINST``, the gap in nats between the two tokens where an answer first
    leaves them, and how far its tokens lie below the simulation's best. ``rows(ids, compressed)``: log-probabilities [T, vocab] of the
    next token."""
    found: dict[str, Any] = {}
    for name, served in ways.items():
        against = AGAINST.get(name, name)
        for step, answers in enumerate(served.tokens):
            others = ways[against].tokens
            equal, splits, behind = 0, [], []
            for prompt, tokens, base in zip(prompts, answers, others[min(step, len(others) - 1)], strict=True):
                at = rows(prompt + tokens, name not in STOCK)[len(prompt) - 1 : -1]
                behind += (at.max(-1).values - at.gather(1, at.new_tensor(tokens).long()[:, None])[:, 0]).tolist()
                where = next((i for i, (a, b) in enumerate(zip(tokens, base, strict=True)) if a != b), None)
                if where is None:
                    equal += 1
                else:
                    splits.append(abs(float(at[where, tokens[where]] - at[where, base[where]])))
            found[name if step == 0 else f"{name}, again"] = {
                "against": against,
                "answers": len(answers),
                "equal": equal,
                "gap_where_they_part_nats": splits,
                "behind_best_nats": {"mean": sum(behind) / len(behind), "max": max(behind)},
            }
    return found


def run(
    model: Path, projector: Path | None, ids: Sequence[int], extra: dict[str, Any], folder: Path, stock: bool = False
) -> dict[str, Any]:
    """Serve and compare. ``projector`` None: the calibration-free codec. ``ids``: tokens of a text, some thousands.
    ``extra``: arguments of every engine. ``stock``: vLLM's own backend as well."""
    prompts = make_prompts(ids)
    step = dict(prompts=prompts, params=GREEDY | dict(max_tokens=ANSWER))
    ways = WAYS | (STOCK if stock else {})
    jobs = {}
    for name, way in ways.items():
        steps = [step] * (2 if "everything" in name else 1)
        backend = {} if name in STOCK else kvsplice(projector)
        jobs[name] = job(model, *steps, **(COMMON | extra | way | backend))
    served, log = serve(list(jobs.values()), folder, timeout=500)
    answers = dict(zip(jobs, served, strict=True))
    failed = [f"{name}: {one.error}" for name, one in answers.items() if one.error]
    assert not failed, "\n".join(failed) + log[-4000:]
    made, known = Projector.load(projector) if projector else None, {}

    def rows(given: list[int], compressed: bool) -> Any:
        key = compressed, tuple(given)
        if key not in known:
            known[key] = simulate(model, made, given, compressed)
        return known[key]

    metrics = answers["everything, graphs"].metrics
    return {
        "ways": compare(answers, prompts, rows),
        "prefix_cache_hits": metrics["vllm:prefix_cache_hits"],
        "accepted_drafts": metrics["vllm:spec_decode_num_accepted_tokens"],
        "captured": "Capturing CUDA graphs" in log,
        "arguments": ways,
    }


def failures(result: dict[str, Any]) -> list[str]:
    """What is not as it should be, in words."""
    found = [] if result["prefix_cache_hits"] > 0 and result["accepted_drafts"] > 0 else ["no prefix hits or no drafts"]
    for name, way in result["ways"].items():
        if max(way["gap_where_they_part_nats"], default=0.0) > LEVEL:
            found.append(
                f"{name} parts from {way['against']} where tokens are not level: {way['gap_where_they_part_nats']}"
            )
        if way["behind_best_nats"]["mean"] > BEHIND:
            found.append(f"{name} lies {way['behind_best_nats']['mean']:.3f} nats behind the simulation's best tokens")
    return found


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("projector", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--stock", action="store_true")
    parser.add_argument("--vllm-args", type=json.loads, default={})
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(given.model)(given.text.read_text()[: 8 * COUNT * LONGEST])["input_ids"]
    with tempfile.TemporaryDirectory() as folder:
        result = run(given.model, given.projector.resolve(), ids, given.vllm_args, Path(folder), given.stock)
    result |= {"model": given.model.name, "failures": failures(result)} | provenance()
    result["command"] = shlex.join(["python", "tests/gpu_greedy.py", *sys.argv[1:]])
    print(json.dumps(result, indent=1))
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
