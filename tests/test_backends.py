"""Which backend computes a loss, how that is chosen, and what is said where one cannot."""

import os
import subprocess
import sys

import pytest
import torch
from checks import assert_near, logits_pair

import kdkernels as kd
from kdkernels import backends
from kdkernels.backends import native, triton

CPU = torch.device("cpu")


def test_automatic_choice_is_native_on_the_cpu(monkeypatch):
    monkeypatch.delenv("KDKERNELS_BACKEND", raising=False)
    assert backends.choose(CPU) == "native"
    assert backends.choose(torch.device("meta")) == "reference"


def test_use_and_its_end(monkeypatch):
    monkeypatch.delenv("KDKERNELS_BACKEND", raising=False)
    with backends.use("reference"):
        assert backends.choose(CPU) == "reference"
        with backends.use("native"):
            assert backends.choose(CPU) == "native"
        assert backends.choose(CPU) == "reference"
    assert backends.choose(CPU) == "native"


def test_reference_backend_computes_the_same():
    student, teacher = logits_pair(5, 100)
    results = {}
    for name in ("native", "reference"):
        leaf = student.clone().requires_grad_()
        with kd.backends.use(name):
            loss, stats = kd.distillation_loss(leaf * 1, teacher, temperature=2.0, return_stats=True, inplace=True)
        loss.backward()
        results[name] = loss.detach(), leaf.grad, stats.divergence
    for ours, theirs in zip(*results.values(), strict=True):
        assert_near("result", ours, theirs, 1e-5)


def test_double_backward_through_the_reference():
    student, teacher = logits_pair(2, 10, dtype=torch.float64)
    with kd.backends.use("reference"):
        assert torch.autograd.gradgradcheck(lambda z: kd.distillation_loss(z, teacher), (student.requires_grad_(),))


def test_environment(monkeypatch):
    monkeypatch.setenv("KDKERNELS_BACKEND", "reference")
    assert backends.choose(CPU) == "reference"
    monkeypatch.setenv("KDKERNELS_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="KDKERNELS_BACKEND is 'cuda'; expected one of native, triton, reference"):
        backends.choose(CPU)


def test_asked_for_and_not_able(monkeypatch):
    monkeypatch.setattr(triton, "_interpreted", lambda: False)
    with (
        backends.use("triton"),
        pytest.raises(RuntimeError, match=r"'triton' was asked for and cannot serve.*cpu: Triton"),
    ):
        kd.distillation_loss(*logits_pair(2, 10))
    with backends.use("native"), pytest.raises(RuntimeError, match="cannot serve tensors on meta: the C"):
        kd.distillation_loss(*(x.to("meta") for x in logits_pair(2, 10)))
    with pytest.raises(ValueError, match="unknown backend 'cuda'"), backends.use("cuda"):
        pass


def test_capability_names_are_checked(monkeypatch):
    monkeypatch.setenv("KDKERNELS_CPU_CAPABILITY", "sse9")
    with pytest.raises(RuntimeError, match="KDKERNELS_CPU_CAPABILITY is 'sse9'; this processor runs baseline"):
        kd.distillation_loss(*logits_pair(2, 10))


def test_capabilities_agree(monkeypatch):
    student, teacher = logits_pair(3, 1003)
    losses = []
    for name in native._built().cpu_capabilities():
        monkeypatch.setenv("KDKERNELS_CPU_CAPABILITY", name)
        assert native.capability() == name
        losses.append(kd.distillation_loss(student, teacher))
    for loss in losses:
        assert_near("loss", loss, losses[0], 1e-6)


def test_python_m_kdkernels():
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "kdkernels"]
    report = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert f"kdkernels {kd.__version__}" in report
    assert (
        f"native     available on cpu (C++, {native.capability()})" in " ".join(report.split("\n")) or "cuda" in report
    )
    if not torch.cuda.is_available():
        assert "triton     not available\n             Triton" in report


NOT_BUILT = """
import sys
sys.modules["kdkernels._C"] = None  # what an import of a missing extension comes to
import torch, kdkernels as kd
from kdkernels.__main__ import describe
z = torch.randn(3, 10, requires_grad=True)
kd.distillation_loss(z, torch.randn(3, 10)).backward()
assert z.grad is not None
assert kd.backends.choose(torch.device("cpu")) == "reference"
print(describe())
try:
    with kd.backends.use("native"):
        kd.distillation_loss(z, torch.randn(3, 10))
except RuntimeError as error:
    print(error)
"""


def test_without_the_extension_the_reference_serves():
    environment = {**os.environ, "KDKERNELS_BACKEND": ""}
    run = subprocess.run([sys.executable, "-c", NOT_BUILT], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert "native     not available" in run.stdout
    assert run.stdout.count("the extension kdkernels._C is not built") == 2
    assert run.stdout.count("pip install -e .") == 2


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch, kdkernels as kd
from kdkernels.__main__ import describe
kd.distillation_loss(torch.randn(3, 10), torch.randn(3, 10))
print(describe())
"""


def test_without_triton():
    run = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "Triton is not installed" in run.stdout


def test_the_interpreter_serves_the_cpu_on_request_alone():
    assert backends.choose(CPU) == "native"
    if triton.why_not(CPU) is None:
        with backends.use("triton"):
            assert backends.choose(CPU) == "triton"


@pytest.mark.gpu
def test_a_label_out_of_range_on_a_gpu_is_nan_in_its_row():
    student, teacher = (x.cuda() for x in logits_pair(3, 10))
    loss = kd.distillation_loss(student, teacher, torch.tensor([1, 10, -7]).cuda(), ce_weight=1.0, reduction="none")
    assert loss.isnan().tolist() == [False, True, True]


@pytest.mark.gpu
def test_tensors_on_two_devices_are_refused():
    student, teacher = logits_pair(3, 10)
    with pytest.raises(ValueError, match="teacher is on cuda:0, student_logits on cpu"):
        kd.distillation_loss(student, teacher.cuda())
