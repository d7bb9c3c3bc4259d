# SPDX-License-Identifier: Apache-2.0
"""Tiny random models on disk, random projectors for them, their plain-torch simulation, and a process to serve them in.

A job is one vLLM engine: ``{"llm": arguments of vllm.LLM, "steps": [{"prompts": [[ids]], "params": {...}}, ...]}``. All
jobs of a ``serve`` call run one after another in a process of their own, the imports paid once.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_kvsplice.calibration.hf_attention import transformed_kv
from vllm_kvsplice.codec import reference
from vllm_kvsplice.codec.layout import LatentLayout
from vllm_kvsplice.codec.projector import Basis, LayerProjector, Projector, build_metadata, default_layer

VOCAB = 320
COMMON = dict(vocab_size=VOCAB, hidden_size=256, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
              num_key_value_heads=2, max_position_embeddings=1024, initializer_range=0.06, bos_token_id=1,
              eos_token_id=2, pad_token_id=0, tie_word_embeddings=False)  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": COMMON,
    # Sliding layers (0, 2) and full ones (1) with soft caps; the window is shorter than a block.
    "gemma2": COMMON
    | dict(
        head_dim=64,
        sliding_window=24,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=30.0,
        query_pre_attn_scalar=64,
        tie_word_embeddings=True,
    ),  # fmt: skip
}
LLM = dict(skip_tokenizer_init=True, dtype="float32", max_model_len=512, kv_cache_memory_bytes=8 << 20, enforce_eager=True,
           max_num_seqs=8, block_size=32, seed=0)  # fmt: skip
GREEDY = dict(temperature=0.0, detokenize=False, logprobs=1, ignore_eos=True)


def make_model(folder: Path, family: str = "qwen2", **changes: Any) -> Path:
    """Write a random model; equal arguments give equal weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(FAMILIES[family] | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    return folder


def random_projector(
    model: Path, layouts: Callable[[int], LatentLayout], seed: int = 0, scale: float = 0.5
) -> Projector:
    """Random orthonormal bases, off-zero means and uneven sigmas: everything that a real projector may hold."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    metadata = build_metadata(config, "test")
    H, g = metadata.model.num_kv_heads, torch.Generator().manual_seed(seed)

    def basis(layout: LatentLayout, side: Any) -> Basis:
        D, rank = layout.head_dim, layout.rank(side)
        rows = torch.linalg.qr(torch.randn(H, D, D, generator=g))[0][:, :rank].contiguous()
        sigma = torch.rand(H, rank, generator=g) + 0.5
        return Basis(rows, rows.transpose(1, 2).contiguous(), scale * torch.randn(H, D, generator=g), sigma)

    made = {i: layouts(i) for i in range(config.num_hidden_layers)}
    return Projector(metadata, {i: LayerProjector(x, basis(x, "k"), basis(x, "v")) for i, x in made.items()})


def prompts(count: int, length: int, seed: int = 0) -> list[list[int]]:
    """Random token ids, no two prompts alike."""
    ids = torch.randint(3, VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))
    return ids.tolist()


def kvsplice(projector: Path | None = None, **settings: Any) -> dict[str, Any]:
    """Arguments of ``vllm.LLM`` that choose the backend; prefill is latent unless told otherwise."""
    named = {"projector": str(projector)} if projector else {}
    return {
        "attention_backend": "kvsplice",
        "additional_config": {"kvsplice": {"prefill": "latent"} | named | settings},
    }


def job(model: Path, *steps: dict[str, Any], **llm: Any) -> dict[str, Any]:
    """One engine over ``model`` with arguments beside the common ones."""
    return {"llm": LLM | {"model": str(model)} | llm, "steps": list(steps)}


def assert_follows(
    served: Served, step: int, expected: Callable[[list[int]], Tensor], prompts: list[list[int]], tol: float
) -> None:
    """What a step generated are the simulation's greedy tokens, unless two were as good as level, at its log-probabilities."""
    for prompt, tokens, logprobs in zip(prompts, served.tokens[step], served.logprobs[step], strict=True):
        rows = expected(prompt + tokens)[len(prompt) - 1 : -1]
        best = rows.topk(2).values
        for row, token, logprob, (first, second) in zip(rows, tokens, logprobs, best.tolist(), strict=True):
            assert abs(row[token].item() - logprob) <= tol
            assert first - row[token].item() <= tol or first - second <= 2 * tol


def simulate(model: Path, projector: Projector | None, ids: list[int], compressed: bool = True) -> Tensor:
    """Log-probabilities [T, vocab] fp32 of the next token, in transformers, K and V through the reference codec."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    text = loaded.config.get_text_config()

    def roundtrip(i: int, _q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if not compressed:
            return k, v
        layer = projector.layers[i] if projector else default_layer(k.shape[-1], text.num_key_value_heads)
        out = []
        for side, x in (("k", k), ("v", v)):
            folded = layer.side(side).folded()  # type: ignore[arg-type]
            z = reference.encode(x.transpose(1, 2), folded.encode, folded.mean)
            z = reference.roundtrip(z, layer.layout, side)  # type: ignore[arg-type]
            out.append(reference.expand(z, folded.decode, folded.mean).transpose(1, 2))
        return out[0], out[1]

    with torch.no_grad(), transformed_kv(loaded, roundtrip):  # soft caps, which transformers' own sdpa drops, included
        logits: Tensor = loaded(torch.tensor([ids]), use_cache=False).logits[0]
    return logits.log_softmax(-1)


@dataclass
class Served:
    """What one engine answered: per step and prompt, generated ids and log-probabilities; ``prompt_logprobs`` if asked."""

    tokens: list[list[list[int]]]
    logprobs: list[list[list[float]]]
    prompt_logprobs: list[list[list[float] | None]]
    cache_tokens: int
    metrics: dict[str, float]
    error: str | None


def serve(
    jobs: list[dict[str, Any]], folder: Path, timeout: float = 280, **environment: str
) -> tuple[list[Served], str]:
    """Run the jobs in one new process; returns one ``Served`` each and everything that was logged."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    # One thread, bound nowhere: deterministic sums, and no spinning for cores that other processes have.
    env = os.environ | dict(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1",
                            OMP_NUM_THREADS="1", VLLM_CPU_OMP_THREADS_BIND="nobind") | environment  # fmt: skip
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), env.get("PYTHONPATH", "")])
    with (folder / "log").open("wb") as out:
        command = [sys.executable, __file__, str(folder)]
        process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # engine core and workers with it
    log = (folder / "log").read_text(errors="replace")
    done = folder / "done.json"
    if process.wait() or not done.exists():
        raise AssertionError(f"the engine process ended with {process.returncode}:\n{log[-6000:]}")
    return [Served(**result) for result in json.loads(done.read_text())], log


