"""What a table is made of: its runs, how it is read from finished ones, statistics, text and figure."""

import csv
import io
import json
import math

import pytest
import yaml

from m3oe_fast.comparison import figure, markdown, results
from m3oe_fast.comparison.folder import TableFolder
from m3oe_fast.comparison.options import SharedTrainOptions, SizeOptions, changed, sizes_of, words
from m3oe_fast.comparison.plan import ALL, OURS, PAPER, Outcome, Plan, Row, Run, parse_lrs, parse_models, parse_seeds
from m3oe_fast.comparison.statistics import Spread, half_interval, improvement, p_value, paired
from m3oe_fast.data import load
from m3oe_fast.errors import ConfigError
from m3oe_fast.models import MODELS
from m3oe_fast.models.options import FORMS

from .finished_runs import ROWS, metrics

MMOE, PLE = Row("mmoe", "mdmt"), Row("ple", "mdmt")
RATE = 1e-3


def finished(scores, lr=RATE, **more):
    """Outcomes of rows by seed: {row: {seed: {pair: auc}}}."""
    return {
        Run(row, seed, lr): Outcome(metrics(auc, form=row.form, **more))
        for row, by_seed in scores.items()
        for seed, auc in by_seed.items()
    }


# Which runs --------------------------------------------------------------------------------------


def test_the_rows_are_those_of_the_paper_and_exist():
    assert len(PAPER) == 15 and (*PAPER, Row("pepnet", "mdmt")) == ALL
    assert all(row.form in FORMS[row.model] for row in ALL)
    assert {row.model for row in ALL} == set(MODELS)
    assert [row.name for row in PAPER][:2] == ["mlp-single", "shared_bottom-mtl"] and PAPER[-1] == OURS
    assert not OURS.extra and ALL[-1].extra and Row("m3oe", "mdl").extra


def test_models_come_in_the_order_of_the_table_once_each():
    assert parse_models("all") == ALL
    assert parse_models("m3oe, ple:mtl,mmoe,mmoe:mdl") == (
        *(Row("ple", "mtl"), Row("mmoe", "mtl"), Row("mmoe", "mdl"), Row("mmoe", "mdmt"), OURS),
    )
    assert parse_models("pepnet:mdl,mlp") == (Row("mlp", "single"), Row("pepnet", "mdl"))


def test_seeds_and_rates():
    assert parse_seeds("2022..2026") == (2022, 2023, 2024, 2025, 2026)
    assert parse_seeds("3,1, 7..8") == (3, 1, 7, 8)
    assert parse_seeds("5") == parse_seeds("5..5") == (5,)
    assert parse_lrs("1e-3,0.003") == (0.001, 0.003)


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (parse_models, "mmo", "models: 'mmo' does not exist; there is all, mlp, "),
        (parse_models, "mlp:mdmt", "models: form 'mdmt' does not exist for mlp; there is single"),
        (parse_models, "mmoe:", "models: form '' does not exist for mmoe"),
        (parse_models, "mmoe,,ple", "models must be all, or for example mmoe"),
        (parse_models, "", "models must be all"),
        (parse_seeds, "2022..2020", r"seeds '2022\.\.2020' go backwards; write 2020\.\.2022"),
        (parse_seeds, "1..2,2", "seeds: 2 is there twice"),
        (parse_seeds, "-1", r"seeds must be 2022\.\.2026, or for example 1,2,3, got '-1'"),
        (parse_seeds, "1...3", "seeds must be"),
        (parse_seeds, "٣", "seeds must be"),
        (parse_seeds, "0..999999999999", "name at most 1,000"),
        (parse_seeds, "1,", "seeds must be"),
        (parse_lrs, "1e-3,0", "lrs must be numbers above 0 such as 1e-3,3e-3,1e-2, got '0'"),
        (parse_lrs, "nan", "lrs must be"),
        (parse_lrs, "inf", "lrs must be"),
        (parse_lrs, "fast", "lrs must be"),
        (parse_lrs, "1e-3,0.001", "name one rate twice"),
    ],
)
def test_what_is_wrong_is_one_line(parse, text, message):
    with pytest.raises(ConfigError, match=message) as error:
        parse(text)
    assert "\n" not in str(error.value)


def test_one_rate_takes_a_run_per_seed():
    plan = Plan((MMOE, OURS), (1, 2), (RATE,))
    assert plan.size == 4
    assert plan.wanted({}) == plan.possible() == [Run(row, seed, RATE) for seed in (1, 2) for row in (MMOE, OURS)]


