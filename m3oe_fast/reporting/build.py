"""The whole report of a run: figures into RUN/report, the text into RUN/report.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from m3oe_fast.data.dataset import Dataset
from m3oe_fast.models import AnyModel
from m3oe_fast.reporting import calibration, curves, embeddings, fusion, gates, markdown, sample, seesaw, style
from m3oe_fast.reporting.counts import count
from m3oe_fast.reporting.record import RunRecord
from m3oe_fast.reporting.style import Drawn
from m3oe_fast.training.run_folder import write_text

ROWS = 2000
FOLDER, FILE = "report", "report.md"


@dataclass(frozen=True)
class Loaded:
    """What the figures of the network are computed from.

    Attributes:
        model: with the weights to look into.
        dataset: what it was trained on.
        weights: which weights they are, in words.
        rows: test rows to draw for gates and embeddings.
    """

    model: AnyModel
    dataset: Dataset
    weights: str
    rows: int = ROWS


def write_report(run: RunRecord, loaded: Loaded | None, missing: str = "", notes: Sequence[str] = ()) -> Path:
    """Write report.md and its figures; those of an earlier report are replaced or, where there is none now, removed.

    Args:
        run: the run.
        loaded: None leaves out what needs the network or the rows.
        missing: why it is None, for the places of these figures.
        notes: further lines on what is missing.

    Returns:
        The path of report.md.

    Raises:
        UserError: the folder cannot be written.
    """
    with style.look():
        inner, counts = _inner(run, loaded, missing)
        drawn = [curves.draw(run), fusion.draw(run), *inner, seesaw.draw(run.seesaw)]
    legible = [_write(one, run.root / FOLDER / f"{one.name}.png") for one in drawn]
    if not all(legible):
        notes = (*notes, "no installed font has some signs of the names, which show as boxes in figures")
    weights = "the run's best epoch" if loaded is None else loaded.weights
    write_text(run.root / FILE, markdown.report(run, drawn, counts, (*run.notes, *notes), weights))
    return run.root / FILE


def _write(one: Drawn, path: Path) -> bool:
    """Write the figure, or remove that of an earlier report; returns whether every sign in it could be drawn."""
    if one.figure is None:
        path.unlink(missing_ok=True)
        return True
    return style.save(one.figure, path)


def _inner(run: RunRecord, loaded: Loaded | None, missing: str) -> tuple[list[Drawn], markdown.Counts]:
    """The figures that need model and rows, and the counts of labelled rows."""
    if loaded is None:
        return [Drawn(family.NAME, family.TITLE, missing) for family in (gates, calibration, embeddings)], {}
    model, dataset = loaded.model, loaded.dataset
    counts = {part: count(getattr(dataset, part), run.domains, run.tasks) for part in ("val", "test")}
    scored = sample.score(model, dataset.test)
    drawn = calibration.draw(calibration.curves(scored, run.domains, run.tasks), scored)
    if reason := sample.reason_not_to_look(model):
        first, last = (Drawn(family.NAME, family.TITLE, reason) for family in (gates, embeddings))
        return [first, drawn, last], counts
    inside = sample.look_inside(model, sample.draw(dataset.test, len(run.domains), loaded.rows))
    return [
        gates.draw(inside, run.domains, run.tasks),
        drawn,
        embeddings.draw(inside, run.domains, run.tasks),
    ], counts
