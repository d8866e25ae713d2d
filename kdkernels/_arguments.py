"""Every check of what a caller hands in, before any work: messages name the argument, what came, what was expected."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor
from typing_extensions import Unpack

from kdkernels._ids import out_of_range
from kdkernels.divergences import Decoupled, Divergence, resolve
from kdkernels.strong_sets import Given, Label, TopK
from kdkernels.teachers import MOST_IDS, TAILS, TopKTeacher

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REDUCTIONS = ("mean", "sum", "none")


class LossOptions(TypedDict, total=False):
    """The keyword arguments that every form of the loss shares; see kdkernels.distillation_loss."""

    divergence: Divergence | str
    temperature: float | Tensor
    kd_weight: float
    ce_weight: float
    scale_by_temperature: bool
    weight: Tensor | None
    reduction: str
    normalizer: float | Tensor | None
    ignore_index: int
    vocab_size: int | None
    student_logit_scale: float
    student_softcap: float | None
    teacher_logit_scale: float
    teacher_softcap: float | None


@dataclass(frozen=True)
class Transform:
    """Applied to a model's logits before the temperature: x = logit_scale·z, then softcap·tanh(x / softcap)."""

    logit_scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class Rows:
    """Where a call's rows come from: what everything else that is given per row must agree with."""

    shape: torch.Size  # (...)
    device: torch.device
    dtype: torch.dtype  # the student's
    widths: tuple[int, int]  # the vocabularies of student and teacher
    name: str = "student_logits"  # the argument that has these rows
    vocabularies: tuple[str, str] = ("student_logits", "teacher")  # the arguments that have these widths


@dataclass(frozen=True)
class RowArguments:
    """A checked call, but for where its logits come from. Everything per row has shape (...)."""

    rows: Rows
    labels: Tensor | None
    divergence: Divergence
    temperature: float | Tensor
    kd_weight: float
    ce_weight: float
    scale_by_temperature: bool
    weight: Tensor | None
    reduction: str
    normalizer: float | Tensor | None
    ignore_index: int
    vocab_size: int
    student_transform: Transform
    teacher_transform: Transform
    sparse: TopKTeacher | None  # the teacher, detached, where it is one


@dataclass(frozen=True)
class Arguments(RowArguments):
    """A checked call on logits (..., V)."""

    student: Tensor
    teacher: Tensor  # (..., V_t) logits; a sparse teacher's log-probabilities (..., K)


def check_float(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")


def check_same_device(name: str, tensor: Tensor, other: str, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, {other} on {device}; move one of them")


def check_logits(name: str, logits: Tensor) -> None:
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name} must be a Tensor of logits (..., V), got {type(logits).__name__}")
    check_float(name, logits)
    if logits.dim() < 1:
        raise ValueError(f"{name} must have at least one dimension (..., V), got a scalar")
    if logits.shape[-1] < 1:
        raise ValueError(f"{name} must have at least one column, got shape {tuple(logits.shape)}")
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        raise ValueError(
            f"{name} must be contiguous in its last dimension, got strides {tuple(logits.stride())} "
            f"for shape {tuple(logits.shape)}; call .contiguous() on it"
        )


def _check_rows(name: str, value: Tensor, rows: Rows, dtypes: str) -> None:
    if value.shape != rows.shape:
        raise ValueError(
            f"{name} must have one entry per row of {rows.name}, shape {tuple(rows.shape)}, got {tuple(value.shape)}"
        )
    check_same_device(name, value, rows.name, rows.device)
    fits = value.is_floating_point() if dtypes == "float" else value.dtype == torch.int64
    if not fits:
        raise TypeError(f"{name} must be {dtypes}, got {value.dtype}")


def check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not -math.inf < value < math.inf:  # not math.isfinite, which torch.compile cannot trace
        raise ValueError(f"{name} must be finite, got {value}")


def _check_transform(side: str, logit_scale: float, softcap: float | None) -> Transform:
    check_number(f"{side}_logit_scale", logit_scale)
    if softcap is not None:
        check_number(f"{side}_softcap", softcap)
        if softcap <= 0:
            raise ValueError(f"{side}_softcap must be positive, got {softcap}")
    return Transform(logit_scale, softcap)


def _check_vocab_size(vocab_size: int | None, rows: Rows) -> int:
    widths = rows.widths
    if vocab_size is None:
        if widths[0] != widths[1]:
            student, teacher = rows.vocabularies
            raise ValueError(
                f"{student} has a vocabulary of {widths[0]} and {teacher} of {widths[1]}; "
                "give vocab_size, the number of columns that are tokens in both"
            )
        return widths[0]
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, (int, torch.SymInt)):
        raise TypeError(f"vocab_size must be an int, got {type(vocab_size).__name__}")
    if not 1 <= vocab_size <= min(widths):
        raise ValueError(f"vocab_size must lie in [1, {min(widths)}], the columns both models have, got {vocab_size}")
    return vocab_size


