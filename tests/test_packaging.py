"""Versions agree, and a build that cannot work says why. What is built is tested by `make package`."""

import os
import re
import subprocess
import sys
from importlib import metadata

import pytest
import yaml

import kdkernels as kd
from benchmarks.environment import ROOT

VERSION = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)[1]


def test_one_version():
    assert kd.__version__ == metadata.version("kdkernels") == VERSION
    versions = re.findall(r"^## \[(.+?)\] - (?:unreleased|\d{4}-\d\d-\d\d)$", changelog(), flags=re.MULTILINE)
    assert versions[0] == VERSION
    assert len(versions) == changelog().count("\n## ")
    assert citation()["version"] == VERSION


def changelog() -> str:
    return (ROOT / "CHANGELOG.md").read_text()


def citation() -> dict:
    return yaml.safe_load((ROOT / "CITATION.cff").read_text())


def test_the_citation_has_what_its_format_requires():
    assert citation()["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "abstract"} <= citation().keys()
    assert citation()["license"] == "Apache-2.0"
    assert citation()["authors"] == [{"name": "The kdkernels authors"}]


@pytest.mark.parametrize(
    ("compiler", "said"),
    [
        ("no-such-compiler -O2", r"no C\+\+ compiler found \(no-such-compiler -O2\); install g\+\+ or clang\+\+"),
        ("false", r"false does not compile C\+\+20; install a newer one"),
    ],
)
def test_a_compiler_that_does_not_serve(tmp_path, compiler, said):
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", tmp_path]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "CXX": compiler})
    assert run.returncode != 0
    assert re.search(f"^kdkernels: {said}", run.stderr, flags=re.MULTILINE), run.stderr
