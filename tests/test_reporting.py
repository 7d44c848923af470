"""The figures and the text of a report: right numbers, every size, and names that are hard to draw."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread

from m3oe_fast import M3oE, M3oEConfig, reference
from m3oe_fast.data.dataset import Part
from m3oe_fast.data.schema import Schema
from m3oe_fast.errors import ConfigError, UserError
from m3oe_fast.reporting import calibration, curves, embeddings, fusion, gates, markdown, record, sample, seesaw, style
from m3oe_fast.reporting.build import write_report
from m3oe_fast.reporting.counts import count
from m3oe_fast.reporting.record import RunRecord
from m3oe_fast.reporting.style import Drawn, Pair

ODD = ("$x_1$ [b]", "_hidden", "a|b\nc", "", "<25", "a name that is much too long for any figure")


pytestmark = pytest.mark.usefixtures("one_thread")


def make_model(domains=3, tasks=2, shared=2, dtype=torch.float32, **changed):
    torch.manual_seed(0)
    sizes = {"embed_dim": 4, "star_dim": 8, "hidden_dim": 8, "expert_dims": (6, 4), "tower_dim": 4}
    model = M3oE(
        M3oEConfig((8, domains + 1), 1, domains, tasks, shared_experts=shared, **(sizes | changed)), backend="reference"
    )
    for weight in model.parameters():
        torch.nn.init.normal_(weight)
    return model.to(dtype).eval()


def make_part(rows, domains=3, tasks=2, seed=0):
    rng = np.random.default_rng(seed)
    names = [f"d{i}" for i in range(domains)]
    schema = Schema(("item", "domain"), (8, domains + 1), ("age",), tuple(names), tuple(f"t{i}" for i in range(tasks)))
    domain = np.minimum(rng.geometric(0.5, rows) - 1, domains - 1).astype(np.uint8)
    label = (rng.random((rows, tasks)) < 0.3).astype(np.float32)
    label[rng.random(label.shape) < 0.2] = np.nan
    columns = {"id:item": rng.integers(0, 8, rows).astype(np.uint8), "id:domain": domain + np.uint8(1)}
    columns |= {"dense": rng.random((rows, 1), dtype=np.float32), "domain": domain, "label": label}
    return Part(columns, schema, "made up")


def make_record(domains=("a", "b"), tasks=("t", "u"), epochs=3, **changed):
    rng = np.random.default_rng(0)
    pairs = [Pair(domain, task) for domain in domains for task in tasks]
    rows = []
    for epoch in range(1, epochs + 1):
        row = {"epoch": float(epoch), "train_loss": 1 / epoch, "seconds": 2.0}
        for metric, value in (("auc", 0.6 + epoch / 100), ("logloss", 0.5 - epoch / 100)):
            row |= {f"val_{metric}/{pair.key}": value + rng.normal(0, 0.01) for pair in pairs}
            row[f"val_{metric}/mean"] = value
        rows.append(row)
    facts = {"config": {}, "metrics": None, "fusion_rows": (), "seesaw": None}
    facts |= {"domains": tuple(domains), "tasks": tuple(tasks), "epochs": tuple(rows)}
    return RunRecord(Path("runs/made-up"), **(facts | changed))


def inside_of(model, part, rows=200):
    return sample.look_inside(model, sample.draw(part, model.config.num_domains, rows))


def image_of(drawn, tmp_path):
    """The picture, after a look at what its parts cover."""
    path = tmp_path / f"{drawn.name}.png"
    assert style.save(drawn.figure, path)
    assert_nothing_covered(drawn.figure)
    image = imread(path)
    assert image.ndim == 3 and image[..., :3].std() > 0
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    assert (border == 1).all()  # white: nothing is cut off
    return image


def assert_nothing_covered(figure):
    """No panel, with its labels and legend, reaches into another, and the figure's legend into none."""
    with style.look():
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        renderer = canvas.get_renderer()
        boxes = [axes.get_tightbbox(renderer) for axes in figure.axes]
        boxes += [legend.get_window_extent(renderer) for legend in figure.legends]
    for i, one in enumerate(boxes):
        assert one.x0 >= -1 and one.y0 >= -1
        assert one.x1 <= figure.bbox.x1 + 1 and one.y1 <= figure.bbox.y1 + 1
        for other in boxes[i + 1 :]:
            width = min(one.x1, other.x1) - max(one.x0, other.x0)
            height = min(one.y1, other.y1) - max(one.y0, other.y0)
            assert width <= 1 or height <= 1, (one, other)


