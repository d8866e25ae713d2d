"""`make package`: an sdist and, from it, a wheel; what they hold; and the wheel at work where nothing else is.

The environment has no pip, no build tools and no framework, but what the wheel asks for: torch, in the version that
requirements-dev.txt pins. The wheel has the CUDA kernels where there is an nvcc and not KDKERNELS_CUDA=0.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
VERSION = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)[1]
# Of the repository alone: its own tools, and what git is told.
NOT_IN_THE_SDIST = re.compile(r"\.ci/.*|\.gitignore")
GENERATED = re.compile(r"PKG-INFO|setup\.cfg|kdkernels\.egg-info/.*")


def tracked() -> set[str]:
    return set(subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).split("\n")) - {""}


def require_same(what: str, found: set[str], expected: set[str]) -> None:
    if found != expected:
        sys.exit(f"{what}: {sorted(found - expected)} should not be there, {sorted(expected - found)} should")


def check_sdist(path: Path) -> None:
    with tarfile.open(path) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    names = {name for name in names if not GENERATED.fullmatch(name)}
    require_same(path.name, names, {name for name in tracked() if not NOT_IN_THE_SDIST.fullmatch(name)})


def check_wheel(path: Path) -> None:
    info = f"kdkernels-{VERSION}.dist-info"
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"{info}/METADATA").decode()
    extensions = {name for name in names if re.fullmatch(r"kdkernels/_C\..*\.so", name)}
    if len(extensions) != 1:
        sys.exit(f"{path.name}: one extension expected, found {sorted(extensions)}")
    expected = {name for name in tracked() if name.startswith("kdkernels/")} | {"kdkernels/_C.pyi"}
    expected |= {f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "top_level.txt", "licenses/LICENSE")}
    require_same(path.name, names - extensions, expected)
    for line in (f"Version: {VERSION}", "License-Expression: Apache-2.0", "License-File: LICENSE"):
        if line not in metadata.split("\n\n")[0].split("\n"):
            sys.exit(f"{path.name}: its metadata has no line {line!r}")


def check_installed(wheel: Path, folder: Path) -> None:
    environment = folder / "environment"
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    pinned = re.search(r"^torch==\S+$", (ROOT / "requirements-dev.txt").read_text(), flags=re.MULTILINE)[0]
    # Not compiled: most of torch's modules are never imported.
    options = ["--quiet", "--disable-pip-version-check", "--no-compile"]
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", *options]
    subprocess.run([*pip, str(wheel), pinned], check=True)

    elsewhere = folder / "empty"
    elsewhere.mkdir()
    # -I: neither PYTHONPATH nor the folder is searched. What steers the package is left out as well.
    variables = {name: value for name, value in os.environ.items() if not re.match("KDKERNELS|TRITON|PYTHON", name)}
    for arguments in (["-m", "kdkernels"], [str(Path(__file__).with_name("smoke.py")), VERSION]):
        subprocess.run([str(python), "-I", "-W", "ignore", *arguments], check=True, cwd=elsewhere, env=variables)
    require_same("the folder that the package was used in", {path.name for path in elsewhere.iterdir()}, set())


def main() -> None:
    dist, log = ROOT / "dist", ROOT / "build" / "package.log"
    for old in dist.glob("kdkernels-*"):
        old.unlink()
    log.parent.mkdir(exist_ok=True)
    with log.open("w") as output:
        command = [sys.executable, "-m", "build", "--outdir", str(dist), str(ROOT)]
        if subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode:
            sys.exit(log.read_text()[-4000:] + f"\n`python -m build` failed; all it said is in {log}")
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    if (ROOT / ".git").exists():  # an unpacked sdist has no list of files to hold against
        check_sdist(sdist)
        check_wheel(wheel)
    with tempfile.TemporaryDirectory() as folder:
        check_installed(wheel, Path(folder))
    for path in (sdist, wheel):
        print(f"{path.relative_to(ROOT)}  {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
