"""What a person sees: a bar on a terminal, lines elsewhere, and an end table that fits."""

import io
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from rich.console import Console

from m3oe_fast.training import console as console_module
from m3oe_fast.training.console import ConsoleDisplay, print_scores

DOMAINS, TASKS = ("home", "discover", "[b]odd"), ("click", "long_view")


@pytest.fixture
def clock(monkeypatch):
    """Time stands still unless a test moves it."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(console_module.time, "perf_counter", lambda: now.seconds)
    return now


def shown(terminal=False, width=100):
    file = io.StringIO()
    return Console(file=file, force_terminal=terminal, width=width, highlight=False), file


def test_a_long_epoch_says_where_it_is_every_half_minute(clock):
    console, file = shown()
    with ConsoleDisplay(console) as display:
        display.begin_epoch(2, 10, 1000)
        for step in range(1, 101):
            clock.seconds += 1.0
            display.advance(10 * step, lambda: 0.5)
    lines = file.getvalue().splitlines()
    assert [line.split()[2] for line in lines] == ["30%", "60%", "90%"]
    assert lines[0] == "epoch 2/10  30%  loss 0.5000  10 rows/s  left 1:10"


def test_a_short_epoch_says_nothing_before_its_end(clock):
    console, file = shown()
    with ConsoleDisplay(console) as display:
        display.begin_epoch(1, 1, 100)
        for done in (50, 100):
            clock.seconds += 5.0
            display.advance(done, lambda: pytest.fail("nobody asked for the loss"))
    assert file.getvalue() == ""


def test_rows_before_a_resume_do_not_count_as_speed(clock):
    console, file = shown()
    with ConsoleDisplay(console) as display:
        display.begin_epoch(1, 1, 10_000, done=8_000)
        clock.seconds += 31
        display.advance(8_310, lambda: 0.5)
    assert file.getvalue().strip() == "epoch 1/1  83%  loss 0.5000  10 rows/s  left 2:49"


def test_no_progress_is_no_division_by_zero(clock):
    console, file = shown()
    with ConsoleDisplay(console) as display:
        display.begin_epoch(1, 1, 100, done=40)
        clock.seconds += 40
        display.advance(40, lambda: float("nan"))
    assert "0 rows/s  left -" in file.getvalue()


def test_the_bar_begins_where_a_resumed_epoch_does(clock):
    console, file = shown(terminal=True)
    with ConsoleDisplay(console) as display:
        display.begin_epoch(3, 9, 1000, done=500)
        clock.seconds += 10
        display.advance(600, lambda: 0.25)
        display._bar.refresh()
        assert display._bar.tasks[0].completed == 600
    text = file.getvalue()
    assert "epoch 3/9" in text
    assert "60%" in text
    assert "10 rows/s" in text
    assert "left 0:40" in text
    assert "loss 0.2500" in text


def test_hours_are_told_apart_from_minutes():
    assert console_module.duration(59.6) == "1:00"
    assert console_module.duration(3_725) == "1:02:05"


# The end table --------------------------------------------------------------------------------------------------------


@dataclass
class Pair:
    domain: str
    task: str
    rows: int = 123_456
    positives: int = 12_345

    @property
    def name(self):
        return f"{self.domain}/{self.task}"


@dataclass
class Scores:
    """As ``metrics.Scores``, with the values given."""

    domains: tuple = DOMAINS
    values: dict = field(default_factory=dict)
    reasons: list = field(default_factory=list)
    approximate: dict = field(default_factory=dict)

    @property
    def pairs(self):
        return tuple(Pair(domain, task) for domain in self.domains for task in TASKS)

    def undefined(self):
        return self.reasons

    def to_dict(self):
        keys = ["mean", *(pair.name for pair in self.pairs)]
        both = {name: dict.fromkeys(keys, 0.7654) for name in ("auc", "logloss")}
        return both | self.values


ALL = {
    "gauc": {"mean": 0.6543, "home/click": 0.6543},
    "calibration": {"mean": 1.0321, "home/click": 1.0321, "discover/click": None},
    "overall": {"auc": {"click": 0.7111}, "calibration": {"click": 1.0111}, "gauc": {"click": None}},
}


def table(scores, **more):
    console, file = shown(width=console_module.PLAIN_WIDTH)
    print_scores(console, "test", scores, **more)
    return file.getvalue().splitlines()


def test_the_whole_table_fits_a_hundred_columns():
    best = {"mean": 0.8, **dict.fromkeys((pair.name for pair in Scores().pairs), 0.8)}
    lines = table(Scores(values=ALL), best_auc=best, val=Scores())
    assert max(map(len, lines)) <= 100
    header = [cell.strip() for cell in lines[0].strip("|").split("|")]
    assert header == ["domain", "task", "rows", "pos.", "val AUC", "AUC", "best", "logloss", "GAUC", "calib."]
    first = [cell.strip() for cell in next(line for line in lines if line.startswith("| home")).strip("|").split("|")]
    assert first == ["home", "click", "123,456", "10.0%", *("0.7654", "0.7654", "0.8000", "0.7654", "0.6543", "1.0321")]
    overall = [line for line in lines if line.startswith("| overall")]
    assert len(overall) == 1  # of long_view none is defined
    assert [cell.strip() for cell in overall[0].strip("|").split("|")][4:] == ["-", "0.7111", "-", "-", "-", "1.0111"]
    assert lines[-1].startswith("| mean")
    assert any("[b]odd" in line for line in lines)


def test_columns_without_a_value_are_left_out():
    nothing = {"gauc": {"mean": None}, "calibration": {}, "overall": {"auc": {"click": None}}}
    lines = table(Scores(values=nothing))
    assert "GAUC" not in lines[0]
    assert "calib." not in lines[0]
    assert not any(line.startswith("| overall") for line in lines)


def test_what_is_not_exact_says_so():
    lines = table(Scores(approximate={"gauc": "of one in 8 users"}))
    assert lines[-1] == "approximate: test gauc of one in 8 users"


def test_one_domain_needs_no_overall():
    lines = table(Scores(domains=("all",), values=ALL))
    assert not any(line.startswith("| overall") for line in lines)


def test_hundreds_of_domains_do_not_bury_the_means():
    many = Scores(domains=tuple(f"d{i}" for i in range(200)), reasons=[f"AUC of d{i}: no rows" for i in range(200)])
    lines = table(many)
    assert sum(line.startswith("| d") for line in lines) == 1 + console_module.MOST_PAIRS
    assert any(line.startswith("340 more pairs") for line in lines)
    assert sum(line.startswith("undefined:") for line in lines) == console_module.MOST_PAIRS
    assert lines[-1] == "140 more values are undefined"