def _check_temperature(temperature: float | Tensor, rows: Rows) -> None:
    if isinstance(temperature, Tensor):
        # A number per row stays on the device; a row whose temperature is not positive comes out as NaN.
        if temperature.dim() > 0:
            _check_rows("temperature", temperature, rows, "float")
        elif not temperature.is_floating_point():
            raise TypeError(f"temperature must be float, got {temperature.dtype}")
        if temperature.requires_grad:
            raise ValueError("temperature requires grad, but no gradient is formed for it; detach it")
        return
    check_number("temperature", temperature)
    if temperature <= 0:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")


def _check_labels(labels: Tensor, ignore_index: int, vocab_size: int, rows: Rows) -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be an int64 Tensor, got {type(labels).__name__}")
    _check_rows("labels", labels, rows, "int64")
    # Reading them back is free on the CPU alone; elsewhere such a row's loss is NaN.
    if labels.device.type == "cpu" and not torch.compiler.is_compiling() and labels.numel():
        counting = labels != ignore_index
        wrong = counting & ((labels < 0) | (labels >= vocab_size))
        if bool(wrong.any()):
            raise ValueError(
                f"labels must be {ignore_index} (ignore_index) or lie in [0, {vocab_size}), got {int(labels[wrong][0])}"
            )


_warned_about_teacher = False


def warn_if_teacher_requires_grad(teacher: Tensor) -> None:
    global _warned_about_teacher
    if teacher.requires_grad and torch.is_grad_enabled() and not _warned_about_teacher:
        if torch.compiler.is_compiling():
            return
        _warned_about_teacher = True
        warnings.warn(
            "teacher requires grad, but a distillation loss gives it none; compute it under torch.no_grad()",
            UserWarning,
            stacklevel=4,
        )


def _check_normalizer(normalizer: float | Tensor, reduction: str, rows: Rows) -> None:
    if reduction != "mean":
        raise ValueError(f"normalizer replaces the mean's denominator, but reduction is {reduction!r}")
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1:
            raise ValueError(f"normalizer must be a number or a 0-dim Tensor, got shape {tuple(normalizer.shape)}")
        if normalizer.device != rows.device and normalizer.device.type != "cpu":
            raise ValueError(f"normalizer is on {normalizer.device}, {rows.name} on {rows.device}; move one")
        return
    check_number("normalizer", normalizer)
    if normalizer < 0:
        raise ValueError(f"normalizer must not be negative, got {normalizer}")


def _check_divergence(divergence: Divergence, vocab_size: int, labels: Tensor | None, rows: Rows) -> None:
    """What a divergence's own arguments have to do with the logits."""
    strong = divergence.strong_set()
    if isinstance(strong, Label) and labels is None:
        raise ValueError("labels are needed for a divergence whose strong set is Label(), got None")
    if isinstance(strong, TopK) and strong.k > vocab_size:
        raise ValueError(f"TopK: k must not exceed the vocabulary, {vocab_size} tokens, got {strong.k}")
    if isinstance(strong, Given):
        _check_mask(strong.mask, vocab_size, rows)
    if isinstance(divergence, Decoupled):
        for name, weight in zip(("bcd", "scd", "wcd"), divergence.weights(), strict=True):
            if isinstance(weight, Tensor) and weight.device != rows.device and weight.device.type != "cpu":
                raise ValueError(f"Decoupled: {name} is on {weight.device}, {rows.name} on {rows.device}; move one")