def test_the_validation_rows_choose_the_rate_and_the_test_rows_do_not():
    plan = Plan((MMOE,), (1, 2, 3), (0.1, 0.2, 0.3))
    assert plan.size == plan.budget == 5 and len(plan.possible()) == 9
    ended = {}
    for lr, val, test in ((0.1, 0.7, 0.9), (0.2, 0.8, 0.6)):
        ended[Run(MMOE, 1, lr)] = Outcome(metrics({"a/click": test}, val=val))
        assert plan.chosen_lr(MMOE, ended) is None and len(plan.wanted(ended)) == 3
    ended[Run(MMOE, 1, 0.3)] = Outcome(None, "training diverged")
    assert plan.chosen_lr(MMOE, ended) == 0.2
    assert plan.wanted(ended)[3:] == [Run(MMOE, 2, 0.2), Run(MMOE, 3, 0.2)]
    assert plan.runs_of(MMOE, ended) == [Run(MMOE, seed, 0.2) for seed in (1, 2, 3)]


def test_an_undefined_validation_auc_wins_over_none_and_ties_go_to_the_first_rate():
    plan = Plan((MMOE,), (1,), (0.1, 0.2))
    undefined = metrics({"a/click": None})
    tied = {Run(MMOE, 1, lr): Outcome(undefined) for lr in plan.lrs}
    assert plan.chosen_lr(MMOE, tied) == 0.1
    tied[Run(MMOE, 1, 0.2)] = Outcome(metrics({"a/click": 0.4}))
    assert plan.chosen_lr(MMOE, tied) == 0.2
    failed = {Run(MMOE, 1, lr): Outcome(None, "no") for lr in plan.lrs}
    assert plan.chosen_lr(MMOE, failed) is None
    assert plan.runs_of(MMOE, failed) == [] and len(plan.wanted(failed)) == 2


def test_sizes_go_to_the_models_that_have_them():
    sizes = changed(SizeOptions(star_dim=8, expert_dims=[8, 4], embed_dim=3, gate_detach=False))
    assert sizes_of(OURS, sizes) == sizes
    assert words(sizes_of(MMOE, sizes)) == ["--embed_dim=3", "--expert_dims=8,4"]
    assert words(sizes) == ["--embed_dim=3", "--star_dim=8", "--expert_dims=8,4", "--gate_detach=false"]
    assert changed(SharedTrainOptions()) == {} and not hasattr(SharedTrainOptions(), "seed")


# Statistics, by hand -----------------------------------------------------------------------------


def test_mean_and_sample_standard_deviation():
    spread = Spread.of([0.70, None, 0.72, 0.74])
    assert spread.count == 3
    assert spread.mean == pytest.approx(0.72, abs=1e-15) and spread.std == pytest.approx(0.02, abs=1e-15)
    assert Spread.of([0.7]) == Spread(0.7, None, 1)
    assert Spread.of([None]) == Spread.of([]) == Spread(None, None, 0)


def test_relative_improvement_is_over_chance():
    assert improvement(0.77, 0.75) == pytest.approx(0.08, abs=1e-12)
    # Means of the paper's Table 2 on MovieLens and its claim of 2.54 %.
    assert round(100 * improvement(0.7702, 0.7635), 2) == 2.54
    assert improvement(0.7, 0.7) == 0
    assert improvement(0.7, 0.5) is None and improvement(0.7, 0.4) is None
    assert improvement(None, 0.7) is None and improvement(0.7, None) is None


def test_paired_t_test():
    # Differences 1, 2, 3, 4, 5: t = 3 / sqrt(2.5 / 5) = 3 sqrt 2 with 4 degrees of freedom, for which the distribution
    # is P(|t| > x) = 1 - s (3 - s^2) / 2 with s = x / sqrt(4 + x^2).
    t = 3 * math.sqrt(2)
    s = t / math.sqrt(4 + t * t)
    pairs = [(10.0 + d + noise, 10.0 + noise) for d, noise in zip((1, 2, 3, 4, 5), (0, 7, -3, 2, 1), strict=True)]
    assert p_value(pairs) == pytest.approx(1 - s * (3 - s * s) / 2, rel=1e-9)
    assert p_value([(b, a) for a, b in pairs]) == pytest.approx(p_value(pairs), rel=1e-12)
    assert p_value(pairs[:1]) is None and p_value([]) is None
    assert p_value([(0.7, 0.7)] * 3) is None
    assert p_value([(2.0, 1.0)] * 3) == 0


def test_pairs_are_those_that_both_have():
    assert paired([1.0, None, 3.0], [4.0, 5.0, None]) == [(1.0, 4.0)]


