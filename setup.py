"""Builds kdkernels._C (C++20, pybind11) with ninja. Needs a C++ compiler and neither torch nor CUDA.

A source listed in SOURCES becomes one object; the CPU kernels are compiled once per instruction set, and the library
chooses at run time. Compiler and flags follow CXX and CXXFLAGS.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()

WARNINGS = "-Wall -Wextra"
COMMON = f"-std=c++20 -O3 -fPIC -fvisibility=hidden {WARNINGS}"
# Contraction to FMA where the set has it; no errno and no FP traps to preserve. NaN and inf keep their meaning.
KERNEL = "-ffp-contract=fast -fno-math-errno -fno-trapping-math"
CAPABILITIES = {"baseline": ""}
if platform.machine() in ("x86_64", "AMD64"):
    CAPABILITIES["avx2"] = "-mavx2 -mfma -mf16c"
    # GCC's own avx512 header trips its maybe-uninitialized check (GCC bug 105593).
    CAPABILITIES["avx512"] = (
        "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512 -Wno-maybe-uninitialized"
    )

Step = tuple[str, str, str]  # source, object, flags


def cpu_steps() -> list[Step]:
    steps = [("csrc/cpu/rows.cpp", "cpu_rows.o", "")]
    for name, flags in CAPABILITIES.items():
        steps.append(("csrc/cpu/kernels.cpp", f"cpu_kernels_{name}.o", f"{KERNEL} {flags} -DKD_KERNELS={name}_kernels"))
    return steps


def binding_steps() -> list[Step]:
    includes = [pybind11.get_include(), sysconfig.get_path("include")]
    return [("python/bindings.cpp", "bindings.o", " ".join(f"-isystem {path}" for path in includes))]


def supports(compiler: str, flag: str, folder: Path) -> bool:
    probe = folder / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    command = [*compiler.split(), flag, str(probe), "-o", str(folder / "probe")]
    return subprocess.run(command, capture_output=True).returncode == 0


def ninja_file(target: Path, folder: Path) -> str:
    """The build graph: a rule per tool, an edge per object, one link."""
    compiler = os.environ.get("CXX") or next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    if compiler is None:
        raise SystemExit("kdkernels: no C++ compiler found; install one (g++ or clang++) or name it in CXX")
    # A binary without OpenMP works, on one thread.
    openmp = "-fopenmp" if supports(compiler, "-fopenmp", folder) else ""
    link = "-undefined dynamic_lookup" if platform.system() == "Darwin" else ""
    steps = cpu_steps() + binding_steps()
    lines = [
        f"cxx = {compiler}",
        f"flags = {COMMON} {openmp} {os.environ.get('CXXFLAGS', '')}",
        "rule cxx\n  command = $cxx $flags $extra -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = $cxx -shared {openmp} {link} $in -o $out",
    ]
    for source, output, extra in steps:
        lines.append(f"build {output}: cxx {ROOT / source}\n  extra = {extra}")
    lines.append(f"build {target}: link {' '.join(output for _, output, _ in steps)}")
    return "\n".join(lines) + "\n"


class NinjaBuild(build_ext):
    """build_ext through one ninja call, so that a rebuild compiles only what changed."""

    def build_extension(self, ext: Extension) -> None:
        folder = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(target, folder))
        subprocess.run([find_ninja(), "-C", str(folder)], check=True)
        in_place = self.inplace or getattr(self, "editable_mode", False)
        shutil.copy(ROOT / "python" / "_C.pyi", (ROOT / "kdkernels" if in_place else target.parent) / "_C.pyi")


def find_ninja() -> str:
    found = shutil.which("ninja")
    if found:
        return found
    import ninja

    return str(Path(ninja.BIN_DIR) / "ninja")


setup(ext_modules=[Extension("kdkernels._C", sources=[])], cmdclass={"build_ext": NinjaBuild})
