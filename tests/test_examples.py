"""The demo runs from end to end, at a size of seconds."""

import json
import subprocess
import sys

from benchmarks.environment import ROOT


def test_the_demo_at_a_small_size(tmp_path):
    command = [sys.executable, "-W", "error", "examples/distill.py", "--smoke", "--device", "cpu", "--output", tmp_path]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert "student, forward KL" in run.stdout
    assert "hard labels" in run.stdout
    assert "eager  kdkernels" in run.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["student_losses"]) == {"hard labels", "forward KL", "skew forward KL"}
    assert (tmp_path / "distillation.png").stat().st_size > 10_000