def test_interval_of_the_mean():
    # One degree of freedom is Cauchy: its 97.5 % quantile is tan(0.475 pi).
    assert half_interval(Spread.of([1.0, 3.0])) == pytest.approx(math.tan(0.475 * math.pi), rel=1e-9)
    assert half_interval(Spread.of([1.0])) is None


# From metrics.json to a table --------------------------------------------------------------------

SCORES = {
    MMOE: {1: {"a/click": 0.70, "b/click": 0.80}, 2: {"a/click": 0.72, "b/click": 0.80}},
    OURS: {1: {"a/click": 0.71, "b/click": 0.85}, 2: {"a/click": 0.75, "b/click": 0.85}},
}


def gathered(outcomes, rows=(MMOE, OURS), seeds=(1, 2), lrs=(RATE,)):
    return results.gather(Plan(rows, seeds, lrs), outcomes, ["a", "b"], ["click"])


def test_a_summary_of_every_row():
    found = gathered(finished(SCORES))
    mmoe, ours = found.summaries
    assert found.pairs == ("a/click", "b/click") and not found.missing
    assert mmoe.spread("auc", "a/click").mean == pytest.approx(0.71) and mmoe.count == 2
    assert mmoe.spread("logloss").mean == pytest.approx(0.245)
    assert mmoe.lr == RATE and mmoe.spent == 2
    assert mmoe.cost == results.Cost(1234, 567, 2.0, 400.0, 3 * 2**20, "cpu avx2")
    against = found.against(mmoe)
    assert against.improvement == pytest.approx(0.29 / 0.255 - 1) and against.count == 2
    assert 0 < against.p < 1
    assert found.against(ours) is None and gathered(finished({MMOE: SCORES[MMOE]}), rows=(MMOE,)).against(mmoe) is None


def test_an_epoch_of_several_models_is_one_of_each():
    members = {name: {"rows": {"train": 600, "val": 1, "test": 1}} for name in ("0-a", "1-b")}
    content = metrics({"a/click": 0.7}, form="mtl", epochs=9, seconds=100.0) | {"members": members}
    found = gathered({Run(Row("mmoe", "mtl"), 1, RATE): Outcome(content)}, rows=(Row("mmoe", "mtl"),), seeds=(1,))
    assert found.summaries[0].cost.epoch_seconds == 1200 / 400
    none = metrics({"a/click": None}, epochs=0, samples_per_second=None)
    assert gathered({Run(MMOE, 1, RATE): Outcome(none)}, seeds=(1,)).summaries[0].cost.epoch_seconds is None


def test_a_failed_run_is_missing_with_its_reason_and_the_others_count():
    outcomes = finished(SCORES) | {Run(MMOE, 2, RATE): Outcome(None, "training diverged")}
    found = gathered(outcomes)
    assert found.missing == [(Run(MMOE, 2, RATE), "training diverged")]
    mmoe = found.summaries[0]
    assert mmoe.count == 1 and mmoe.values("auc") == (pytest.approx(0.75), None)
    against = found.against(mmoe)
    assert against.count == 1 and against.p is None and against.improvement == pytest.approx(0.28 / 0.25 - 1)


def test_the_tidy_table_has_every_run_and_the_wide_one_every_row():
    tried = finished({MMOE: {1: {"a/click": 0.9, "b/click": 0.9}}}, lr=0.1, val=0.1)
    outcomes = tried | finished({MMOE: SCORES[MMOE]}, val=0.8)
    shuffled = dict(sorted(outcomes.items(), key=lambda item: (item[0].lr, -item[0].seed)))
    found = gathered(shuffled, rows=(MMOE,), lrs=(RATE, 0.1))
    lines = list(csv.DictReader(io.StringIO(results.tidy(found).to_csv(index=False))))
    assert [(line["seed"], line["lr"]) for line in lines if line["part"] == "val" and line["metric"] == "auc"] == [
        *((seed, lr) for seed, lr in (("1", "0.001"), ("1", "0.1"), ("2", "0.001")) for _ in range(3))
    ]
    assert {(line["seed"], line["lr"]) for line in lines if line["chosen"] == "True"} == {
        ("1", "0.001"),
        ("2", "0.001"),
    }
    one = [line for line in lines if (line["part"], line["pair"], line["metric"]) == ("test", "a/click", "auc")]
    assert [float(line["value"]) for line in one] == [0.70, 0.9, 0.72]
    (line,) = csv.DictReader(io.StringIO(results.wide(found).to_csv(index=False)))
    assert float(line["auc/a/click"]) == pytest.approx(0.71) and float(line["lr"]) == RATE and line["runs"] == "3"
    assert line["m3oe_p"] == ""


