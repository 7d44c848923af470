"""Runs side by side: how many, what becomes of failed ones, Ctrl-C, and those that a killed table left at work."""

import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from m3oe_fast.comparison import workers
from m3oe_fast.comparison.folder import TableFolder
from m3oe_fast.comparison.plan import OURS, Outcome, Plan, Row, Run
from m3oe_fast.comparison.progress import ComparisonDisplay
from m3oe_fast.comparison.workers import Workers
from m3oe_fast.errors import UserError
from m3oe_fast.training.console import make_console

from .finished_runs import metrics

MMOE = Row("mmoe", "mdmt")

# Stands in for m3oe_fast.train: knows how to work for a while, to fail, and to end at SIGTERM.
TRAINER = """
import os, signal, sys, time
options = dict(word[2:].split("=", 1) for word in sys.argv[1:])
with open("started", "a") as stream:
    stream.write(options["label"] + " " + os.environ["OMP_NUM_THREADS"] + "\\n")
signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
print("at work", flush=True)
begun = time.time()
while os.path.exists("hold"):
    time.sleep(0.01)
what = options["does"]
if what == "fails":
    sys.exit("error: training diverged")
if what == "dies":
    os.kill(os.getpid(), signal.SIGKILL)
if what == "hangs":
    time.sleep(600)
os.makedirs(options["out"])
open(options["out"] + "/span", "w").write(f"{begun} {time.time()}")
if what != "forgets":
    open(options["out"] + "/done", "w").write(options["resume"])
"""


@pytest.fixture(autouse=True)
def trainer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("trainer.py").write_text(TRAINER)
    monkeypatch.setattr(workers, "TRAIN", (sys.executable, "-S", "trainer.py"))


def started():
    lines = Path("started").read_text().split("\n")[:-1] if Path("started").exists() else []
    return [line.split() for line in lines]


def make(plan, does=None, jobs=2, threads=3, val=lambda run: 0.7):
    folder = TableFolder("out", names_rates=len(plan.lrs) > 1)

    def words(run):
        label = f"{run.row.model}-{run.seed}-{run.lr:g}"
        return [f"--label={label}", f"--does={(does or {}).get(label, 'works')}"]

    def result(run):
        return metrics({"a/click": 0.7}, val=val(run)) if (folder.run(run) / "done").exists() else None

    display = ComparisonDisplay(make_console(), plan.size, jobs)
    return Workers(plan, folder, words, result, jobs, threads, display), folder


PLAN = Plan((MMOE, OURS), (1, 2), (0.1,))


def test_every_run_is_done_once_with_its_own_threads(capsys):
    work, folder = make(PLAN)
    assert work.run()
    assert sorted(started()) == [[f"{model}-{seed}-0.1", "3"] for model in ("m3oe", "mmoe") for seed in (1, 2)]
    assert set(work.outcomes) == set(PLAN.possible()) and all(done.metrics for done in work.outcomes.values())
    text = capsys.readouterr().out
    assert [line.split()[1] for line in text.splitlines()] == ["1/4", "2/4", "3/4", "4/4"]
    assert "m3oe mdmt  seed 2  lr 0.1  val AUC 0.7000  test AUC 0.7000" in text
    assert (folder.run(Run(MMOE, 1, 0.1)) / "done").read_text() == "last"
    again, _ = make(PLAN)
    assert again.run() and again.outcomes == work.outcomes
    assert len(started()) == 4 and capsys.readouterr().out == ""


@pytest.mark.parametrize("jobs", [1, 2])
def test_no_more_run_at_a_time_than_asked_for(jobs):
    work, folder = make(PLAN, jobs=jobs)
    assert work.run()
    spans = [tuple(map(float, (folder.run(run) / "span").read_text().split())) for run in PLAN.possible()]
    assert max(sum(a <= begun < b for a, b in spans) for begun, _ in spans) <= jobs


def test_the_rate_that_validates_best_is_trained_on():
    plan = Plan((MMOE,), (1, 2, 3), (0.1, 0.2))
    work, folder = make(plan, val=lambda run: run.lr)
    assert work.run()
    assert sorted(label for label, _ in started()) == [f"mmoe-{x}" for x in ("1-0.1", "1-0.2", "2-0.2", "3-0.2")]
    assert folder.run(Run(MMOE, 3, 0.2)).name == "3-lr0.2"


