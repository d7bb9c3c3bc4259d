# SPDX-License-Identifier: Apache-2.0
"""Real vLLM engines over tiny random models against a plain-torch simulation. One process runs them all."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm")

from engine_models import Served, assert_follows, job, kvsplice, make_model, prompts, random_projector, serve, simulate

from vllm_kvsplice.codec.layout import LatentLayout
from vllm_kvsplice.codec.projector import FILE_NAME, Projector, default_layer

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]
# All tier widths, other ones in each layer.
LAYOUTS = [
    LatentLayout.of(64, k=[(8, 16), (4, 48)], v=[(8, 16), (4, 48)]),
    LatentLayout.of(64, k=[(16, 64)], v=[(4, 40), (0, 24)]),
    LatentLayout.of(64, k=[(8, 64)], v=[(8, 16), (4, 40), (2, 8)]),
]
DENSE = 2 * 64 * 4  # K and V of the fp32 models
TOLERANCE = 0.03  # of log-probabilities: codes that round the other way; the codec itself moves them by 0.3 and more
PROMPTS = prompts(2, 77)  # not a multiple of any block size here, and longer than gemma2's window
SCORE = dict(prompts=PROMPTS, params=dict(max_tokens=4, prompt_logprobs=0))
GENERATE = dict(prompts=PROMPTS, params=dict(max_tokens=8))
LOOPS = dict(prompts=[p[:9] * 5 for p in PROMPTS], params=dict(max_tokens=24))  # what an n-gram speculator can guess
MANY = dict(prompts=prompts(6, 50, seed=3), params=dict(max_tokens=40))
BLOCK = LAYOUTS[0].bytes_per_token_head + LAYOUTS[1].bytes_per_token_head + LAYOUTS[2].bytes_per_token_head


@dataclass(eq=False, repr=False)  # compared and hashed by identity
class Run:
    """What all engines of this file answered, by name, and the model folders and projectors that they had."""

    served: dict[str, Served]
    log: str
    models: dict[str, Path]
    projectors: dict[str, Projector | None]

    @cache  # noqa: B019
    def simulated(self, model: str, projector: str, ids: tuple[int, ...], compressed: bool = True) -> Tensor:
        return simulate(self.models[model], self.projectors[projector], list(ids), compressed)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("engines")
    qwen, gemma = make_model(folder / "qwen"), make_model(folder / "gemma", "gemma2")
    made: dict[str, Projector | None] = {"none": None}
    for name, model in (("qwen", qwen), ("gemma", gemma)):
        made[name] = random_projector(model, LAYOUTS.__getitem__)
        made[name].save(folder / f"{name}.safetensors")  # type: ignore[union-attr]
    q, g = folder / "qwen.safetensors", folder / "gemma.safetensors"
    beside = shutil.copytree(qwen, folder / "beside")
    (beside / "kvsplice").mkdir()
    shutil.copy(q, beside / "kvsplice" / FILE_NAME)
    above = shutil.copytree(qwen, folder / "above")
    shutil.copy(q, above / FILE_NAME)
    jobs = {
        "stock": job(qwen, SCORE, GENERATE),
        "int8": job(qwen, SCORE, **kvsplice()),
        "int8-exact": job(qwen, SCORE, **kvsplice(prefill="exact")),
        "mixed": job(qwen, SCORE, LOOPS, MANY, **kvsplice(q)),
        "chunks": job(qwen, GENERATE, GENERATE, max_num_batched_tokens=32, block_size=16, **kvsplice(q)),
        "chunks-exact": job(qwen, GENERATE, GENERATE, max_num_batched_tokens=32, **kvsplice(q, prefill="exact")),
        "tiny": job(qwen, MANY, max_model_len=128, kv_cache_memory_bytes=BLOCK * 2 * 32 * 9, **kvsplice(q)),
        "beside": job(beside, GENERATE, dict(reload=True, **GENERATE), enable_prefix_caching=False, **kvsplice()),
        "gemma": job(gemma, SCORE, **kvsplice(g)),
        "gemma-exact": job(gemma, SCORE, **kvsplice(g, prefill="exact")),
        "gemma-stock": job(gemma),
        "fp8": job(qwen, kv_cache_dtype="fp8", **kvsplice()),
        "unknown": job(qwen, **kvsplice(rank=3)),
        "other-model": job(qwen, **kvsplice(g)),
        "above": job(above, **kvsplice()),
        # Last: after an engine with a speculator vLLM 0.32 cannot start another one in the same process.
        "drafts": job(qwen, LOOPS, block_size=48, **kvsplice(q),
                      speculative_config=dict(method="ngram", num_speculative_tokens=3, prompt_lookup_max=3)),
    }  # fmt: skip
    served, log = serve(list(jobs.values()), folder / "run")
    models = {"qwen": qwen, "gemma": gemma}
    return Run(dict(zip(jobs, served, strict=True)), log, models, made)


def prompt_differences(run: Run, name: str, model: str, projector: str, compressed: bool) -> Tensor:
    """|served - simulated| log-probability of every prompt token."""
    found = []
    for ids, got in zip(PROMPTS, run.served[name].prompt_logprobs[0], strict=True):
        expected = run.simulated(model, projector, tuple(ids), compressed)
        found.append((torch.tensor(got) - expected[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0]).abs())
    return torch.cat(found)


@pytest.mark.parametrize(
    "name, model, projector", [("int8", "qwen", "none"), ("mixed", "qwen", "qwen"), ("gemma", "gemma", "gemma")]
)
def test_latent_prefill_and_decode_are_the_simulation(run: Run, name: str, model: str, projector: str) -> None:
    assert prompt_differences(run, name, model, projector, True).max() <= TOLERANCE
    assert_follows(run.served[name], 0, lambda ids: run.simulated(model, projector, tuple(ids)), PROMPTS, TOLERANCE)


@pytest.mark.parametrize("name, model, projector", [("mixed", "qwen", "qwen"), ("gemma", "gemma", "gemma")])
def test_the_simulation_can_tell_the_codec_from_none(run: Run, name: str, model: str, projector: str) -> None:
    assert prompt_differences(run, name, model, projector, False).max() > 10 * TOLERANCE


@pytest.mark.parametrize("name, model", [("stock", "qwen"), ("int8-exact", "qwen"), ("gemma-exact", "gemma")])
def test_exact_prefill_of_a_whole_prompt_loses_nothing(run: Run, name: str, model: str) -> None:
    assert prompt_differences(run, name, model, "none", False).max() <= 1e-4


def test_exact_and_latent_agree_within_the_codec_error(run: Run) -> None:
    exact, latent = (torch.tensor(run.served[name].prompt_logprobs[0]) for name in ("int8-exact", "int8"))
    assert 1e-4 < (exact - latent).abs().max() <= 2 * TOLERANCE  # int8 is near lossless


def test_chunks_blocks_of_16_and_prefix_hits_change_nothing(run: Run) -> None:
    for step in (0, 1):
        assert_follows(
            run.served["chunks"], step, lambda ids: run.simulated("qwen", "qwen", tuple(ids)), PROMPTS, TOLERANCE
        )
    assert run.served["chunks"].metrics["vllm:prefix_cache_hits"] >= 2 * 64
    assert run.served["chunks"].tokens[0] == run.served["chunks"].tokens[1]


def test_exact_prefill_hands_over_to_codes_where_chunks_end_and_prefixes_hit(run: Run) -> None:
    served = run.served["chunks-exact"]
    assert served.metrics["vllm:prefix_cache_hits"] >= 2 * 64
    dense = [run.simulated("qwen", "none", tuple(p + t), False) for p, t in zip(PROMPTS, served.tokens[1], strict=True)]
    for expected, prompt, tokens, logprobs in zip(dense, PROMPTS, served.tokens[1], served.logprobs[1], strict=True):
        rows = expected[len(prompt) - 1 : -1].gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert (rows - torch.tensor(logprobs)).abs().max() < 2.0  # a random basis, but the right context


def test_speculative_decoding_is_greedy_decoding(run: Run) -> None:
    assert run.served["drafts"].metrics["vllm:spec_decode_num_accepted_tokens"] > 5
    assert_follows(
        run.served["drafts"], 0, lambda ids: run.simulated("qwen", "qwen", tuple(ids)), LOOPS["prompts"], TOLERANCE
    )  # type: ignore[arg-type]
    assert_follows(
        run.served["mixed"], 1, lambda ids: run.simulated("qwen", "qwen", tuple(ids)), LOOPS["prompts"], TOLERANCE
    )  # type: ignore[arg-type]


def test_a_draft_model_s_layers_are_int8_beside_a_projector(run: Run, tmp_path: Path) -> None:
    """The target drafts for itself: the projector would fit the draft too, but is the target's."""
    qwen, file = run.models["qwen"], tmp_path / "qwen.safetensors"
    run.projectors["qwen"].save(file)
    drafts = dict(method="draft_model", model=str(qwen), num_speculative_tokens=3, attention_backend="KVSPLICE")
    (served,), log = serve([job(qwen, LOOPS, speculative_config=drafts, **kvsplice(file))], tmp_path / "run")
    assert served.error is None and served.metrics["vllm:spec_decode_num_accepted_tokens"] > 5
    assert_follows(served, 0, lambda ids: run.simulated("qwen", "qwen", tuple(ids)), LOOPS["prompts"], TOLERANCE)
    int8 = default_layer(64, 2).layout.bytes_per_token_head
    mean = (BLOCK + 3 * int8) / 6
    assert f"{mean:.1f} bytes per token and KV head" in log and "active on 6 of 6 attention layers" in log


