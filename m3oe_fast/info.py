"""`python -m m3oe_fast.info`: what is installed, which backends can run here and why others cannot."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform

import torch

from m3oe_fast import __version__, _extension, backends, cli

PACKAGES = ("torch", "numpy", "pandas", "pyarrow", "torchmetrics", "triton")


def describe() -> dict[str, str]:
    """Every line of the report, by label."""
    lines = {"m3oe_fast": __version__, "python": platform.python_version(), "machine": platform.platform()}
    for package in PACKAGES:
        found = importlib.util.find_spec(package) is not None
        lines[package] = importlib.metadata.version(package) if found else "not installed"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in backends.NAMES:
        reasons = backends.reasons_against(name, device if name in ("triton", "cuda") else torch.device("cpu"))
        lines[f"backend {name}"] = "off: " + "; ".join(reasons) if reasons else "on"
    if not _extension.reasons_missing():
        module = _extension.load()
        forced = os.environ.get("M3OE_FAST_CPU_ISA")
        lines["instruction sets found"] = ", ".join(module.cpu_isas())
        lines["instruction set in use"] = module.cpu_isa() + (" (forced by M3OE_FAST_CPU_ISA)" if forced else "")
        lines["compiler"] = module.compiler
    lines["threads"] = f"{torch.get_num_threads()} of {os.cpu_count()} processors"
    lines["CUDA"] = (
        f"{torch.version.cuda}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "no device"
    )
    return lines


def main(argv: list[str]) -> int:
    """Print the report."""
    parser = argparse.ArgumentParser("python -m m3oe_fast.info", description=__doc__.split(": ", 1)[1])
    parser.parse_args(argv)
    lines = describe()
    width = max(map(len, lines))
    for label, value in lines.items():
        print(f"{label:<{width}}  {value}")
    return 0


if __name__ == "__main__":
    cli.run(main)