def _check_mask(mask: Tensor, vocab_size: int, rows: Rows) -> None:
    widths = {vocab_size, *rows.widths}
    if mask.shape[-1] not in widths or mask.shape[:-1] not in ((), rows.shape):
        either = " or ".join(str(width) for width in sorted(widths))
        raise ValueError(
            f"Given: mask must be (V,) or {(*tuple(rows.shape), 'V')} with V = {either}, got shape {tuple(mask.shape)}"
        )
    check_same_device("Given: mask", mask, rows.name, rows.device)
    if mask.stride(-1) != 1 and mask.shape[-1] > 1:
        raise ValueError(
            f"Given: mask must be contiguous in its last dimension, got strides {tuple(mask.stride())} "
            f"for shape {tuple(mask.shape)}; call .contiguous() on it"
        )


def _check_ids(ids: object, rows: Rows) -> Tensor:
    if not isinstance(ids, Tensor):
        raise TypeError(f"teacher.ids must be an int32 or int64 Tensor, got {type(ids).__name__}")
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"teacher.ids must be int32 or int64, got {ids.dtype}")
    if ids.dim() < 1 or ids.shape[:-1] != rows.shape:
        raise ValueError(
            f"teacher.ids must be (..., K) with the rows of {rows.name}, {tuple(rows.shape)}, got {tuple(ids.shape)}"
        )
    if not 1 <= ids.shape[-1] <= MOST_IDS:
        raise ValueError(f"teacher.ids must have between 1 and {MOST_IDS} ids a row, got {ids.shape[-1]}")
    check_same_device("teacher.ids", ids, rows.name, rows.device)
    return ids


def check_sparse(teacher: TopKTeacher, rows: Rows) -> TopKTeacher:
    """A sparse teacher's tensors and settings; the teacher detached."""
    ids, logprobs, tail, temperature = teacher
    _check_ids(ids, rows)
    if not isinstance(logprobs, Tensor):
        raise TypeError(f"teacher.logprobs must be a Tensor (..., K), got {type(logprobs).__name__}")
    check_float("teacher.logprobs", logprobs)
    if logprobs.shape != ids.shape:
        raise ValueError(
            f"teacher.logprobs must have the shape of teacher.ids, {tuple(ids.shape)}, got {tuple(logprobs.shape)}"
        )
    check_same_device("teacher.logprobs", logprobs, "teacher.ids", ids.device)
    if tail not in TAILS:
        raise ValueError(f"teacher.tail must be one of {', '.join(TAILS)}, got {tail!r}")
    check_number("teacher.teacher_temperature", temperature)
    if temperature <= 0:
        raise ValueError(f"teacher.teacher_temperature must be positive, got {temperature}")
    return TopKTeacher(ids, logprobs.detach(), tail, temperature)


def _check_sparse_call(
    teacher: TopKTeacher, divergence: Divergence, temperature: float | Tensor, transform: Transform, vocab_size: int
) -> None:
    """What a sparse teacher has to do with the rest of the call."""
    allowed = ("forward_kl", "reverse_kl", "jensen_shannon") if teacher.tail == "renormalize" else ("forward_kl",)
    if divergence.name not in allowed:
        also = "" if teacher.tail == "renormalize" else "; reverse_kl and jensen_shannon need tail='renormalize'"
        raise ValueError(
            f"divergence must be {' or '.join(allowed)} for a TopKTeacher with tail={teacher.tail!r}, "
            f"got {divergence.name}{also}"
        )
    if transform != Transform():
        raise ValueError("teacher_logit_scale and teacher_softcap are for logits; a TopKTeacher has log-probabilities")
    given = teacher.teacher_temperature
    if teacher.tail in ("bucket", "drop") and (isinstance(temperature, Tensor) or temperature != given):
        came = f"a Tensor {tuple(temperature.shape)}" if isinstance(temperature, Tensor) else temperature
        raise ValueError(
            f"temperature must be {given}, the teacher_temperature of its log-probabilities, for "
            f"tail={teacher.tail!r}, got {came}: the mass outside the given ids is not known at another temperature; "
            "tail='renormalize' and tail='teacher' do not need it"
        )
    if teacher.ids.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere such a row's loss is NaN
        wrong = out_of_range(teacher.ids, vocab_size)
        if bool(wrong.any()):
            largest = int(teacher.ids.max())
            raise ValueError(f"teacher.ids must be negative (no token) or lie in [0, {vocab_size}), got {largest}")


