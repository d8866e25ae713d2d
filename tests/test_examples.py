"""The demo runs from end to end, at a size of seconds; and its losses in the precision it has on a GPU."""

import json
import subprocess
import sys
from functools import partial

import torch

import kdkernels as kd
from benchmarks.environment import ROOT


def test_the_demo_at_a_small_size(tmp_path):
    command = [sys.executable, "-W", "error", "examples/distill.py", "--smoke", "--device", "cpu", "--output", tmp_path]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert "student, forward KL" in run.stdout
    assert "hard labels" in run.stdout
    assert "From hidden states to the gradients of hidden states and head weight" in run.stdout
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


def test_the_demos_losses_under_autocast(monkeypatch):
    """Both give fp32 gradients that differ by eager's rounding of the logits to bfloat16."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    import distill
    import training

    monkeypatch.setattr(training, "product_dtype", lambda device: torch.bfloat16)
    device = torch.device("cpu")
    settings = distill.SMOKE
    teacher, student = (
        training.build_model(shape, settings.vocab_size, settings.context, seed, device)
        for seed, shape in enumerate((settings.teacher, settings.student))
    )
    teacher.requires_grad_(False)
    ids, labels = torch.randint(0, settings.vocab_size, (2, 2, settings.context))
    frozen = kd.LinearTeacher(training.compute_hidden(teacher, ids), training.head_weight(teacher))

    trainer = training.Trainer(student, steps=1, rates=settings.student_rates)

    def gradients(loss):
        student.zero_grad()
        value = trainer.backward(ids, partial(loss, teacher=frozen, labels=labels))
        return value, [parameter.grad for parameter in student.parameters()]

    for objective in distill.OBJECTIVES.values():
        fused, fused_gradients = gradients(objective.fused)
        eager, eager_gradients = gradients(objective.eager)
        torch.testing.assert_close(fused, eager, rtol=1e-4, atol=0)
        for ours, theirs in zip(fused_gradients, eager_gradients, strict=True):
            assert ours.dtype == torch.float32
            assert (ours - theirs).norm() <= 0.03 * theirs.norm()
