# SPDX-License-Identifier: Apache-2.0
"""Figures of whole engines: what the README and docs/performance.md quote is what the files hold."""

import pytest
from result_files import PERFORMANCE, README, RESULTS

BALANCED = "serve-balanced-h200"


@pytest.mark.parametrize(
    ("file", "point"),
    [
        *((f"serve-{name}h200", i) for name in ("", "v_only-") for i in range(3)),
        *((f"serve-{name}-h200", i) for name in ("int8", "balanced", "fp8-cut") for i in range(2)),
        ("serve-fp8-int8-h200", 0),
    ],
)
def test_times_per_token_are_quoted_as_measured(file, point):
    points = [setting["points"][point] for setting in RESULTS[file]["settings"]]
    base, *others = (p["tpot_ms"] for p in points)
    cells = [f"{base:.2f}", *(f"{tpot:.2f} ({tpot / base:.2f}x)" for tpot in others)]
    name = f"{points[0]['batch']} x {points[0]['context']} (`{file}`)"
    assert f"| {name} | {' | '.join(cells)} |" in README


def test_shares_of_the_time_per_token_are_quoted_as_measured():
    for file, setting, quoted in (
        ("serve-h200", "kvsplice:near_lossless", "| `near_lossless` | .73 / .62 / .99 |"),
        ("serve-h200", "kvsplice:max", "| `max` | .74 / .63 / 1.00 |"),
        ("serve-int8-h200", "kvsplice:int8", "| `int8` | .805 / .738 |"),
        ("serve-int8-h200", "kvsplice:v_only", "| `v_only` | .872 / .813 |"),
        ("serve-v_only-h200", "kvsplice:v_only", "| `v_only`, default launch | .883 / .820 / .99 |"),
        (BALANCED, "kvsplice:balanced", "| `balanced` | .798 / .669 |"),
        ("serve-v_only-h200", "fp8", "| fp8 | .91 / .85 / 1.03 |"),
        (BALANCED, "kvsplice:v_cut_132.toml", "| `v_cut_132`, 3.87x the tokens | .708 / .576 |"),
        ("serve-fp8-int8-h200", "fp8", "| fp8, beside the next two | .903 |"),
        ("serve-fp8-int8-h200", "kvsplice:int8", "| `int8` | .796 |"),
        ("serve-fp8-int8-h200", "kvsplice:v_only", "| `v_only` | .853 |"),
        ("serve-fp8-cut-h200", "fp8", "| fp8, beside the next | .923 / .859 |"),
        ("serve-fp8-cut-h200", "kvsplice:v_cut_132.toml", "| `v_cut_132`, again | .703 / .575 |"),
    ):
        shares = RESULTS[file]["summary"]["settings"][setting]["tpot_ratio"].values()
        shown = quoted.split("|")[2].strip().split(" / ")
        assert quoted in PERFORMANCE
        assert shown == [f"{x:.{len(s.split('.')[1])}f}".lstrip("0") for x, s in zip(shares, shown, strict=True)]


def test_fresh_throughput_is_quoted_as_measured():
    (bf16, fp8, ours) = [s["sweep"][0] for s in RESULTS["fresh-h200"]["settings"]]
    users, rates = ([value(p) for p in (bf16, fp8, ours)] for value in (lambda p: p["users"], fresh_rate))
    assert "| users that fit | {} | {} | {} |".format(*users) in README
    gains = [rate / rates[0] for rate in rates]
    cells = f"{rates[0]:.0f} | {rates[1]:.0f} ({gains[1]:.2f}x) | {rates[2]:.0f} ({gains[2]:.2f}x)"
    assert f"| output tokens per second | {cells} |" in README
    steady = " | ".join(f"{p['fresh']['steady_tpot_ms']:.1f}" for p in (bf16, fp8, ours))
    assert f"| ms per token while all decode | {steady} |" in README
    text = f"bf16 {rates[0]:.0f} tokens per second with {users[0]} users, fp8 {rates[1]:.0f} with {users[1]}"
    assert f"{text}, `near_lossless` {rates[2]:.0f} with {users[2]}, {gains[2]:.2f} times bf16's" in PERFORMANCE


def fresh_rate(point):
    """Output tokens per second of new prompts."""
    return point["fresh"]["vllm"]["output_throughput"]


@pytest.mark.parametrize("preset", ["near_lossless", "balanced"])
def test_steps_in_the_engine_are_quoted_as_measured(preset):
    step = RESULTS[f"step-{preset}-h200"]
    cells = [step["us_per_layer"][f"{kernel}_kernel"] for kernel in ("write_and_project", "decode", "reduce_expand")]
    cells += [step["attention_us"], step["layer_us"]]
    assert f"| `{preset}` | {' | '.join(f'{us:.1f}' for us in cells)} |" in PERFORMANCE
    assert round(step["layer_us"] - step["attention_us"]) in (151, 153) and "layer is 151 to 153 us" in PERFORMANCE


def test_clocks_are_quoted_as_measured():
    files = ("serve-fp8-int8-h200", "serve-fp8-cut-h200")
    points = [point for file in files for setting in RESULTS[file]["settings"] for point in setting["points"]]
    decode = [call["gpu"]["sm_mhz"] for point in points for call in point["decode"]]
    prefill = [point["prefill"]["gpu"]["sm_mhz"] for point in points]
    assert f"{min(decode):.0f} to {max(decode):.0f} MHz with every setting" in PERFORMANCE
    assert f"falls to {min(prefill):.0f} to {max(prefill):.0f} MHz" in PERFORMANCE


