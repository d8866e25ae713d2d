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
    from_file = "forward KL, top 64 from a file"
    assert set(results["student_losses"]) == {"hard labels", "forward KL", "skew forward KL", "CAKD, top 32", from_file}
    assert results["student_losses"][from_file] != results["student_losses"]["hard labels"]
    terms = results["terms"]
    for name in ("bcd", "scd", "wcd", "strong_mass_teacher", "strong_mass_student"):
        assert len(terms[name]) == results["settings"]["steps"]
        assert all(0 <= value < 100 for value in terms[name])
    for cost, eager in zip(results["fused_costs"].values(), results["eager_costs"].values(), strict=True):
        assert abs(cost["loss"] / eager["loss"] - 1) < 1e-5
    written, settings = results["teacher_file"], results["settings"]
    positions = settings["steps"] * settings["sequences"] * settings["context"]
    assert (written["positions"], written["tokens_per_position"]) == (positions, 64)
    assert 0 < written["mass"] < 1
    with kd.TopKCache(tmp_path / written["name"]) as file:
        assert len(file) == settings["steps"] * settings["sequences"]
        assert file[0].ids.shape == (settings["context"], 64)
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
    cases = [(objective, frozen) for objective in distill.OBJECTIVES.values()]
    logits = distill.teacher_logits(frozen)
    cases += [(distill.FILE_OBJECTIVE, kind.choose(logits)) for kind in distill.FILES.values()]

    trainer = training.Trainer(student, steps=1, rates=settings.student_rates)

    def gradients(loss, given):
        student.zero_grad()
        value = trainer.backward(ids, partial(loss, teacher=given, labels=labels))
        return value, [parameter.grad for parameter in student.parameters()]

    for objective, given in cases:
        fused, fused_gradients = gradients(objective.fused, given)
        eager, eager_gradients = gradients(objective.eager, given)
        torch.testing.assert_close(fused, eager, rtol=1e-4, atol=0)
        for ours, theirs in zip(fused_gradients, eager_gradients, strict=True):
            assert ours.dtype == torch.float32
            assert (ours - theirs).norm() <= 0.03 * theirs.norm()


def test_every_program_is_run_by_a_test():
    """Those that say how to run them alone; the other files are parts of the demo, which imports them."""
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    programs = [path for path in (ROOT / "examples").rglob("*.py") if "__main__" in path.read_text()]
    assert programs
    for program in programs:
        assert f'"{program.relative_to(ROOT)}"' in tests