def _run_job(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    out: dict[str, Any] = dict(tokens=[], logprobs=[], prompt_logprobs=[], cache_tokens=0, metrics={}, error=None)
    try:
        llm = LLM(disable_log_stats=False, **job["llm"])
    except Exception as error:
        out["error"] = f"{type(error).__name__}: {error}"
        traceback.print_exc()
        return out
    cache = llm.llm_engine.vllm_config.cache_config
    out["cache_tokens"] = cache.num_gpu_blocks * cache.block_size
    for step in job["steps"]:
        if step.get("reload"):
            llm.collective_rpc("reload_weights")
        params = SamplingParams(**(GREEDY | step.get("params", {})))
        answers = llm.generate([{"prompt_token_ids": p} for p in step["prompts"]], params, use_tqdm=False)
        out["tokens"].append([list(a.outputs[0].token_ids) for a in answers])
        out["logprobs"].append(
            [
                [p[t].logprob for p, t in zip(a.outputs[0].logprobs, a.outputs[0].token_ids, strict=True)]
                for a in answers
            ]
        )
        out["prompt_logprobs"].append(
            [a.prompt_logprobs and [p[t].logprob for p, t in zip(a.prompt_logprobs[1:], a.prompt_token_ids[1:], strict=True)]
             for a in answers]
        )  # fmt: skip
    out["metrics"] = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    if hasattr(llm.llm_engine.engine_core, "shutdown"):
        llm.llm_engine.engine_core.shutdown()
    return out


def _main(folder: Path) -> None:
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    results = []
    for job in json.loads((folder / "jobs.json").read_text()):
        results.append(_run_job(job))
        gc.collect()
        cleanup_dist_env_and_memory()
        (folder / "partial.json").write_text(json.dumps(results))
    (folder / "partial.json").rename(folder / "done.json")


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