# What the network computes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["scalar", "per_index", "per_pair"])
@pytest.mark.parametrize(("domains", "tasks", "shared"), [(3, 2, 2), (1, 1, 1), (2, 3, 0), (1, 2, 0)])
def test_the_fused_sum_is_what_the_towers_of_the_oracle_get(mode, domains, tasks, shared):
    model = make_model(domains, tasks, shared, torch.float64, fusion=mode)
    batch = sample.draw(make_part(60, domains, tasks), domains, 60)
    inside = sample.look_inside(model, batch)
    p = dict(model.named_parameters())
    with torch.no_grad():
        fused, domain = torch.from_numpy(inside.fused), batch.domain
        h = torch.einsum("ntx,ntxy->nty", fused, p["tower_weight"][domain]) + p["tower_bias"][domain]
        h = torch.relu(reference.layer_norm(h, p["tower_gain"][domain], p["tower_offset"][domain]))
        logits = (h * p["head_weight"][domain]).sum(-1) + p["head_bias"][domain]
        expected = model(*batch.inputs)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    assert inside.gates.shape == (60, tasks, shared)
    if shared:
        np.testing.assert_allclose(inside.gates.sum(-1), 1.0)
    np.testing.assert_allclose(inside.shared + inside.of_domain + inside.of_task, inside.fused)


def test_rows_are_drawn_evenly_and_the_same_every_time():
    part = make_part(1000, domains=5)
    counts = np.bincount(part.domain, minlength=5)
    taken = np.bincount(sample.draw(part, 5, 200).domain.numpy(), minlength=5)
    assert taken.sum() == 200
    assert taken[-1] == min(counts[-1], 40)  # fewest rows
    assert taken[:2].min() >= 40
    again = sample.draw(part, 5, 200)
    assert torch.equal(again.dense, sample.draw(part, 5, 200).dense)
    assert len(sample.draw(part, 5, 10_000).domain) == 1000
    assert len(sample.draw(part, 7, 3).domain) == 3  # fewer rows than domains, some of them absent


def test_scores_are_of_the_rows_they_stand_beside():
    model, part = make_model(), make_part(300)
    scored = sample.score(model, part, most=120)
    assert len(scored.probability) == 120 and not scored.whole
    rows = np.sort(np.random.default_rng(sample.SEED).choice(300, 120, replace=False))
    batch = part.take(rows)
    np.testing.assert_allclose(scored.probability, torch.sigmoid(model(*batch.inputs)).detach().numpy(), rtol=1e-5)
    np.testing.assert_array_equal(scored.label, batch.label.numpy())
    assert sample.score(model, part).whole


def test_counts_are_those_of_the_labels():
    part = make_part(500)
    found = count(part, ("d0", "d1", "d2"), ("t0", "t1"))
    own = part.label[part.domain == 1, 1]
    assert found[Pair("d1", "t1")].rows == (~np.isnan(own)).sum()
    assert found[Pair("d1", "t1")].positives == np.nansum(own)


# Calibration ----------------------------------------------------------------------------------------------------------


def test_calibration_bins_have_equal_counts_and_right_means():
    probability = np.linspace(0, 1, 1000)
    label = (np.arange(1000) % 2).astype(np.float32)
    label[::10] = np.nan
    curve = calibration.curve(probability, label)
    assert (curve.rows, curve.positives) == (900, 500)
    observed = ~np.isnan(label)
    first = np.flatnonzero(observed)[:90]
    assert curve.predicted[0] == pytest.approx(probability[first].mean())
    assert curve.observed[0] == pytest.approx(label[first].mean())
    assert len(curve.observed) == calibration.BINS
    assert curve.ratio == pytest.approx(probability[observed].sum() / 500)
    assert (curve.low <= curve.observed).all() and (curve.observed <= curve.high).all()