def check_rows(
    rows: Rows,
    labels: Tensor | None,
    *,
    sparse: TopKTeacher | None = None,
    divergence: Divergence | str = "forward_kl",
    temperature: float | Tensor = 1.0,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    scale_by_temperature: bool = True,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
) -> RowArguments:
    """What a call says beside its logits, or a ValueError or TypeError that names the argument."""
    vocab = _check_vocab_size(vocab_size, rows)
    resolved = resolve(divergence)
    _check_temperature(temperature, rows)
    check_number("kd_weight", kd_weight)
    check_number("ce_weight", ce_weight)
    if ce_weight < 0:
        raise ValueError(f"ce_weight must not be negative, got {ce_weight}")
    if ce_weight > 0 and labels is None:
        raise ValueError(f"labels are needed for ce_weight = {ce_weight}, got None")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")
    if labels is not None:
        _check_labels(labels, ignore_index, vocab, rows)
    _check_divergence(resolved, vocab, labels, rows)
    if weight is not None:
        if not isinstance(weight, Tensor):
            raise TypeError(f"weight must be a float Tensor, got {type(weight).__name__}")
        _check_rows("weight", weight, rows, "float")
        if weight.requires_grad:
            raise ValueError("weight requires grad, but no gradient is formed for it; detach it")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if normalizer is not None:
        _check_normalizer(normalizer, reduction, rows)
    teacher_transform = _check_transform("teacher", teacher_logit_scale, teacher_softcap)
    if sparse is not None:
        _check_sparse_call(sparse, resolved, temperature, teacher_transform, vocab)
    return RowArguments(
        rows=rows,
        labels=labels,
        divergence=resolved,
        temperature=temperature,
        kd_weight=kd_weight,
        ce_weight=ce_weight,
        scale_by_temperature=scale_by_temperature,
        weight=weight,
        reduction=reduction,
        normalizer=normalizer,
        ignore_index=ignore_index,
        vocab_size=vocab,
        student_transform=_check_transform("student", student_logit_scale, student_softcap),
        teacher_transform=teacher_transform,
        sparse=sparse,
    )


def check(
    student_logits: Tensor, teacher: Tensor | TopKTeacher, labels: Tensor | None, **options: Unpack[LossOptions]
) -> Arguments:
    """A call on logits as :class:`Arguments`, or a ValueError or TypeError that names the argument."""
    check_logits("student_logits", student_logits)
    if isinstance(teacher, TopKTeacher):
        width = student_logits.shape[-1]
        rows = Rows(student_logits.shape[:-1], student_logits.device, student_logits.dtype, (width, width))
        sparse = check_sparse(teacher, rows)
        rest = check_rows(rows, labels, sparse=sparse, **options)
        warn_if_teacher_requires_grad(teacher.logprobs)
        return Arguments(**vars(rest), student=student_logits, teacher=sparse.logprobs)
    check_logits("teacher", teacher)
    if student_logits.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"teacher must have the rows of student_logits, {tuple(student_logits.shape[:-1])}, "
            f"got {tuple(teacher.shape[:-1])}"
        )
    check_same_device("teacher", teacher, "student_logits", student_logits.device)
    widths = (student_logits.shape[-1], teacher.shape[-1])
    rows = Rows(student_logits.shape[:-1], student_logits.device, student_logits.dtype, widths)
    rest = check_rows(rows, labels, **options)
    warn_if_teacher_requires_grad(teacher)
    return Arguments(**vars(rest), student=student_logits, teacher=teacher.detach())
