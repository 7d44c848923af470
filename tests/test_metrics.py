"""Metrics: exact by definition, the same however the rows come, close in bounded memory, harmless without an answer."""

import json
import math
import pickle
import tracemalloc

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_auroc

from m3oe_fast import metrics
from m3oe_fast.metrics import (
    METRICS,
    NO_MIXED_USER,
    NO_ROWS,
    NO_USER,
    NOT_FINITE,
    ONLY_NEGATIVES,
    ONLY_POSITIVES,
    Meter,
    ranking,
    users,
)
from m3oe_fast.metrics.exact_sum import ExactSum
from m3oe_fast.metrics.seesaw import seesaw

GREATEST = np.finfo(np.float32).max
LEAST = np.float32(1e-45)  # subnormal


def auc_by_pairs(score, positive):
    """The definition: every (positive, negative) pair, a tie counts half; None with one class."""
    above, below = score[positive][:, None], score[~positive][None]
    return ((above > below).mean() + (above == below).mean() / 2).item() if above.size and below.size else None


def gauc_by_users(score, positive, user):
    """The definition: a loop over the users with both classes; None if there is none."""
    found = []
    for number in sorted(set(user.tolist()) - {-1}):
        own = user == number
        area = auc_by_pairs(score[own], positive[own])
        if area is not None:
            found.append((own.sum(), area))
    return sum(n * area for n, area in found) / sum(n for n, _ in found) if found else None


def logloss_by_rows(logit, label):
    """In float64, row by row."""
    loss = [max(x, 0.0) - x * y + math.log1p(math.exp(-abs(x))) for x, y in zip(logit, label, strict=True)]
    return math.fsum(loss) / len(loss)


def calibration_by_rows(logit, positive):
    probability = 1 / (1 + np.exp(-logit.astype(np.float64)))
    return probability.mean() / positive.mean() if positive.any() else None


