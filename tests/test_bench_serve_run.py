# SPDX-License-Identifier: Apache-2.0
"""`kvsplice bench serve` at work: models without weights, the process that runs `vllm bench`, and the whole with two engines."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import textwrap
from contextlib import nullcontext
from pathlib import Path
from statistics import median

import pytest
from rich.console import Console

from vllm_kvsplice.bench import client, dummy_model, serve
from vllm_kvsplice.bench.request import ServeBenchRequest
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.scoring.processes import group_members

TINY = dict(model_type="qwen2", architectures=["Qwen2ForCausalLM"], vocab_size=320, hidden_size=256, intermediate_size=128,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, hidden_act="silu",
            rms_norm_eps=1e-6, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False)  # fmt: skip


# ---------------------------------------------------------------- models without weights
def test_a_dummy_model_has_an_exact_tokenizer_and_projectors_of_its_shape(tmp_path):
    from transformers import AutoConfig, AutoTokenizer

    from vllm_kvsplice.calibration.presets import resolve
    from vllm_kvsplice.codec.projector import Projector

    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "config.json").write_text(json.dumps(TINY))
    model, tokenizer = tmp_path / "model", tmp_path / "tokenizer"
    dummy_model.write_model(model, tokenizer, None, str(tmp_path / "given"))
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    ids = [319, 0, 7, 7, 120]
    assert loaded.encode(loaded.decode(ids)) == ids and len(loaded) == 320
    projector = Projector.load(dummy_model.write_projector(tmp_path, model, "near_lossless"))
    projector.verify(AutoConfig.from_pretrained(model))
    assert len(projector.layers) == 2
    layer = projector.layers[1]
    assert layer.layout == resolve("near_lossless", 64)[0]
    gram = layer.k.encode @ layer.k.encode.transpose(1, 2)
    assert (gram - gram.new_ones(64).diag()).abs().max() < 1e-5


@pytest.mark.parametrize("shape", dummy_model.SHAPES)
def test_built_in_shapes_are_configs(tmp_path, shape):
    from transformers import AutoConfig

    from vllm_kvsplice.codec.fingerprint import model_shape

    dummy_model.write_model(tmp_path / "m", tmp_path / "t", shape, None)
    got = model_shape(AutoConfig.from_pretrained(tmp_path / "m"))
    expected = {"qwen2.5-7b": (28, 4, 128), "qwen2.5-0.5b": (14, 2, 64), "llama-3.1-8b": (32, 8, 128)}
    assert (got.num_attention_heads, got.num_kv_heads, got.head_dim) == expected[shape]


def test_an_unknown_shape_is_refused(tmp_path):
    with pytest.raises(KVSpliceError, match="expected qwen2.5-7b"):
        dummy_model.write_model(tmp_path, tmp_path, "gpt-5", None)


# ---------------------------------------------------------------- the process that runs `vllm bench`
FAKE_VLLM = """
import os, sys, time
sys.stdout.write(f"ran {sys.argv[1:]}\\n")
if sys.argv[1] == "fail": sys.exit("it failed")
if sys.argv[1] == "raise": raise ValueError("it raised")
if sys.argv[1] == "die": os._exit(3)
if sys.argv[1] == "hang": time.sleep(60)
open(sys.argv[2], "a").write(f"{os.getpid()}\\n") if sys.argv[1] == "note" else None
"""


@pytest.fixture
def fake_client(monkeypatch, tmp_path):
    """A Client whose vLLM is FAKE_VLLM."""
    (tmp_path / "fake_vllm.py").write_text(FAKE_VLLM)
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from vllm_kvsplice.bench import client; "
    script += "client.VLLM = 'fake_vllm'; client.main()"
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{script}"\n')
    python.chmod(0o755)
    monkeypatch.setattr(client.sys, "executable", str(python))
    return client.Client(tmp_path / "log")


def test_one_process_runs_command_after_command(fake_client, tmp_path):
    with fake_client as running:
        for _ in range(2):
            running.run(["note", str(tmp_path / "pids")], 30)
        pids = (tmp_path / "pids").read_text().split()
        assert len(pids) == 2 and len(set(pids)) == 1
    assert group_members(int(pids[0])) == []
    assert "ran ['bench', 'serve', '--help']" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    "command, message",
    [("fail", "ended with 1.*it failed"), ("raise", "ended with 1.*it raised"), ("die", "death of its process")],
)
def test_a_command_that_fails_is_told_with_its_log(fake_client, command, message):
    with fake_client as running, pytest.raises(KVSpliceError, match=f"(?s)`vllm {command}` .*{message}"):
        running.run([command], 30)


def test_a_command_that_hangs_is_given_up(fake_client):
    with fake_client as running:
        running.run(["ok"], 30)
        with pytest.raises(KVSpliceError, match="was not done after 0 s"):
            running.run(["hang"], 0.2)
        running.run(["ok"], 30)  # in a new process


# ---------------------------------------------------------------- the whole
def test_a_setting_that_fails_does_not_take_the_others_along(monkeypatch, tmp_path, capsys):
    def fake_measure(request, setting_, projector, model, running, work, record, progress):
        if setting_.name == "bf16":
            raise KVSpliceError("out of memory.")
        assert projector.exists() and Path(model.path, "config.json").exists()
        record |= {"capacity": {"tokens": 1000}, "start_s": 30.0}
        progress("measured")
        assert len(json.loads((tmp_path / "r.json").read_text())["settings"]) == 2  # written before the end

    monkeypatch.setattr(serve, "measure", fake_measure)
    monkeypatch.setattr(serve, "Client", lambda log, offline: nullcontext())
    monkeypatch.setattr(serve, "require_vllm", lambda: None)
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    request = ServeBenchRequest(
        model=str(tmp_path), dummy=True, settings=("bf16", "kvsplice:v_only"), json=str(tmp_path / "r.json")
    )
    assert serve.run(request, Console(file=io.StringIO())) == 1
    got = json.loads((tmp_path / "r.json").read_text())
    assert [s["error"] for s in got["settings"]] == ["out of memory.", None]
    codec = got["settings"][1]["codec"]
    assert codec["bases"] == "dummy weights, random orthogonal bases" and codec["preset"] == "v_only"
    assert got["model"]["weights"] == "dummy" and got["provenance"][0]["versions"]
    assert "bf16 FAILED: out of memory." in capsys.readouterr().out


@pytest.mark.engine
def test_the_whole_on_a_cpu(tmp_path):
    """Two real engines, the smallest calls there are, as a user would run them.

    Chunks of 32 tokens: a busy machine delivers shorter ones merged, and then there is no time per token,
    which was seen with these too, in one decode: one of the six must have it.
    """
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(TINY))
    command = """
        bench serve tiny --dummy --setting bf16 --setting kvsplice:near_lossless --point 2x64,999x64 --point-output 129 --repeats 3 --stream-interval 32
        --concurrency 2 --sweep-input 48 --sweep-output 9 --sweep-rounds 1 --sweep-returning --kv-cache-memory-bytes 8000000
        --json r.json --logs logs --serve-args
    """
    args = [*textwrap.dedent(command).split(), "--enforce-eager --block-size 32 --max-num-seqs 4"]
    env = os.environ | dict(OMP_NUM_THREADS="1", VLLM_CPU_OMP_THREADS_BIND="nobind", TMPDIR=str(tmp_path))
    done = subprocess.run([sys.executable, "-P", "-m", "vllm_kvsplice.cli", *args], cwd=tmp_path, env=env,
                          capture_output=True, text=True, timeout=290)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    stock, ours = json.loads((tmp_path / "r.json").read_text())["settings"]
    assert ours["capacity"]["tokens"] > 2.5 * stock["capacity"]["tokens"]  # 84 bytes for 256
    times = []
    for record in (stock, ours):
        point, skipped = record["points"]
        decode, sweep = point["decode"][0], record["sweep"][0]
        steady = [d["steady_tpot_ms"] for d in point["decode"] if d["steady_requests"]]
        assert len(point["decode"]) == 3 and point["tpot_ms"] == (median(steady) if steady else None)
        times += steady
        assert "do not fit" in skipped["skipped"] and skipped["tpot_ms"] is None
        assert point["prefill"]["prefix_hit_share"] == 0.0 and decode["prefix_hit_share"] == 0.5  # one block of two
        assert point["prefill_tok_s"] > 0
        assert decode["vllm"]["total_input_tokens"] == 2 * 64 and decode["vllm"]["total_output_tokens"] == 2 * 129
        assert sweep["fresh"]["vllm"]["output_throughput"] > 0 and sweep["returning"]["prefix_hit_share"] > 0
    assert times and min(times) > 0
    assert list(tmp_path.glob("kvsplice-*")) == []
