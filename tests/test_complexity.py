"""The formulas of docs/complexity.md, and what bench.complexity counts, checks, times and draws."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchmetrics", reason="bench needs it")

from bench import complexity, gate, models, plot_complexity, report, workload
from bench.tables import complexity as tables
from m3oe_fast.errors import DataError, UserError
from m3oe_fast.models import MODELS

DOCUMENT = Path(__file__).parents[1] / "docs" / "complexity.md"
SIZES = {
    "published": {"num_domains": 3, "num_tasks": 2},
    "single": {"num_domains": 1, "num_tasks": 1},
    "odd": {
        "num_domains": 5,
        "num_tasks": 3,
        "tower_dim": 7,
        "expert_dims": (33, 17, 9),
        "shared_experts": 2,
        "specific_experts": 3,
        "knowledge_dim": 6,
        "attention_dim": 11,
        "gate_dim": 10,
        "tower_layers": 4,
        "star_dim": 21,
        "hidden_dim": 13,
    },
}
QUICK = ["--quick", "--models", "mlp", "star", "m2m", "pepnet", "mmoe", "m3oe"]


def formulas():
    """By model: what E is, parameters, multiply-adds, as the document has them."""
    rows = [line.strip("|\n ").split(" | ") for line in DOCUMENT.read_text().splitlines() if line.startswith("| `")]
    return {re.match(r"`(\w+)`", model)[1]: (model.partition("E = ")[2], *counts) for model, *counts in rows}


def evaluate(formula, values):
    """A formula of the document: names side by side are a product, M, P and Q are functions."""
    tokens = re.findall(r"[A-Za-z]+|\d+|[()+]", formula)
    assert "".join(tokens) == formula.replace(" ", "")
    text = tokens[0]
    for left, right in itertools.pairwise(tokens):
        product = left not in "(+MPQ" and right not in "+)"
        text += f"*{right}" if product else right
    return eval(text, {"__builtins__": {}}, values)


def symbols(c):
    """The document's symbols for a configuration."""
    widths = c.expert_dims
    x, y = widths[-1], getattr(c, "tower_dim", 0)

    def m(width):
        return sum(i * o for i, o in itertools.pairwise([width, *widths]))

    found = {"I": c.input_dim, "D": c.num_domains, "T": c.num_tasks, "L": len(widths), "W": sum(widths), "X": x, "Y": y}
    found |= {"M": m, "P": lambda width: m(width) + 3 * sum(widths), "Q": lambda width: m(width) + sum(widths)}
    found |= {"t": x * y + y, "u": x * y + 4 * y + 1}
    named = {"K": "shared_experts", "n": "specific_experts", "U": "knowledge_dim", "A": "attention_dim"}
    named |= {"G": "gate_dim", "J": "tower_layers", "S": "star_dim", "H": "hidden_dim"}
    return found | {symbol: getattr(c, field) for symbol, field in named.items() if hasattr(c, field)}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_multiply_adds_are_those_of_the_document(name, sizes):
    sizes = SIZES[sizes] | ({"num_domains": 1, "num_tasks": 1} if name == "mlp" else {})
    fields = {field.name for field in dataclasses.fields(MODELS[name].config_type)}
    config = models.config_of(name, **{field: value for field, value in sizes.items() if field in fields})
    model = MODELS[name](config)
    looked_up = sum(table.numel() for table in model.table_parameters())
    experts, parameters, multiply_adds = formulas()[name]
    values = symbols(config)
    if experts:
        values["E"] = evaluate(experts, values)
    assert evaluate(parameters, values) == sum(p.numel() for p in model.parameters()) - looked_up
    assert evaluate(multiply_adds, values) == model.multiply_adds()


def test_a_family_of_mlps_counts_all_pairs_and_a_row_its_tasks():
    point = complexity.Point(5, 3, 4)
    family = complexity.make("mlp", point, 0)
    found = complexity.counts(family, point)
    values = symbols(family.config) | {"D": 5, "T": 3}
    _, parameters, multiply_adds = formulas()["mlp"]
    assert found["parameters"] == evaluate(parameters, values)
    assert found["multiply_adds"] == evaluate(multiply_adds, values)
    assert found["parameters_with_tables"] == sum(p.numel() for p in family.parameters())
    assert 5 * found["bytes_read"] == found["bytes"]  # of each domain the models of all tasks


def test_the_reference_computes_what_a_row_does_not_need():
    point = complexity.Point(10, 2, 4)
    found = {name: complexity.counts(complexity.make(name, point, 0), point) for name in ("ple", "star", "adatt")}
    assert found["star"]["reference_multiply_adds"] > 9 * found["star"]["multiply_adds"]
    assert found["ple"]["reference_multiply_adds"] > 3 * found["ple"]["multiply_adds"]


def test_what_is_made_of_parameters_once_a_step_counts_for_no_row():
    found = {
        d: complexity.counts(complexity.make("m2m", point, 0), point)
        for d in (1, 30)
        if (point := complexity.Point(d, 2, 4))
    }
    assert found[1]["reference_multiply_adds"] == found[30]["reference_multiply_adds"] <= found[30]["multiply_adds"]


@pytest.mark.parametrize("name", ["shared_bottom", "mmoe", "ple"])
def test_a_row_reads_all_weights_of_one_domain_and_no_more_with_others(name):
    found = {
        d: complexity.counts(complexity.make(name, complexity.Point(d, 2, 4), 0), complexity.Point(d, 2, 4))
        for d in (1, 7)
    }
    assert found[1]["bytes_read"] == found[1]["bytes"] == 4 * found[1]["parameters"]
    assert found[7]["bytes_read"] == found[1]["bytes_read"] < found[7]["bytes"]


