"""`python -m m3oe_fast.info` and the forced instruction set, each in a process of its own."""

import os
import subprocess
import sys

import pytest
import torch

from m3oe_fast import _extension


def info(**environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "m3oe_fast.info"],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


def test_report_names_versions_backends_and_instruction_sets():
    result = info()
    assert result.returncode == 0 and result.stderr == ""
    lines = dict(line.split("  ", 1) for line in result.stdout.splitlines())
    assert lines["torch"].strip() == torch.__version__
    assert lines["backend cpu"].strip() == "on"
    assert "not built yet" in lines["backend cuda"]
    assert "scalar" in lines["instruction sets found"]
    assert {"threads", "CUDA", "python", "compiler"} <= set(lines)


@pytest.mark.parametrize("isa", _extension.load().cpu_isas())
def test_forced_instruction_set(isa):
    lines = info(M3OE_FAST_CPU_ISA=isa).stdout.splitlines()
    assert any(line.startswith("instruction set in use") and f" {isa} (forced" in line for line in lines)


def test_impossible_instruction_set_turns_the_backend_off_with_the_reason():
    result = info(M3OE_FAST_CPU_ISA="neon")
    assert result.returncode == 0
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("backend cpu")]
    assert "off: M3OE_FAST_CPU_ISA=neon cannot run here; this processor offers" in line
