"""Every way a command can end, and how any command reads its line, its YAML files and its help."""

import importlib
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import yaml

import m3oe_fast
from m3oe_fast import cli
from m3oe_fast.__main__ import COMMANDS
from m3oe_fast.__main__ import main as list_commands
from m3oe_fast.cli.output import check_output, writing
from m3oe_fast.cli.run_config import options_of_run, parse_with_data_of
from m3oe_fast.data.options import DataOptions, option
from m3oe_fast.errors import ConfigError

SOURCE = Path(m3oe_fast.__file__).parents[1]
# Loaded on its own: what is tested here does not need torch.
SCRIPT = """
import importlib.util, os, signal, sys, types
from pathlib import Path
sys.modules["m3oe_fast"] = types.ModuleType("m3oe_fast")
for name, file in (("errors", "errors.py"), ("cli.exits", "cli/exits.py")):
    spec = importlib.util.spec_from_file_location(f"m3oe_fast.{name}", Path(sys.argv[1], file))
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
def main(argv):
BODY
module.run(main)
"""


def run(body, stdout=subprocess.PIPE, **environment):
    script = SCRIPT.replace("BODY", "\n".join(f"    {line}" for line in body.splitlines()))
    done = subprocess.run(
        [sys.executable, "-c", script, str(SOURCE / "m3oe_fast")],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("body", "status", "error"),
    [
        ("return 0", 0, ""),
        ("return 130", 130, ""),
        ("sys.exit(0)", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("raise sys.modules['m3oe_fast.errors'].ConfigError('lr is odd')", 2, "error: lr is odd\n"),
        ("raise KeyboardInterrupt", 130, "interrupted\n"),
        ("raise BrokenPipeError", 0, ""),
        ("raise PermissionError(13, 'Permission denied', 'a/b')", 2, "error: a/b: Permission denied\n"),
        ("open('x' * 5000)", 2, "error: " + "x" * 5000 + ": File name too long\n"),
        ("raise OSError(28, 'No space left on device')", 2, "error: No space left on device\n"),
    ],
)
def test_status_and_one_line(body, status, error):
    assert run(body) == (status, "", error)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize(
    "body", ["print('x')\nreturn 0", "print('x', flush=True)\nreturn 0", "print('x')\nsys.exit(0)"]
)
def test_full_standard_output_is_one_line(body):
    with open("/dev/full", "w") as full:
        assert run(body, stdout=full) == (2, None, "error: No space left on device\n")


def test_names_beyond_the_encoding_of_the_output_are_escaped():
    status, out, error = run("print('caf\\u00e9 \\udcff')\nreturn 0", PYTHONIOENCODING="ascii")
    assert (status, out, error) == (0, "caf\\xe9 \\udcff\n", "")


def test_a_second_ctrl_c_at_the_end_is_silent():
    body = "import atexit\natexit.register(os.kill, os.getpid(), signal.SIGINT)\nraise KeyboardInterrupt"
    assert run(body) == (130, "", "interrupted\n")


def test_a_warning_for_the_user_is_one_line_and_others_keep_their_place():
    body = """import warnings
warnings.warn("slow here")
warnings.warn("old", FutureWarning)
return 0"""
    status, _, error = run(body)
    lines = error.splitlines()
    assert status == 0
    assert lines[0] == "warning: slow here"
    assert lines[1].endswith("FutureWarning: old")


# Options -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fruit:
    """A group of options of every type."""

    name: str = option("apple", "What it is called.")
    count: int = option(3, "How many.")
    weight: float | None = option(None, "How heavy (default: unknown).")
    ripe: bool = option(False, "Whether it can be eaten.")
    kind: Literal["on", "off", "auto"] = option("auto", "Some words.")
    cuts: int | list[int] | str = option(1, "Some widths.")

    def __post_init__(self):
        if self.count < 0:
            raise ConfigError(f"count must be at least 0, got {self.count}")


@dataclass(frozen=True)
class Place:
    """Another group."""

    out: str | None = option(None, "Where.")


def command(**changes):
    given = {
        "name": "test",
        "description": "Counts\nfruit.",
        "examples": ["", "--count 4"],
        "groups": {"fruit": Fruit, "place": Place},
        "aliases": {"--amount": "--count", "--save_dir": "--out", "--elsewhere": "--not_here"},
    }
    return cli.Command(**given | changes)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_nothing_typed_gives_the_defaults_group_by_group():
    assert command().parse([]) == (Fruit(), Place())


@pytest.mark.parametrize(
    ("line", "fruit"),
    [
        ("--count 4 --weight 0.5", Fruit(count=4, weight=0.5)),
        ("--count=4 --name=--x", Fruit(count=4, name="--x")),
        ("--weight -1", Fruit(weight=-1.0)),
        ("--ripe", Fruit(ripe=True)),
        ("--ripe --count 1", Fruit(ripe=True, count=1)),
        ("--ripe false --count 1", Fruit(count=1)),
        ("--amount 5", Fruit(count=5)),
        ("--count 5 --amount 6", Fruit(count=6)),
        ("--kind off", Fruit(kind="off")),
        ("--name=", Fruit(name="")),
        ("--name a=b", Fruit(name="a=b")),
        ("--cuts [3,4]", Fruit(cuts=[3, 4])),
    ],
)
def test_a_line_is_read(line, fruit):
    assert command().parse(line.split()) == (fruit, Place())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--cuont 3", "unknown option --cuont; did you mean --count[?]"),
        ("--cou 3", "unknown option --cou; did you mean --count[?]"),
        ("--amuont 3", "unknown option --amuont; did you mean --count[?]"),
        ("--elsewhere 3", "unknown option --elsewhere; see --help"),
        ("-c 3", "unknown option -c; see --help"),
        ("apple", "'apple' belongs to no option; write --name value, see --help"),
        ("--count", "--count must be followed by a whole number"),
        ("--count --ripe", "--count must be followed by a whole number"),
        ("--weight", "--weight must be followed by a number"),
        ("--kind", "--kind must be followed by one of on, off, auto"),
        ("--config", "--config must be followed by the path of a YAML file"),
        ("--count 1.5", "--count must be a whole number, got 1.5"),
        ("--weight heavy", "--weight must be a number, got heavy"),
        ("--ripe maybe", "--ripe must be true or false, got maybe"),
        ("--kind sweet", "--kind must be one of on, off, auto, got sweet"),
        ("--count -1", "count must be at least 0, got -1"),
        ("--cuts+=3", "unknown option --cuts[+]; did you mean --cuts[?]"),
    ],
)
def test_a_wrong_line_is_one_line(line, message):
    with pytest.raises(ConfigError, match=f"^{message}") as caught:
        command().parse(line.split())
    assert "\n" not in str(caught.value)


