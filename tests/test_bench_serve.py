# SPDX-License-Identifier: Apache-2.0
"""`kvsplice bench serve`: what it asks vLLM for, what it makes of the answers, and its pictures."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from vllm_kvsplice.bench import analysis, breakdown, commands, measure, serve
from vllm_kvsplice.bench.report import report
from vllm_kvsplice.bench.request import ServeBenchRequest, check, parse_setting
from vllm_kvsplice.errors import KVSpliceError

DUMMY = ServeBenchRequest(model_shape="qwen2.5-7b")


# ---------------------------------------------------------------- requests and command lines
@pytest.mark.parametrize(
    "name, args, preset",
    [
        ("bf16", ("--kv-cache-dtype", "auto"), None),
        ("fp8", ("--kv-cache-dtype", "fp8"), None),
        ("cache:int8_per_token_head", ("--kv-cache-dtype", "int8_per_token_head"), None),
        ("kvsplice", ("--attention-backend", "kvsplice"), None),
        ("kvsplice:near_lossless", ("--attention-backend", "kvsplice"), "near_lossless"),
    ],
)
def test_settings_choose_the_cache_and_nothing_else(name, args, preset):
    setting = parse_setting(name, "dummy")
    assert (setting.name, setting.args, setting.preset, setting.projector) == (name, args, preset, None)


def test_a_setting_takes_a_projector_file(tmp_path):
    file = tmp_path / "p.safetensors"
    file.write_bytes(b"")
    assert parse_setting(f"kvsplice:{file}", "real").projector == str(file)


@pytest.mark.parametrize(
    "name, weights, message",
    [
        ("fp16", "real", "is not known"),
        ("bf16:x", "real", "is not known"),
        ("cache:", "real", "is not known"),
        ("kvsplice:", "dummy", "is not known"),
        ("kvsplice:near_lossless", "real", "kvsplice calibrate MODEL --preset near_lossless"),
        ("kvsplice:/no/where.safetensors", "dummy", "does not exist"),
    ],
)
def test_unknown_settings_are_refused(name, weights, message):
    with pytest.raises(KVSpliceError, match=message) as refusal:
        parse_setting(name, weights)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(model_shape=None), "needs one model"),
        (dict(model="m"), "needs one model"),
        (dict(points=()), "nothing to measure"),
        (dict(points=((0, 8),)), "at least 1"),
        (dict(concurrency=(4, 0)), "at least 1"),
        (dict(concurrency=("fit",), also=("throughput",)), "fit leaves open"),
        (dict(point_output=128), "for example 129"),
        (dict(also=("startup",)), "--also startup"),
        (dict(goodput=("itl:5",)), "--goodput itl"),
        (dict(serve_args="--x 'y"), "cannot be split"),
        (dict(settings=("bf16", "fp8", "bf16")), "repeat"),
    ],
)
def test_bad_requests_are_refused_before_the_work(changes, message):
    check(DUMMY)
    with pytest.raises(KVSpliceError, match=message):
        check(dataclasses.replace(DUMMY, **changes))


def test_engines_differ_in_their_cache_alone():
    request = dataclasses.replace(DUMMY, concurrency=(100,), serve_args="--max-num-partial-prefills '2'")
    stock, ours = (parse_setting(name, "dummy") for name in ("bf16", "kvsplice:int8"))
    a = commands.server_args(request, stock, None, "tok")
    b = commands.server_args(request, ours, Path("/p.safetensors"), "tok")
    own = [*ours.args, "--additional-config", '{"kvsplice": {"projector": "/p.safetensors"}}']
    assert [x for x in a if x not in stock.args] == [x for x in b if x not in own]
    assert all(x in b for x in own)
    pairs = dict(zip(a, a[1:], strict=False))
    assert pairs["--max-num-seqs"] == "100"  # the sweep's, over the points' 64
    assert int(pairs["--max-model-len"]) >= 32768 + 129
    assert pairs["--gpu-memory-utilization"] == "0.9" and pairs["--load-format"] == "dummy"
    assert pairs["--max-num-partial-prefills"] == "2"


def test_as_many_users_as_fit():
    request = dataclasses.replace(DUMMY, points=(), concurrency=("fit", 8), sweep_input=8192, sweep_output=4096)
    check(request)
    assert "--max-num-seqs" in (args := commands.engine_args(request, parse_setting("bf16", "dummy"), None, "tok"))
    assert args[args.index("--max-num-seqs") + 1] == "1024" and request.longest == 12288
    assert measure.fitting(request, 435_965) == 35 and measure.fitting(request, 10**9) == 1024
    with pytest.raises(KVSpliceError, match="12,288 tokens does not fit a cache of 12,287"):
        measure.fitting(request, 12_287)


def test_loads_of_different_seeds_share_no_prompt(tmp_path):
    seen = []
    for seed in (1, 2):
        load = commands.Load(users=2, prompts=3, input_len=64, output_len=9, seed=seed, goodput=("tpot:50",))
        commands.write_trace(tmp_path / "t", load)
        lines = [json.loads(line) for line in (tmp_path / "t").read_text().splitlines()]
        assert [(x["input_length"], x["output_length"]) for x in lines] == [(64, 9)] * 3
        seen += [x["hash_ids"][0] for x in lines]
    assert len(set(seen)) == 6
    args = commands.bench_serve("http://x", "tok", load, tmp_path / "t", tmp_path / "out.json")
    pairs = dict(zip(args, args[1:], strict=False))
    assert pairs["--timed-trace-chunk-hash-size"] == "64"  # else a prompt is cut at its first chunk
    assert (pairs["--max-concurrency"], pairs["--num-prompts"], pairs["--goodput"]) == ("2", "3", "tpot:50")


# ---------------------------------------------------------------- what is made of vLLM's numbers
def answer(begins, step_s, num_chunks, chunk=8, slow_until=0.0, slow_s=0.0):
    """vLLM's JSON for requests sent at 0 whose first tokens come at ``begins``; a chunk takes ``step_s`` a token, and
    ``slow_s`` more if it starts before ``slow_until``."""
    itls = []
    for begin in begins:
        now, gaps = begin, []
        for _ in range(num_chunks):
            gaps.append(chunk * step_s + (slow_s if now < slow_until else 0.0))
            now += gaps[-1]
        itls.append(gaps)
    n = len(begins)
    latencies = [begin + sum(gaps) for begin, gaps in zip(begins, itls, strict=True)]
    return dict(
        num_prompts=n, completed=n, failed=0, start_times=[0.0] * n, ttfts=list(begins), itls=itls, latencies=latencies,
        output_lens=[1 + chunk * num_chunks] * n, errors=[""] * n, duration=max(latencies), output_throughput=1.0,
    )  # fmt: skip


def test_steady_time_counts_only_while_all_decode():
    raw = answer(begins=[1.0, 1.5, 3.0], step_s=0.01, num_chunks=100, slow_until=3.0, slow_s=0.5)
    assert analysis.steady_tpot_ms(raw, 8) == pytest.approx([10.0] * 3, rel=1e-9)
    assert 1e3 * (raw["latencies"][0] - 1.0) / 800 > 11  # what a whole request says


def test_a_request_whose_chunks_were_merged_is_left_out():
    raw = answer(begins=[1.0, 1.0, 1.0], step_s=0.01, num_chunks=10)
    raw["itls"][1] = [0.16, *raw["itls"][1][2:]]
    assert len(analysis.steady_tpot_ms(raw, 8)) == 2
    assert analysis.summarise(raw, 8)["steady_tpot_ms"] == pytest.approx(10.0)


def test_chunks_merged_before_all_decode_leave_the_steady_time_known():
    raw = answer(begins=[1.0, 1.0, 1.5], step_s=0.01, num_chunks=100)
    raw["itls"][0] = [0.16, *raw["itls"][0][2:]]  # ends before the third request begins
    assert analysis.steady_tpot_ms(raw, 8) == pytest.approx([10.0] * 3)


def test_without_a_moment_of_all_decoding_there_is_no_steady_time():
    raw = answer(begins=[1.0, 99.0], step_s=0.01, num_chunks=10)
    record = analysis.summarise(raw, 8)
    assert record["steady_tpot_ms"] is None and record["steady_requests"] == 0


def test_failed_requests_are_no_measurement():
    raw = answer(begins=[1.0, 1.0], step_s=0.01, num_chunks=2) | dict(completed=1, failed=1, errors=["", "a\nrefused"])
    with pytest.raises(KVSpliceError, match=r"1 of 2 requests failed \(refused\)"):
        analysis.summarise(raw, 8)


def test_a_line_is_found_again():
    line = analysis.fit([(x, 5.0 + 0.002 * x) for x in (100.0, 1000.0, 5000.0)])
    assert line == pytest.approx((5.0, 2000.0))
    assert analysis.fit([(100.0, 5.0), (100.0, 6.0)]) is None


@pytest.mark.parametrize(
    "base, ours, context",
    [
        ((5.0, 1000.0), (5.5, 500.0), 1000.0),  # 0.5 ms more, 0.5 us less a token
        ((5.0, 1000.0), (4.0, 500.0), 0.0),
        ((5.0, 1000.0), (4.0, 1000.0), 0.0),
        ((5.0, 1000.0), (5.0, 1000.0), math.inf),
        ((5.0, 1000.0), (4.0, 1100.0), math.inf),  # faster at first, slower from some context on
    ],
)
def test_break_even(base, ours, context):
    assert analysis.break_even(analysis.Line(*base), analysis.Line(*ours)) == pytest.approx(context)


def test_prefix_counts_add_up_engines():
    text = "# TYPE vllm:prefix_cache_queries counter\n"
    text += 'vllm:prefix_cache_queries_total{engine="0"} 64.0\nvllm:prefix_cache_queries_total{engine="1"} 36.0\n'
    text += 'vllm:prefix_cache_hits_total{engine="0"} 2.5e1\nvllm:external_prefix_cache_hits_total{engine="0"} 7.0\n'
    assert measure.prefix_counts(text) == (100.0, 25.0)


def test_attention_lines_are_cut_from_the_log():
    log = (
        "(E pid=1) INFO 11-25 [cuda.py:446] Using FLASH_ATTN attention backend out of x.\nINFO [a:1] Using a cat.\n" * 2
    )
    assert measure.attention_lines(log) == ["Using FLASH_ATTN attention backend out of x."]


# ---------------------------------------------------------------- results, side by side
def call(throughput=100.0, good=0.5):
    vllm = dict(output_throughput=throughput, request_goodput=good, total_output_tokens=1000, completed=10)
    return {"vllm": vllm, "steady_tpot_ms": 1.0}


def setting(name, tpot, capacity=1000, throughput=100.0):
    """A record with two points of batch 64 at ``tpot`` ms, one that was skipped, and one sweep."""
    points = [
        dict(batch=64, context=c, output=129, tpot_ms=t, ttft_ms=10.0, prefill_s=1.0, prefill_tok_s=500.0, skipped=None)
        for c, t in zip((1024, 4096), tpot, strict=True)
    ]
    skipped = dict(batch=1, context=8, output=129, skipped="no room", tpot_ms=None, ttft_ms=None, prefill_s=None, prefill_tok_s=None)  # fmt: skip
    sweep = [{"users": n, "fresh": call(throughput * n), "returning": call(3 * throughput)} for n in (1, 2)]
    return measure.new_record(parse_setting(name, "dummy")) | dict(
        points=[*points, skipped], sweep=sweep, capacity=dict(tokens=capacity), start_s=30.0
    )


def result(*settings, **changes):
    request = dataclasses.replace(DUMMY, concurrency=(1, 2))
    made = serve._new_result(request, {"name": "shape", "weights": "dummy"}) | {"settings": list(settings)}
    made["provenance"] = [
        dict(command="x", date="2026-01-01", hardware=dict(cpu="c", cores=2, gpus=["H200"]), versions={})
    ]
    return made | changes | {"summary": analysis.summarise_result(made)}


BASE, OURS = setting("bf16", (5.0, 8.0)), setting("kvsplice:int8", (5.1, 6.6), capacity=2500, throughput=150.0)


def test_everything_is_compared_with_the_first_setting():
    of = result(BASE, OURS)["summary"]["settings"]["kvsplice:int8"]
    assert of["capacity_ratio"] == 2.5 and of["throughput_ratio"] == 1.5
    assert of["tpot_ratio"] == {"64x1024": 1.02, "64x4096": pytest.approx(0.825), "1x8": None}
    assert of["goodput_ratio"] == 1.0 and of["best"]["good_tok_s"] == 50.0  # 0.5 requests/s of 100 tokens
    line = of["lines"]["64"]
    # 3 ms and 1.5 ms per 3,072 tokens; 0.1 ms behind at 1,024, of which the middle of decoding is at 1,088.
    assert line["slope_us_per_1k"] == pytest.approx(1.5e6 / 3072)
    assert line["break_even_tokens"] == pytest.approx(1088 + 0.1 / (1.5 / 3072))


def test_merged_runs_equal_one_run():
    together, merged = result(BASE, OURS), analysis.merge([result(BASE), result(OURS)])
    assert merged["summary"] == together["summary"] and len(merged["provenance"]) == 2


@pytest.mark.parametrize(
    "other, message",
    [
        (result(OURS, model={"name": "another"}), "different model"),
        (result(OURS, conditions={}), "different conditions"),
        (result(BASE), "bf16 is in two"),
        (result(OURS, provenance=[dict(hardware={"gpus": ["H100"]}, versions={})]), "different hardware"),
    ],
)
def test_runs_that_cannot_be_compared_are_not_merged(other, message):
    with pytest.raises(KVSpliceError, match=message):
        analysis.merge([result(BASE), other])


def test_the_report_shows_numbers_ratios_and_failures():
    broken = measure.new_record(parse_setting("fp8", "dummy")) | {"error": "no such cache"}
    text = report(result(BASE, OURS, broken))
    for shown in ("6.60", "0.825x", "2.500x", "1,293", "fp8 FAILED: no such cache", "H200", "300", "ttft:10000"):
        assert shown in text, shown


def test_without_its_baseline_the_report_has_no_ratio():
    broken = measure.new_record(parse_setting("bf16", "dummy")) | {"error": "out of memory"}
    text = report(result(broken, OURS))
    assert "6.60" in text and "x\n" not in text and "out of memory" in text


# ---------------------------------------------------------------- pictures
KERNEL_ROW = dict(what="decode", heads="28/4", head_dim=128, batch=64, context=4096, preset="int8", block_size=16)
KERNELS = [
    KERNEL_ROW | dict(kernel="kvsplice", p50_us=90.0),
    KERNEL_ROW | dict(kernel="kvsplice: decode", p50_us=80.0),
    KERNEL_ROW | dict(kernel="kvsplice", p50_us=70.0, block_size=64),
    KERNEL_ROW | dict(kernel="kvsplice: decode", p50_us=60.0, block_size=64),
    KERNEL_ROW | dict(kernel="kvsplice: reduce", p50_us=6.0, block_size=64),
    KERNEL_ROW | dict(kernel="FA3", preset="bf16", p50_us=65.0),
    KERNEL_ROW | dict(kernel="kvsplice", p50_us=5.0, what="write"),
]


def test_kernel_times_are_the_fastest_row_with_its_own_stages(tmp_path):
    (tmp_path / "k.json").write_text(json.dumps({"rows": KERNELS}))
    found = breakdown.read(str(tmp_path / "k.json"))
    bars = [(bar.label, bar.us, bar.stages) for bar in found["64x4096, 28/4 heads x 128"]]
    assert bars == [("FA3 bf16", 65.0, []), ("kvsplice int8", 70.0, [("decode", 60.0), ("reduce", 6.0)])]


@pytest.mark.parametrize("content", ["{", "[]", '{"rows": []}', '{"rows": [{"what": "decode"}]}'])
def test_other_files_are_no_kernel_times(tmp_path, content):
    (tmp_path / "k.json").write_text(content)
    with pytest.raises(KVSpliceError, match="--kernels-json"):
        breakdown.read(str(tmp_path / "k.json"))


def test_from_files_to_table_json_and_pictures(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for name, of in (("a", BASE), ("b", OURS)):
        (tmp_path / name).write_text(json.dumps(result(of)))
    (tmp_path / "k.json").write_text(json.dumps({"rows": KERNELS}))
    request = ServeBenchRequest(
        results=(str(tmp_path / "a"), str(tmp_path / "b")),
        json=str(tmp_path / "both.json"),
        plot=str(tmp_path / "plots"),
        kernels_json=str(tmp_path / "k.json"),
    )
    assert serve.run(request, Console(file=io.StringIO())) == 0
    assert "0.825x" in capsys.readouterr().out
    assert json.loads((tmp_path / "both.json").read_text())["summary"]["baseline"] == "bf16"
    written = {p.name: p.read_bytes() for p in (tmp_path / "plots").iterdir()}
    assert set(written) == {
        "tpot_batch64.png",
        "throughput_users.png",
        "capacity_throughput.png",
        "kernels_64x4096_28_4_heads_x_128.png",
    }  # fmt: skip; batch 1 has no numbers, so no picture
    assert all(data.startswith(b"\x89PNG") and len(data) > 5000 for data in written.values())


def test_a_file_that_is_no_result_is_refused(tmp_path):
    (tmp_path / "x").write_text("{}")
    with pytest.raises(KVSpliceError, match="is not a result of this command"):
        serve.run(ServeBenchRequest(results=(str(tmp_path / "x"),)))


def test_plots_say_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(KVSpliceError, match="pip install"):
        serve.run(dataclasses.replace(DUMMY, plot="x"))
