"""Builds kdkernels._C (C++20, pybind11) with ninja. Needs a C++ compiler, and no torch; with nvcc, CUDA kernels too.

The CPU kernels are compiled once per instruction set, and the library chooses at run time; the CUDA kernels once per
dtype and divergence, for compute capability 9.0 and, through PTX, newer. Compilers and flags follow CXX, CXXFLAGS, NVCC
and NVCCFLAGS; KDKERNELS_CUDA=0 leaves the CUDA kernels out.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from contextlib import suppress
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
    # GCC's own avx512 header trips its checks for uninitialized variables (GCC bug 105593).
    CAPABILITIES["avx512"] = (
        "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512"
        " -Wno-maybe-uninitialized -Wno-uninitialized"
    )

CUDA = "-std=c++20 -O3 --expt-relaxed-constexpr -Xcompiler -fPIC,-fvisibility=hidden"
CUDA_TARGETS = "-gencode arch=compute_90,code=sm_90 -gencode arch=compute_90,code=compute_90"
OLDEST_NVCC = (12, 0)
CUDA_TYPES = {"float": "float32", "__nv_bfloat16": "bfloat16", "__half": "float16"}
DIVERGENCES = (
    "ForwardKL",
    "ReverseKL",
    "SymmetricKL",
    "JensenShannon",
    "SkewForwardKL",
    "SkewReverseKL",
    "TotalVariation",
    "AlphaBeta",
)
SPLIT_SWEEPS = ("decoupled_label", "decoupled_top_k", "decoupled_top_p", "decoupled_given", "adaptive_kl")

Step = tuple[str, str, str]  # source, object, flags


def cpu_steps() -> list[Step]:
    steps = [("csrc/cpu/rows.cpp", "cpu_rows.o", "")]
    for name, flags in CAPABILITIES.items():
        steps.append(("csrc/cpu/kernels.cpp", f"cpu_kernels_{name}.o", f"{KERNEL} {flags} -DKD_KERNELS={name}_kernels"))
    return steps


def cuda_steps() -> list[Step]:
    steps = [("csrc/cuda/rows.cu", "cuda_rows.o", ""), ("csrc/cuda/sparse_ids.cu", "cuda_sparse_ids.o", "")]
    for cuda_type, name in CUDA_TYPES.items():
        steps.append(("csrc/cuda/sparse_kernel.cu", f"cuda_{name}_sparse.o", f"-DKD_TYPE={cuda_type}"))
        for divergence in DIVERGENCES:
            flags = f"-DKD_TYPE={cuda_type} -DKD_DIVERGENCE={divergence}"
            steps.append(("csrc/cuda/kernel.cu", f"cuda_{name}_{divergence}.o", flags))
        for sweep in SPLIT_SWEEPS:
            flags = f"-DKD_TYPE={cuda_type} -DKD_SWEEP={sweep}"
            steps.append(("csrc/cuda/split_kernel.cu", f"cuda_{name}_{sweep}.o", flags))
    return steps


def binding_steps(with_cuda: bool) -> list[Step]:
    includes = [pybind11.get_include(), sysconfig.get_path("include")]
    flags = [*(f"-isystem {path}" for path in includes), *(["-DKD_CUDA"] if with_cuda else [])]
    return [("python/bindings.cpp", "bindings.o", " ".join(flags))]


def find_nvcc() -> str | None:
    """An nvcc that can build the CUDA kernels; None where there is none, or none is wanted."""
    if os.environ.get("KDKERNELS_CUDA") == "0" or platform.system() != "Linux":
        return None
    folders = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)] + ["/usr/local/cuda"]
    candidates = [os.environ.get("NVCC"), *(f"{folder}/bin/nvcc" for folder in folders), "nvcc"]
    nvcc = next((found for name in candidates if name and (found := shutil.which(name))), None)
    if nvcc is None:
        print("kdkernels: no nvcc found: building without CUDA kernels (Triton serves GPUs)")
        return None
    version = re.search(
        r"release (\d+)\.(\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    )
    if version is None or (int(version[1]), int(version[2])) < OLDEST_NVCC:
        needed = ".".join(map(str, OLDEST_NVCC))
        print(f"kdkernels: {nvcc} is older than {needed}: building without CUDA kernels (Triton serves GPUs)")
        return None
    return nvcc


def supports(compiler: str, flag: str, folder: Path) -> bool:
    probe = folder / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    command = [*compiler.split(), flag, str(probe), "-o", str(folder / "probe")]
    return subprocess.run(command, capture_output=True).returncode == 0


def find_compiler(folder: Path) -> str:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    compiler = next((name for name in names if shutil.which(name.split()[0])), None)
    if compiler is None:
        tried = ", ".join(names)
        raise SystemExit(f"kdkernels: no C++ compiler found ({tried}); install g++ or clang++, or name one in CXX")
    if not supports(compiler, "-std=c++20", folder):
        raise SystemExit(f"kdkernels: {compiler} does not compile C++20; install a newer one, or name one in CXX")
    return compiler


def ninja_file(target: Path, folder: Path) -> str:
    """The build graph: a rule per tool, an edge per object, one link."""
    compiler = find_compiler(folder)
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").exists():
        raise SystemExit(f"kdkernels: no Python.h in {headers}; install Python's headers (python3-dev, python3-devel)")
    # A binary without OpenMP works, on one thread.
    openmp = "-fopenmp" if supports(compiler, "-fopenmp", folder) else ""
    nvcc = find_nvcc()
    link = f"$cxx -shared {openmp} {'-undefined dynamic_lookup' if platform.system() == 'Darwin' else ''} $in -o $out"
    if nvcc:  # which knows where its run-time library lies; linked in, so that nothing of CUDA is needed to import
        link = f"$nvcc -ccbin $cxx -shared -cudart static {f'-Xcompiler {openmp}' if openmp else ''} $in -o $out"
    edges = [("cxx", step) for step in cpu_steps() + binding_steps(nvcc is not None)]
    edges += [("nvcc", step) for step in (cuda_steps() if nvcc else [])]
    lines = [
        f"cxx = {compiler}",
        f"nvcc = {nvcc}",
        f"flags = {COMMON} {openmp} {os.environ.get('CXXFLAGS', '')}",
        f"cuda_flags = {CUDA} {CUDA_TARGETS} {os.environ.get('NVCCFLAGS', '')}",
        "rule cxx\n  command = $cxx $flags $extra -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        "rule nvcc\n  command = $nvcc -ccbin $cxx $cuda_flags $extra -MMD -MF $out.d -c $in -o $out\n"
        "  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = {link}",
    ]
    for rule, (source, output, extra) in edges:
        lines.append(f"build {output}: {rule} {ROOT / source}\n  extra = {extra}")
    lines.append(f"build {target}: link {' '.join(output for _, (_, output, _) in edges)}")
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
    """The build's own before the system's: another version takes every object for outdated."""
    with suppress(ImportError):
        from ninja import BIN_DIR

        if BIN_DIR:
            return str(Path(BIN_DIR) / "ninja")
    found = shutil.which("ninja")  # pip's isolated builds: on the path alone
    if found is None:
        raise SystemExit("kdkernels: no ninja found; install it: pip install ninja")
    return found


setup(ext_modules=[Extension("kdkernels._C", sources=[])], cmdclass={"build_ext": NinjaBuild})
