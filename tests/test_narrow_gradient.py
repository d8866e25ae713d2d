"""The gradient of fp32 logits in 16 bits: the fp32 one, rounded once. The CUDA kernels take short forms for it.

Under Triton's interpreter on the CPU, and by both backends on a GPU. Gradients are written into memory full of NaN, so
that what a kernel leaves out shows, and so does what it writes beside a row.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from checks import BOUNDS, DIVERGENCES, assert_near, assert_rounded, logits_pair
from decoupled_cases import FAMILY, labels_for, on_device
from interpreter import interpreted
from torch import Tensor

import kdkernels as kd
from kdkernels import backends
from kdkernels.backends import native, triton
from kdkernels.backends.native import RowOptions, number_of_stats

EVERY = {**{name: lambda width, d=d: d for name, d in DIVERGENCES.items()}, **FAMILY}
EACH = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
# One of each sweep that writes a gradient of its own.
FEW = [EVERY[name] for name in ("forward_kl", "jensen_shannon", "dkd", "cakd_top_k", "adaptive_kl")]
A_FEW = pytest.mark.parametrize("make", FEW, ids=["forward_kl", "jensen_shannon", "label", "top_k", "adaptive_kl"])
NARROW = (torch.bfloat16, torch.float16)
# The interpreter is slow, and one 16-bit type is as the other but for the rounding.
WIDTHS = {
    "cpu": {7: NARROW[:1]},
    "cuda": {7: NARROW, 1000: NARROW, 50257: NARROW, 128256: NARROW},
}
SCALES = torch.tensor([1.0, 0.0, 0.5, -1.0])
OPTIONS = {"temperature": 1.5, "ce_weight": 0.3, "kd_weight": 0.7}
POISON = torch.nan


@pytest.fixture(
    params=[
        pytest.param(("triton", "cpu"), id="interpreter"),
        pytest.param(("native", "cuda"), id="native", marks=pytest.mark.gpu),
        pytest.param(("triton", "cuda"), id="triton", marks=pytest.mark.gpu),
    ]
)
def where(request, monkeypatch):
    """A backend and the device of its tensors."""
    backend, device = request.param
    reason = backends.why_not(backend, torch.device(device))
    if reason is not None:
        pytest.skip(reason)
    if device == "cuda":
        yield backend, device
    else:
        with interpreted(monkeypatch):
            yield backend, device


def laid(values: Tensor, start: int = 0, apart: int = 0, dtype: torch.dtype | None = None) -> Tensor:
    """values (rows, width) in memory full of POISON from column ``start`` on, with ``apart`` columns between rows.

    A ``dtype`` leaves the values out.
    """
    rows, width = values.shape
    memory = torch.full((start + rows * (width + apart),), POISON, dtype=dtype or values.dtype, device=values.device)
    view = memory[start:].view(rows, width + apart)[:, :width]
    return view if dtype else view.copy_(values)


def untouched(view: Tensor) -> bool:
    """Whether the memory around ``view`` (see :func:`laid`) is still poison."""
    memory = view.new_empty(0).set_(view.untyped_storage())
    inside = torch.zeros_like(memory, dtype=torch.bool)
    inside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
    return bool(memory[~inside].isnan().all())


def sweep(
    backend: str, student: Tensor, teacher: Tensor, divergence: kd.Divergence, gradient: Tensor | None, **changes
) -> tuple[Tensor, Tensor]:
    """Loss and statistics of a row sweep with labels from :func:`labels_for`; rows beyond SCALES count 1."""
    width = changes.get("vocab_size", student.shape[-1])
    rows, device = student.shape[:-1], student.device
    scale = torch.ones(rows.numel())
    scale[: len(SCALES)] = SCALES[: rows.numel()]
    divergence = divergence.canonical()
    strong = divergence.strong_set()
    options = RowOptions(
        divergence=divergence.name,
        parameters=divergence.parameters(),
        scale_by_temperature=True,
        student_logit_scale=1.0,
        student_softcap=0.0,
        teacher_logit_scale=1.0,
        teacher_softcap=0.0,
        scale_gradient=True,
        strong="" if strong is None else strong.name,
        strong_amount=0.0 if strong is None else strong.amount,
        **{"vocab_size": width, **OPTIONS, **changes},
    )
    loss = torch.empty(rows, device=device)
    stats = torch.empty(number_of_stats(divergence.name), *rows, device=device)
    labels = labels_for(rows.numel(), width).view(rows).to(device) if options.reads_labels else None
    mask = strong.mask if isinstance(strong, kd.Given) else None
    scale = scale.view(rows).to(device)
    try:
        backends.row_loss(backend, student, teacher, labels, scale, None, None, mask, options, gradient, loss, stats)
    except RuntimeError as error:
        if "a mask whose rows" not in str(error):
            raise
        pytest.skip("the CUDA kernels leave these rows and their mask to Triton")
    return loss, stats


def reference_gradient(student: Tensor, teacher: Tensor, divergence: kd.Divergence, **changes) -> Tensor:
    return reference(student, teacher, divergence, **changes)[1]


def reference(student: Tensor, teacher: Tensor, divergence: kd.Divergence, **changes) -> tuple[Tensor, Tensor]:
    """In fp64, what :func:`sweep` computes: the rows' losses, and the gradient of their sum."""
    width = changes.get("vocab_size", student.shape[-1])
    rows = student.shape[0]
    # A row that does not count is not read, and padding holds anything.
    weight = torch.ones(rows)
    weight[: len(SCALES)] = SCALES[:rows]
    clean = [torch.where(weight.to(x.device)[:, None] != 0, x, 0.0).double() for x in (student, teacher)]
    exact = clean[0].requires_grad_()
    options = {"divergence": divergence, "weight": weight.to(student.device), "reduction": "none", **OPTIONS, **changes}
    loss = kd.reference.distillation_loss(exact, clean[1], labels_for(rows, width).to(student.device), **options)
    loss.sum().backward()
    assert exact.grad is not None
    return loss.detach(), exact.grad


