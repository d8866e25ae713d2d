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
    assert set(results["student_losses"]) == {"hard labels", "forward KL", "skew forward KL", "CAKD, top 32"}
    terms = results["terms"]
    for name in ("bcd", "scd", "wcd", "strong_mass_teacher", "strong_mass_student"):
        assert len(terms[name]) == results["settings"]["steps"]
        assert all(0 <= value < 100 for value in terms[name])
    for cost, eager in zip(results["fused_costs"].values(), results["eager_costs"].values(), strict=True):
        assert abs(cost["loss"] / eager["loss"] - 1) < 1e-5
    for plot in ("distillation.png", "decoupled.png"):
        assert (tmp_path / plot).stat().st_size > 10_000