def test_calibration_of_what_cannot_be_measured():
    assert calibration.curve(np.array([0.5]), np.array([np.nan])) is None
    assert calibration.curve(np.array([np.nan]), np.array([1.0])) is None
    none = calibration.curve(np.full(30, 0.5), np.zeros(30))
    assert math.isnan(none.ratio)
    assert none.low[0] == 0 and 0 < none.high[0] < 0.2  # thirty negatives do not prove a rate of zero
    assert len(calibration.curve(np.full(5, 0.5), np.ones(5)).observed) == 1


def test_calibration_figure_limits_its_panels_and_says_so(tmp_path):
    domains, tasks = [f"d{i}" for i in range(30)], ["t0"]
    domain = np.repeat(np.arange(30), 10 + np.arange(30))
    n = len(domain)
    scored = sample.Scored(np.full((n, 1), 0.3, np.float32), domain, np.zeros((n, 1), np.float32), 2 * n)
    found = calibration.curves(scored, domains, tasks)
    with style.look():
        drawn = calibration.draw(found, scored)
    assert f"Of 30 pairs the {calibration.MAX_PANELS} with most labelled rows are shown" in drawn.caption
    assert f"{n:,} of {2 * n:,} test rows were drawn" in drawn.caption
    titles = [axes.get_title() for axes in drawn.figure.axes if axes.get_title()]
    assert len(titles) == calibration.MAX_PANELS
    assert titles[-1].startswith("d29 · t0\n39 rows")
    image_of(drawn, tmp_path)


# Every figure at every size -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("domains", "tasks", "shared"),
    [
        (ODD, ("click", "like"), 20),
        (("all",), ("click",), 0),
        (("all",), tuple("abcdefg"), 1),
        (tuple("abc"), tuple("tuv"), 4),
    ],
)
def test_figures_cover_nothing_whatever_the_names(tmp_path, domains, tasks, shared):
    model = make_model(len(domains), len(tasks), shared)
    part = make_part(400, len(domains), len(tasks))
    inside = inside_of(model, part, 60)
    scored = sample.score(model, part)
    steps = []
    for step in range(0, 90, 10):
        row = {"epoch": 1.0, "step": float(step), "alpha_task": 0.7 + step / 1000, "beta_task": 0.7}
        row |= {f"alpha_domain/{name}": 0.6 + step / 1000 for name in domains}
        row |= {f"beta_domain/{d}/{t}": 0.6 - step / 1000 for d in domains for t in tasks}
        steps.append(row)
    run = make_record(domains, tasks, fusion_rows=tuple(steps))
    gains = {"pairs": {pair.key: {"difference": 0.01 * (-1) ** i} for i, pair in enumerate(run.pairs)}}
    with style.look():
        drawn = [
            curves.draw(run),
            fusion.draw(run),
            gates.draw(inside, domains, tasks),
            calibration.draw(calibration.curves(scored, domains, tasks), scored),
            embeddings.draw(inside, domains, tasks),
            seesaw.draw(gains),
        ]
    for one in drawn:
        if one.figure is None:
            assert one.name == "gates" and "K = 0" in one.caption and not shared
        else:
            image_of(one, tmp_path)


def test_two_hundred_domains_are_limited_and_the_captions_say_so(tmp_path):
    domains, tasks = tuple(f"country {i:03}" for i in range(200)), ("click", "like")
    rows = tuple(
        {"step": float(s), "epoch": 1.0} | {f"alpha_domain/{d}": 0.7 + s / 99 for d in domains} for s in (1, 2)
    )
    run = make_record(domains, tasks, fusion_rows=rows)
    model = make_model(200, 2, 3)
    part = make_part(900, 200, 2)
    inside = inside_of(model, part, 150)
    inside = dataclasses.replace(inside, domain=np.arange(len(inside.domain)) % 200)
    gains = {"pairs": {pair.key: {"difference": i / 1e4} for i, pair in enumerate(run.pairs)}}
    with style.look():
        drawn = {
            one.name: one
            for one in (
                curves.draw(run),
                fusion.draw(run),
                gates.draw(inside, domains, tasks),
                embeddings.draw(inside, domains, tasks),
                seesaw.draw(gains),
            )
        }
    assert "400 pairs are too many for a line each" in drawn["curves"].caption
    assert "alpha_domain hold too many values" in drawn["fusion"].caption
    assert f"the {gates.MAX_ROWS} with the strongest preferences" in drawn["gates"].caption
    assert "the other 194 are grey" in drawn["embeddings"].caption
    assert "The 12 best and the 12 worst pairs are shown" in drawn["seesaw"].caption
    for one in drawn.values():
        height, width, _ = image_of(one, tmp_path).shape
        assert width <= 10.2 * style.DPI and height <= 11 * style.DPI


