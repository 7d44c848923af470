"""The formulas of docs/complexity.md, and what bench.complexity counts."""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("torchmetrics", reason="bench needs it")

from bench import complexity, models
from bench.tables import complexity as tables
from m3oe_fast.models import MODELS

SIZES = [
    {"num_domains": 3, "num_tasks": 2},
    {"num_domains": 1, "num_tasks": 1},
    {"num_domains": 5, "num_tasks": 3, "tower_dim": 7, "expert_dims": (33, 17, 9)},
]
SHARED = {"shared_experts": 3}
SPECIFIC = {"specific_experts": 2}


def stack(width, widths):
    products = sum(i * o for i, o in zip([width, *widths], widths, strict=False))
    return products, products + 3 * sum(widths)


def formulas(name, c):
    """Parameters without tables and multiply-adds, as the document has them."""
    d, t, i = c.num_domains, c.num_tasks, c.input_dim
    k = getattr(c, "shared_experts", 0)
    n = getattr(c, "specific_experts", 0)
    x, y = c.expert_dims[-1], c.tower_dim
    a, p = stack(i, c.expert_dims)
    tower, u = x * y + y, x * y + 4 * y + 1
    e = k + d * t * n
    shared = a + sum(c.expert_dims)
    table = {
        "mlp": (p + u, a + x + tower),
        "shared_bottom": (p + d * t * u, a + t * (x + tower)),
        "mmoe": (k * p + d * t * (k * (i + 1) + u), k * a + t * (k * (i + x) + tower)),
        "ple": (
            (k + d * t * n) * p + d * t * ((k + n) * (i + 1) + u),
            (k + t * n) * a + t * ((k + n) * (i + x) + tower),
        ),
        "adatt": (e * p + d * t * (e * (i + 1) + n + u), e * a + t * (e * (i + x) + tower)),
        "star": (d * p + shared + d * t * u + t * (x * y + 2 * y + 1), a + t * (x + tower)),
    }
    table["adatt_sp"] = table["adatt"]
    if name != "m3oe":
        return table[name]
    s, h, e = c.star_dim, c.hidden_dim, k + d + t
    a, p = stack(h, c.expert_dims)
    parameters = (d + 1) * (i * s + s) + s * h + 3 * h + i * h + 3 * h + e * p + d * t * (k * (h + 1) + u) + 4
    return parameters, 2 * i * h + e * a + t * (k * h + e * x + tower)


@pytest.mark.parametrize("sizes", SIZES, ids=["published", "single", "odd"])
@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("m2m", "pepnet")])
def test_parameters_and_multiply_adds_are_those_of_the_document(name, sizes):
    if name == "mlp":
        sizes = sizes | {"num_domains": 1, "num_tasks": 1}
    fields = {field.name for field in dataclasses.fields(MODELS[name].config_type)}
    own = {field: value for field, value in (SHARED | SPECIFIC | sizes).items() if field in fields}
    config = models.config_of(name, **own)
    model = MODELS[name](config)
    tables_of = sum(table.numel() for table in model.table_parameters())
    counted = sum(p.numel() for p in model.parameters()) - tables_of, model.multiply_adds()
    assert counted == formulas(name, config)


def test_a_family_of_mlps_counts_all_pairs_and_a_row_its_tasks():
    point = complexity.Point(5, 3, 4)
    family = complexity.make("mlp", point, 0)
    one = family.members[0].model
    found = complexity.counts(family, point)
    assert found["multiply_adds"] == 3 * one.multiply_adds()
    assert found["parameters"] == 15 * formulas("mlp", one.config)[0]
    assert found["parameters_with_tables"] == sum(p.numel() for p in family.parameters())


def test_the_reference_computes_what_a_row_does_not_need():
    point = complexity.Point(10, 2, 4)
    found = {name: complexity.counts(complexity.make(name, point, 0), point) for name in ("ple", "star", "adatt")}
    assert found["star"]["reference_multiply_adds"] > 9 * found["star"]["multiply_adds"]
    assert found["ple"]["reference_multiply_adds"] > 3 * found["ple"]["multiply_adds"]
    assert found["ple"]["bytes_read"] < 4 * found["ple"]["parameters"] / 3
    assert found["adatt"]["bytes_read"] > 3.5 * found["adatt"]["parameters"]


def test_what_is_made_of_parameters_once_a_step_counts_for_no_row():
    found = {
        d: complexity.counts(complexity.make("m2m", point, 0), point)
        for d in (1, 30)
        if (point := complexity.Point(d, 2, 4))
    }
    assert found[1]["reference_multiply_adds"] == found[30]["reference_multiply_adds"] <= found[30]["multiply_adds"]


def test_every_model_is_measured_at_every_point_of_a_sweep(monkeypatch):
    monkeypatch.setitem(complexity.SWEEPS, "K", (1, 4))
    line = ["--sweep", "K", "--batch", "64", "--rounds", "1", "--models", "mlp", "star", "mmoe", "m2m", "m3oe"]
    result = complexity.run(complexity._parse(line)) | {"settings": {"batch": 64}}
    assert [point["value"] for point in result["points"]] == [1, 4]
    for point in result["points"]:
        assert list(point["models"]) == ["mlp", "star", "mmoe", "m2m", "m3oe"]
        assert all(set(one) >= {"predict_1", "predict", "step"} for one in point["models"].values())
    text = "\n".join(tables.render(result))
    assert "| m2m" in text and "eager PyTorch" in text and "K = 4" in text


def test_what_would_take_too_long_is_left_out():
    line = "--sweep K --batch 64 --rounds 1 --models mmoe star --most_gflop 0.03"
    found = complexity._at(complexity.Point(3, 2, 16), complexity._parse(line.split()))
    assert "step" not in found["mmoe"] and "step" in found["star"]