def test_preempted_requests_resume_where_they_were(run: Run) -> None:
    assert run.served["tiny"].metrics["vllm:num_preemptions"] > 0
    for name, step in (("tiny", 0), ("mixed", 2)):
        assert_follows(
            run.served[name], step, lambda ids: run.simulated("qwen", "qwen", tuple(ids)), MANY["prompts"], TOLERANCE
        )  # type: ignore[arg-type]


def test_a_projector_beside_the_weights_is_found_and_survives_a_reload(run: Run) -> None:
    for step in (0, 1):
        assert_follows(
            run.served["beside"], step, lambda ids: run.simulated("qwen", "qwen", tuple(ids)), PROMPTS, TOLERANCE
        )


def test_capacity_is_the_byte_ratio(run: Run) -> None:
    memory, heads, layers, block = 8 << 20, 2, 3, 32

    def expected(bytes_per_token_head: int, layers: int = layers) -> int:
        return memory // (bytes_per_token_head * heads * layers * block) * block

    assert run.served["stock"].cache_tokens == expected(DENSE)
    assert run.served["int8"].cache_tokens == expected(130)
    assert run.served["mixed"].cache_tokens == expected(BLOCK, 1)
    ratio = run.served["mixed"].cache_tokens / run.served["stock"].cache_tokens
    assert ratio == pytest.approx(3 * DENSE / BLOCK, rel=0.02)


