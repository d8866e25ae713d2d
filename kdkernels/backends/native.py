"""The C++ and CUDA kernels (csrc, built as kdkernels._C): torch tensors to addresses, strides, threads and streams."""

from __future__ import annotations

import importlib
import sysconfig
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def _hides_an_installed_one() -> str:
    """What to say where a checkout, most likely the working folder, hides an installed package with its extension."""
    here, installed = Path(__file__).parents[1], Path(sysconfig.get_path("platlib"), "kdkernels")
    if here == installed or not any((installed / f"_C{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
        return ""
    return f"{here} hides the kdkernels installed in {installed}: start Python in another folder"


_kernels: ModuleType | None
_import_error = _hides = ""
try:
    _kernels = importlib.import_module("kdkernels._C")
except ImportError as error:
    _kernels, _import_error, _hides = None, str(error), _hides_an_installed_one()
    if _hides:
        warnings.warn(f"losses on the CPU will be computed by plain PyTorch: {_hides}", stacklevel=2)

# The CUDA kernels' plan: cluster, consumers, slot_columns, blocks_per_sm, ahead (csrc/cuda/rows.h); empty: their own.
cuda_plan: list[int] = []

BUILD_HINT = "build it with `pip install -e .` (needs a C++20 compiler) in a checkout of kdkernels"

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
# The ids of csrc/rows.h.
DIVERGENCE_IDS = {
    "forward_kl": 0,
    "reverse_kl": 1,
    "symmetric_kl": 2,
    "jensen_shannon": 3,
    "skew_forward_kl": 4,
    "skew_reverse_kl": 5,
    "total_variation": 6,
    "alpha_beta": 7,
    "decoupled": 8,
    "adaptive_kl": 9,
}
STRONG_SET_IDS = {"": 0, "label": 1, "top_k": 2, "top_p": 3, "given": 4}
TAIL_IDS = {"": 0, "bucket": 1, "renormalize": 2, "teacher": 3, "drop": 4}


@dataclass(frozen=True)
class RowOptions:
    """What a row sweep is told beside its tensors; see csrc/rows.h."""

    divergence: str
    parameters: tuple[float, ...]
    temperature: float
    kd_weight: float
    ce_weight: float
    scale_by_temperature: bool
    vocab_size: int
    student_logit_scale: float
    student_softcap: float
    teacher_logit_scale: float
    teacher_softcap: float
    scale_gradient: bool
    strong: str = ""  # the name of a StrongSet; none: the divergence splits no vocabulary
    strong_amount: float = 0.0
    tail: str = ""  # of a sparse teacher: what becomes of the mass it does not tell; none: a teacher of logits
    whole: bool = True  # a sparse teacher's: read the vocabulary, not the given ids alone ("renormalize")

    @property
    def reads_labels(self) -> bool:
        return self.ce_weight > 0 or self.strong == "label"


def number_of_stats(divergence: str, tail: str = "") -> int:
    """Rows of the statistics: student lse, teacher lse, divergence, cross-entropy.

    Decoupled: five more. Of a sparse teacher: the teacher's and the student's mass of the given ids, and whether their
    most likely tokens agree.
    """
    if tail:
        return 7
    return 9 if divergence == "decoupled" else 4


def why_not(device: torch.device | None = None) -> str | None:
    """Why the kernels cannot serve tensors on ``device``; None where they can."""
    if _kernels is None:
        return f"the extension kdkernels._C is not built ({_import_error}); {_hides or BUILD_HINT}"
    if device is None or device.type == "cpu":
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return f"the C++ kernels serve the CPU and NVIDIA GPUs, not {device.type}"
    if not _kernels.cuda:
        return "this build has kernels for the CPU only: it was built without nvcc (12 or newer)"
    return _cuda_why_not(torch.cuda.current_device() if device.index is None else device.index)


_cuda_reasons: dict[int, str | None] = {}


@torch.compiler.assume_constant_result
def _cuda_why_not(device: int) -> str | None:
    if device not in _cuda_reasons:
        _cuda_reasons[device] = str(_built().cuda_why_not(device)) or None
    return _cuda_reasons[device]


def capability() -> str:
    """The instruction set the CPU kernels use: "baseline", "avx2" or "avx512"."""
    return str(_built().cpu_capability())


def contents() -> str:
    """What the extension was built with, in words."""
    if _built().cuda:
        return f"CPU kernels ({capability()}) and CUDA kernels (compute capability 9.0 and newer)"
    return f"CPU kernels ({capability()}); built without CUDA kernels: Triton serves GPUs"


def _built() -> ModuleType:
    if _kernels is None:
        raise RuntimeError(why_not())
    return _kernels


def row_layout(logits: Tensor) -> tuple[list[int], list[int]]:
    """Sizes and strides of the leading dimensions, as few as describe them: neighbours that are one run are merged."""
    sizes: list[int] = []
    strides: list[int] = []
    for size, stride in zip(logits.shape[:-1], logits.stride()[:-1], strict=True):
        if size == 1:
            continue
        if sizes and strides[-1] == size * stride:
            sizes[-1] *= size
            strides[-1] = stride
        else:
            sizes.append(size)
            strides.append(stride)
    return sizes, strides


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def narrows(device: torch.device) -> bool:
    """Whether a sweep of fp32 logits on ``device`` can write its gradient in 16 bits."""
    return device.type == "cuda"


def why_not_gradient(student: Tensor, gradient: Tensor | None) -> str | None:
    """Why no sweep forms a gradient of this dtype; None where the dtypes do."""
    if gradient is None or gradient.dtype == student.dtype:
        return None
    if student.dtype == torch.float32 and gradient.dtype in (torch.bfloat16, torch.float16):
        return None
    dtypes = [str(tensor.dtype).removeprefix("torch.") for tensor in (student, gradient)]
    return f"the gradient of {dtypes[0]} logits is {dtypes[1]}; expected their dtype, or 16 bits where that is float32"


def empty_gradient(student: Tensor) -> Tensor:
    """Uninitialised memory for a gradient of the student's logits, contiguous."""
    gradient = torch.empty_like(student, memory_format=torch.contiguous_format)
    if student.device.type != "cpu":
        return gradient
    _built().back_with_huge_pages(
        gradient.data_ptr(), gradient.numel() * gradient.element_size(), torch.get_num_threads()
    )
    return gradient


def _few_dims(logits: Tensor) -> Tensor:
    # More runs of rows than csrc counts do not occur in practice; correct all the same, at the price of a copy.
    return logits if len(row_layout(logits)[0]) <= _built().max_row_dims else logits.contiguous()


def _mask_layout(mask: Tensor | None, student: Tensor) -> tuple[Tensor | None, list[int], list[int]]:
    if mask is None:
        return None, [], []
    mask = _few_dims(mask.expand(*student.shape[:-1], mask.shape[-1]))
    return mask, *row_layout(mask)


def _on(device: torch.device) -> AbstractContextManager[object]:
    """The tensors' device as the current one; most often it is."""
    return nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device)


def _logits(logits: Tensor, logit_scale: float, softcap: float) -> Any:
    sizes, strides = row_layout(logits)
    return _built().Logits(
        data=logits.data_ptr(),
        dtype=DTYPE_CODES[logits.dtype],
        width=logits.shape[-1],
        sizes=sizes,
        strides=strides,
        logit_scale=logit_scale,
        softcap=softcap,
    )


def row_loss(
    student: Tensor,  # (..., V_s)
    teacher: Tensor,  # (..., V_t)
    labels: Tensor | None,  # (...) int64
    row_scale: Tensor,  # (...) fp32 (fp64 for an fp64 student)
    temperatures: Tensor | None,  # (...) as row_scale
    weights: Tensor | None,  # (3,) as row_scale: a decoupled divergence's
    mask: Tensor | None,  # (V,) or (..., V) bool: its strong set, where that is given
    options: RowOptions,
    gradient: Tensor | None,  # (..., V_s), written; may be the student itself; of 16 bits too where that is fp32
    loss: Tensor,  # (...) as row_scale, written
    stats: Tensor,  # (4 or 9, ...) as row_scale, written
) -> str | None:
    """Loss, statistics and (where asked for) gradient of every row, written to the last three arguments.

    Returns:
        None; or, with nothing written, why these tensors cannot be served.
    """
    teacher = _few_dims(teacher)
    mask, mask_sizes, mask_strides = _mask_layout(mask, student)
    return _sweep(
        student,
        labels,
        row_scale,
        temperatures,
        options,
        gradient,
        loss,
        stats,
        teacher=_logits(teacher, options.teacher_logit_scale, options.teacher_softcap),
        weights=_address(weights),
        strong=STRONG_SET_IDS[options.strong],
        strong_amount=options.strong_amount,
        mask=_address(mask),
        mask_sizes=mask_sizes,
        mask_strides=mask_strides,
    )


def sparse_row_loss(
    student: Tensor,  # (..., V_s)
    logprobs: Tensor,  # (..., K)
    labels: Tensor | None,  # (...) int64
    row_scale: Tensor,  # (...) fp32 (fp64 for an fp64 student)
    temperatures: Tensor | None,  # (...) as row_scale
    weights: None,
    ids: Tensor,  # (..., K) int32 or int64
    options: RowOptions,
    gradient: Tensor | None,  # (..., V_s), written; may be the student itself
    loss: Tensor,  # (...) as row_scale, written
    stats: Tensor,  # (7, ...) as row_scale, written
) -> str | None:
    """The same where the teacher is sparse. Without ``options.whole``, statistics of the whole vocabulary are NaN.

    Returns:
        As :func:`row_loss`.
    """
    ids, logprobs = _as_matrix(ids), _as_matrix(logprobs)
    teacher = _built().SparseTeacher(
        tail=TAIL_IDS[options.tail],
        whole=options.whole,
        ids=ids.data_ptr(),
        ids_are_64_bit=ids.dtype == torch.int64,
        logprobs=logprobs.data_ptr(),
        logprobs_dtype=DTYPE_CODES[logprobs.dtype],
        k=ids.shape[1],
        ids_stride=ids.stride(0),
        logprobs_stride=logprobs.stride(0),
        scale=options.teacher_logit_scale,
    )
    return _sweep(student, labels, row_scale, temperatures, options, gradient, loss, stats, sparse=teacher)


def _as_matrix(values: Tensor) -> Tensor:  # (..., K) -> (N, K), contiguous in its last dimension
    values = values.flatten(0, -2) if values.dim() > 1 else values.unsqueeze(0)
    return values if values.stride(1) == 1 else values.contiguous()


def _sweep(
    student: Tensor,
    labels: Tensor | None,
    row_scale: Tensor,
    temperatures: Tensor | None,
    options: RowOptions,
    gradient: Tensor | None,
    loss: Tensor,
    stats: Tensor,
    **teacher: Any,
) -> str | None:
    """``teacher``: what a RowProblem is told of it."""
    kernels = _built()
    reason = why_not_gradient(student, gradient)
    if reason is not None:
        return reason
    if gradient is not None and gradient.dtype != student.dtype and not narrows(student.device):
        return "on the CPU the gradient of float32 logits is float32"
    given, student = student, _few_dims(student)
    target = student if gradient is given else gradient
    labels = None if labels is None else labels.contiguous()
    row_scale = row_scale.contiguous()
    temperatures = None if temperatures is None else temperatures.contiguous()
    gradient_sizes, gradient_strides = ([], []) if target is None else row_layout(target)
    problem = kernels.RowProblem(
        **teacher,
        student=_logits(student, options.student_logit_scale, options.student_softcap),
        rows=row_scale.numel(),
        vocab_size=options.vocab_size,
        divergence=DIVERGENCE_IDS[options.divergence],
        parameters=options.parameters,
        kd_weight=options.kd_weight,
        ce_weight=options.ce_weight,
        scale_by_temperature=options.scale_by_temperature,
        temperature=options.temperature,
        temperatures=_address(temperatures),
        labels=_address(labels),
        row_scale=row_scale.data_ptr(),
        scale_gradient=options.scale_gradient,
        loss=loss.data_ptr(),
        stats=stats.data_ptr(),
        gradient=_address(target),
        gradient_dtype=DTYPE_CODES[student.dtype if target is None else target.dtype],
        gradient_sizes=gradient_sizes,
        gradient_strides=gradient_strides,
    )
    if student.device.type == "cuda":
        with _on(student.device):
            reason = str(kernels.cuda_why_not_rows(problem))
            if reason:
                return reason
            stream = torch.cuda.current_stream(student.device).cuda_stream
            if options.tail:
                memory = torch.empty(kernels.cuda_sparse_bytes(problem), dtype=torch.uint8, device=student.device)
                kernels.cuda_sparse_row_loss(problem, memory=memory.data_ptr(), stream=stream, plan=cuda_plan)
            else:
                kernels.cuda_row_loss(problem, stream=stream, plan=cuda_plan)
    else:
        kernels.cpu_row_loss(problem, threads=torch.get_num_threads())
    if gradient is given and student is not given:
        given.copy_(student)
    return None


def scale_rows(
    values: Tensor,  # (..., V)
    factors: Tensor,  # (...) fp32 (fp64 for fp64 values)
    out: Tensor,  # (..., V), the strides of values; may be values itself
) -> None:
    """out = values·factors, row by row. Rows whose factor is 1 are copied, or not touched where out is values."""
    sizes, strides = row_layout(values)
    if len(sizes) > _built().max_row_dims:
        out.copy_(values * factors.unsqueeze(-1))
        return
    call = {
        "inp": values.data_ptr(),
        "out": out.data_ptr(),
        "dtype": DTYPE_CODES[values.dtype],
        "sizes": sizes,
        "strides": strides,
        "rows": factors.numel(),
        "width": values.shape[-1],
    }
    if values.device.type == "cuda":
        one_for_all = all(
            stride == 0 or size == 1 for size, stride in zip(factors.shape, factors.stride(), strict=True)
        )
        factors = factors if one_for_all else factors.contiguous()
        with _on(values.device):
            stream = torch.cuda.current_stream(values.device).cuda_stream
            _built().cuda_scale_rows(
                **call, factors=factors.data_ptr(), factor_stride=0 if one_for_all else 1, stream=stream
            )
    else:
        factors = factors.contiguous()
        _built().cpu_scale_rows(**call, factors=factors.data_ptr(), threads=torch.get_num_threads())