def make_rows(rows, domains=3, tasks=2, people=20, distinct=None, missing=0.1, seed=0):
    """Logits with labels drawn from them, some missing; with ``distinct`` the logits are so many and tie a lot."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((rows, tasks)).astype(np.float32)
    if distinct is not None:
        logits = rng.integers(0, distinct, (rows, tasks)).astype(np.float32) / distinct - 0.5
    label = (rng.random((rows, tasks)) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    label[rng.random((rows, tasks)) < missing] = np.nan
    return logits, rng.integers(0, domains, rows), label, rng.integers(-1, people, rows)


def metered(parts, domains=3, tasks=2, **options):
    meter = Meter([f"d{d}" for d in range(domains)], [f"t{t}" for t in range(tasks)], **options)
    for part in parts:
        meter.update(*part)
    return meter


def taken(rows, which):
    return tuple(column[which] for column in rows)


def chunks(rows, ends):
    return zip(*(np.split(column, ends) for column in rows), strict=True)


# AUC


@pytest.mark.parametrize("distinct", [2, 5, 10_000])
def test_auc_is_the_share_of_ordered_pairs_with_ties_counted_half(distinct):
    rng = np.random.default_rng(distinct)
    score = rng.integers(-distinct, distinct, 300).astype(np.float32)
    positive = rng.random(300) < 0.3
    assert metrics.auc(score, positive).value == pytest.approx(auc_by_pairs(score, positive), rel=1e-14)


def test_auc_agrees_with_torchmetrics():
    rng = np.random.default_rng(0)
    score = rng.random(2_000).astype(np.float32)
    positive = rng.random(2_000) < score
    expected = binary_auroc(torch.from_numpy(score), torch.from_numpy(positive).long()).item()
    assert metrics.auc(score, positive).value == pytest.approx(expected, abs=1e-6)


def test_auc_does_not_merge_confident_logits():
    """As float32 probabilities both would be 1."""
    measure = metrics.auc(np.array([40.0, 41.0], np.float32), np.array([False, True]))
    assert measure.value == 1.0


def test_signed_zeros_are_a_tie():
    assert metrics.auc(np.array([0.0, -0.0], np.float32), np.array([True, False])).value == 0.5


def test_every_finite_float32_has_its_place():
    score = np.array(
        [-GREATEST, -1.0, -LEAST, 0.0, LEAST, 2 * LEAST, 1.0, np.nextafter(1, 2, dtype=np.float32), GREATEST]
    )
    key = ranking.keys_of(score.astype(np.float32))
    assert (np.diff(key.astype(np.int64)) > 0).all()
    for place in range(1, len(score)):
        pair = score[place - 1 : place + 1].astype(np.float32)
        assert metrics.auc(pair, np.array([False, True])).value == 1.0
        assert metrics.auc(pair, np.array([True, False])).value == 0.0


@pytest.mark.parametrize(
    ("score", "positive", "reason"),
    [
        ([], [], NO_ROWS),
        ([0.1, 0.2], [True, True], ONLY_POSITIVES),
        ([0.1, 0.2], [False, False], ONLY_NEGATIVES),
        ([0.1, math.nan], [False, True], NOT_FINITE),
        ([0.1, math.inf], [False, True], NOT_FINITE),
    ],
)
def test_undefined_auc_says_why(score, positive, reason):
    measure = metrics.auc(np.array(score, np.float32), np.array(positive, bool))
    assert measure == metrics.Measure(None, reason)


def test_more_pairs_than_int64_holds_are_counted_in_float64():
    """4e9 negatives below, 4e9 positives above and as many tied with negatives."""
    many = 1 << 32
    runs = ranking.Runs(np.array([1, 2, 3], np.uint64), np.array([many, many, 0]), np.array([0, many, many]))
    found = ranking.areas(runs)
    assert found.twice_ordered.dtype == np.float64
    assert ranking.measure_of(found, 0).value == pytest.approx(1 - 0.5 / 4, rel=1e-12)


# Sums


def test_a_sum_is_correctly_rounded_over_all_magnitudes():
    rng = np.random.default_rng(0)
    values = rng.random(20_000) * 2.0 ** rng.integers(-60, 129, 20_000)
    group = rng.integers(0, 3, 20_000)
    sums = ExactSum(3)
    sums.add(values, group)
    for number in range(3):
        total, unit = sums.totals([number])
        assert total / unit == math.fsum(values[group == number])
    total, unit = sums.totals([0, 2])
    assert total / unit == math.fsum(values[group != 1])


def test_what_is_too_small_for_a_sum_is_left_out():
    sums = ExactSum(1)
    sums.add(np.array([1e-40, 5e-324, 0.0, 1.0]), np.zeros(4, np.int64))
    assert sums.totals([0])[0] == sums.totals([0])[1]


# All metrics by their definitions


@pytest.mark.parametrize(
    ("rows", "domains", "tasks", "people", "distinct"),
    [(600, 3, 2, 20, None), (600, 3, 2, 20, 7), (300, 1, 1, 5, 3), (500, 2, 3, 400, None), (2_000, 200, 2, 3, 50)],
)
def test_every_metric_is_what_its_definition_says(rows, domains, tasks, people, distinct):
    given = make_rows(rows, domains, tasks, people, distinct)
    scores = metered([given], domains, tasks).compute()
    logits, domain, label, user = given
    assert len(scores.pairs) == domains * tasks and len(scores.overall) == tasks
    for number, found in enumerate([*scores.pairs, *scores.overall]):
        d, t = divmod(number, tasks)
        own = ~np.isnan(label[:, t]) & ((domain == d) if d < domains else True)
        score, positive = logits[own, t], label[own, t] > 0.5
        assert (found.rows, found.positives) == (own.sum(), positive.sum())
        expected = {
            "auc": auc_by_pairs(score, positive),
            "logloss": logloss_by_rows(score.tolist(), label[own, t].tolist()),
            "calibration": calibration_by_rows(score, positive),
            "gauc": gauc_by_users(score, positive, user[own]),
        }
        measured = {metric: getattr(found, metric).value for metric in METRICS}
        assert {metric for metric in METRICS if measured[metric] is None} == {m for m in METRICS if expected[m] is None}
        for metric, value in expected.items():
            if value is not None:
                assert measured[metric] == pytest.approx(value, rel=1e-12), (found.name, metric)


def test_logloss_is_exact_for_extreme_logits():
    logits = np.array([[0.0], [2.0], [-200.0], [200.0], [GREATEST], [-GREATEST]], np.float32)
    label = np.array([[1.0], [0.0], [1.0], [1.0], [1.0], [0.0]], np.float32)
    expected = (math.log(2) + math.log1p(math.exp(2)) + 200.0) / 6
    scores = metrics.evaluate(logits, np.zeros(6, int), label, ("a",), ("x",))
    assert scores.pairs[0].logloss.value == pytest.approx(expected, rel=1e-15)
    wrong = metrics.evaluate(logits, np.zeros(6, int), 1 - label, ("a",), ("x",))
    assert wrong.pairs[0].logloss.value == pytest.approx(2 * float(GREATEST) / 6, rel=1e-6)
    assert wrong.pairs[0].calibration.value == pytest.approx((0.5 + 1 / (1 + math.exp(-2)) + 2) / 2)


def test_a_label_between_the_classes_is_weighed_in_logloss_and_counts_as_the_nearer_class():
    logits, label = np.array([[1.0], [-1.0]], np.float32), np.array([[0.75], [0.5]], np.float32)
    (pair,) = metrics.evaluate(logits, np.zeros(2, int), label, ("a",), ("x",)).pairs
    assert (pair.positives, pair.auc.value) == (1, 1.0)
    assert pair.logloss.value == pytest.approx(logloss_by_rows([1.0, -1.0], [0.75, 0.5]))


def test_a_model_that_promises_twice_too_much_has_calibration_2():
    probability = np.full((10, 1), 0.4)
    logits = np.log(probability / (1 - probability)).astype(np.float32)
    label = (np.arange(10) < 2).astype(np.float32)[:, None]
    scores = metrics.evaluate(logits, np.zeros(10, int), label, ("a",), ("x",))
    assert scores.pairs[0].calibration.value == pytest.approx(2.0)


def test_users_with_one_class_and_unknown_users_leave_gauc_alone():
    logits = np.array([[1], [0], [5], [-5], [9], [-9]], np.float32)
    label = np.array([[1], [0], [1], [1], [0], [1]], np.float32)
    user = np.array([7, 7, 8, 8, -1, -1])
    (pair,) = metrics.evaluate(logits, np.zeros(6, int), label, ("a",), ("x",), user).pairs
    assert pair.gauc.value == 1.0
    assert pair.auc.value < 1.0


def test_users_may_be_any_whole_numbers():
    logits, domain, label, user = make_rows(400)
    far = np.array([-1, -(2**63), 2**63 - 1, *range(2**40, 2**40 + 18)])
    one, other = (metered([(logits, domain, label, codes)]).compute() for codes in (user, far[user + 1]))
    assert [pair.gauc.value for pair in one.pairs] == pytest.approx([pair.gauc.value for pair in other.pairs])


def test_more_domains_times_users_than_fit_a_packed_row(monkeypatch):
    rows = make_rows(500)
    expected = metered([rows]).compute()
    monkeypatch.setattr(users, "MOST_GROUPS", 10)
    assert metered([rows]).compute() == expected


def test_users_may_be_ranked_some_at_a_time(monkeypatch):
    rows = make_rows(2_000, people=100)
    expected = metered([rows]).compute()
    monkeypatch.setattr(users, "_AT_ONCE", 150)
    some = metered([rows]).compute()
    assert [p.gauc.value for p in some.pairs] == pytest.approx([p.gauc.value for p in expected.pairs], rel=1e-12)
    assert [p.gauc.value for p in some.overall] == pytest.approx([p.gauc.value for p in expected.overall], rel=1e-12)
    assert metered([taken(rows, slice(None, None, -1))]).compute() == some


# Pairs without an answer


def scores_of_three_domains(user=None):
    """Domain a: both classes; b: labels of one class, or missing; c: no rows."""
    domain = np.array([0, 1, 0, 0, 1, 0], np.uint8)
    label = np.array([[1, 0], [1, np.nan], [0, 1], [1, np.nan], [1, np.nan], [0, 0]], np.float32)
    logits = np.array([[2, -1], [1, 0], [-2, 3], [-3, 9], [0, 5], [0, 0]], np.float32)
    return metrics.evaluate(logits, domain, label, ("a", "b", "c"), ("x", "y"), user)


def test_evaluate_measures_each_pair_on_its_own_labelled_rows():
    scores = scores_of_three_domains()
    by_name = {pair.name: pair for pair in scores.pairs}
    assert list(by_name) == ["a/x", "a/y", "b/x", "b/y", "c/x", "c/y"]
    assert (by_name["a/x"].rows, by_name["a/x"].positives) == (4, 2)
    assert by_name["a/x"].auc.value == 0.5  # 2 > {-2, 0}, -3 < both
    assert (by_name["a/y"].rows, by_name["a/y"].auc.value) == (3, 1.0)
    assert by_name["b/x"].auc.reason == ONLY_POSITIVES
    assert by_name["b/y"].auc.reason == by_name["c/x"].auc.reason == NO_ROWS


def test_overall_pools_the_domains():
    x, y = scores_of_three_domains().overall
    assert (x.task, x.rows, x.positives, y.rows, y.positives) == ("x", 6, 4, 3, 1)
    assert x.auc.value == (2 + 2 + 0 + 1.5) / 8  # 2, 1, -3, 0 against -2, 0
    assert y.auc.value == 1.0


def test_reasons_of_calibration_and_gauc():
    by_name = {pair.name: pair for pair in scores_of_three_domains().pairs}
    assert by_name["c/x"].calibration.reason == by_name["c/x"].gauc.reason == NO_ROWS
    assert by_name["b/x"].calibration.value > 0
    assert by_name["b/x"].gauc.reason == ONLY_POSITIVES
    assert by_name["a/x"].gauc.reason == NO_USER
    alone = {pair.name: pair for pair in scores_of_three_domains(np.arange(6)).pairs}
    assert alone["a/x"].gauc.reason == NO_MIXED_USER
    negatives = metrics.evaluate(np.zeros((2, 1)), np.zeros(2, int), np.zeros((2, 1)), ("a",), ("x",)).pairs[0]
    assert negatives.calibration.reason == negatives.auc.reason == ONLY_NEGATIVES
    assert negatives.logloss.value == pytest.approx(math.log(2))


def test_undefined_pairs_leave_the_mean_alone():
    scores = scores_of_three_domains()
    assert scores.mean_auc == 0.75
    defined = [p.logloss.value for p in scores.pairs if p.logloss.value is not None]
    assert len(defined) == 3
    assert scores.mean("logloss") == pytest.approx(sum(defined) / 3)
    assert scores.mean("gauc") is None


def test_scores_become_strict_json_with_null_for_undefined():
    plain = scores_of_three_domains().to_dict()
    assert list(plain) == [*METRICS, "overall"]
    assert all(list(plain[metric]) == ["mean", "a/x", "a/y", "b/x", "b/y", "c/x", "c/y"] for metric in METRICS)
    assert list(plain["overall"]) == list(METRICS)
    assert all(list(values) == ["x", "y"] for values in plain["overall"].values())
    back = json.loads(json.dumps(plain, allow_nan=False))
    assert back["auc"]["b/x"] is None
    assert back["overall"]["gauc"] == {"x": None, "y": None}


def test_undefined_lines_name_pair_and_reason_once():
    lines = scores_of_three_domains().undefined()
    assert lines == [
        "AUC of b/x: only positives (2 labelled rows)",
        "AUC and logloss of b/y: no labelled rows (0 labelled rows)",
        "AUC and logloss of c/x: no labelled rows (0 labelled rows)",
        "AUC and logloss of c/y: no labelled rows (0 labelled rows)",
    ]
    alone = scores_of_three_domains(np.arange(6)).undefined()
    assert "GAUC of a/x: no user has both classes (4 labelled rows)" in alone


def test_withheld_scores_keep_the_rows_and_give_the_reason():
    withheld = scores_of_three_domains().withheld("no epoch")
    assert [pair.rows for pair in withheld.pairs] == [pair.rows for pair in scores_of_three_domains().pairs]
    assert {withheld.mean(metric) for metric in METRICS} == {None}
    assert {pair.auc.reason for pair in (*withheld.pairs, *withheld.overall)} == {"no epoch"}
    assert withheld.undefined()[0] == "AUC and logloss of a/x: no epoch (4 labelled rows)"


@pytest.mark.parametrize("broken", [np.inf, -np.inf, np.nan, 1e300])
def test_one_score_that_is_not_finite_is_noticed(broken):
    assert scores_of_three_domains().finite
    logits = np.array([[0.0, 1.0], [0.0, broken], [1.0, 0.0]])
    label = np.array([[0, 1], [1, 0], [0, 1]])
    scores = metrics.evaluate(logits, np.array([0, 0, 1]), label, ("a", "b"), ("x", "y"), np.zeros(3, int))
    assert not scores.finite
    by_name = {part.name: part for part in (*scores.pairs, *scores.overall)}
    for name in ("a/y", "y"):
        assert {getattr(by_name[name], metric).reason for metric in METRICS} == {NOT_FINITE}
        assert by_name[name].rows > 0
    assert by_name["a/x"].auc.value == 0.5
    assert by_name["b/y"].logloss.value is not None


def test_a_broken_score_without_a_label_does_no_harm():
    label = np.array([[1.0], [0.0], [np.nan]])
    scores = metrics.evaluate(np.array([[1.0], [0.0], [np.nan]]), np.zeros(3, int), label, ("a",), ("x",))
    assert scores.finite
    assert scores.pairs[0].auc.value == 1.0


def test_no_rows_have_no_values():
    empty = metrics.evaluate(np.empty((0, 1)), np.empty(0, np.int64), np.empty((0, 1)), ("a",), ("x",))
    assert empty == Meter(("a",), ("x",)).compute()
    assert {empty.mean(metric) for metric in METRICS} == {None}
    assert empty.pairs[0].auc.reason == empty.overall[0].gauc.reason == NO_ROWS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"domain": np.array([0, 3])}, r"domain must be within 0\.\.2, got 0\.\.3"),
        ({"domain": np.array([0, -1])}, r"domain must be within 0\.\.2, got -1\.\.0"),
        ({"domain": np.array([0.0, 1.0])}, r"domain must be whole numbers \[n\], got float64"),
        ({"logits": np.zeros((2, 1))}, r"logits must be \[2,2\], got \[2, 1\]"),
        ({"label": np.zeros(2)}, r"label must be \[2,2\], got \[2\]"),
        ({"label": np.full((2, 2), 2.0)}, r"label must be within 0\.\.1 or NaN"),
        ({"label": np.full((2, 2), np.inf)}, r"label must be within 0\.\.1 or NaN"),
        ({"user": np.zeros(3, int)}, r"user must be whole numbers \[2\], got int64 \[3\]"),
        ({"user": np.zeros(2)}, r"user must be whole numbers \[2\], got float64"),
    ],
)
def test_rows_of_another_form_are_refused_and_leave_no_trace(change, message):
    good = {"logits": np.eye(2), "domain": np.array([0, 1]), "label": np.eye(2), "user": None}
    meter = Meter("abc", "xy")
    with pytest.raises(ValueError, match=message):
        meter.update(**(good | change))
    assert meter.compute() == Meter("abc", "xy").compute()


# Batches, order, merging


@pytest.mark.parametrize("exact_rows", [10_000, 700])
def test_batches_order_and_merging_change_no_bit(exact_rows):
    """Exact, and with less than the rows kept."""
    rng = np.random.default_rng(1)
    rows = make_rows(3_000, people=300)
    expected = metered([rows], exact_rows=exact_rows).compute()
    assert bool(expected.approximate) == (exact_rows == 700)
    assert metered(chunks(rows, [1, 1, 64, 2_000, 2_999]), exact_rows=exact_rows).compute() == expected
    shuffled = taken(rows, rng.permutation(3_000))
    assert metered(chunks(shuffled, range(100, 3_000, 100)), exact_rows=exact_rows).compute() == expected
    one, other, third = (metered([part], exact_rows=exact_rows) for part in chunks(shuffled, [500, 550]))
    before = other.compute()
    other_first = pickle.loads(pickle.dumps(other))
    one.merge(other)
    one.merge(third)
    assert one.compute() == expected
    assert other.compute() == before
    third.merge(other_first)
    third.merge(metered([taken(shuffled, slice(0, 500))], exact_rows=exact_rows))
    assert third.compute() == expected


def test_large_blocks_change_no_bit():
    """More rows than are taken in at once."""
    rows = make_rows(150_000, people=3_000)
    assert metered([rows]).compute() == metered(chunks(rows, [70_001])).compute()


@pytest.mark.parametrize("exact_rows", [10_000, 700])
def test_rows_may_be_added_after_measuring(exact_rows):
    rows = make_rows(2_000)
    meter = metered([], exact_rows=exact_rows)
    for part in chunks(rows, [300, 900, 1_500]):
        meter.update(*part)
        meter.compute()
    assert meter.compute() == meter.compute() == metered([rows], exact_rows=exact_rows).compute()


def test_the_arrays_may_be_overwritten_after_an_update():
    rows = make_rows(100)
    meter = metered([rows])
    expected = metered([make_rows(100)]).compute()
    for column in rows:
        column[...] = 0
    assert meter.compute() == expected


def test_a_log_that_names_users_in_some_batches_only():
    logits, domain, label, user = make_rows(600)
    half = np.where(np.arange(600) < 300, user, -1)
    expected = metered([(logits, domain, label, half)]).compute()
    first, last = (taken((logits, domain, label), part) for part in (slice(300), slice(300, None)))
    assert metered([(*first, user[:300]), (*last, None)]).compute() == expected


def test_meters_of_different_logs_are_not_merged():
    for other in (Meter("ab", "x"), Meter("a", "y"), Meter("a", "x", exact_rows=5)):
        with pytest.raises(ValueError, match="cannot be merged"):
            Meter("a", "x").merge(other)
    with pytest.raises(ValueError, match="exact_rows 0"):
        Meter("a", "x", exact_rows=0)


# Bounded memory


def test_beyond_the_rows_kept_auc_is_within_its_bound_and_sums_stay_exact():
    rows = make_rows(40_000, people=2_000)
    exact, near = (metered([rows], exact_rows=kept).compute() for kept in (100_000, 8_000))
    assert set(near.approximate) == {"auc", "gauc"} and not exact.approximate
    for one, other in zip((*exact.pairs, *exact.overall), (*near.pairs, *near.overall), strict=True):
        assert (one.rows, one.positives) == (other.rows, other.positives)
        assert (one.logloss, one.calibration) == (other.logloss, other.calibration)
        assert one.auc.within == 0 < other.auc.within < 0.01
        assert abs(one.auc.value - other.auc.value) <= other.auc.within
        assert other.auc.value == pytest.approx(one.auc.value, abs=1e-3)
        assert other.gauc.value == pytest.approx(one.gauc.value, abs=0.05)


def test_few_different_scores_stay_exact_however_many_rows():
    logits, domain, label, _ = make_rows(20_000, distinct=50)
    rows = (logits, domain, label)
    exact, near = (metered([rows], exact_rows=kept).compute() for kept in (100_000, 2_000))
    assert near == exact
    assert not near.approximate


def test_gauc_of_a_sample_is_that_of_its_users():
    rows = make_rows(20_000, people=1_000)
    meter = metered([rows], exact_rows=3_000)
    scores = meter.compute()
    sample = meter._sample.rows()
    kept = np.isin(rows[3], np.unique(sample.user))
    assert 1_000 < len(sample) <= 3_000
    expected = metered([taken(rows, kept)]).compute()
    assert [pair.gauc for pair in scores.pairs] == [pair.gauc for pair in expected.pairs]
    assert scores.approximate["gauc"] == (
        f"of one in {2**meter._sample.level} users: {len(np.unique(sample.user))} users, {len(sample):,} rows"
    )


def test_a_user_with_more_rows_than_are_kept_ends_without_gauc():
    logits, domain, label, user = make_rows(3_000, people=1)
    scores = metered([(logits, domain, label, np.zeros_like(user))], exact_rows=500).compute()
    assert {pair.gauc.reason for pair in scores.pairs} == {NO_MIXED_USER}
    assert scores.approximate["gauc"].endswith("0 users, 0 rows")


def test_more_pairs_than_counts_still_end():
    rows = make_rows(3_000, domains=200)
    scores = metered([rows], domains=200, exact_rows=40).compute()
    exact = metered([rows], domains=200).compute()
    assert scores.approximate["auc"].startswith("scores are told apart by 0 of their 32 bits")
    for one, other in zip(exact.pairs, scores.pairs, strict=True):
        assert one.auc.reason == other.auc.reason
        if one.auc.value is not None:
            assert other.auc.value == other.auc.within == 0.5


def test_broken_scores_are_noticed_beyond_the_rows_kept():
    logits, domain, label, user = make_rows(3_000)
    logits[5], label[5] = np.nan, 1.0
    scores = metered([(logits, domain, label, user)], exact_rows=100).compute()
    assert not scores.finite
    assert {pair.auc.reason for pair in scores.pairs if pair.domain == f"d{domain[5]}"} == {NOT_FINITE}
    assert {pair.auc.reason for pair in scores.pairs if pair.domain != f"d{domain[5]}"} == {None}


def test_memory_does_not_grow_with_the_rows():
    """Eight times the rows, about the same peak."""
    rng = np.random.default_rng(0)
    meter = Meter("abc", "xy", exact_rows=50_000)

    def peak_of(batches):
        for _ in range(batches):
            logits, domain, label, _ = make_rows(20_000, seed=int(rng.integers(2**32)))
            meter.update(logits, domain, label, rng.integers(0, 10**6, 20_000))
        meter.compute()
        return tracemalloc.get_traced_memory()[1]

    tracemalloc.start()
    try:
        first = peak_of(8)
        assert peak_of(56) < 1.15 * first
    finally:
        tracemalloc.stop()


# Seesaw


def test_seesaw_compares_pair_by_pair():
    scores = {"mean": 0.7, "a/x": 0.8, "a/y": 0.6, "b/x": None, "b/y": 0.7, "c/x": 0.55}
    baseline = {"mean": 0.6, "a/x": 0.7, "a/y": 0.65, "b/x": 0.6, "b/y": None, "c/x": 0.5, "c/y": 0.6}
    found = seesaw(scores, baseline, {"b/y": "no labelled row in val"})
    json.dumps(found, allow_nan=False)
    assert list(found["pairs"]) == ["a/x", "a/y", "b/x", "b/y", "c/x", "c/y"]
    assert found["pairs"]["a/x"]["difference"] == pytest.approx(0.1)
    assert found["pairs"]["a/x"]["relative_improvement"] == pytest.approx(0.5)
    assert found["pairs"]["a/y"]["relative_improvement"] == pytest.approx(0.1 / 0.15 - 1)
    assert found["pairs"]["b/y"]["reason"] == "no labelled row in val"
    assert found["pairs"]["b/x"]["reason"] == found["pairs"]["c/y"]["reason"] == "the model's AUC is undefined"
    assert found["pairs"]["c/x"]["difference"] == pytest.approx(0.05)
    assert found["pairs"]["c/x"]["relative_improvement"] is None
    assert (found["gain"], found["lose"], found["equal"]) == (2, 1, 0)
    assert found["mean_difference"] == pytest.approx((0.1 - 0.05 + 0.05) / 3)


def test_seesaw_of_nothing_is_nothing():
    found = seesaw({"mean": None}, {})
    assert found == {"pairs": {}, "gain": 0, "lose": 0, "equal": 0, "mean_difference": None}
    assert seesaw({"a/x": 0.5}, {"a/x": 0.5})["equal"] == 1


def test_seesaw_takes_what_scores_give():
    scores = scores_of_three_domains().to_dict()["auc"]
    found = seesaw(scores, scores)
    assert (found["gain"], found["lose"], found["equal"]) == (0, 0, 2)
