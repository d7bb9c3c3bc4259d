# SPDX-License-Identifier: Apache-2.0
"""The simulation and real vLLM engines give the same scores: the bundled model, a calibrated codec, equal tokens.

Tolerances are earned. Both engines run in bfloat16, each with kernels of its own, so their runs differ by rounding; how
much rounding is worth in this model, on these tokens, is measured beside them: float32 against bfloat16, no codec.
"""

import math
from importlib.resources import files

import pytest
import torch

from vllm_kvsplice.calibration import calibrate
from vllm_kvsplice.calibration.hf_attention import load_model
from vllm_kvsplice.calibration.texts import load_text
from vllm_kvsplice.scoring import evaluate, hf_engine
from vllm_kvsplice.scoring.evaluate import EvalRequest, cut_windows
from vllm_kvsplice.scoring.metrics import Scores, score_logits

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]
MODEL = str(files("vllm_kvsplice") / "demo" / "model")
SEQ_LEN, WINDOWS, TOPK, CACHE_GIB = 512, 3, 128, 0.125


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Results of both engines over the same windows and needles."""
    projector = str(tmp_path_factory.mktemp("agree") / "p.safetensors")
    calibrate.run(calibrate.CalibrateRequest(MODEL, projector, samples=4, seq_len=512))
    shared = dict(seq_len=SEQ_LEN, windows=WINDOWS, topk=TOPK, needle=2, dtype="bfloat16", cache_gib=CACHE_GIB)
    requests = {engine: EvalRequest(MODEL, projector, engine=engine, **shared) for engine in ("hf", "vllm")}
    return {engine: evaluate.run(request) for engine, request in requests.items()}


@pytest.fixture(scope="module")
def rounding():
    """Scores of bfloat16 against float32 over the same windows, no codec."""
    (exact, tokenizer), (rounded, _) = (load_model(MODEL, "cpu", dtype) for dtype in ("float32", "bfloat16"))
    ids = tokenizer(load_text(held_out=True).content, add_special_tokens=False, verbose=False).input_ids
    total = Scores()
    for window in cut_windows(ids, [], SEQ_LEN, WINDOWS):
        tokens = torch.tensor(window)
        base, other = (hf_engine.logits(model, tokens, None) for model in (exact, rounded))
        total += score_logits(base[:-1], other[:-1], tokens[1:], TOPK)
    return total


def test_both_scored_the_same_tokens_with_the_same_codec(results):
    hf, vllm = results["hf"], results["vllm"]
    for key in ("tokens", "windows", "seq_len", "text", "projector", "bytes_per_token_head", "ratio", "model"):
        assert hf[key] == vllm[key], key
    assert hf["tokens"] == WINDOWS * (SEQ_LEN - 1)


def test_divergence_agrees_within_rounding(results, rounding):
    hf, vllm = results["hf"]["kld_topk"], results["vllm"]["kld_topk"]
    assert abs(hf - vllm) <= rounding.kld_topk
    assert vllm > 5 * rounding.kld_topk, "the codec must be seen over the rounding, or agreement means nothing"


def test_perplexity_agrees_within_rounding(results, rounding):
    hf, vllm = (results[engine]["ppl"] for engine in ("hf", "vllm"))
    # Rounding moves a token's log-probability by sqrt(2 KL) in root mean square, and the mean over tokens by that over
    # sqrt(tokens). Of four runs compared two at a time: twice that, times three for three standard deviations.
    noise_pct = 100 * 3 * 2 * math.sqrt(2 * rounding.kld / rounding.tokens)
    assert noise_pct < 0.5
    assert abs(hf["delta_pct"] - vllm["delta_pct"]) <= noise_pct
    assert 100 * abs(hf["baseline"] / vllm["baseline"] - 1) <= noise_pct


def test_most_likely_tokens_agree_within_rounding(results, rounding):
    assert abs(results["hf"]["top1"] - results["vllm"]["top1"]) <= 2 * (1 - rounding.top1)


def test_needles_agree(results):
    assert results["hf"]["needle"] == results["vllm"]["needle"] == {"baseline": 1.0, "kvsplice": 1.0}


def test_the_cache_holds_as_many_more_tokens_as_the_ratio_says(results):
    vllm = results["vllm"]
    assert vllm["cache_tokens"]["ratio"] == pytest.approx(vllm["ratio"]["kv"], rel=0.02)  # whole blocks
    shape = evaluate.load_config(MODEL)[0]
    dense = 2 * 2 * shape.head_dim * shape.num_key_value_heads * shape.num_hidden_layers
    assert vllm["cache_tokens"]["baseline"] == pytest.approx(CACHE_GIB * 2**30 / dense, rel=0.2)
