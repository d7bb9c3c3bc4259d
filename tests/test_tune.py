# SPDX-License-Identifier: Apache-2.0
"""Choosing tiers: the plans, the deal, the search and the texts, without a model."""

import itertools
import math
import random

import pytest

from vllm_kvsplice import cli
from vllm_kvsplice.calibration.presets import load_preset
from vllm_kvsplice.calibration.texts import Text
from vllm_kvsplice.codec.layout import LatentLayout, Tier, runs
from vllm_kvsplice.errors import KVSpliceError
from vllm_kvsplice.scoring.metrics import Scores
from vllm_kvsplice.tuning import allocate, candidates, search, texts
from vllm_kvsplice.tuning.allocate import Pair, Point
from vllm_kvsplice.tuning.candidates import Option
from vllm_kvsplice.tuning.search import Budget, Factor, Seen, Use
from vllm_kvsplice.tuning.verify import Measured


def option(size, loss, bits=8):
    return Option(((bits, 8),), size, loss)


def random_layers(count, seed):
    draw = random.Random(seed)
    sides = [[option(draw.randrange(10, 60, 2), draw.random()) for _ in range(5)] for _ in range(2 * count)]
    return list(zip(sides[::2], sides[1::2], strict=True))


# ---------------------------------------------------------------- plans
@pytest.mark.parametrize("head_dim", [24, 64, 80, 96, 128, 256])
def test_every_plan_is_a_layout_that_kernels_read_in_long_runs(head_dim):
    for side in ("k", "v"):
        plans = candidates.tier_plans(head_dim, side)
        assert len(plans) == len(set(plans)) >= 3
        for plan in plans:
            layout = LatentLayout.of(head_dim, plan, plan)
            assert candidates.side_bytes(head_dim, plan) == layout.side_bytes("v")
            assert min(length for t in layout.k if t.bits for _, length in runs(t.code_bytes)) >= candidates.MIN_RUN
            assert all(dims % candidates.step_of(head_dim) == 0 for _, dims in plan)


@pytest.mark.parametrize("head_dim", [24, 64, 80, 96, 128, 256])
def test_fast_plans_have_two_tiers_and_no_short_run(head_dim):
    for side in ("k", "v"):
        plans = candidates.tier_plans(head_dim, side, fast=True)
        assert len(plans) >= 3 and set(plans) <= set(candidates.tier_plans(head_dim, side))
        for plan in plans:
            stored = [Tier(bits, dims) for bits, dims in plan if bits]
            assert len(stored) <= 2
            assert min(length for t in stored for _, length in runs(t.code_bytes)) >= head_dim / 8
    if head_dim == 128:
        assert ((8, 32), (4, 96)) in plans and ((8, 16), (4, 64), (0, 48)) in plans
        assert not {((8, 16), (4, 112)), ((8, 16), (4, 80), (2, 32))} & set(plans)


def test_plans_hold_the_presets_and_k_keeps_every_dimension():
    k, v = (candidates.tier_plans(128, side) for side in ("k", "v"))
    for plan in (((16, 128),), ((8, 32), (4, 96)), ((8, 16), (4, 80), (2, 32))):
        assert plan in k and plan in v
    assert ((8, 96), (0, 32)) in v
    assert not any(bits == 0 for plan in k for bits, _ in plan)


def test_a_recipe_keeps_its_metrics_and_takes_the_tiers():
    layout = LatentLayout.of(128, [(8, 16), (4, 112)], [(4, 96), (0, 32)])
    recipe = candidates.recipe_of(load_preset("near_lossless"), layout)
    assert [(t.bits, t.share) for t in recipe.v.tiers] == [(4, 0.75), (0, 0.25)]
    assert recipe.k.metric == load_preset("near_lossless").k.metric and not recipe.k.untouched
    wide = LatentLayout.of(128, [(16, 128)], [(16, 128)])
    assert candidates.recipe_of(load_preset("near_lossless"), wide).k.untouched