def test_failures_are_told_and_the_others_go_on(capsys):
    does = {"mmoe-1-0.1": "fails", "mmoe-2-0.1": "dies", "m3oe-1-0.1": "forgets"}
    work, _ = make(PLAN, does)
    assert work.run()
    reasons = {run: outcome.reason for run, outcome in work.outcomes.items()}
    assert reasons[Run(MMOE, 1, 0.1)] == "training diverged"
    assert reasons[Run(MMOE, 2, 0.1)] == "killed by SIGKILL, perhaps for want of memory"
    assert reasons[Run(OURS, 1, 0.1)] == "ended without a result; it last said: at work"
    assert work.outcomes[Run(OURS, 2, 0.1)].metrics
    assert "mmoe mdmt  seed 1  lr 0.1  failed: training diverged" in capsys.readouterr().out


def test_a_row_whose_rates_all_failed_ends(capsys):
    plan = Plan((MMOE,), (1, 2), (0.1, 0.2))
    work, _ = make(plan, {"mmoe-1-0.1": "fails", "mmoe-1-0.2": "fails"})
    assert work.run() and len(started()) == len(work.outcomes) == 2


def test_a_command_that_cannot_be_started_is_one_line(monkeypatch):
    monkeypatch.setattr(workers, "TRAIN", ("./nowhere",))
    work, _ = make(PLAN)
    with pytest.raises(UserError, match="cannot start mmoe mdmt  seed 1"):
        work.run()
    Path("out").rename("elsewhere")
    Path("out").write_text("")
    with pytest.raises(UserError, match=r"cannot write out/logs/mmoe-mdmt-1\.log: Not a directory"):
        make(PLAN)[0].run()


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_runs(number, capsys):
    work, folder = make(PLAN, {"mmoe-1-0.1": "hangs", "m3oe-1-0.1": "hangs"})

    def interrupt():
        wait_for(lambda: len(started()) == 2)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert not work.run()
    thread.join()
    assert len(started()) == 2 and not work.outcomes
    assert "stopping 2 runs" in capsys.readouterr().out
    assert workers._is_free(folder.log(Run(MMOE, 1, 0.1)))  # nobody holds it any more


def test_a_second_ctrl_c_leaves_at_once(monkeypatch):
    monkeypatch.setattr(workers, "TRAIN", (sys.executable, "-S", "stubborn.py"))
    Path("stubborn.py").write_text(
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint(1, flush=True)\ntime.sleep(600)\n"
    )
    work, folder = make(PLAN, jobs=1)
    log = folder.log(Run(MMOE, 1, 0.1))

    def interrupt():
        wait_for(lambda: log.exists() and log.read_text())
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert not work.run()
    thread.join()
    assert workers._is_free(log)


def test_runs_that_a_killed_table_left_are_waited_for_and_not_done_twice(capsys):
    """The orphan here is a process that holds the log as a run does."""
    run = Run(MMOE, 1, 0.1)
    work, folder = make(Plan((MMOE,), (1,), (0.1,)))
    Path("hold").write_text("")
    folder.log(run).parent.mkdir(parents=True)
    code = (
        "import fcntl, os, sys\n"
        "fcntl.flock(1, fcntl.LOCK_EX)\n"
        "os.execv(sys.executable, [sys.executable, '-S', 'trainer.py', *sys.argv[1:]])\n"
    )
    with folder.log(run).open("a") as stream:
        line = ["--label=orphan", "--does=works", f"--out={folder.run(run)}", "--resume=last"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        orphan = subprocess.Popen([sys.executable, "-S", "-c", code, *line], stdout=stream, env=environment)
    wait_for(lambda: "at work" in folder.log(run).read_text())
    thread = threading.Timer(0.5, Path("hold").unlink)
    thread.start()
    assert work.run()
    assert orphan.wait() == 0
    assert [label for label, _ in started()] == ["orphan"] and work.outcomes[run].metrics
    assert re.search("waiting for mmoe mdmt  seed 1  lr 0.1, which an earlier command left", capsys.readouterr().out)


def test_on_a_terminal_one_bar_counts_the_runs():
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=120, highlight=False, color_system=None)
    with ComparisonDisplay(console, 10, 2) as display:
        display.kept()
        display.ended(Run(MMOE, 1, 0.1), Outcome(metrics({"a/click": 0.75})), 61.0)
        display.ended(Run(MMOE, 2, 0.1), Outcome(None, "no [red]memory"), 5.0)
        display.at_work([Run(MMOE, 3, 0.1), Run(OURS, 3, 0.1), Run(OURS, 4, 0.1)])
    text = shown.getvalue()
    assert "run 2/10  mmoe mdmt  seed 1  lr 0.1  val AUC 0.7500  test AUC 0.7500  1:01  left 4:04" in text
    assert "failed: no [red]memory" in text
    assert "3/10  3 running  1 failed  left 3:34  mmoe mdmt, m3oe mdmt, ..." in text