def test_a_word_alone_may_stand_for_an_option():
    named = command(bare="name")
    assert named.parse(["pear", "--count", "2"])[0] == Fruit("pear", 2)
    assert named.parse(["--ripe", "pear"])[0] == Fruit("pear", ripe=True)
    assert named.parse(["pear", "--name", "pear"])[0] == Fruit("pear")
    for argv in (["pear", "--name", "fig"], ["--name", "pear", "fig"], ["pear", "fig"]):
        with pytest.raises(ConfigError, match=r"^both pear and fig stand for --name; drop one$"):
            named.parse(argv)


def test_files_win_over_the_base_and_the_line_over_all():
    Path("a.yaml").write_text("count: 5\nname: fig\nkind: off\n")
    Path("b.yaml").write_text("amount: 6\nsave_dir: there\n")
    base = {"count": 4, "weight": 2, "name": "plum"}
    assert command().parse([], base) == (Fruit("plum", 4, 2.0), Place())
    line = ["--ripe", "--config", "a.yaml", "--weight=3", "--config=b.yaml"]
    assert command().parse(line, base) == (Fruit("fig", 6, 3.0, True, "off"), Place("there"))


def test_given_are_the_options_somebody_named():
    Path("a.yaml").write_text("amount: 5\nkind: on\n")
    line = ["--config", "a.yaml", "--name", "fig", "--ripe", "--print_config"]
    assert command().given(line) == {"count": 5, "kind": "on", "name": "fig", "ripe": "true"}
    assert command().given(line, files=False) == {"name": "fig", "ripe": "true"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"cuont: 3\n", "unknown option cuont; did you mean count[?]"),
        (b"amount: 3\ncount: 2\n", "count is there twice, once by another name; drop one"),
        (b"config: b.yaml\n", "config works on the line only"),
        (b"3: 4\n", "unknown option 3"),
        (b"count: many\n", "--count must be a whole number, got many"),
        (b"count: [3\n", "while parsing"),
        (b"- count\n", "it holds no options"),
        (b"", "it holds no options"),
        (b"\xff\xfe\x00", "'utf-8' codec can't decode|.*can't decode"),
        (b"name: 2020-13-45\n", "month must be in 1..12"),
        (b"[" * 5000, "maximum recursion|recursion"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_it(content, message):
    Path("c.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"^config file c\.yaml: ({message})") as caught:
        command().parse(["--config", "c.yaml"])
    assert "\n" not in str(caught.value)


def test_print_config_is_what_config_reads(capsys):
    with pytest.raises(SystemExit) as done:
        command().parse(["--amount", "7", "--print_config"])
    assert done.value.code in (0, None)
    Path("c.yaml").write_text(capsys.readouterr().out)
    assert yaml.safe_load(Path("c.yaml").read_text())["count"] == 7
    assert command().parse(["--config=c.yaml"]) == (Fruit(count=7), Place())


def test_help_is_for_people(capsys):
    with pytest.raises(SystemExit) as done:
        command(bare="name", interrupted="interrupted, and that is that").parse(["-h"])
    assert done.value.code in (0, None)
    text = capsys.readouterr().out
    for words in (
        "usage: python -m m3oe_fast.test [NAME] [--option value ...]\n\nCounts\nfruit.\n",
        "\nfruit:\n  --name TEXT ",
        "What it is called. (default: apple)",
        "--count N ",
        "--weight NUMBER ",
        "--ripe {true,false}",
        "Whether it can be eaten. (default: false)",
        "--kind {on,off,auto}",
        "\nplace:\n  --out TEXT            Where.\n",
        "examples:\n  python -m m3oe_fast.test\n  python -m m3oe_fast.test --count 4\n",
        "  --amount   = --count\n  --save_dir = --out\n",
        "exit status: 0 done, 2 wrong input, 130 interrupted, and that is that",
    ):
        assert words in text
    for word in ("Literal", "NoneType", "null", "+", "not_here"):
        assert word not in text
    assert max(map(len, text.splitlines())) <= 100


# Run folders and outputs -------------------------------------------------------------------------


def test_data_options_of_a_run_fill_in_what_the_line_leaves_out():
    described = cli.Command("test", "Reads.", [""], {"data": DataOptions})
    run = {"data": "recbole:a", "labels": "click=rating>3", "lr": 0.1, "split": "user"}
    assert parse_with_data_of(run, described, []) == (
        DataOptions(data="recbole:a", labels="click=rating>3", split="user"),
    )
    (data,) = parse_with_data_of(run, described, ["--split", "random", "--data=recbole:b"])
    assert data == DataOptions(data="recbole:b", labels="click=rating>3")
    (data,) = parse_with_data_of(run, described, ["--data", "prepared:a"])
    assert data == DataOptions(data="prepared:a")


def test_options_of_a_run_come_from_its_folder():
    Path("run/checkpoints/best").mkdir(parents=True)
    assert options_of_run("run") is None
    Path("run/config.yaml").write_text("lr: 0.1\n")
    for path in ("run", "run/checkpoints/best", Path("run/checkpoints/best").absolute()):
        assert options_of_run(path) == {"lr": 0.1}
    assert options_of_run("nowhere") is None
    Path("run/config.yaml").write_text("lr")
    with pytest.raises(ConfigError, match=r"^run/config\.yaml: it holds no options"):
        options_of_run("run")


def test_an_output_is_refused_before_it_is_made():
    Path("there").write_text("x")
    Path("folder").mkdir()
    for path, message in (
        ("there", "--json there is there already; name another file, or add --overwrite"),
        ("folder", "--json folder is a folder; name a file"),
        ("there/below", r"cannot write --json there/below \(.*\); name another file"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_output("json", Path(path), overwrite=False)
    check_output("json", Path("there"), overwrite=True)
    check_output("json", Path("new/deep/file"), overwrite=False)
    assert sorted(map(str, Path().rglob("*"))) == ["folder", "there"]
    assert Path("there").read_text() == "x"


def test_what_a_failed_write_made_is_gone():
    with pytest.raises(ZeroDivisionError), writing(Path("new/deep/file")) as stream:
        stream.write(b"half")
        raise ZeroDivisionError
    assert list(Path().iterdir()) == []
    with writing(Path("new/deep/file")) as stream:
        stream.write(b"whole")
    assert Path("new/deep/file").read_bytes() == b"whole"


# All commands ------------------------------------------------------------------------------------


def test_every_command_is_listed_and_explains_itself(capsys):
    assert list_commands([]) == 0
    listed = capsys.readouterr().out
    files = (SOURCE / "m3oe_fast").glob("*.py")
    commands = [file.stem for file in files if "cli.run(main)" in file.read_text()]
    assert sorted(commands) == sorted([*COMMANDS, "__main__"])
    for name, does in COMMANDS.items():
        assert f"python -m m3oe_fast.{name} " in listed and does in listed
        module = importlib.import_module(f"m3oe_fast.{name}")
        with pytest.raises(SystemExit):
            module.main(["--help"])
        text = capsys.readouterr().out
        assert text.startswith(f"usage: python -m m3oe_fast.{name} ") and "exit status: 0 done" in text
        with pytest.raises(ConfigError, match="unknown option --bogus"):
            module.main(["--bogus"])


def test_a_wrong_command_is_one_line():
    with pytest.raises(ConfigError, match=r"^a dot goes before the command: python -m m3oe_fast\.train --lr 3$"):
        list_commands(["train", "--lr", "3"])
    with pytest.raises(ConfigError, match=r"^there is no command 'fly'; the commands are train, evaluate,"):
        list_commands(["fly"])