# ---------------------------------------------------------------- the deal
@pytest.mark.parametrize("seed", range(4))
def test_the_free_front_is_the_best_of_all_combinations(seed):
    layers = random_layers(2, seed)
    front = allocate.free_front(layers)
    best = {}
    for chosen in itertools.product(*(options for pair in layers for options in pair)):
        total = sum(o.bytes for o in chosen)
        best[total] = min(best.get(total, math.inf), sum(o.loss for o in chosen))
    least = list(itertools.accumulate((best[total] for total in sorted(best)), min))
    wanted = [(t, loss) for i, (t, loss) in enumerate(zip(sorted(best), least, strict=True)) if not i or loss < least[i - 1] - 1e-12]  # fmt: skip
    assert [p.bytes for p in front] == [t for t, _ in wanted]
    assert [p.loss for p in front] == pytest.approx([loss for _, loss in wanted])
    for point in front:
        assert point.bytes == sum(pair.bytes for pair in point.layers)


def test_the_even_front_gives_every_layer_one_size_and_counts_the_padding():
    layers = random_layers(3, 0)
    front, free = allocate.even_front(layers), allocate.free_front(layers)
    for point in front:
        size = point.bytes // 3
        assert all(pair.bytes <= size for pair in point.layers)
        for pair, (k, v) in zip(point.layers, layers, strict=True):
            within = [Pair(a, b).loss for a in k for b in v if a.bytes + b.bytes <= size]
            assert pair.loss == pytest.approx(min(within))
        assert point.loss >= min(p.loss for p in free if p.bytes <= point.bytes) - 1e-12
    assert any(sum(pair.bytes for pair in p.layers) < p.bytes for p in front)


def test_the_uniform_front_has_one_plan_per_side():
    plans = [((8, 8),), ((4, 8),), ((2, 8),)]
    layers = [
        tuple([Option(p, size, loss * (i + 1)) for p, size, loss in zip(plans, (10, 8, 6), (0.1, 0.2, 0.7), strict=True)] for _ in "kv")
        for i in range(3)
    ]  # fmt: skip
    front = allocate.uniform_front(layers)
    for point in front:
        assert len({(pair.k.tiers, pair.v.tiers) for pair in point.layers}) == 1
        assert point.loss == pytest.approx(sum(pair.loss for pair in point.layers))
        assert point.bytes == sum(pair.bytes for pair in point.layers)
    assert [p.bytes for p in front] == sorted({p.bytes for p in front})


# ---------------------------------------------------------------- the search
def measured(klds, rises):
    return Measured(
        tuple(Scores(10, 100.0, 100.0 + 10 * r, 10 * k, 10 * k, 9) for k, r in zip(klds, rises, strict=True))
    )


def point(size, loss):
    return Point(size, loss, (Pair(option(size, loss), option(0, 0.0)),))


FRONT = [point(size, loss) for size, loss in ((10, 0.08), (20, 0.04), (30, 0.02), (40, 0.01), (50, 0.005))]


def test_a_measured_difference_has_the_error_of_the_paired_windows():
    m = measured([0.01, 0.03], [0.02, 0.04])
    assert m.total.kld == pytest.approx(0.02) and m.kld_se == pytest.approx(0.01)
    assert m.nll_rise == pytest.approx(0.03) and m.nll_rise_se == pytest.approx(0.01)
    assert m.ppl_pct == pytest.approx(m.total.ppl["delta_pct"])
    assert math.isnan(m.first(1).kld_se)


def test_expectations_meet_what_was_measured_and_lie_between():
    seen = [Seen(0.01, 0.02), Seen(0.04, 0.04)]
    assert search.expected_kld(0.01, seen) == pytest.approx(0.02)
    assert search.expected_kld(0.04, seen) == pytest.approx(0.04)
    assert search.expected_kld(0.02, seen) == pytest.approx(0.02 * math.sqrt(2))  # halfway in the logarithm
    assert search.expected_kld(0.001, seen) == pytest.approx(0.002)
    assert search.expected_kld(0.1, seen) == pytest.approx(0.1)
    assert search.expected_kld(0.1, []) == 0.1


def test_the_next_point_is_the_cheapest_that_is_expected_within():
    assert search.cheapest_within(FRONT, 0.03, []) == FRONT[2]
    assert search.cheapest_within(FRONT, 0.03, [Seen(0.02, 0.04)]) == FRONT[3]
    assert search.cheapest_within(FRONT, 1e-9, []) == FRONT[-1]
    assert search.largest_within(FRONT, 39) == FRONT[2]
    with pytest.raises(KVSpliceError, match="target-ratio"):
        search.largest_within(FRONT, 9)


