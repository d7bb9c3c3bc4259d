# SPDX-License-Identifier: Apache-2.0
"""The command line: exit statuses, what is passed on, help, and no heavy import before a subcommand runs."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hf_models import save

from vllm_kvsplice import cli
from vllm_kvsplice.bench import kernels, serve
from vllm_kvsplice.bench import request as bench_serve
from vllm_kvsplice.calibration import calibrate
from vllm_kvsplice.demo import run as demo
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.scoring import evaluate, plan

COMMANDS = (
    "calibrate",
    "eval",
    "compare",
    "study",
    "inspect",
    "plan",
    "bench",
    "bench kernels",
    "bench serve",
    "demo",
    "version",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("tiny") / "tiny-qwen", num_hidden_layers=2, hidden_size=96)  # head_dim 24


def call(capsys, *argv):
    status = cli.main(argv)
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as done:
        cli.main([*command.split(), "--help"])
    assert done.value.code == 0 and f"kvsplice {command}" in capsys.readouterr().out


def test_help_loads_nothing_heavy():
    script = (
        "import sys\nfrom vllm_kvsplice import cli\n"
        "try: cli.main(['eval', '--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'transformers', 'vllm', 'triton', 'numpy', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "argv",
    [[], ["nonsense"], ["eval"], ["calibrate", "m"], ["plan", "m"], ["eval", "m", "--engine", "gguf"], ["eval", "m", "--vllm-args", "[1]"],
     ["calibrate", "m", "--out", "f", "--text", "a", "--dataset", "c4"], ["bench"], ["bench", "kernels", "--heads", "28"],
     ["bench", "serve", "m", "--point", "64x4096,8"], ["bench", "serve", "m", "--concurrency", "1,two"]],
    ids=["nothing", "unknown", "no-model", "no-out", "no-memory", "engine", "vllm-args", "two-texts", "bench", "heads", "point", "users"],
)  # fmt: skip
def test_bad_command_lines_exit_with_two(argv, capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(argv)
    assert done.value.code == 2


@pytest.mark.parametrize("command", ["eval", "plan", "calibrate", "inspect"])
def test_a_refusal_is_one_line_and_status_two(command, capsys, tmp_path):
    missing = str(tmp_path / "missing")
    more = {"plan": ["--gpu-memory", "1", "--context", "1"], "calibrate": ["--out", str(tmp_path / "p")]}
    status, out, err = call(capsys, command, missing, *more.get(command, []))
    assert status == 2 and out == ""
    assert err.startswith("kvsplice: ") and err.count("\n") == 1 and missing in err and "Traceback" not in err


def test_options_that_were_not_given_are_left_to_the_request(monkeypatch, capsys):
    seen = []
    for module, request in (
        (calibrate, "CalibrateRequest"),
        (evaluate, "EvalRequest"),
        (demo, "DemoRequest"),
        (plan, "PlanRequest"),
    ):
        monkeypatch.setattr(module, request, lambda **given: seen.append(given) or (_ for _ in ()).throw(KVSpliceError("seen.")))  # fmt: skip
    call(capsys, "calibrate", "m", "--out", "f")
    call(capsys, "eval", "m")
    call(capsys, "demo")
    call(capsys, "plan", "m", "--gpu-memory", "80", "--context", "9")
    assert seen == [dict(model="m", out="f"), dict(model="m"), {}, dict(model="m", gpu_memory=80.0, context=9)]


def test_every_option_is_a_field_of_its_request():
    requests = dict(
        calibrate=calibrate.CalibrateRequest, eval=evaluate.EvalRequest, plan=plan.PlanRequest, demo=demo.DemoRequest
    )
    requests |= {"bench kernels": kernels.KernelsRequest, "bench serve": bench_serve.ServeBenchRequest}
    for name, request in requests.items():
        command = cli.parser()
        for word in name.split():
            command = next(a for a in command._actions if a.choices).choices[word]
        options = {a.dest for a in command._actions} - {"help"}
        fields = {f.name for f in dataclasses.fields(request)}
        assert options - {"json"} == fields - {"json"}, name


def test_bench_options_become_frozen_requests(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(kernels, "run", lambda request: seen.append(request) or 0)
    monkeypatch.setattr(serve, "run", lambda request: seen.append(request) or 1)
    assert call(capsys, "bench", "kernels")[0] == 0 and call(capsys, "bench", "serve", "m")[0] == 1
    assert seen == [kernels.KernelsRequest(), bench_serve.ServeBenchRequest(model="m")]
    for line in (
        "kernels --layout int8 --layout a.toml --heads 28/4 --heads 64/8 --shape 64x4096 --what decode,write --query-len 1 --query-len 5 --no-peers",
        "kernels --chunk 1x8x0 --write-tokens 1,64 --block-size 16 --splits sweep --head-dim 64 --json f",
        "serve --model-shape s --setting bf16 --setting kvsplice:x --point 1x8,2x16 --point 4x8 --concurrency 1,2 --concurrency fit",
        "serve --from a --from b --plot d --goodput tpot:9 --also latency --no-points --sweep-returning",
    ):
        call(capsys, "bench", *line.split())
    assert seen[2:] == [
        kernels.KernelsRequest(
            presets=("int8", "a.toml"),
            heads=((28, 4), (64, 8)),
            shapes=((64, 4096),),
            query_lens=(1, 5),
            what=("decode", "write"),
            peers=False,
        ),
        kernels.KernelsRequest(
            chunks=((1, 8, 0),), write_tokens=(1, 64), block_sizes=(16,), splits="sweep", head_dim=64, json="f"
        ),
        bench_serve.ServeBenchRequest(
            model_shape="s",
            settings=("bf16", "kvsplice:x"),
            points=((1, 8), (2, 16), (4, 8)),
            concurrency=(1, 2, "fit"),
        ),
        bench_serve.ServeBenchRequest(
            results=("a", "b"), plot="d", goodput=("tpot:9",), also=("latency",), points=(), sweep_returning=True
        ),
    ]


def test_calibrate_inspect_eval_and_plan_in_a_row(folder, tmp_path, capsys):
    file, report = str(tmp_path / "p.safetensors"), str(tmp_path / "r.json")
    status, out, _ = call(
        capsys, "calibrate", folder, "--out", file, "--samples", "2", "--seq-len", "64", "--preset", "near_lossless"
    )
    assert status == 0 and "near_lossless" in out
    status, out, _ = call(capsys, "inspect", file, "--json")
    facts = json.loads(out)
    assert status == 0 and {"bytes_per_token_head", "ratio", "layers", "fingerprint"} <= set(facts)
    status, out, _ = call(capsys, "inspect", file)
    assert status == 0 and facts["fingerprint"]["digest"] in out
    status, out, _ = call(
        capsys, "eval", folder, "--projector", file, "--seq-len", "64", "--windows", "2", "--json", report
    )
    result = json.loads(Path(report).read_text())
    assert status == 0 and f"{result['kld']:.6f}" in out
    assert result["bytes_per_token_head"] == facts["bytes_per_token_head"] and result["ratio"] == facts["ratio"]
    status, out, _ = call(
        capsys, "plan", folder, "--projector", file, "--gpu-memory", "2", "--context", "128", "--json"
    )
    sizes = {name: cache["bytes_per_token"] for name, cache in json.loads(out)["caches"].items()}
    assert status == 0 and sizes["kvsplice"] == 2 * 2 * facts["bytes_per_token_head"]


def test_an_unwritable_report_is_refused_before_the_work(folder, tmp_path, capsys):
    status, _, err = call(capsys, "eval", folder, "--json", str(tmp_path / "no" / "r.json"))
    assert status == 2 and "--json" in err


def test_a_failed_check_is_status_one(monkeypatch, capsys):
    monkeypatch.setattr(demo, "run", lambda request: 1)
    assert call(capsys, "demo")[0] == 1


def test_version_names_what_runs(capsys):
    status, out, _ = call(capsys, "version")
    assert status == 0 and out.startswith("kvsplice ") and "torch " in out
