# SPDX-License-Identifier: Apache-2.0
"""Real vLLM on a GPU, CUDA graphs and FlashAttention included, against the plain-torch simulation in fp32."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

import gpu_greedy
from engine_models import Served, job, kvsplice, make_model, prompts, random_projector, serve, simulate

import vllm_kvsplice.demo
from vllm_kvsplice.calibration.texts import load_text
from vllm_kvsplice.codec.layout import LatentLayout

pytestmark = [pytest.mark.gpu, pytest.mark.engine, pytest.mark.timeout(600)]
LAYOUTS = [
    LatentLayout.of(64, k=[(8, 16), (4, 48)], v=[(8, 16), (4, 48)]),
    LatentLayout.of(64, k=[(16, 64)], v=[(4, 40), (0, 24)]),
    LatentLayout.of(64, k=[(8, 64)], v=[(8, 16), (4, 40), (2, 8)]),
]
PROMPTS = prompts(5, 77)
SCORE = dict(prompts=PROMPTS, params=dict(max_tokens=12, prompt_logprobs=0))
GENERATE = dict(prompts=PROMPTS, params=dict(max_tokens=12))
LONG = prompts(4, 400)  # with 160 tokens a step and 4 query heads to a KV head, so that continued chunks are expanded
CONTINUE = dict(prompts=LONG, params=dict(max_tokens=12))
LOOPS = dict(prompts=[p[:9] * 5 for p in PROMPTS], params=dict(max_tokens=24))
# No torch.compile, which takes a minute an engine; full graphs of decode steps, the part that holds our kernels.
GRAPHS = dict(mode=0, cudagraph_mode="FULL_DECODE_ONLY", cudagraph_capture_sizes=[4, 8, 32])
GPU: dict[str, Any] = dict(
    dtype="bfloat16", kv_cache_memory_bytes=64 << 20, gpu_memory_utilization=0.2, enforce_eager=False,
    compilation_config=GRAPHS,
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("gpu")
    found: dict[str, Any] = {}
    jobs = {}
    for name in ("qwen2", "gemma2"):
        model = make_model(folder / name, name)
        made = random_projector(model, LAYOUTS.__getitem__)
        made.save(folder / f"{name}.safetensors")
        found[name] = (model, made)
        file = folder / f"{name}.safetensors"
        jobs |= {
            name: job(model, SCORE, **GPU, **kvsplice(file)),
            f"{name}-exact": job(model, SCORE, **GPU, **kvsplice(file, prefill="exact")),
            f"{name}-stock": job(model, SCORE, **GPU),
        }
    file = folder / "qwen2.safetensors"
    hits = dict(max_num_batched_tokens=48, block_size=16, max_num_seqs=4)
    jobs["hits"] = job(found["qwen2"][0], GENERATE, GENERATE, **GPU, **hits, **kvsplice(file, prefill="exact"))
    grouped = make_model(folder / "grouped", "qwen2", num_key_value_heads=1)
    made = random_projector(grouped, LAYOUTS.__getitem__)
    made.save(folder / "grouped.safetensors")
    found["grouped"] = (grouped, made)
    file = folder / "grouped.safetensors"
    chunks = dict(max_num_batched_tokens=160, block_size=16, max_num_seqs=8)
    for prefill in ("latent", "exact"):
        served_with = kvsplice(file, prefill=prefill)
        jobs[f"{prefill}-chunks"] = job(grouped, CONTINUE, CONTINUE, **GPU, **chunks, **served_with)
    jobs["latent-whole"] = job(grouped, CONTINUE, **GPU, block_size=16, **kvsplice(file, prefill="latent"))
    file = folder / "qwen2.safetensors"
    drafts = dict(method="ngram", num_speculative_tokens=3, prompt_lookup_max=3)
    jobs["drafts"] = job(found["qwen2"][0], LOOPS, block_size=48, **GPU, **kvsplice(file), speculative_config=drafts)
    return found | serve_together(jobs, folder)


def serve_together(jobs: dict[str, Any], folder: Path, processes: int = 4) -> dict[str, Any]:
    """The jobs dealt to processes that share the GPU, since engines spend their time starting."""
    names = [list(jobs)[i::processes] for i in range(processes)]

    def run_share(i: int) -> tuple[list[Served], str]:
        return serve([jobs[name] for name in names[i]], folder / f"run{i}", timeout=500)

    with ThreadPoolExecutor(processes) as pool:
        shares = list(pool.map(run_share, range(processes)))
    served = {
        name: one
        for share, (found, _) in zip(names, shares, strict=True)
        for name, one in zip(share, found, strict=True)
    }
    return {"served": served, "log": "".join(log for _, log in shares)}


def differences(run: dict[str, Any], name: str, model: str, compressed: bool) -> torch.Tensor:
    """|served - simulated| log-probability of every token after the first, prompt and generated."""
    served: Served = run["served"][name]
    assert served.error is None, served.error
    folder, projector = run[model]
    found = []
    prompt_rows = served.prompt_logprobs[0]
    for i, prompt in enumerate(PROMPTS):
        ids = prompt + served.tokens[0][i]
        expected = simulate(folder, projector, ids, compressed)[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0]
        got = torch.tensor((prompt_rows[i] or []) + served.logprobs[0][i])
        found.append((got - expected[-len(got) :]).abs())
    return torch.cat(found)


@pytest.mark.parametrize("model", ["qwen2", "gemma2"])
def test_served_on_a_gpu_is_the_simulation_as_far_as_bf16_goes(run: dict[str, Any], model: str) -> None:
    # bf16 keys and values round to other codes than fp32 ones now and then; without the codec it is far off.
    assert 5 * differences(run, model, model, True).mean() < differences(run, model, model, False).mean()


@pytest.mark.parametrize("model", ["qwen2", "gemma2"])
def test_exact_prefill_is_flash_attention(run: dict[str, Any], model: str) -> None:
    exact, stock = (torch.tensor(run["served"][f"{model}-{kind}"].prompt_logprobs[0]) for kind in ("exact", "stock"))
    assert torch.equal(exact, stock)  # the same FlashAttention on the same numbers


def test_chunks_and_prefix_hits_in_one_step(run: dict[str, Any]) -> None:
    served: Served = run["served"]["hits"]
    assert served.error is None and served.metrics["vllm:prefix_cache_hits"] >= 5 * 64
    assert all(len(tokens) == 12 for step in served.tokens for tokens in step)


def gaps(run: dict[str, Any], name: str, step: int, compressed: bool) -> torch.Tensor:
    """|served - simulated| log-probability of every generated token of the long prompts."""
    served: Served = run["served"][name]
    assert served.error is None, served.error
    folder, projector = run["grouped"]
    found = []
    for prompt, tokens, logprobs in zip(LONG, served.tokens[step], served.logprobs[step], strict=True):
        rows = simulate(folder, projector, prompt + tokens, compressed)[len(prompt) - 1 : -1]
        found.append((rows.gather(1, torch.tensor(tokens)[:, None])[:, 0] - torch.tensor(logprobs)).abs())
    return torch.cat(found)


def test_chunks_and_prefix_hits_are_as_good_as_whole_prompts(run: dict[str, Any]) -> None:
    """In chunks of 160 tokens, and again from the prefix cache: off the simulation by as little as the whole prompt is."""
    whole = gaps(run, "latent-whole", 0, True).mean()
    uncompressed = gaps(run, "latent-whole", 0, False).mean()
    for step in (0, 1):
        assert gaps(run, "latent-chunks", step, True).mean() <= max(2 * whole, 0.2 * uncompressed)
    assert run["served"]["latent-chunks"].metrics["vllm:prefix_cache_hits"] >= 4 * 384
    first = [[tokens[0] for tokens in run["served"][f"latent-{kind}"].tokens[0]] for kind in ("chunks", "whole")]
    assert sum(a == b for a, b in zip(*first, strict=True)) >= len(LONG) // 2  # the rest are as good as level


def test_exact_chunks_lie_within_the_codec_s_error(run: dict[str, Any]) -> None:
    """First chunks on fresh keys beside continued ones on codes: between the codec's simulation and that without one."""
    for step in (0, 1):
        found = min(gaps(run, "exact-chunks", step, compressed).mean() for compressed in (True, False))
        assert found <= gaps(run, "latent-whole", 0, False).mean()


