# SPDX-License-Identifier: Apache-2.0
"""Engines across processes: spawned engine core, torch.compile, tensor parallel; and every way to spell the arguments."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from engine_models import assert_follows, job, kvsplice, make_model, prompts, random_projector, serve, simulate

from vllm_kvsplice.codec.layout import LatentLayout

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]
LAYOUTS = [
    LatentLayout.of(64, k=[(8, 16), (4, 48)], v=[(8, 16), (4, 48)]),
    LatentLayout.of(64, k=[(16, 64)], v=[(4, 40), (0, 24)]),
]
TOLERANCE = 0.03
PROMPTS = prompts(2, 45, seed=5)
GENERATE = dict(prompts=PROMPTS, params=dict(max_tokens=6))
SPAWN = dict(VLLM_ENABLE_V1_MULTIPROCESSING="1")


def make(folder: Path, kv_heads: int) -> tuple[Path, Path]:
    model = make_model(folder / f"model-{kv_heads}", num_key_value_heads=kv_heads, num_hidden_layers=2)
    projector = random_projector(model, LAYOUTS.__getitem__)
    projector.save(folder / f"{kv_heads}.safetensors")
    return model, folder / f"{kv_heads}.safetensors"


def test_a_spawned_engine_under_torch_compile(tmp_path: Path) -> None:
    from vllm_kvsplice.codec.projector import Projector

    model, file = make(tmp_path, 2)
    compiled = job(model, GENERATE, enforce_eager=False, **kvsplice(file))
    (served,), log = serve([compiled], tmp_path / "run", VLLM_CACHE_ROOT=str(tmp_path / "cache"), **SPAWN)
    assert served.error is None
    assert "EngineCore pid=" in log and "DYNAMO_TRACE_ONCE" in log
    projector = Projector.load(file)
    assert_follows(served, 0, lambda ids: simulate(model, projector, ids), PROMPTS, TOLERANCE)


@pytest.mark.parametrize("kv_heads", [pytest.param(2, id="sliced-heads"), pytest.param(1, id="replicated-head")])
def test_tensor_parallel_ranks_take_their_heads(tmp_path: Path, kv_heads: int) -> None:
    from vllm_kvsplice.codec.projector import Projector

    model, file = make(tmp_path, kv_heads)
    (served,), log = serve(
        [job(model, GENERATE, tensor_parallel_size=2, **kvsplice(file))],
        tmp_path / "run",
        VLLM_CPU_OMP_THREADS_BIND="0|1" if (os.cpu_count() or 1) > 1 else "0|0",
        **SPAWN,
    )
    assert served.error is None
    projector = Projector.load(file)
    assert_follows(served, 0, lambda ids: simulate(model, projector, ids), PROMPTS, TOLERANCE)
    assert log.count("bytes per token and KV head all in") == 1  # by the first rank


CLI = """
import json, pickle, sys
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
found = []
for line in json.loads(sys.argv[2]):
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    arguments = parser.parse_args(["--model", sys.argv[1], "--skip-tokenizer-init", "--max-model-len", "64", *line])
    config = AsyncEngineArgs.from_cli_args(arguments).create_engine_config()
    name = config.attention_config.backend and config.attention_config.backend.name
    again = pickle.loads(pickle.dumps(config))
    assert again.attention_config.backend is config.attention_config.backend
    found.append([name, config.additional_config.get("kvsplice")])
print("FOUND", json.dumps(found))
"""


def test_every_spelling_of_vllm_serve(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", num_hidden_layers=1)
    lines = {
        ("--attention-backend", "kvsplice"): ["KVSPLICE", None],
        ("--attention-backend", "KVSPLICE"): ["KVSPLICE", None],
        ("--attention-backend", "KvSplice", "--additional-config", '{"kvsplice": {"projector": "f"}}'): [
            "KVSPLICE",
            {"projector": "f"},
        ],
        ("--attention-backend=kvsplice", "--additional-config.kvsplice.projector", "/x/y", "--additional-config.kvsplice.prefill=latent"): [
            "KVSPLICE",
            {"projector": "/x/y", "prefill": "latent"},
        ],
        ("-ac", '{"backend": "kvsplice"}'): ["KVSPLICE", None],
        ("--attention-config.backend", "kvsplice"): ["KVSPLICE", None],
        (): [None, None],
    }  # fmt: skip
    given = json.dumps([list(line) for line in lines])
    run = subprocess.run([sys.executable, "-c", CLI, str(model), given], capture_output=True, text=True, timeout=200)
    found = [line for line in run.stdout.splitlines() if line.startswith("FOUND ")]
    assert found, run.stdout[-2000:] + run.stderr[-4000:]
    assert json.loads(found[0].removeprefix("FOUND ")) == list(lines.values())