def test_a_row_reads_folded_and_generated_weights_in_the_place_of_what_makes_them():
    point = complexity.Point(4, 2, 3)
    read = {
        name: complexity.weights_read(complexity.make(name, point, 0)) for name in ("m3oe", "star", "m2m", "pepnet")
    }
    values = {name: symbols(complexity.config_of(name, point)) for name in read}
    values["m3oe"]["E"] = 3 + 4 + 2
    by_hand = {
        "m3oe": "2 (I + 3) H + E P(H) + T (K (H + 1) + u)",  # star and skip: weight, bias, gain and offset
        "star": "P(I) + T u",
        "m2m": "K P(I) + X A + T A + A + J T (X X + X) + T (X + 1)",
        "pepnet": "(I + 3) G + (G + 1) I + L (2 I + 3) G + T ((G + 1) W + P(I) + X + 1)",
    }
    assert read == {name: evaluate(formula, values[name]) for name, formula in by_hand.items()}


@pytest.fixture(scope="module")
def quick():
    """A quick run's document."""
    options = complexity._parse(QUICK)
    return json.loads(json.dumps(complexity.run(options)))


def test_every_model_is_measured_at_every_point_of_a_sweep(quick):
    found = [(point["axis"], point["value"]) for point in quick["points"]]
    assert found == [("D", 1), ("D", 3), ("T", 1), ("T", 2), ("K", 2), ("K", 4)]
    for point in quick["points"]:
        expected = ["m2m", "mmoe", "m3oe"] if point["K"] == 2 else QUICK[2:]
        assert list(point["models"]) == expected
        for one in point["models"].values():
            assert all(one[what]["seconds"]["median"] > 0 < one[what]["cpu_seconds"] for what in tables.TIMES)


def test_the_tables_show_counts_bytes_and_times_against_every_axis(quick):
    text = report.render(quick)
    assert text.count("**By ") == 9 and "times say nothing" in text
    of_k = text.partition("**By K: ms")[2]
    assert "| m2m" in of_k and "star" not in of_k
    assert "eager PyTorch" in text and "not timed" not in text


def test_the_figure_has_a_look_for_every_model_and_is_written(quick, tmp_path):
    assert set(plot_complexity.LOOKS) == set(MODELS)
    looks = [(str(colour), line, marker) for colour, line, marker in plot_complexity.LOOKS.values()]
    assert len(set(looks)) == len(looks)
    pytest.importorskip("matplotlib")
    kept = tmp_path / "quick.json"
    kept.write_text(json.dumps(quick))
    assert plot_complexity.main([str(kept), "--out", str(tmp_path / "f" / "a.png")]) == 0
    assert (tmp_path / "f" / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match=r"a\.foo"):
        plot_complexity.main([str(kept), "--out", str(tmp_path / "a.foo")])
    kept.write_text(json.dumps(quick | {"kind": "compare"}))
    with pytest.raises(DataError, match=r"bench\.compare"):
        plot_complexity.main([str(kept), "--out", str(tmp_path / "a.png")])


def test_what_would_take_too_long_is_left_out_and_said():
    options = complexity._parse(["--quick", "--sweep", "K", "--models", "mmoe", "star", "--most_gflop", "0.03"])
    result = complexity.run(options)
    base = result["points"][-1]["models"]
    assert "step" not in base["mmoe"] and "step" in base["star"]
    assert "more than 0.03 GFLOP" in report.render(result)


@pytest.mark.parametrize("name", ["mmoe", "mlp", "pepnet"])
def test_nothing_is_timed_that_computes_something_else(name, monkeypatch):
    point = complexity.Point(2, 2, 2)
    model = complexity.make(name, point, 0)
    complexity._check(name, model, point, 0)
    kind = MODELS[name]
    right = kind.predict
    wrong = {torch.float32: 1e-4, torch.float64: 0.0}
    monkeypatch.setattr(kind, "predict", lambda self, *inputs: right(self, *inputs) + wrong[self.embedding.dtype])
    with pytest.raises(gate.GateError, match=f"{name}, D=2 T=2 K=2: probabilities"):
        complexity._check(name, model, point, 0)


def test_a_wrong_gradient_is_refused_though_the_probabilities_are_right(monkeypatch):
    point = complexity.Point(2, 2, 2)
    model = complexity.make("mmoe", point, 0)
    right = MODELS["mmoe"].loss
    monkeypatch.setattr(MODELS["mmoe"], "loss", lambda self, *batch: right(self, *batch) * 1.001)
    with pytest.raises(gate.GateError, match="mmoe, m3oe_fast"):
        complexity._check("mmoe", model, point, 0)


@pytest.mark.parametrize("name, point", [("mmoe", complexity.Point(3, 8, 4)), ("m3oe", complexity.Point(3, 2, 16))])
def test_rounding_is_no_reason_to_refuse(name, point):
    """In the first batch a ReLU is 8e-8 from its kink, in the second a fusion gradient is what a cancellation left."""
    complexity._check(name, complexity.make(name, point, 0), point, 0)


def test_a_check_of_no_rows_is_a_refusal(monkeypatch):
    monkeypatch.setattr(workload, "KINK_MARGIN", 1e9)
    point = complexity.Point(2, 2, 2)
    with pytest.raises(gate.GateError, match="mmoe: every row has a ReLU on its kink; check with more rows"):
        complexity._check("mmoe", complexity.make("mmoe", point, 0), point, 0)