def test_a_hybrid_model_has_one_page_size(run: Run) -> None:
    largest = max(layout.bytes_per_token_head for layout in LAYOUTS)
    ratio = run.served["gemma"].cache_tokens / run.served["gemma-stock"].cache_tokens
    assert ratio == pytest.approx(DENSE / largest, rel=0.02)
    assert re.search(rf"{largest}.0 bytes per token and KV head all in, [\d.]+ of them padding", run.log)


def test_the_log_says_what_was_gained_and_what_runs(run: Run) -> None:
    for text in (
        "K 64x8 V 64x8: 130.0 bytes per token and KV head all in, dense 512.0; ratio V 3.94x, K 3.94x, K+V 3.94x; active on 3 of 3 attention layers",
        "K and V are rotated int8, near lossless. For a smaller cache: `kvsplice calibrate",
        "attention runs in plain torch, fp32",
        "kvsplice is active on this CPU",
        "KV cache size: 10,752 tokens",
    ):
        assert text in run.log
    assert run.log.count("bytes per token and KV head all in") == 10  # once for each engine of ours that started


@pytest.mark.parametrize(
    "name, words",
    [
        ("fp8", "kvsplice does not support a fp8 KV cache"),
        ("unknown", "kvsplice has no setting 'rank': the known ones are projector, prefill"),
        ("other-model", "the projector was calibrated for another model (model_type gemma2, not qwen2"),
        ("above", "vLLM would read"),
    ],
)
def test_refused_at_start(run: Run, name: str, words: str) -> None:
    error: Any = run.served[name].error
    assert error is not None and words in error


def test_with_the_plugin_installed_and_not_chosen_outputs_are_bit_identical(run: Run, tmp_path: Path) -> None:
    (without,), log = serve([job(run.models["qwen"], SCORE, GENERATE)], tmp_path, VLLM_PLUGINS="none")
    assert "kvsplice" not in log.lower() and "kvsplice" in run.log.lower()
    with_it = run.served["stock"]
    assert (without.tokens, without.logprobs, without.prompt_logprobs) == (
        with_it.tokens,
        with_it.logprobs,
        with_it.prompt_logprobs,
    )