def test_drawing_leaves_the_settings_of_the_program_alone():
    before = dict(matplotlib.rcParams)
    with style.look():
        curves.draw(make_record())
    assert dict(matplotlib.rcParams) == before


def test_signs_that_no_font_has_are_noticed(tmp_path):
    run = make_record(("\U0001fae8", "b"))
    with style.look():
        drawn = curves.draw(run)
    assert not style.save(drawn.figure, tmp_path / "curves.png")


def test_a_full_disk_is_one_line_and_leaves_the_old_figure(tmp_path, monkeypatch):
    with style.look():
        drawn = curves.draw(make_record())
    path = tmp_path / "curves.png"
    path.write_bytes(b"old")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*curves\.png: No space left"):
        style.save(drawn.figure, path)
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("package", ["matplotlib", "sklearn"])
def test_a_missing_package_is_one_line_with_the_command(monkeypatch, package):
    real = style.importlib.util.find_spec
    monkeypatch.setattr(style.importlib.util, "find_spec", lambda name: None if name == package else real(name))
    with pytest.raises(ConfigError, match=rf"needs {package}.*pip install 'm3oe_fast\[report\]'"):
        style.check_installed()


# Captions -------------------------------------------------------------------------------------------------------------


def test_captions_of_curves():
    with style.look():
        assert "best in epoch 3 (0.6300), the last one" in curves.draw(make_record()).caption
        early = make_record(metrics={"best_epoch": 1, "train": {"epochs": 3}})
        assert "best in epoch 1 (0.6100); the 2 epochs after it were no better" in curves.draw(early).caption
        assert curves.draw(make_record(epochs=1)).caption.startswith("One epoch: training loss 1.0000.")
        nothing = make_record()
        rows = [row | {name: math.nan for name in row if name.startswith("val_")} for row in nothing.epochs]
        undefined = curves.draw(dataclasses.replace(nothing, epochs=tuple(rows)))
        assert "No epoch has a defined validation AUC" in undefined.caption
    assert curves.draw(make_record(epochs=0)).figure is None


def test_fusion_weights_of_an_old_run_come_from_the_epochs():
    run = make_record()
    assert fusion.draw(run).figure is None
    rows = tuple(row | {"alpha_domain": 0.731, "beta_task": 0.5} for row in run.epochs)
    with style.look():
        drawn = fusion.draw(dataclasses.replace(run, epochs=rows))
    assert [axes.get_xlabel() for axes in drawn.figure.axes] == ["epoch", "epoch"]
    assert "They never moved" not in drawn.caption  # one is 0.731 and the other 0.5
    assert "one point per epoch, from metrics.csv" in drawn.caption
    rows = tuple(row | {"alpha_domain": 0.731} for row in run.epochs)
    with style.look():
        assert "They never moved" in fusion.draw(dataclasses.replace(run, epochs=rows)).caption


def test_experts_that_nobody_uses_are_named():
    use = np.tile(np.array([0.9, 0.1, 0.0], np.float32), (20, 1, 1))
    nothing = np.zeros((20, 1, 4), np.float32)
    inside = sample.Inside(np.zeros(20, np.int64), use, nothing, nothing, nothing, nothing)
    with style.look():
        drawn = gates.draw(inside, ("all",), ("click",))
        assert "all/click for expert 1 (0.90)" in drawn.caption
        assert "Hardly used at all: expert 3." in drawn.caption
        assert drawn.figure.axes[0].texts[1].get_text() == "0.10"
        # All points of all panels coincide, which t-SNE cannot take.
        assert embeddings.draw(inside, ("all",), ("click",)).figure is not None