def test_a_continued_chunk_allocates_nothing_but_its_lse() -> None:
    """After the reservation and with the workspace locked, over a context that takes several pieces."""
    from kernel_cases import Case, make_batch
    from prefill_cases import codec_of, requests_of
    from vllm.v1.worker import workspace

    from kvsplice_kernels.encode import prepare
    from vllm_kvsplice.serving import triton_path
    from vllm_kvsplice.serving.attention_layer import Bases, Limits

    case = Case(num_kv_heads=1, group=8, seq_lens=(40_000, 2048), query_lens=(2048, 2048))
    batch, device = make_batch(case, filled=False), torch.device("cuda")
    batch.kv_cache.zero_()
    codec, limits = codec_of(case), Limits(8, 4096, 65536)
    steps = [requests_of(batch, limits) for _ in range(2)]
    fresh = (batch.key[-4096:], batch.value[-4096:])
    out = torch.empty_like(batch.query)
    bases = Bases(*batch.bases["k"], *batch.bases["v"])
    tensors = triton_path.Tensors(bases, prepare(*bases))
    workspace.init_workspace_manager(device)
    try:
        triton_path.reserve(codec, limits.max_num_seqs, 1, limits.max_num_batched_tokens, limits.max_model_len, device)
        workspace.lock_workspace()
        triton_path.prefill(codec, tensors, batch.query, None, fresh, batch.kv_cache, steps[0], out)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        triton_path.prefill(codec, tensors, batch.query, None, fresh, batch.kv_cache, steps[1], out)
        torch.cuda.synchronize()
    finally:
        workspace.reset_workspace_manager()
    lse_bytes = 4 * 8 * 2048
    assert torch.cuda.max_memory_allocated() - before <= 4 * lse_bytes + (1 << 20)
    assert out.isfinite().all()


