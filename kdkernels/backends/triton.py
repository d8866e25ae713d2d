"""The Triton kernels: whatever Triton runs on, NVIDIA and AMD GPUs and Intel's; CPU tensors under its interpreter."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from kdkernels.backends.native import RowOptions, why_not_gradient

_import_error = ""
try:
    from kdkernels.backends import _triton_decoupled, _triton_divergences, _triton_rows, _triton_scale, _triton_sparse
except ImportError as error:
    _import_error = str(error)

DEVICES = ("cuda", "xpu")  # "cuda" is what torch calls AMD's too
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_DIMS = 4  # leading dimensions a kernel counts rows by

# Columns a program takes at a time, by the vocabulary up to which it is chosen; each lane takes 8 of them. On an H100:
# forward KL 0.76 of the memory limit at 32000, 0.64 at 128256 (docs/performance.md); other sizes were not measured.
BLOCKS = [(1024, 1024), (4096, 2048), (65536, 4096)]
LARGEST_BLOCK = 8192
STAGES = 1
LANE_COLUMNS = 8
REGISTERS = 64  # of an NVIDIA GPU, where 1024 threads a multiprocessor can have as many
# Low bits of an fp32 number that are 0 in all numbers of a 16-bit type.
ORDER_SHIFTS = {torch.bfloat16: 16, torch.float16: 13}
MOST_COUNTED = 2**24
SCALE_BLOCK = 4096
SCALE_PROGRAMS = 512  # about four a multiprocessor
# A sparse teacher's kernel: threads of a program at most, and blocks that its sweeps load at once. Beside its sweeps a
# program does the same work in every thread, so that fewer threads do less. Measured on an H100 (docs/performance.md).
SPARSE_THREADS = 512
SPARSE_UNROLL = 1


def _interpreted() -> bool:
    return type(_triton_rows.row_kernel).__name__ == "InterpretedFunction"


def why_not(device: torch.device | None = None) -> str | None:
    """Why the Triton kernels cannot serve tensors on ``device``; None where they can."""
    if _import_error:
        return f"Triton is not installed ({_import_error})"
    if device is None or device.type in DEVICES or (device.type == "cpu" and _interpreted()):
        return None
    return f"Triton's kernels need a GPU, not {device.type} (but for its interpreter: TRITON_INTERPRET=1)"


def narrows(device: torch.device) -> bool:
    """Whether a sweep of fp32 logits on ``device`` can write its gradient in 16 bits."""
    return True


def empty_gradient(student: Tensor) -> Tensor:
    """Uninitialised memory for a gradient of the student's logits, contiguous."""
    return torch.empty_like(student, memory_format=torch.contiguous_format)


def _layout(*tensors: Tensor) -> tuple[list[int], list[list[int]]]:
    """Sizes of the leading dimensions and each tensor's strides, merged where all tensors run on."""
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in tensors]
    for i, size in enumerate(tensors[0].shape[:-1]):
        if size == 1:
            continue
        here = [tensor.stride(i) for tensor in tensors]
        if sizes and all(of[-1] == size * stride for of, stride in zip(strides, here, strict=True)):
            sizes[-1] *= size
            for of, stride in zip(strides, here, strict=True):
                of[-1] = stride
        else:
            sizes.append(size)
            for of, stride in zip(strides, here, strict=True):
                of.append(stride)
    return sizes or [1], [of or [0] for of in strides]


def _padded(numbers: list[int], fill: int) -> list[int]:
    return numbers + [fill] * (MAX_DIMS - len(numbers))