# Text and figure ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return load("demo", cache_dir=str(tmp_path_factory.mktemp("cache")))


def lines_of(found, demo, heading="## Test AUC x 100"):
    text = markdown.text(found, demo, {"split": "random"}, "table.png")
    part = text.split(heading)[1].split("\n## ")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("|")]


def test_the_text_shows_means_marks_and_the_comparison(demo):
    outcomes = finished(SCORES | {PLE: {1: {"a/click": 0.70, "b/click": None}, 2: {"a/click": 0.74, "b/click": None}}})
    head, _, mmoe, ple, ours = lines_of(gathered(outcomes, rows=(MMOE, PLE, OURS)), demo)
    assert head[:5] == ["model", "form", "a/click", "b/click", "mean AUC"]
    assert mmoe[:4] == ["MMoE", "mdmt", "71.00 ± 1.41", "*80.00 ± 0.00*"]
    assert ple[2:4] == ["*72.00 ± 2.83*", "-"]
    assert ours[2] == "**73.00 ± 2.83**" and ours[3] == "**85.00 ± 0.00**" and ours[-2:] == ["-", "-"]
    assert mmoe[4:8] == ["*75.50 ± 0.71*", "*24.50 ± 0.71*", "2/2", "+13.73%"]
    assert ours[5] == "**21.00 ± 1.41**"  # the lower logloss is the better one


def test_the_text_says_what_is_missing_and_what_is_extra(demo):
    rows = (MMOE, OURS, Row("pepnet", "mdmt"))
    some = {OURS: {1: {"a/click": 0.7, "b/click": None}, 2: {"a/click": 0.7, "b/click": 0.6}}}
    failed = {Run(row, seed, RATE): Outcome(None, "a|b *boom*") for row in (MMOE, rows[2]) for seed in (1, 2)}
    found = gathered(finished(some) | failed, rows=rows)
    _, _, mmoe, ours, pepnet = lines_of(found, demo)
    assert mmoe[2:] == ["-", "-", "-", "-", "0/2", "-", "-"] and pepnet[0] == "PEPNet †"
    assert ours[3] == "**60.00 (1)**"
    text = markdown.text(found, demo, {"split": "random"}, "table.png")
    assert "- mmoe mdmt seed 1 lr 0.001: a\\|b \\*boom\\*" in text
    assert "† is no row of the paper's table" in text and "(n) means" in text
    assert ["MMoE", "mdmt", "0.001", "2", *["-"] * 6] in lines_of(found, demo, "## Cost")


def test_one_seed_has_no_spread_and_no_p(demo):
    found = gathered(finished({row: {1: by[1]} for row, by in SCORES.items()}), seeds=(1,))
    _, _, mmoe, _ = lines_of(found, demo)
    assert mmoe[2] == "*70.00*" and mmoe[-1] == "-"
    text = markdown.text(found, demo, {}, "table.png")
    assert "a paired t-test needs two seeds or more" in text and "±" not in text


def test_many_pairs_stay_out_of_the_text(demo):
    domains = [f"d{number}" for number in range(13)]
    scores = {f"{domain}/click": 0.7 for domain in domains}
    outcomes = finished({MMOE: {1: scores}}, domains=domains)
    found = results.gather(Plan((MMOE,), (1,), (RATE,)), outcomes, domains, ["click"])
    head, _, row = lines_of(found, demo)
    assert head[:3] == ["model", "form", "mean AUC"] and row[2].startswith("**70.00")
    assert "The 13 pairs of domain and task are in summary.csv" in markdown.text(found, demo, {}, "table.png")