def test_drafts_are_verified_as_greedy_decoding(run: dict[str, Any]) -> None:
    served: Served = run["served"]["drafts"]
    assert served.error is None and served.metrics["vllm:spec_decode_num_accepted_tokens"] > 5
    folder, projector = run["qwen2"]
    for prompt, tokens in zip(LOOPS["prompts"], served.tokens[0], strict=True):  # type: ignore[call-overload]
        rows = simulate(folder, projector, prompt + tokens)[len(prompt) - 1 : -1]
        gap = rows.max(-1).values - rows.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert gap.mean() <= 0.05 and gap.max() <= 0.5, gap


def test_a_draft_model_s_tokens_are_accepted(tmp_path: Path) -> None:
    """The bundled model drafts for itself, so all its tokens are right but where its int8 codes and level logits say otherwise.

    Prompts of 200 tokens, of which a draft that misses a key, or reads one too many, makes other keys and values.
    """
    from transformers import AutoTokenizer

    model = Path(vllm_kvsplice.demo.__file__).parent / "model"
    ids = AutoTokenizer.from_pretrained(model)(load_text(held_out=True).content)["input_ids"]
    text = dict(prompts=[ids[i * 200 : (i + 1) * 200] for i in range(6)], params=dict(max_tokens=48))
    drafts = dict(method="draft_model", model=str(model), num_speculative_tokens=3, attention_backend="KVSPLICE")
    (served,), _ = serve([job(model, text, **GPU, **kvsplice(), speculative_config=drafts)], tmp_path)
    assert served.error is None
    drafted, accepted = (served.metrics[f"vllm:spec_decode_num_{n}_tokens"] for n in ("draft", "accepted"))
    assert drafted >= 100 and accepted >= 0.98 * drafted, (drafted, accepted)  # 216 of 216 on an H200


def test_greedy_answers_are_those_without_graphs_and_those_of_the_simulation(tmp_path: Path) -> None:
    """The bundled model; graphs, prefix hits, chunks and drafts."""
    from transformers import AutoTokenizer

    model = Path(vllm_kvsplice.demo.__file__).parent / "model"
    ids = AutoTokenizer.from_pretrained(model)(load_text(held_out=True).content)["input_ids"]
    result = gpu_greedy.run(model, None, ids, {}, tmp_path)
    assert result["captured"] and gpu_greedy.failures(result) == []


def test_graphs_were_captured_and_pages_are_small(run: dict[str, Any]) -> None:
    served = run["served"]
    assert "Capturing CUDA graphs" in run["log"]
    ratio = served["qwen2"].cache_tokens / served["qwen2-stock"].cache_tokens
    assert ratio == pytest.approx(3 * 256 / sum(x.bytes_per_token_head for x in LAYOUTS), rel=0.02)


def test_a_gpu_says_that_kernels_run(run: dict[str, Any]) -> None:
    assert "plain torch" not in run["log"]