def same(what: str, actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{what}: {text}")


def rounded_fp32(what: str, device: str, narrow: Tensor, wide: Tensor) -> None:
    """The 16-bit gradient is the same backend's fp32 one, rounded; on a GPU, but for other forms of the same."""
    if device == "cpu":
        same(what, narrow, wide.to(narrow.dtype))
        return
    good = ~wide.isnan().any(-1)
    same(what, narrow.isnan(), wide.isnan())
    assert_rounded(what, narrow[good], wide[good].double(), 2e-6)


@EACH
def test_it_is_the_reference_gradient_rounded_once(where, make):
    backend, device = where
    if device == "cpu" and make not in FEW:
        pytest.skip("the interpreter is slow; the fp32 gradients of all are tested with it, and the store is the same")
    for width, dtypes in WIDTHS[device].items():
        vocab_size = (width - 1) // 16 * 16 if width > 16 else width - 1
        divergence = on_device(make(vocab_size), device)
        student, teacher = (x.to(device) for x in logits_pair(4, width))
        student[1], teacher[1] = torch.nan, torch.inf  # SCALES[1] is 0
        student[:, vocab_size:], teacher[:, vocab_size:] = torch.nan, torch.inf
        losses, expected = reference(student, teacher, divergence, vocab_size=vocab_size)
        wide = torch.full_like(student, POISON)
        before = sweep(backend, student, teacher, divergence, wide, vocab_size=vocab_size)
        for dtype in dtypes:
            what = f"{width} columns, {dtype}"
            gradient = torch.full_like(student, POISON, dtype=dtype)
            after = sweep(backend, student, teacher, divergence, gradient, vocab_size=vocab_size)
            assert (gradient[1] == 0).all(), what
            assert (gradient[:, vocab_size:] == 0).all(), what
            assert_rounded(what, gradient, expected, BOUNDS[dtype][1], floor=0.1 if width <= 7 else 0.0)
            rounded_fp32(what, device, gradient, wide)
            assert_near(f"{what}: loss", after[0], losses, 4e-6, floor=0.1 if width <= 7 else 0.0)
            if device == "cpu":
                same(f"{what}: loss", after[0], before[0])
                same(f"{what}: statistics", after[1], before[1])


@A_FEW
def test_rows_without_numbers_are_nan(where, make):
    backend, device = where
    for width, dtypes in WIDTHS[device].items():
        student, teacher = (x.to(device) for x in logits_pair(4, width))
        student[0, width // 2], teacher[2, width - 1] = torch.nan, torch.nan
        divergence = on_device(make(width), device)
        for dtype in dtypes:
            gradient = torch.full_like(student, 7.0, dtype=dtype)  # not NaN, which is what must come
            sweep(backend, student, teacher, divergence, gradient)
            assert gradient[[0, 2]].isnan().all()
            assert (gradient[1] == 0).all()
            assert gradient[3].isfinite().all()
            assert not (gradient == 7.0).any()


# Of student, teacher and gradient: the first column, and the columns between rows. All lie alike within 4 columns, as
# the CUDA kernels need them; within 8 rows apart, as Triton's vectors do, all but the last two.
LAYOUTS = {
    "one after another": ((0, 0, 0), (0, 0, 0)),
    "rows apart": ((0, 0, 0), (8, 16, 24)),
    "shifted": ((1, 1, 1), (5, 5, 5)),
    "gradient 4 further": ((3, 3, 7), (8, 0, 16)),
    "rows 4 further": ((0, 0, 0), (1, 1, 5)),
    "all different": ((1, 5, 5), (3, 7, 11)),
}


@A_FEW
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_rows_wherever_they_lie(where, make, layout):
    backend, device = where
    if device == "cpu" and layout not in (LAYOUTS["shifted"], LAYOUTS["all different"]):
        pytest.skip("the interpreter is slow, and sees no difference")
    widths, dtypes = ((1003,), NARROW[:1]) if device == "cpu" else ((1001, 1002, 1003, 1008, 50257), NARROW)
    for width, dtype in itertools.product(widths, dtypes):
        student, teacher = (x.to(device) for x in logits_pair(5, width))
        divergence = on_device(make(width), device)
        expected = reference_gradient(student, teacher, divergence)
        (of_student, of_teacher, of_gradient), apart = layout
        student, teacher = laid(student, of_student, apart[0]), laid(teacher, of_teacher, apart[1])
        gradient = laid(student, of_gradient, apart[2], dtype=dtype)
        sweep(backend, student, teacher, divergence, gradient)
        assert_rounded(f"{width} columns, {dtype}", gradient, expected, BOUNDS[dtype][1])
        assert untouched(gradient)


@A_FEW
@pytest.mark.parametrize("noise", [1e-3, 0.1])
def test_models_that_nearly_agree(where, make, noise):
    backend, device = where
    width = 1000 if device == "cpu" else max(WIDTHS[device])
    student, teacher = (x.to(device) for x in logits_pair(4, width, noise=noise))
    divergence = on_device(make(width), device)
    expected = reference_gradient(student, teacher, divergence, ce_weight=0.0)
    for dtype in NARROW[1:] if device == "cpu" else NARROW:
        gradient = torch.full_like(student, POISON, dtype=dtype)
        sweep(backend, student, teacher, divergence, gradient, ce_weight=0.0)
        assert_rounded(str(dtype), gradient, expected, BOUNDS[dtype][1])


def test_more_dimensions_than_a_kernel_counts(where):
    backend, device = where
    if backend == "native":
        pytest.skip("the CUDA kernels take a gradient of up to 4 leading dimensions")
    shape, cut = (3, 3, 3, 3, 3, 20), (slice(None, 2),) * 5
    student, teacher = (x.to(device)[cut] for x in logits_pair(*shape))
    memory = torch.full(shape, POISON, dtype=torch.bfloat16, device=device)
    gradient, flat = memory[cut], [x.reshape(-1, 20) for x in (student, teacher)]
    sweep(backend, student, teacher, kd.ForwardKL(), gradient)
    expected = reference_gradient(*flat, kd.ForwardKL())
    assert_rounded("gradient", gradient.reshape(-1, 20), expected, BOUNDS[torch.bfloat16][1])
    assert int(memory.isnan().sum()) == memory.numel() - gradient.numel()


@pytest.mark.gpu
def test_what_the_cuda_kernels_leave_to_triton():
    if backends.why_not("native", torch.device("cuda")) is not None:
        pytest.skip("no CUDA kernels here")
    student, teacher = (x.cuda() for x in logits_pair(5, 1003))
    gradient = laid(student, 2, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="lie differently within 16 bytes"):
        sweep("native", student, teacher, kd.ForwardKL(), gradient)
    assert gradient.isnan().all()
    if backends.why_not("triton", torch.device("cuda")) is None:
        sweep(backends.AUTO, student, teacher, kd.ForwardKL(), gradient)
        expected = reference_gradient(student, teacher, kd.ForwardKL())
        assert_rounded("gradient", gradient, expected, BOUNDS[torch.bfloat16][1])


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_the_cpu_kernels_refuse_it(dtype):
    student, teacher = logits_pair(3, 100)
    gradient = torch.full_like(student, POISON, dtype=dtype)
    with pytest.raises(RuntimeError, match="on the CPU the gradient of float32 logits is float32"):
        sweep("native", student, teacher, kd.ForwardKL(), gradient)
    assert gradient.isnan().all()


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize(
    ("dtype", "of_gradient"),
    [
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.float64),
    ],
    ids=str,
)
def test_other_dtypes_are_refused(backend, dtype, of_gradient):
    if triton.why_not(torch.device("cpu")) is not None and backend == "triton":
        pytest.skip(str(triton.why_not(torch.device("cpu"))))
    student, teacher = logits_pair(3, 100, dtype=dtype)
    with pytest.raises(RuntimeError, match=f"the gradient of {str(dtype)[6:]} logits is {str(of_gradient)[6:]}"):
        sweep(backend, student, teacher, kd.ForwardKL(), torch.empty_like(student, dtype=of_gradient))


def test_who_can():
    for device in ("cpu", "cuda"):
        assert native.narrows(torch.device(device)) == (device == "cuda")
        assert triton.narrows(torch.device(device))


# Triton is told that rows less their first columns lie at 16 bytes; its interpreter would not notice if they did not.
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 3, (*(torch.float32,) * 2, torch.bfloat16)], ids=["fp32", "16"])
def test_triton_is_told_the_truth_about_vectors(dtypes):
    memory = [torch.empty(9000, dtype=dtype) for dtype in dtypes]
    told = set()
    for first in range(64):
        starts = first % 4, first % 4, first % 8 if first < 32 else first // 4 % 8
        for strides in ((1008, 1000, 1008), (1003, 1003, 1003), (1003, 1011, 1019), (1003, 1003, 1007)):
            tensors = [of[start:] for of, start in zip(memory, starts, strict=True)]
            kind, misalignment = triton._alignment(tensors, [[stride] for stride in strides], 992)
            told.add(kind)
            for row in range(8) if kind != "none" else ():
                begin = (row * strides[2] + misalignment) % triton.LANE_COLUMNS if kind == "shifted" else 0
                for tensor, stride in zip(tensors, strides, strict=True):
                    assert (tensor.data_ptr() + (row * stride - begin) * tensor.element_size()) % 16 == 0
    assert told == {"aligned", "shifted", "none"}