def test_embeddings_that_cannot_be_drawn_say_so():
    inside = inside_of(make_model(), make_part(400), 5)
    assert "5 test rows are too few" in embeddings.draw(inside, tuple("abc"), tuple("tu")).caption
    inside = inside_of(make_model(), make_part(400), 20)
    inside.fused[3, :, 0] = np.nan
    with style.look():
        drawn = embeddings.draw(inside, tuple("abc"), tuple("tu"))
    assert [text.get_text() for axes in drawn.figure.axes for text in axes.texts] == ["values are not finite"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "--seesaw trains the baselines"),
        ({}, "no pair with both AUCs"),
        ({"pairs": []}, "no pair with both AUCs"),
        ({"pairs": {"a/t": {"difference": None}, "b/t": 3}}, "no pair with both AUCs"),
    ],
)
def test_a_seesaw_without_numbers_is_no_figure(content, said):
    drawn = seesaw.draw(content)
    assert drawn.figure is None and said in drawn.caption


def test_the_seesaw_is_in_order_and_counts_both_sides():
    pairs = {"a/t": 0.01, "b/t": -0.02, "c/t": 0.03, "d/t": None}
    with style.look():
        drawn = seesaw.draw({"pairs": {key: {"difference": value} for key, value in pairs.items()}})
    assert "2 of 3 pairs gain and 1 lose" in drawn.caption
    assert "1 pairs are left out" in drawn.caption
    labels = [label.get_text() for label in drawn.figure.axes[0].get_yticklabels()]
    assert labels == ["c · t", "a · t", "b · t"]
    assert [bar.get_width() for bar in drawn.figure.axes[0].patches] == pytest.approx([3.0, 1.0, -2.0])


# The record -----------------------------------------------------------------------------------------------------------


def write_run(root, metrics=True, epochs=3):
    root.mkdir(parents=True, exist_ok=True)
    run = make_record(epochs=epochs)
    names = list(run.epochs[0]) if epochs else ["epoch"]
    lines = [",".join(names), *(",".join(str(row[name]) for name in names) for row in run.epochs)]
    (root / "metrics.csv").write_text("\n".join(lines) + "\n")
    (root / "config.yaml").write_text("epochs: 3\ndata: demo\n")
    if metrics:
        pairs = {pair.key: 0.7 for pair in run.pairs}
        scores = {"auc": {"mean": 0.7, **pairs}, "logloss": {"mean": 0.5, **pairs, "b/u": None}}
        content = {"data": {"domains": ["a", "b"], "tasks": ["t", "u"]}, "train": {"epochs": 3}, "best_epoch": 2}
        (root / "metrics.json").write_text(json.dumps(content | {"val": scores, "test": scores}))
    return root


def test_a_whole_run_is_read(tmp_path):
    run = record.read(write_run(tmp_path / "run"))
    assert run.notes == ("fusion.csv is missing",)
    assert (run.best_epoch, len(run.epochs), run.domains, run.tasks) == (2, 3, ("a", "b"), ("t", "u"))
    assert run.score("test", "auc", None) == 0.7
    assert run.score("test", "logloss", Pair("b", "u")) is None
    assert run.score("test", "gauc", Pair("b", "u")) is None


def test_a_killed_run_is_told_from_its_epochs(tmp_path):
    run = record.read(write_run(tmp_path, metrics=False))
    assert "metrics.json is missing" in run.notes
    assert (run.best_epoch, run.ended) == (3, False)
    assert (run.domains, run.tasks) == (("a", "b"), ("t", "u"))
    assert run.score("val", "auc", None) == pytest.approx(0.63)
    assert run.score("test", "auc", None) is None


def test_a_result_that_is_older_than_the_epochs_does_not_count(tmp_path):
    root = write_run(tmp_path)
    content = json.loads((root / "metrics.json").read_text())
    content["train"]["epochs"] = 2
    (root / "metrics.json").write_text(json.dumps(content))
    run = record.read(root)
    assert not run.ended
    assert run.best_epoch == 3
    assert run.score("test", "auc", None) is None


@pytest.mark.parametrize("content", ["{", "[1]", "\x00\xff", ""])
def test_damaged_files_are_notes(tmp_path, content):
    root = write_run(tmp_path)
    for name in ("metrics.json", "config.yaml", "seesaw.json"):
        (root / name).write_bytes(content.encode("latin-1"))
    (root / "metrics.csv").write_bytes(b"epoch,train_loss\n1,x\nnan,2\n2\n\xc3\xa9,1\n3,0.5,7,8\n")
    (root / "fusion.csv").write_bytes(b"\xff\xfe,step\n1,2\n")
    run = record.read(root)
    assert sum("cannot be read" in note for note in run.notes) >= 2
    assert [row["epoch"] for row in run.epochs] == [1, 2, 3]
    assert math.isnan(run.epochs[0]["train_loss"])
    assert run.metrics is None and run.fusion_rows == () and run.config == {}
    assert write_report(run, None, "nothing was loaded") == root / "report.md"


