"""Compiles `m3oe_fast._C`: one static library per instruction set, each with its own flags, and the module itself.

Everything that is not compilation stands in pyproject.toml.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "build_backend"))

from torch_location import find_torch  # noqa: E402

VERSION = "0.1.0"
# None while pip only asks what the build needs, or an sdist is made: neither compiles.
TORCH = find_torch()
TORCH_HEADERS = ("include", "include/torch/csrc/api/include")
# Headers of torch 2.10: the binary then runs on every later torch.
TORCH_TARGET = "0x020a000000000000"
COMMON = ["-std=c++20", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wextra"]
# gcc 12 reports its own _mm512_undefined_ps as uninitialised (gcc bug 105593).
QUIET = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", *QUIET]
X86_FLAGS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16"],
    "amx": [*AVX512, "-mavx512bf16"],  # the tile instructions are written as assembly
    "amx_emulated": [*AVX512, "-mavx512bf16"],
}


def isa_libraries() -> list[tuple[str, dict]]:
    """A static library per instruction set that this machine's compiler can target."""
    sets = {"scalar": []}
    if platform.machine() in ("x86_64", "AMD64"):
        sets |= X86_FLAGS
    headers = [str(p.relative_to(ROOT)) for p in sorted((ROOT / "csrc" / "cpu").rglob("*.h"))]
    return [
        # obj_deps, not depends: build_clib recompiles by these, and a stale layout would be silent memory corruption.
        (f"m3oe_{name}", {"sources": [f"csrc/cpu/isa/{name}.cpp"], "obj_deps": {"": headers}, "cflags": COMMON + flags})
        for name, flags in sets.items()
    ]


class BuildExt(build_ext):
    """Also leaves `_C` in the source package, which `python -m m3oe_fast...` in the clone's root imports."""

    def run(self) -> None:
        if TORCH is None:
            sys.exit(
                "m3oe_fast: no torch >= 2.10 to build against; run `pip install torch`, then `pip install .` again"
            )
        super().run()
        for built in self.get_outputs():
            target = ROOT / "m3oe_fast" / Path(built).name
            if Path(built).resolve() != target.resolve():
                shutil.copy2(built, target)


def extension() -> Extension:
    import pybind11  # here, so that a missing compiler is reported before a missing package

    sources = [ROOT / "csrc" / "ops.cpp", *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]
    return Extension(
        "m3oe_fast._C",
        sources=[str(p.relative_to(ROOT)) for p in sources],
        # Every source, those of the static libraries too: their change must link the module anew.
        depends=[str(p.relative_to(ROOT)) for p in sorted((ROOT / "csrc").rglob("*.[ch]*"))],
        include_dirs=[*(str(TORCH / folder) for folder in TORCH_HEADERS if TORCH), pybind11.get_include()],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET), ("M3OE_FAST_VERSION", f'"{VERSION}"')],
        library_dirs=[str(TORCH / "lib")] if TORCH else [],
        libraries=["torch_cpu", "c10"],
        extra_compile_args=COMMON,
        language="c++",
    )


def check_compiler() -> None:
    named = os.environ.get("CXX", "").split()[:1]
    if not any(shutil.which(name) for name in (*named, "g++", "clang++", "c++")):
        sys.exit("m3oe_fast: no C++ compiler found; install g++ 11 or newer (Debian: apt install g++) and try again")


if __name__ == "__main__":
    check_compiler()
    setup(libraries=isa_libraries(), ext_modules=[extension()], cmdclass={"build_ext": BuildExt})
