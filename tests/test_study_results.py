# SPDX-License-Identifier: Apache-2.0
"""docs/studies.md: every row of its tables is what the files hold. Run as a script it prints the tables."""

import json
import math
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = {path.stem: json.loads(path.read_text()) for path in (ROOT / "docs/results").glob("study-*.json")}
REFINED = "study-refinements-ref-d128", "study-refinements-demo"
REF, DEMO, GPT2 = "study-ref-d128", "study-demo", "study-gpt2"
SIDES = [{"sides": side} for side in ("V", "K", "K+V")]
WIDTHS = [{"sides": side, "bits": bits} for side in ("V", "K") for bits in (16, 8, 4)]
EVENED = [{"equalise": e, "gain": "in the norm"} for e in ("gamma", "rotate", "sigma", "none")]
EVENED += [{"equalise": "gamma", "gain": "folded"}]
DOMAINS = [{"calibrated": c, "scored": s} for s in ("given", "code") for c in ("given", "english", "code")]
PRESETS = [{"preset": name} for name in ("near_lossless", "balanced", "orthogonal_int8")]
SERVED = [{"tiers": name} for name in ("near_lossless", "balanced", "max")]
# heading: file, study, axis of the lines, columns
TABLES = {
    "rank, head_dim 128": (REF, "rank", "rank", WIDTHS),
    "rank, head_dim 64": (DEMO, "rank", "rank", WIDTHS),
    "bits, head_dim 128": (REF, "bits", "bits", SIDES),
    "bits, head_dim 64": (DEMO, "bits", "bits", SIDES),
    "sides, head_dim 128": (REF, "sides", "tiers", SIDES),
    "sides, head_dim 64": (DEMO, "sides", "tiers", SIDES),
    "gamma, head_dim 128": (REF, "gamma", "tiers", EVENED),
    "gamma, head_dim 64": (DEMO, "gamma", "tiers", EVENED),
    "refinements, head_dim 128": (REFINED[0], "refinements", "refinement", SERVED),
    "refinements, head_dim 64": (REFINED[1], "refinements", "refinement", SERVED),
    "calibration": (DEMO, "calibration", "samples", PRESETS),
    "domain": (DEMO, "domain", "preset", DOMAINS),
    "nullspace": (GPT2, "nullspace", "scope", SIDES),
}
# heading: file, study; a line for each row
LISTS = {
    "seeds": (DEMO, "seeds"),
    "joint, 2 heads of 128": (REF, "joint"),
    "joint, 2 heads of 64": (DEMO, "joint"),
    "modes, head_dim 128": (REF, "modes"),
    "modes, head_dim 64": (DEMO, "modes"),
}


def loss(row):
    """Perplexity and KLD."""
    return f"{row['delta_ppl_pct']['mean']:+.2f} % {row['kld']['mean']:.5f}"


def pivoted(file, study, axis, columns):
    """One line for each place on the axis, one cell for each column."""
    rows = RESULTS[file]["studies"][study]["rows"]
    for place in dict.fromkeys(row["at"][axis] for row in rows):
        cells = []
        for column in columns:
            found = [r for r in rows if r["at"].items() >= (column | {axis: place}).items()]
            assert len(found) == 1 or (found == [] and place == "3 bits")  # near_lossless has no 2-bit tier
            cells.append(loss(found[0]) if found else "")
        yield f"| {place} | {' | '.join(cells)} |"


def listed(file, study):
    """One line for each row: its place, bytes of K and V, ratio of K+V, loss, spread and products where there are any."""
    for row in RESULTS[file]["studies"][study]["rows"]:
        size = row["bytes_per_token_head"]
        cells = [*map(str, row["at"].values()), f"{size['k']:.1f} + {size['v']:.1f}", f"{row['ratio']['kv']:.2f}x"]
        cells.append(loss(row))
        if row["kld"]["sd"] is not None:
            cells.append(f"{row['delta_ppl_pct']['sd']:.2f} % {row['kld']['sd']:.5f}")
        if row["products"] is not None:
            cells.append(str(row["products"]))
        yield f"| {' | '.join(cells)} |"


LINES = dict.fromkeys(TABLES, pivoted) | dict.fromkeys(LISTS, listed)


@pytest.mark.parametrize("name", LINES)
def test_tables_are_what_was_measured(name):
    text = (ROOT / "docs/studies.md").read_text().splitlines()
    lines = list(LINES[name](*(TABLES | LISTS)[name]))
    start = text.index(lines[0])
    assert text[start : start + len(lines)] == lines and text[start - 1].startswith("|---")


