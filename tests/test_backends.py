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
    assert "native     available on cpu" in report
    cuda = " and CUDA kernels" if native._built().cuda else "; built without CUDA kernels: Triton serves GPUs"
    assert f"\n             CPU kernels ({native.capability()}){cuda}" in report
    if not torch.cuda.is_available():
        assert "triton     not available\n             Triton" in report


@pytest.mark.parametrize("cuda", [False, True])
def test_what_the_extension_was_built_with(monkeypatch, cuda):
    monkeypatch.setattr(native._built(), "cuda", cuda)
    without = f"CPU kernels ({native.capability()}); built without CUDA kernels: Triton serves GPUs"
    assert (native.contents() == without) is not cuda
    assert ("and CUDA kernels" in native.contents()) is cuda
    if not cuda:
        assert "it was built without nvcc" in native.why_not(torch.device("cuda", 0))


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


CHECKOUT_IN_FRONT = """
import sys, sysconfig, warnings
import torch
sys.modules["kdkernels._C"] = None
sysconfig.get_path = lambda name: sys.argv[1]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import kdkernels as kd
print(caught[0].message)
print(kd.backends.why_not("native"))
"""


def test_a_checkout_that_hides_the_installed_package_says_so(tmp_path):
    (tmp_path / "kdkernels").mkdir()
    (tmp_path / "kdkernels" / "_C.so").touch()
    command = [sys.executable, "-c", CHECKOUT_IN_FRONT, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    said = f"hides the kdkernels installed in {tmp_path}/kdkernels: start Python in another folder"
    assert [line.endswith(said) for line in run.stdout.split("\n")] == [True, True, False]


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


WITHOUT_NUMPY = """
import sys
sys.modules["numpy"] = None
import warnings
warnings.simplefilter("ignore")  # torch's own
from kdkernels import backends
print(backends.why_not("triton"))
"""


def test_triton_without_numpy():
    """Only its interpreter needs it."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", WITHOUT_NUMPY]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.stdout == "None\n", run.stderr


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