def test_the_factor_of_perplexity_pools_points_and_distrusts_few():
    quiet = [measured([0.01] * 8, [0.013] * 8), measured([0.02] * 4, [0.026] * 4)]
    assert search.factor_of(quiet).value == pytest.approx(1.3) and search.factor_of(quiet).error < 1e-6
    noisy = search.factor_of([measured([0.01] * 4, [0.06, -0.04, 0.05, -0.02])])
    assert 1.0 < noisy.value < 1.25 < 0.0125 / 0.01 + 0.1 and 0.15 < noisy.error <= search.PRIOR_SPREAD
    assert search.factor_of([]) == Factor(1.0, search.PRIOR_SPREAD)


def test_a_budget_is_met_within_it_and_nearly_used_up():
    kld = Budget("kld", 0.01)
    for loss, within, accepted in ((0.0095, True, True), (0.008, True, False), (0.0101, False, False)):
        use = search.use_of(kld, measured([loss] * 3, [0.0] * 3), Factor(1.0, 0.0))
        assert (search.is_within(use), search.is_accepted(use)) == (within, accepted)
    # Noisy perplexity must be within too, but how much is used is told by KL divergence.
    assert search.is_accepted(Use(0.5, 0.3, 0.95)) and not search.is_accepted(Use(1.2, 0.3, 0.95))
    # Quiet perplexity decides alone.
    assert not search.is_accepted(Use(0.5, 0.02, 0.95)) and search.is_accepted(Use(0.95, 0.02, 1.2))
    assert search.kld_limit(Budget("ppl", 1.0), Factor(2.0, 0.0)) == pytest.approx(math.log(1.01) / 2)


def test_the_aim_moves_only_where_scoring_alone_does_not_correct_it():
    assert search.correction(Use(1.5, 0.1, 1.5)) == 1.0
    assert search.correction(Use(1.05, 0.1, 0.95)) == pytest.approx(search.AIM / 1.05)
    assert search.correction(Use(0.2, 0.01, 0.95)) == pytest.approx(1.08)
    uses = {FRONT[1]: Use(1.3, 0.1, 1.2), FRONT[2]: Use(0.97, 0.1, 0.95), FRONT[3]: Use(0.5, 0.1, 0.5)}
    assert search.best(uses) == FRONT[2]
    assert search.best({FRONT[0]: Use(3.0, 0.1, 3.0), FRONT[1]: Use(1.3, 0.1, 1.2)}) == FRONT[1]


def test_exactly_one_positive_budget_is_taken():
    assert search.budget_of(0.5, None, None) == Budget("ppl", 0.5)
    for given in ((None, None, None), (0.5, 0.1, None), (0.0, None, None), (None, math.nan, None), (None, None, 1.0)):
        with pytest.raises(KVSpliceError, match="--target-ratio|--budget"):
            search.budget_of(*given)


# ---------------------------------------------------------------- the texts
def test_a_given_text_is_split_at_a_paragraph_and_never_verified_on_itself(tmp_path):
    whole = Text("t", "\n\n".join(f"paragraph {i} of many." for i in range(50)))
    first, last = texts.split(whole)
    assert first.content + last.content == whole.content
    assert last.content.startswith("paragraph") and 0.1 < len(last.content) / len(whole.content) <= 0.2
    plain = Text("t", "x" * 100)
    assert [len(part.content) for part in texts.split(plain)] == [80, 20]
    path = tmp_path / "a.txt"
    path.write_text(whole.content)
    with pytest.raises(KVSpliceError, match="--verify-text"):
        texts.choose(str(path), None, str(path))
    assert texts.choose(str(path), None, None)[1].content == last.content
    seen, held_out = texts.choose(None, None, None)
    assert not set(seen.content.split("\n\n")) & set(held_out.content.split("\n\n")) - {""}


# ---------------------------------------------------------------- the command line
@pytest.mark.parametrize(
    "argv", [["m"], ["m", "--budget-ppl", "1", "--budget-kld", "1"], ["m", "--budget-ppl", "1", "--text", "a", "--dataset", "c4"]],
    ids=["no-budget", "two-budgets", "two-texts"],
)  # fmt: skip
def test_bad_command_lines_exit_with_two(argv, capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(["tune", *argv])
    assert done.value.code == 2