def test_greedy_answers_are_quoted_as_measured():
    found = RESULTS["greedy-ref-d128-h200"]
    ways = found["ways"]
    assert found["failures"] == [] and ways["graphs"]["equal"] == 12 and "all 12 answers are equal" in PERFORMANCE
    equal = {
        way: [ways[f"{way}{again}"]["equal"] for again in ("", ", again")] for way in ways if f"{way}, again" in ways
    }
    assert equal["everything, graphs"] == equal["stock, everything, graphs"] == [12, 12]
    assert (
        "with everything on 12 and 12 of 12, as with vLLM's own bf16 backend in the same run (12 and 12)" in PERFORMANCE
    )
    parted = [ways[f"everything, eager{again}"] for again in ("", ", again")]
    gap = max(gap for one in parted for gap in one["gap_where_they_part_nats"])
    assert "{} and {} are equal there".format(*equal["everything, eager"]) in PERFORMANCE
    assert f"within {gap:.2f} nats. All ways" in PERFORMANCE
    behind = [way["behind_best_nats"]["mean"] for way in ways.values()]
    assert f"lie {min(behind):.5f} to {max(behind):.5f} nats behind" in PERFORMANCE


def test_the_time_to_the_first_token_is_quoted_as_measured():
    names = ("kvsplice:near_lossless", "bf16")
    sweeps = {s["name"]: s["sweep"][0] for s in RESULTS["serve-ttft-h200"]["settings"]}
    (ours, bf16), (ours_new, bf16_new) = (
        [sweeps[name][kind]["vllm"]["median_ttft_ms"] for name in names] for kind in ("returning", "fresh")
    )
    cached = f"comes after {ours:.0f} ms, with bf16 after {bf16:.0f} ("
    assert (
        f"of a cached prompt of 16384 tokens {cached}medians of four, whose ranges overlap; `serve-ttft-h200`)"
        in README
    )
    spans = [[1e3 * s for s in sweeps[name]["returning"]["requests"]["ttft_s"]] for name in names]
    assert max(map(min, spans)) < min(map(max, spans)) and [len(ms) for ms in spans] == [4, 4]
    span = " and ".join(f"{min(ms):.0f} to {max(ms):.0f}" for ms in spans)
    assert f"{cached}medians of four, {span}; 64 new tokens" in PERFORMANCE
    assert f"new one after {ours_new:.0f} and {bf16_new:.0f} (`serve-ttft-h200`" in PERFORMANCE
    new = [round((1 - sweeps[name]["returning"]["prefix_hit_share"]) * 16384) for name in names]
    assert new == [64, 16]


def test_throughput_is_quoted_as_measured():
    settings = {s["name"]: s["sweep"] for s in RESULTS["saturation-h200"]["settings"]}
    for users, kind, shown in (
        (48, "fresh", "new"),
        (152, "fresh", "new"),
        *((n, "returning", "sent again") for n in (48, 96, 152)),
    ):
        found = [
            [p[kind]["vllm"]["output_throughput"] for p in sweep if p["users"] == users] for sweep in settings.values()
        ]
        cells = " | ".join(f"{one[0]:.0f}" if one else "" for one in found)
        assert f"| {users}, {shown} | {cells} |".replace("|  |", "| |") in README
    ours = RESULTS["saturation-h200"]["summary"]["settings"]["kvsplice:near_lossless"]
    assert f"{ours['throughput_ratio']:.1f}x bf16. Prompts sent again: {ours['returning_ratio']:.1f}x" in README


def test_steps_of_many_users_are_quoted_as_measured():
    steady = {
        (s["name"], p["users"]): p["returning"]["steady_tpot_ms"]
        for s in RESULTS["saturation-h200"]["settings"]
        for p in s["sweep"]
    }
    bf16, fp8, ours, balanced = (
        steady[name, 48] for name in ("bf16", "fp8", "kvsplice:near_lossless", "kvsplice:balanced")
    )
    cells = " | ".join(f"{ms:.2f} ({ms / bf16:.2f}x)" for ms in (fp8, ours, balanced))
    assert f"| 48 | {bf16:.2f} | {cells} |" in PERFORMANCE
    assert (
        f"{bf16:.1f} ms with bf16, {fp8:.1f} with fp8, {ours:.1f} with `near_lossless` ({ours / bf16:.2f}x)" in README
    )
    for users in (96, 152):
        cells = " | ".join(
            f"{ms:.2f}" if ms else "-"
            for ms in (steady[n, users] for n in ("fp8", "kvsplice:near_lossless", "kvsplice:balanced"))
        )
        assert f"| {users} | - | {cells} |" in PERFORMANCE


def test_peaks_of_memory_are_quoted_as_measured():
    memory = {s["name"]: s["memory"] for s in RESULTS[BALANCED]["settings"]}
    bf16, ours = (memory[n]["peak_bytes"] / memory[n]["total_bytes"] for n in ("bf16", "kvsplice:balanced"))
    assert f"{ours:.1%} with `balanced` and\n{bf16:.1%} with bf16".replace("%", " %") in README