def _alignment(tensors: list[Tensor], strides: list[list[int]], vocab_size: int) -> tuple[str, int]:
    """How rows lie to 16 bytes (see Plan), and how many columns after that the first one starts."""
    # An fp32 tensor's 8 columns are 32 bytes; 16 are as good.
    groups = [16 // tensor.element_size() for tensor in tensors]
    starts = [tensor.data_ptr() % 16 // tensor.element_size() for tensor in tensors]
    start = max(starts)
    alike = all(start % group == own for group, own in zip(groups, starts, strict=True))
    fits = {tuple(stride % LANE_COLUMNS for stride in of) for of in strides}
    if not alike or len(fits) > 1 or any(tensor.data_ptr() % tensor.element_size() for tensor in tensors):
        return "none", 0
    # 16, not 8: that is what Triton looks for in vocab_size by itself.
    aligned = start == 0 and not any(fits.pop()) and vocab_size % 16 == 0
    return ("aligned", 0) if aligned else ("shifted", start)


@functools.cache
def _warp_size(device: torch.device) -> int:
    if device.type != "cuda":
        return 32
    return int(getattr(torch.cuda.get_device_properties(device), "warp_size", 32))


def _block(vocab_size: int) -> int:
    return next((block for largest, block in BLOCKS if vocab_size <= largest), LARGEST_BLOCK)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "xpu":
        return int(torch.xpu.get_device_properties(device).gpu_subslice_count)
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _launch(block: int, device: torch.device, threads: int = 1024, registers: int = REGISTERS) -> dict[str, int]:
    """How a kernel is compiled for a device, beside its own constants: with so many threads at most."""
    options = {"num_warps": max(1, min(block // LANE_COLUMNS, threads) // _warp_size(device))}
    if device.type == "cuda" and torch.version.cuda:
        options["maxnreg"] = registers
    return options


def _on(device: torch.device) -> AbstractContextManager[Any]:
    if device.type == "cuda":
        return torch.cuda.device(device)
    if device.type == "xpu":
        return torch.xpu.device(device)
    import numpy  # which torch and Triton do without on a GPU

    return numpy.errstate(all="ignore")  # the interpreter's: inf and NaN are meant


def _transform(scale: float, cap: float) -> str:
    return "softcap" if cap > 0 else "none" if scale == 1 else "scale"


def _some(tensor: Tensor | None) -> list[Tensor]:
    return [] if tensor is None else [tensor]


def _plan(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    temperatures: Tensor | None,
    weights: Tensor | None,
    options: RowOptions,
    alignment: str,
    dims: int,
) -> _triton_rows.Plan:
    name, strong = _triton_divergences.kernel_name(options.divergence, options.parameters), options.strong
    if name == "adaptive_kl":
        # With all of the teacher's mass in its head, its tail has no weight.
        name, strong = ("symmetric_kl", strong) if options.strong_amount < 1 else ("forward_kl", "")
    with_ce = options.ce_weight != 0
    teacher_transform = _transform(options.teacher_logit_scale, options.teacher_softcap)
    return _triton_rows.Plan(
        DIVERGENCE=name,
        # fp32 logits leave the memory twice the time, and their gradients more digits to be right in.
        PLAIN="none" if student.dtype == torch.float32 else _triton_divergences.PLAIN.get(name, "none"),
        GRADIENT=target is not None,
        DIVERGENCE_IN_GRADIENT=options.kd_weight != 0,
        LABELS=with_ce,
        OWN_HARD_SUM=with_ce and (temperatures is not None or options.temperature != 1),
        ROW_TEMPERATURES=temperatures is not None,
        SCALE_BY_TEMPERATURE=options.scale_by_temperature,
        SCALE_GRADIENT=options.scale_gradient,
        STUDENT_TRANSFORM=_transform(options.student_logit_scale, options.student_softcap),
        TEACHER_TRANSFORM=teacher_transform,
        ALIGNMENT=alignment,
        DIMS=dims,
        BLOCK=_block(options.vocab_size),
        STAGES=STAGES,
        STRONG=strong,
        ORDER_SHIFT=ORDER_SHIFTS.get(teacher.dtype, 0) if teacher_transform == "none" else 0,
        TERM_WEIGHTS=weights is not None,
    )


def _why_not_dtypes(**tensors: Tensor) -> str | None:
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            return f"Triton's kernels compute in fp32, but {name} is {str(tensor.dtype).removeprefix('torch.')}"
    return None


def row_loss(
    student: Tensor,  # (..., V_s)
    teacher: Tensor,  # (..., V_t)
    labels: Tensor | None,  # (...) int64
    row_scale: Tensor,  # (...) fp32
    temperatures: Tensor | None,  # (...) fp32
    weights: Tensor | None,  # (3,) fp32: a decoupled divergence's
    mask: Tensor | None,  # (V,) or (..., V) bool: its strong set, where that is given
    options: RowOptions,
    gradient: Tensor | None,  # (..., V_s), written; may be the student itself; of 16 bits too where that is fp32
    loss: Tensor,  # (...) fp32, written
    stats: Tensor,  # (4 or 9, ...) fp32, written
) -> str | None:
    """Loss, statistics and (where asked for) gradient of every row, written to the last three arguments.

    Returns:
        None; or, with nothing written, why these tensors cannot be served.
    """
    reason = _why_not_dtypes(student_logits=student, teacher=teacher)
    if reason is not None:
        return reason
    if options.strong == "top_k" and options.vocab_size > MOST_COUNTED:
        return f"Triton's kernels count tokens in fp32, to {MOST_COUNTED}; vocab_size is {options.vocab_size}"
    reason = why_not_gradient(student, gradient)
    if reason is not None:
        return reason
    rows = row_scale.numel()
    if rows == 0:
        return None
    if mask is not None:
        mask = mask.view(torch.uint8).expand(*student.shape[:-1], mask.shape[-1])
    given, target = student, gradient
    sizes, strides = _layout(student, teacher, student if target is None else target, *_some(mask))
    if len(sizes) > MAX_DIMS:  # does not occur in practice; correct all the same, at the price of copies
        student, teacher = student.contiguous(), teacher.contiguous()
        mask = None if mask is None else mask.contiguous()
        if gradient is not None:
            target = student if gradient is given else torch.empty_like(student, dtype=gradient.dtype)
        sizes, strides = _layout(student, teacher, student if target is None else target, *_some(mask))
    tensors = [student, teacher, student if target is None else target]
    alignment, misalignment = _alignment(tensors, strides[:3], options.vocab_size)
    plan = _plan(student, teacher, target, temperatures, weights, options, alignment, len(sizes))
    row_scale = row_scale.contiguous()
    numbers = (
        options.student_logit_scale,
        options.student_softcap,
        options.teacher_logit_scale,
        options.teacher_softcap,
        *_padded(sizes, 1)[1:],
        *(stride for of in strides for stride in _padded(of, 0)),
    )
    before = (
        *tensors,
        row_scale if labels is None or not options.reads_labels else labels.contiguous(),
        row_scale,
        row_scale if temperatures is None else temperatures.contiguous(),
    )
    problem = (
        loss,
        stats,
        rows,
        options.vocab_size,
        student.shape[-1],
        misalignment,
        options.temperature,
        options.kd_weight,
        options.ce_weight,
    )
    launch = _launch(plan.BLOCK, student.device)
    with _on(student.device):
        if options.divergence == "decoupled":
            sets = (row_scale if weights is None else weights, row_scale if mask is None else mask)
            masks = () if mask is not None else _padded([], 0)
            _triton_decoupled.decoupled_kernel[(rows,)](
                *before, *sets, *problem, *options.parameters, options.strong_amount, *numbers, *masks, plan, **launch
            )
        else:
            parameters = (options.strong_amount,) if options.strong else options.parameters
            _triton_rows.row_kernel[(rows,)](*before, *problem, *(*parameters, 0.0, 0.0)[:2], *numbers, plan, **launch)
    if gradient is not None and target is not None and (target is not gradient):
        gradient.copy_(target)
    return None


def sparse_row_loss(
    student: Tensor,  # (..., V_s)
    logprobs: Tensor,  # (..., K)
    labels: Tensor | None,  # (...) int64
    row_scale: Tensor,  # (...) fp32
    temperatures: Tensor | None,  # (...) fp32
    weights: Tensor | None,  # None: a decoupled divergence's
    ids: Tensor,  # (..., K) int32 or int64
    options: RowOptions,
    gradient: Tensor | None,  # (..., V_s), written; may be the student itself; of 16 bits too where that is fp32
    loss: Tensor,  # (...) fp32, written
    stats: Tensor,  # (7, ...) fp32, written
) -> str | None:
    """:func:`row_loss` of a sparse teacher: log-probabilities of a few ids a row.

    Returns:
        None; or, with nothing written, why these tensors cannot be served.
    """
    reason = _why_not_dtypes(student_logits=student, **{"teacher.logprobs": logprobs})
    reason = reason or why_not_gradient(student, gradient)
    if reason is not None:
        return reason
    rows, number_of_ids = row_scale.numel(), ids.shape[-1]
    if rows == 0:
        return None
    given, target = student, gradient
    sizes, strides = _layout(student, student if target is None else target)
    if len(sizes) > MAX_DIMS:  # as in row_loss
        student = student.contiguous()
        if gradient is not None:
            target = student if gradient is given else torch.empty_like(student, dtype=gradient.dtype)
        sizes, strides = _layout(student, student if target is None else target)
    tensors = [student, student if target is None else target]
    alignment, misalignment = _alignment(tensors, strides, options.vocab_size)
    block = _block(max(options.vocab_size, 2 * number_of_ids))  # of many ids, few for each thread
    threads = min(block // LANE_COLUMNS, SPARSE_THREADS)
    plan = _plan(student, logprobs, target, temperatures, None, options, alignment, len(sizes))._replace(
        PLAIN="none",
        ORDER_SHIFT=0,
        BLOCK=block,
        TAIL=options.tail,
        IDS=max(1 << (number_of_ids - 1).bit_length(), threads),
        WHOLE=options.whole,
        UNROLL=SPARSE_UNROLL,
        # What Triton gives a thread for 16 bytes of the narrowest number at hand.
        LANE=LANE_COLUMNS if alignment == "none" else min(LANE_COLUMNS, 16 // min(of.element_size() for of in tensors)),
    )
    # Rows of the largest blocks one a multiprocessor: those under way then fit the second cache, for the gradient.
    at_once = max(1, LARGEST_BLOCK // block)
    # The interpreter runs its programs one after the other anyway.
    programs = min(rows, 1 if student.device.type == "cpu" else at_once * _multiprocessors(student.device))
    # A bit for each column of whole blocks, the first of which may begin up to a lane before the row.
    words = -(-(options.vocab_size + LANE_COLUMNS - 1) // block) * block // 32
    marks = torch.empty(programs, words, dtype=torch.int32, device=student.device)
    row_scale = row_scale.contiguous()
    with _on(student.device):
        _triton_sparse.sparse_kernel[(programs,)](
            *tensors,
            logprobs.contiguous(),
            ids.contiguous(),
            row_scale if labels is None or not options.reads_labels else labels.contiguous(),
            row_scale,
            row_scale if temperatures is None else temperatures.contiguous(),
            loss,
            stats,
            marks,
            marks.view(torch.uint8),
            rows,
            number_of_ids,
            words,
            options.vocab_size,
            student.shape[-1],
            misalignment,
            options.temperature,
            options.kd_weight,
            options.ce_weight,
            (*options.parameters, 0.0)[0],
            options.student_logit_scale,
            options.student_softcap,
            options.teacher_logit_scale,
            *_padded(sizes, 1)[1:],
            *(stride for of in strides for stride in _padded(of, 0)),
            plan,
            **_launch(block, student.device, threads, REGISTERS * 1024 // (at_once * threads)),
        )
    if gradient is not None and target is not None and (target is not gradient):
        gradient.copy_(target)
    return None


def scale_rows(
    values: Tensor,  # (..., V)
    factors: Tensor,  # (...) fp32
    out: Tensor,  # (..., V), the strides of values; may be values itself
) -> None:
    """out = values·factors, row by row. Rows whose factor is 1 are copied, or not touched where out is values."""
    rows, width = factors.numel(), values.shape[-1]
    if rows == 0:
        return
    sizes, (strides,) = _layout(values)
    if len(sizes) > MAX_DIMS:
        out.copy_(values * factors.unsqueeze(-1))
        return
    factor_sizes, (factor_strides,) = _layout(factors.unsqueeze(-1))
    if len(factor_sizes) > 1:
        factors, factor_strides = factors.contiguous(), [1]
    rows_each = min(64, 1 << max(0, (rows // SCALE_PROGRAMS).bit_length() - 1))
    with _on(values.device):
        _triton_scale.scale_kernel[((rows + rows_each - 1) // rows_each,)](
            values,
            factors,
            out,
            rows,
            width,
            factor_strides[0],
            *_padded(sizes, 1)[1:],
            *_padded(strides, 0),
            DIMS=len(sizes),
            IN_PLACE=values.data_ptr() == out.data_ptr(),
            ROWS=rows_each,
            BLOCK=SCALE_BLOCK,
            **_launch(SCALE_BLOCK, values.device),
        )
