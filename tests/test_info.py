"""`python -m m3oe_fast.info`, the forced instruction set, how threads wait: each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from m3oe_fast import _extension, _threads
from m3oe_fast.info import EXTRAS, _precisions, describe


def python(*argv: str, **environment: str) -> subprocess.CompletedProcess:
    """Python with these arguments, in an environment where nobody has said how threads wait but ``environment``."""
    inherited = {k: v for k, v in os.environ.items() if k not in (_threads.WAIT_POLICY, _threads.SPIN_COUNT)}
    return subprocess.run(
        [sys.executable, *argv],
        capture_output=True,
        text=True,
        env={**inherited, **environment},
        check=False,
    )


def info(**environment: str) -> subprocess.CompletedProcess:
    return python("-m", "m3oe_fast.info", **environment)


def test_report_names_versions_backends_and_instruction_sets():
    result = info()
    assert result.returncode == 0 and result.stderr == ""
    lines = dict(line.split("  ", 1) for line in result.stdout.splitlines())
    assert lines["torch"].strip() == torch.__version__
    assert lines["backend cpu"].strip() == "on"
    assert "not built yet" in lines["backend cuda"]
    assert "scalar" in lines["instruction sets found"]
    assert {"threads", "CUDA", "python", "compiler", "pandas"} <= set(lines)
    assert lines["precisions"].strip().startswith("fp32")


def test_extras_are_there_with_their_versions_or_say_how_to_get_them(monkeypatch):
    versions = {"optuna": "5.0", "matplotlib": "3.8"}
    monkeypatch.setattr("m3oe_fast.info._version", versions.get)
    lines = describe()
    assert lines["for tune"] == "optuna 5.0"
    assert lines["for report"] == "off: pip install 'm3oe_fast[report]'"  # scikit-learn is missing
    assert lines["for wandb"] == "off: pip install 'm3oe_fast[wandb]'"
    assert lines["numpy"] == "not installed"


def test_extras_are_those_of_the_package():
    pyproject = Path(__file__).parents[1] / "pyproject.toml"
    if sys.version_info < (3, 11) or not pyproject.is_file():
        pytest.skip("needs the source tree and tomllib")
    import tomllib

    declared = tomllib.loads(pyproject.read_text())["project"]["optional-dependencies"]
    for extra, packages in EXTRAS.items():
        assert tuple(requirement.split(">=")[0] for requirement in declared[extra]) == packages


def test_nothing_but_help_can_be_asked_for():
    result = python("-m", "m3oe_fast.info", "--config", "x")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: unknown option --config; see --help\n"


@pytest.mark.parametrize("isa", _extension.load().cpu_isas())
def test_forced_instruction_set(isa):
    lines = info(M3OE_FAST_CPU_ISA=isa).stdout.splitlines()
    assert any(line.startswith("instruction set in use") and f" {isa} (forced" in line for line in lines)


def test_impossible_instruction_set_turns_the_backend_off_with_the_reason():
    result = info(M3OE_FAST_CPU_ISA="neon")
    assert result.returncode == 0
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("backend cpu")]
    assert "off: M3OE_FAST_CPU_ISA=neon cannot run here; this processor offers" in line


@pytest.mark.parametrize(
    ("bf16", "bf16x3", "line"),
    [
        (True, True, "fp32, bf16x3, bf16"),
        (True, False, "fp32, bf16 (bf16x3 computed in fp32 here)"),
        (False, False, "fp32 (bf16x3 and bf16 computed in fp32 here)"),
    ],
)
def test_report_says_which_precisions_have_kernels(monkeypatch, bf16, bf16x3, line):
    module = SimpleNamespace(computes_bf16=lambda: bf16, computes_bf16x3=lambda: bf16x3)
    monkeypatch.setattr("m3oe_fast._extension.load", lambda: module)
    assert _precisions() == line


# How threads wait --------------------------------------------------------------------------------

ASK = "import os, m3oe_fast; print(os.environ.get('OMP_WAIT_POLICY'))"


def waits(result: subprocess.CompletedProcess) -> str:
    """What the report says about waiting."""
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("OpenMP wait policy")]
    return line.removeprefix("OpenMP wait policy").strip()


@pytest.mark.parametrize(
    "argv", [["-m", "m3oe_fast.info"], ["-mm3oe_fast.info"], ["-W", "ignore", "-um", "m3oe_fast.info"]]
)
def test_threads_of_own_commands_sleep(argv):
    assert waits(python(*argv)).startswith("PASSIVE, set by this command; in programs of your own")


def test_a_choice_of_the_user_is_kept():
    assert waits(info(OMP_WAIT_POLICY="ACTIVE")) == "ACTIVE"
    assert waits(info(OMP_WAIT_POLICY="PASSIVE")) == "PASSIVE"
    assert waits(info(GOMP_SPINCOUNT="7")) == "unset, but GOMP_SPINCOUNT is 7"


def test_a_program_that_imports_the_package_is_left_alone(tmp_path):
    (tmp_path / "single.py").write_text(ASK)
    # Its package imports ours while -m still looks for the module.
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "__init__.py").write_text("import m3oe_fast")
    (tmp_path / "folder" / "tool.py").write_text(ASK)
    for argv in (
        ["-c", ASK],
        [str(tmp_path / "single.py"), "-m", "m3oe_fast.info"],
        ["-m", "single", "-m", "m3oe_fast.info"],
        ["-m", "folder.tool", "m3oe_fast.info"],
        ["-c", f"import sys; del sys.argv[1:]; {ASK}", "m3oe_fast.info"],
    ):
        result = python(*argv, PYTHONPATH=str(tmp_path))
        assert (result.stdout, result.stderr) == ("None\n", ""), argv


def test_own_command_that_a_program_runs_gets_the_advice():
    code = "import sys; from m3oe_fast.info import main; sys.exit(main([]))"
    assert waits(python("-c", code)).startswith("unset; set OMP_WAIT_POLICY=PASSIVE on shared cores")


def as_if_typed(*words: str, before: str = "") -> str:
    """The policy after an import while ``python WORDS`` looks for its module; ``before`` runs ahead of it."""
    argv = ["-m", *words[words.index("-m") + 2 :]]
    result = python("-c", f"import sys; sys.argv, sys.orig_argv = {argv}, {['python', *words]}\n{before}\n{ASK}")
    assert result.stderr == ""
    return result.stdout.strip()


def test_only_the_name_behind_m_counts():
    assert as_if_typed("-m", "m3oe_fast.train", "--epochs", "3", "-m", "x") == "PASSIVE"
    assert as_if_typed("-m", "m3oe_fast_tools.train") == "None"
    assert as_if_typed("-m", "pytest", "m3oe_fast.train") == "None"


def test_too_late_after_torch():
    assert as_if_typed("-m", "m3oe_fast.train", before="import torch") == "None"
