"""What a stranger meets: the wheel, sdist -> wheel -> import, the clone's root, an unbuilt tree, no compiler.

Tests that need the source tree are skipped where the tests run without one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
needs_sources = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="no source tree")


def python(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": "", **environment}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A copy of the sources without anything built."""
    if not (ROOT / "csrc").is_dir():
        pytest.skip("no source tree")
    target = tmp_path_factory.mktemp("clone") / "m3oe_fast"
    ignore = shutil.ignore_patterns(".git", "build", "*.so", "__pycache__", "*.egg-info", ".venv", "runs", ".*_cache")
    shutil.copytree(ROOT, target, ignore=ignore)
    return target


@pytest.fixture(scope="module")
def distributions(clone, tmp_path_factory) -> Path:
    """An sdist of the clone and the wheel built from that sdist."""
    out = tmp_path_factory.mktemp("dist")
    result = python("-m", "build", "--no-isolation", "--outdir", str(out), str(clone), cwd=out)
    assert result.returncode == 0, result.stderr + result.stdout
    return out


@needs_sources
def test_sdist_holds_headers_and_wheel_holds_the_package(distributions):
    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    for needed in ("csrc/cpu/network.h", "csrc/cpu/isa/avx512.cpp", "build_backend/m3oe_build.py", "LICENSE"):
        assert needed in names
    (wheel,) = distributions.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.startswith("m3oe_fast/_C.") and name.endswith(".so") for name in names)
    assert {"m3oe_fast/py.typed", "m3oe_fast/kernels/__init__.py", "m3oe_fast/data/__init__.py"} <= set(names)
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"m3oe_fast"}


@needs_sources
def test_the_wheel_imports_and_runs_elsewhere(distributions, tmp_path):
    (wheel,) = distributions.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = "import m3oe_fast as m, m3oe_fast.kernels; print(m.M3oE(m.M3oEConfig([3],1,2,1)).backend_name, m.__file__)"
    result = python("-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("cpu") and "site" in result.stdout


@needs_sources
def test_the_clone_root_works_after_an_install():
    """`-m` puts the current folder first: what runs there is the source package, with the `_C` the build left."""
    code = (
        "import m3oe_fast, m3oe_fast._C as c, m3oe_fast.kernels as k; print(m3oe_fast.__file__, c.__file__, k.__file__)"
    )
    result = python("-c", code, cwd=ROOT)
    package, compiled, kernels = map(Path, result.stdout.split())
    assert package == ROOT / "m3oe_fast" / "__init__.py"
    assert compiled.parent == ROOT / "m3oe_fast"
    assert kernels == ROOT / "kernels" / "__init__.py"
    result = python("-m", "m3oe_fast.info", cwd=ROOT)
    assert result.returncode == 0 and "backend cpu             on" in result.stdout, result.stderr


def run_module_alone(module: str, cwd: Path) -> subprocess.CompletedProcess:
    """`python -m module` with only the folder's own package: an editable install would lend it a compiled module."""
    code = (
        "import runpy, sys; "
        "sys.meta_path = [f for f in sys.meta_path if not getattr(f, '__module__', '').startswith('__editable__')]; "
        f"sys.argv = ['{module}']; runpy.run_module('{module}', run_name='__main__', alter_sys=True)"
    )
    return python("-c", code, cwd=cwd)


@needs_sources
def test_an_unbuilt_tree_says_what_to_do_in_one_line(clone):
    result = run_module_alone("m3oe_fast.train", clone)
    assert result.returncode == 2, result.stdout
    assert result.stderr.count("\n") == 1 and "run `pip install .`" in result.stderr
    result = run_module_alone("m3oe_fast.info", clone)
    assert result.returncode == 0 and "off: the compiled kernels are not built" in result.stdout


@needs_sources
def test_no_compiler_is_one_clear_line(clone, tmp_path):
    result = python("setup.py", "build", cwd=clone, PATH=str(tmp_path))
    assert result.returncode == 1
    assert result.stderr.strip() == (
        "m3oe_fast: no C++ compiler found; install g++ 11 or newer (Debian: apt install g++) and try again"
    )


@needs_sources
def test_instruction_set_objects_share_no_symbol_with_the_rest(clone, tmp_path):
    """An inline function compiled for AVX-512 must never be the copy the linker keeps for every processor."""
    compiler, nm = shutil.which("g++") or shutil.which("c++"), shutil.which("nm")
    if nm is None or sysconfig.get_platform() != "linux-x86_64":
        pytest.skip("needs nm on x86-64")
    flags = {
        "scalar": [],
        "avx2": ["-mavx2", "-mfma"],
        "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
    }
    for name, extra in flags.items():
        out = tmp_path / f"{name}.o"
        source = clone / "csrc" / "cpu" / "isa" / f"{name}.cpp"
        subprocess.run([compiler, "-std=c++20", "-O1", "-w", *extra, "-c", source, "-o", out], check=True)
        symbols = subprocess.run([nm, "-C", out], capture_output=True, text=True, check=True).stdout
        assert f"m3oe::isa_{name}()" in symbols
        weak = [line for line in symbols.splitlines() if any(f" {kind} " in line for kind in "VWuvw")]
        assert weak == []


@needs_sources
def test_sources_keep_to_the_stable_abi(clone):
    banned = ("ATen/", "c10/", "torch/extension.h", "torch/torch.h")
    for path in (clone / "csrc").rglob("*"):
        if path.suffix in (".h", ".cpp", ".cu", ".cuh"):
            includes = [line for line in path.read_text().splitlines() if line.startswith("#include")]
            assert not [line for line in includes if any(b in line for b in banned)], path


@needs_sources
def test_versions_agree(clone):
    import m3oe_fast

    assert f'version = "{m3oe_fast.__version__}"' in (clone / "pyproject.toml").read_text()
    assert f'VERSION = "{m3oe_fast.__version__}"' in (clone / "setup.py").read_text()