def test_the_figure_has_a_place_for_every_row(tmp_path):
    seeds = (1, 2, 3)
    scores = {OURS: {seed: {"a/click": 0.7 + seed / 100} for seed in seeds}, PLE: {1: {"a/click": 0.6}}}
    failed = {Run(row, seed, RATE): Outcome(None, "no") for row, seed in ((MMOE, 1), (MMOE, 2), (MMOE, 3), (PLE, 2))}
    found = gathered(finished(scores) | failed, rows=(MMOE, PLE, OURS), seeds=seeds)
    drawn = figure.draw(found, "a $x_1 log")
    (axes,) = drawn.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["MMoE", "PLE", "M3oE"]
    assert [text.get_text() for text in axes.texts] == ["no result"]
    dots = [line.get_xdata() for line in axes.lines if line.get_marker() == "o" and len(line.get_xdata())]
    assert [list(map(round, shown)) for shown in dots] == [[60], [71, 72, 73]]
    bands = [line for line in axes.lines if line.get_linewidth() == 9]
    half = half_interval(Spread.of([71.0, 72.0, 73.0]))
    assert len(bands) == 1 and list(bands[0].get_xdata()) == pytest.approx([72 - half, 72 + half])
    for name in ("one.png", "two.png"):
        figure.write(found, "demo", tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


# The folder --------------------------------------------------------------------------------------


def leave(folder, run, content, config):
    root = folder.run(run)
    root.mkdir(parents=True)
    (root / "metrics.json").write_text(content if isinstance(content, str) else json.dumps(content))
    (root / "config.yaml").write_text(yaml.safe_dump(config))


def test_only_finished_runs_have_a_result(tmp_path):
    folder = TableFolder(str(tmp_path), names_rates=False)
    run, of_tasks = Run(MMOE, 1, RATE), Run(Row("mmoe", "mdl"), 1, RATE)
    assert folder.run(run) == tmp_path / "runs/mmoe-mdmt/1"
    assert folder.result(run, 4, 3, ROWS) is None
    content = metrics({"a/click": 0.7})  # 4 epochs, the second the best
    leave(folder, run, content, {})
    assert folder.result(run, 4, 3, ROWS) == content
    assert folder.result(run, 9, 2, ROWS) == content  # stopped early
    assert folder.result(run, 9, 3, ROWS) is None  # interrupted
    assert folder.result(run, 9, 0, ROWS) is None
    leave(folder, of_tasks, content, {})
    assert folder.result(of_tasks, 9, 3, ROWS) == content  # written at the end only


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"data": 1}', json.dumps(metrics({}) | {"model": {}})])
def test_a_damaged_result_is_none(tmp_path, content):
    folder = TableFolder(str(tmp_path), names_rates=True)
    run = Run(MMOE, 1, RATE)
    assert folder.run(run) == tmp_path / "runs/mmoe-mdmt/1-lr0.001"
    leave(folder, run, content, {})
    assert folder.result(run, 1, 0, ROWS) is None


def test_protocols_are_never_mixed(tmp_path):
    folder = TableFolder(str(tmp_path), names_rates=False)
    settings = {"data": "demo", "split": "random", "expert_dims": (64,), "data_path": "x", "lr": RATE}
    folder.write_settings(settings)
    folder.check_protocol(settings | {"data_path": "y"})
    with pytest.raises(ConfigError, match="holds a table with another split: it was 'random' and is now 'user'"):
        folder.check_protocol(settings | {"split": "user"})
    with pytest.raises(ConfigError, match=r"another expert_dims: it was \[64\] and is now \[8\]"):
        folder.check_protocol(settings | {"expert_dims": (8,)})
    folder.settings.write_text("{")
    with pytest.raises(ConfigError, match=r"table\.yaml"):
        folder.check_protocol(settings)


def test_runs_of_another_protocol_are_refused(tmp_path):
    folder = TableFolder(str(tmp_path), names_rates=False)
    run = Run(MMOE, 1, RATE)
    folder.check_run(run, {"lr": RATE})
    leave(folder, run, metrics({"a/click": 0.7}), {"lr": 0.5, "out": "elsewhere"})
    folder.check_run(run, {"lr": 0.5, "out": ""})
    with pytest.raises(
        ConfigError, match=r"runs/mmoe-mdmt/1 is a run with another lr: it was 0\.5 and would be 0\.001"
    ):
        folder.check_run(run, {"lr": RATE})
    with pytest.raises(ConfigError, match=r"metrics\.json tells of other rows"):
        folder.result(run, 4, 3, ROWS | {"test": 99})
    (folder.run(run) / "config.yaml").write_text("{")
    with pytest.raises(ConfigError, match="remove the run's folder to train it again"):
        folder.check_run(run, {"lr": RATE})


@pytest.mark.parametrize(
    ("holds", "message"),
    [
        ("notes.txt", r"out is no table folder: it holds notes\.txt"),
        ("config.yaml", "out holds a training run"),
        (".table.yaml.123", None),
        ("table.yaml", None),
    ],
)
def test_a_folder_with_something_else_is_refused(tmp_path, monkeypatch, holds, message):
    monkeypatch.chdir(tmp_path)
    folder = TableFolder("out", names_rates=False)
    folder.check()
    assert not folder.root.exists()
    folder.root.mkdir()
    folder.check()
    (folder.root / holds).write_text("")
    if message is None:
        folder.check()
    else:
        with pytest.raises(ConfigError, match=message):
            folder.check()
