"""What a download shows."""

import io

import pytest
from rich.console import Console

from m3oe_fast.cli.transfer import TransferDisplay


def shown(terminal, steps, **options):
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=100, highlight=False)
    with TransferDisplay(console, "log.zip", 4_000_000, **options) as display:
        for step in steps:
            display.tell(step) if isinstance(step, str) else display.report(step)
        display._bar.refresh()
    return text.getvalue()


def test_lines_where_there_is_no_terminal():
    lines = shown(False, [1_000_000, "lost [bold]", 4_000_000], line_seconds=0).splitlines()
    assert lines == ["log.zip  25%  1.0 MB of 4.0 MB", "lost [bold]", "log.zip  100%  4.0 MB of 4.0 MB"]


def test_no_line_for_a_short_download():
    assert shown(False, [0, 4_000_000]) == ""


@pytest.mark.parametrize("first", [0, 3_000_000])
def test_bar_on_a_terminal(first):
    text = shown(True, [first, "lost", 3_500_000])
    assert "log.zip" in text
    assert "3.5/4.0 MB" in text
    assert "lost" in text


def test_an_earlier_part_counts_for_no_speed():
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with TransferDisplay(console, "log.zip", 4_000_000) as display:
        display.report(3_000_000)
        (task,) = display._bar.tasks
        assert task.completed == 3_000_000
        assert not task.speed
