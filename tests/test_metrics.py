"""AUC and logloss: exact by definition and torchmetrics, harmless where there is no answer."""

import json
import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_auroc

from m3oe_fast import metrics
from m3oe_fast.metrics import NO_ROWS, NOT_FINITE, ONLY_NEGATIVES, ONLY_POSITIVES


def auc_by_pairs(score, positive):
    """The definition: every (positive, negative) pair, a tie counts half."""
    above, below = score[positive][:, None], score[~positive][None]
    return ((above > below).mean() + (above == below).mean() / 2).item()


@pytest.mark.parametrize("distinct", [2, 5, 10_000])
def test_auc_is_the_share_of_ordered_pairs_with_ties_counted_half(distinct):
    rng = np.random.default_rng(distinct)
    score = rng.integers(0, distinct, 300).astype(np.float32)
    positive = rng.random(300) < 0.3
    assert metrics.auc(score, positive).value == pytest.approx(auc_by_pairs(score, positive), abs=1e-6)


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


def test_logloss_is_exact_for_extreme_logits():
    logit = np.array([0.0, 2.0, -200.0, 200.0], np.float32)
    label = np.array([1.0, 0.0, 1.0, 1.0], np.float32)
    expected = (math.log(2) + math.log1p(math.exp(2)) + 200.0 + 0.0) / 4
    assert metrics.logloss(logit, label).value == pytest.approx(expected, rel=1e-12)


def test_logloss_of_no_rows_or_broken_scores_is_undefined():
    assert metrics.logloss(np.empty(0), np.empty(0)).reason == NO_ROWS
    assert metrics.logloss(np.array([math.nan]), np.array([1.0])).reason == NOT_FINITE


def scores_of_three_domains():
    """Domain a: both classes; b: labels of one class, or missing; c: no rows."""
    domain = np.array([0, 1, 0, 0, 1, 0], np.uint8)
    label = np.array([[1, 0], [1, np.nan], [0, 1], [1, np.nan], [1, np.nan], [0, 0]], np.float32)
    logits = np.array([[2, -1], [1, 0], [-2, 3], [-3, 9], [0, 5], [0, 0]], np.float32)
    return metrics.evaluate(logits, domain, label, ("a", "b", "c"), ("x", "y"))


def test_evaluate_measures_each_pair_on_its_own_labelled_rows():
    scores = scores_of_three_domains()
    by_name = {pair.name: pair for pair in scores.pairs}
    assert list(by_name) == ["a/x", "a/y", "b/x", "b/y", "c/x", "c/y"]
    assert (by_name["a/x"].rows, by_name["a/x"].positives) == (4, 2)
    assert by_name["a/x"].auc.value == 0.5  # 2 > {-2, 0}, -3 < both
    assert (by_name["a/y"].rows, by_name["a/y"].auc.value) == (3, 1.0)
    assert by_name["b/x"].auc.reason == ONLY_POSITIVES
    assert by_name["b/y"].auc.reason == by_name["c/x"].auc.reason == NO_ROWS


def test_undefined_pairs_leave_the_mean_alone():
    scores = scores_of_three_domains()
    assert scores.mean_auc == 0.75
    defined = [p.logloss.value for p in scores.pairs if p.logloss.value is not None]
    assert len(defined) == 3
    assert scores.mean_logloss == pytest.approx(sum(defined) / 3)


def test_scores_become_strict_json_with_null_for_undefined():
    plain = scores_of_three_domains().to_dict()
    assert list(plain) == ["auc", "logloss"]
    assert list(plain["auc"]) == ["mean", "a/x", "a/y", "b/x", "b/y", "c/x", "c/y"]
    assert json.loads(json.dumps(plain, allow_nan=False))["auc"]["b/x"] is None


def test_undefined_lines_name_pair_and_reason():
    assert "AUC of b/x: only positives (2 labelled rows)" in scores_of_three_domains().undefined()


def test_withheld_scores_keep_the_rows_and_give_the_reason():
    withheld = scores_of_three_domains().withheld("no epoch")
    assert [pair.rows for pair in withheld.pairs] == [pair.rows for pair in scores_of_three_domains().pairs]
    assert (withheld.mean_auc, withheld.mean_logloss) == (None, None)
    assert {pair.auc.reason for pair in withheld.pairs} == {"no epoch"}


def test_one_score_that_is_not_finite_is_noticed():
    assert scores_of_three_domains().finite
    logits = np.array([[0.0, 1.0], [0.0, np.inf]])
    assert not metrics.evaluate(logits, np.array([0, 0]), np.array([[0, 1], [1, 0]]), ("a",), ("x", "y")).finite


def test_mean_of_nothing_is_none():
    empty = metrics.evaluate(np.empty((0, 1)), np.empty(0, np.int64), np.empty((0, 1)), ("a",), ("x",))
    assert empty.mean_auc is None
    assert empty.mean_logloss is None