def test_no_run_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere is no folder; name the folder"):
        record.read(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="holds no run"):
        record.read(tmp_path)


# The text -------------------------------------------------------------------------------------------------------------


def rows_of(text, heading):
    table = text.split(heading)[1].split("\n\n")[1]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]


def test_the_table_has_every_score_and_the_reasons_of_what_is_missing(tmp_path):
    run = record.read(write_run(tmp_path / "run"))
    part = make_part(300, 2, 2)
    counts = {name: count(part, run.domains, run.tasks) for name in ("val", "test")}
    lacking = {Pair("b", "u"): dataclasses.replace(counts["test"][Pair("b", "u")], rows=0, positives=0)}
    counts["test"] = counts["test"] | lacking
    text = markdown.report(run, [], counts, ["something"], "the best epoch")
    head, _, *body = rows_of(text, "## Scores")
    assert head[:5] == ["domain", "task", "test rows", "positive", "val AUC"]
    assert len(body) == 5
    assert body[3][:4] == ["b", "u", "0", "-"] and body[3][-1] == "-"
    assert "- test logloss of b/u: no labelled rows (0 labelled rows)" in text
    assert "- val logloss of b/u: scores are not finite" in text
    assert "GAUC" not in text
    assert text.endswith("## What is missing\n\n- something\n")


def test_optional_metrics_have_their_columns(tmp_path):
    root = write_run(tmp_path)
    content = json.loads((root / "metrics.json").read_text())
    content["test"] |= {"gauc": {"mean": 0.6, "a/t": 0.6}, "calibration": {"mean": 1.1, "a/t": 1.1}}
    content["test"]["overall"] = {"auc": {"t": 0.71, "u": None}, "gauc": {"t": 0.61}}
    (root / "metrics.json").write_text(json.dumps(content))
    text = markdown.report(record.read(root), [], {}, [], "the best epoch")
    head, _, *body = rows_of(text, "## Scores")
    assert head[-4:] == ["val calibration", "test calibration", "val GAUC", "test GAUC"]
    overall = [row for row in body if row[0] == "*all rows*"]
    assert len(overall) == 1 and overall[0][3] == "0.7100" and overall[0][-1] == "0.6100"


def test_names_are_text_and_not_markdown():
    run = make_record(ODD)
    text = markdown.report(run, [Drawn("x", "Title", "Caption of <25 | $x_1$")], {}, [], "*best*")
    table = rows_of(text, "## Scores")
    assert {len(row) for row in table} == {len(table[0])}
    assert "&lt;25" in text and "<25" not in text
    assert r"a\|b c" in text
    assert r"\$x\_1\$ \[b\]" in text
    assert r"\*best\*" in text


def test_hundreds_of_pairs_do_not_bury_the_figures():
    run = make_record(tuple(f"d{i}" for i in range(200)))
    text = markdown.report(run, [], {}, [], "the best epoch")
    assert len(rows_of(text, "## Scores")) == 2 + markdown.MOST_PAIRS + 1
    assert f"{markdown.MOST_PAIRS} of 400 pairs, those that come first" in text
    assert "and 192 more" in text


def test_a_run_without_epochs_is_a_report_too(tmp_path):
    root = write_run(tmp_path / "run", metrics=False, epochs=0)
    write_report(record.read(root), None, "the run has no checkpoint best yet")
    text = (root / "report.md").read_text()
    assert "No epoch was finished." in text
    assert text.count("No figure: ") == 6
    assert not (root / "report").exists() or not list((root / "report").iterdir())


def test_a_figure_that_can_no_longer_be_drawn_does_not_stay(tmp_path):
    root = write_run(tmp_path / "run")
    write_report(record.read(root), None)
    assert (root / "report" / "curves.png").exists()
    (root / "metrics.csv").unlink()
    write_report(record.read(root), None)
    assert not (root / "report" / "curves.png").exists()
    assert "report/curves.png" not in (root / "report.md").read_text()
