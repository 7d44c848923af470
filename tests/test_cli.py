"""Every way a command can end: its exit status and what it prints."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import m3oe_fast

SOURCE = Path(m3oe_fast.__file__).parents[1]
# Loaded on its own: what is tested here does not need torch.
SCRIPT = """
import importlib.util, os, signal, sys, types
from pathlib import Path
for name in ("errors", "cli"):
    spec = importlib.util.spec_from_file_location(f"m3oe_fast.{name}", Path(sys.argv[1], f"{name}.py"))
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    if name == "errors":
        sys.modules["m3oe_fast"] = types.ModuleType("m3oe_fast")
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