def test_refinements_are_summed_up_as_measured():
    text = " ".join((ROOT / "docs/studies.md").read_text().split())
    klds = []
    for file in REFINED:
        rows = RESULTS[file]["studies"]["refinements"]["rows"]
        klds.append({(r["at"]["tiers"], r["at"]["refinement"]): r["kld"]["mean"] for r in rows})

    def span(refinement):
        """Least and greatest change of the KLD against the preset as it is, in per cent, by model."""
        for found in klds:
            changes = [
                100 * (kld / found[tiers, "as it is"] - 1) for (tiers, r), kld in found.items() if r == refinement
            ]
            yield f"{min(changes):+.0f} to {max(changes):+.0f} %"

    for refinement in dict.fromkeys(r for found in klds for _, r in found if r != "as it is"):
        assert f"| {refinement} | {' | '.join(span(refinement))} |" in text


@pytest.mark.parametrize(("file", "suffix"), [(REFINED[0], ""), (REFINED[1], "-d64")])
def test_what_a_moving_mean_wins_and_costs_is_as_measured(file, suffix):
    """KLD of steps of 64 tokens, the bytes that win as much, and the time of a decode that reads the mean's logits."""
    rows = RESULTS[file]["studies"]["refinements"]["rows"]
    found = {
        (r["at"]["tiers"], r["at"]["refinement"]): (r["kld"]["mean"], r["bytes_per_token_head"]["kv"]) for r in rows
    }
    times = [
        {
            (r["preset"], r["batch"]): r["p50_us"]
            for r in json.loads((ROOT / f"docs/results/kernels-mean-logits-{way}{suffix}-h200.json").read_text())[
                "rows"
            ]
            if r["kernel"] == "kvsplice: decode"
        }
        for way in ("without", "with")
    ]
    cells = []
    for preset, other in (("near_lossless", "balanced"), ("balanced", "near_lossless"), ("max", "balanced")):
        kld, size = found[preset, "as it is"]
        other_kld, other_size = found[other, "as it is"]
        won = math.log(found[preset, "moving mean, steps of 64"][0] / kld)
        worth = math.exp(won * math.log(other_size / size) / math.log(other_kld / kld)) - 1
        slower = sorted(100 * (times[1][preset, batch] / times[0][preset, batch] - 1) for batch in (64, 16))
        cells.append(f"{100 * math.expm1(won):+.0f} % | {100 * worth:.1f} % | {slower[0]:.1f} to {slower[1]:.1f} %")
    head_dim = 64 if suffix else 128
    text = (ROOT / "docs/studies.md").read_text()
    for preset, cell in zip(("near_lossless", "balanced", "max"), cells, strict=True):
        assert f"| {preset}, head_dim {head_dim} | {cell} |" in text


def test_figures_in_sentences_are_what_was_measured():
    text = " ".join((ROOT / "docs/studies.md").read_text().split())
    spread = RESULTS[REF]["studies"]["sides"]["spread"]
    assert f"is {spread['k']:.0f} for K and {spread['v']:.0f} for V" in text
    saved = RESULTS[GPT2]["studies"]["nullspace"]["ranks_saved"]
    assert saved["head"]["saved"] == 0 and saved["joint"]["saved"] == 1
    assert f"0 of 64, and the nearest misses by {100 * saved['head']['least_residual']:.0f} % of its length" in text
    (trick,) = [r for r in RESULTS[GPT2]["studies"]["nullspace"]["rows"] if r["at"] == {"sides": "V", "scope": "head"}]
    rows = [r["at"] | {"row": r} for r in RESULTS[GPT2]["studies"]["joint"]["rows"]]
    (smallest,) = [r["row"] for r in rows if (r["scope"], r["tiers"]) == ("head", "max")]
    assert f"loses {trick['kld']['mean']:.5f}: more than `max`" in text and smallest["bytes_per_token_head"]["v"] == 26
    assert (
        f"26 bytes ({smallest['kld']['mean']:.5f}, per head" in text and trick["kld"]["mean"] > smallest["kld"]["mean"]
    )
    assert f"perplexity {RESULTS[GPT2]['texts']['given']['ppl']:.0f}; not shipped" in text


if __name__ == "__main__":
    for name, lines in LINES.items():
        print(name, *lines(*(TABLES | LISTS)[name]), sep="\n")
