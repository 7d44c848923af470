"""`python -m m3oe_fast.info`: what is installed, which backends can run here and why others cannot."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

from m3oe_fast import __version__, _extension, _threads, backends, cli

PACKAGES = ("torch", "numpy", "pandas", "pyarrow", "jsonargparse", "triton")
EXTRAS = {
    "tune": ("optuna",),
    "report": ("matplotlib", "scikit-learn", "scipy"),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
}
"""Packages that only some options need, by the extra that installs them."""

_READ = "(docs/training.md, On shared machines)"


def describe() -> dict[str, str]:
    """Every line of the report, by label."""
    lines = {"m3oe_fast": __version__, "python": platform.python_version(), "machine": platform.platform()}
    for package in PACKAGES:
        lines[package] = _version(package) or "not installed"
    for extra, packages in EXTRAS.items():
        versions = {package: _version(package) for package in packages}
        if None in versions.values():
            lines[f"for {extra}"] = f"off: pip install 'm3oe_fast[{extra}]'"
        else:
            lines[f"for {extra}"] = ", ".join(f"{package} {version}" for package, version in versions.items())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in backends.NAMES:
        reasons = backends.reasons_against(name, device if name in ("triton", "cuda") else torch.device("cpu"))
        lines[f"backend {name}"] = "off: " + "; ".join(reasons) if reasons else "on"
    if not _extension.reasons_missing():
        module = _extension.load()
        forced = os.environ.get("M3OE_FAST_CPU_ISA")
        lines["instruction sets found"] = ", ".join(module.cpu_isas())
        lines["instruction set in use"] = module.cpu_isa() + (" (forced by M3OE_FAST_CPU_ISA)" if forced else "")
        lines["precisions"] = _precisions()
        lines["compiler"] = module.compiler
    lines["threads"] = f"{torch.get_num_threads()} of {os.cpu_count()} processors"
    lines["OpenMP wait policy"] = _wait_policy()
    lines["CUDA"] = (
        f"{torch.version.cuda}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "no device"
    )
    return lines


def _version(package: str) -> str | None:
    """The version of an installed distribution, None if there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _precisions() -> str:
    """Which precisions the CPU kernels in use compute in, and which are fp32 under another name."""
    here = {name: backends.compute_precision("cpu", name) == name for name in ("fp32", "bf16x3", "bf16")}
    others = [name for name, has_kernels in here.items() if not has_kernels]
    return ", ".join(name for name, has_kernels in here.items() if has_kernels) + (
        f" ({' and '.join(others)} computed in fp32 here)" if others else ""
    )


def _wait_policy() -> str:
    """How waiting threads of OpenMP pass their time, as the environment of this process says."""
    policy = os.environ.get(_threads.WAIT_POLICY)
    if policy is None and _threads.SPIN_COUNT in os.environ:
        return f"unset, but {_threads.SPIN_COUNT} is {os.environ[_threads.SPIN_COUNT]}"
    if policy is None:
        return f"unset; set {_threads.WAIT_POLICY}=PASSIVE on shared cores: spinning threads slow each other {_READ}"
    if _threads.chosen:
        return f"{policy}, set by this command; in programs of your own set it yourself {_READ}"
    return policy


COMMAND = cli.Command(
    "info",
    "What is installed, which backends can run here, and why others cannot.",
    examples=[""],
    groups={},
)


def main(argv: list[str]) -> int:
    """Print the report."""
    COMMAND.parse(argv)
    lines = describe()
    width = max(map(len, lines))
    for label, value in lines.items():
        print(f"{label:<{width}}  {value}")
    return 0


if __name__ == "__main__":
    cli.run(main)
