"""The checks of a call that starts from hidden states: its operands; the rest is in kdkernels/_arguments.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Unpack

from kdkernels._arguments import (
    LossOptions,
    RowArguments,
    Rows,
    check_float,
    check_logits,
    check_rows,
    check_same_device,
    check_sparse,
    warn_if_teacher_requires_grad,
)
from kdkernels.teachers import LinearTeacher, TopKTeacher


@dataclass(frozen=True)
class LinearArguments:
    """A checked call; the teacher detached."""

    rows: RowArguments
    hidden: Tensor  # (..., H_s)
    weight: Tensor  # (V_s, H_s)
    bias: Tensor | None  # (V_s,)
    teacher: Tensor  # (..., H_t) hidden states; without a weight, (..., V_t) logits or (..., K) log-probabilities
    teacher_weight: Tensor | None  # (V_t, H_t)
    teacher_bias: Tensor | None  # (V_t,)
    compute_dtype: torch.dtype | None  # of the products, where autocast sets it
    logits_dtype: torch.dtype
    workspace_bytes: int | None


def _refuse_dtensor(name: str, tensor: Tensor) -> None:
    if hasattr(tensor, "full_tensor") and hasattr(tensor, "to_local"):
        raise TypeError(
            f"{name} is a DTensor, a part of which lies on each rank; gather it first and pass {name}.full_tensor(), "
            f"or, where every rank has all of it, {name}.to_local()"
        )


def _check_operand(name: str, tensor: object, shape: str, dims: int | None) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a Tensor {shape}, got {type(tensor).__name__}")
    _refuse_dtensor(name, tensor)
    check_float(name, tensor)
    if (tensor.dim() < 1) if dims is None else (tensor.dim() != dims):
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")


def _check_model(names: tuple[str, str, str], hidden: object, weight: object, bias: object, autocast: bool) -> None:
    """A model's operands: (..., H), (V, H) and (V,) or None, on one device."""
    h, w, b = names
    _check_operand(h, hidden, "(..., H)", None)
    _check_operand(w, weight, "(V, H)", 2)
    assert isinstance(hidden, Tensor)
    assert isinstance(weight, Tensor)
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{w} must be (V, {hidden.shape[-1]}) for {h} of shape {tuple(hidden.shape)}, got {tuple(weight.shape)}"
        )
    if weight.shape[0] < 1:
        raise ValueError(f"{w} must have at least one row, got shape {tuple(weight.shape)}")
    check_same_device(w, weight, h, hidden.device)
    if hidden.dtype != weight.dtype and (not autocast or torch.float64 in (hidden.dtype, weight.dtype)):
        raise TypeError(f"{h} is {hidden.dtype} and {w} {weight.dtype}; cast one, or use torch.autocast")
    if bias is None:
        return
    _check_operand(b, bias, "(V,)", 1)
    assert isinstance(bias, Tensor)
    if bias.shape[0] != weight.shape[0]:
        raise ValueError(f"{b} must have one entry per row of {w}, {weight.shape[0]}, got {bias.shape[0]}")
    check_same_device(b, bias, h, hidden.device)


def _logits_dtype(asked: torch.dtype, computed: torch.dtype) -> torch.dtype:
    """The dtype of both models' logits, for student operands of dtype ``computed``."""
    if not isinstance(asked, torch.dtype):
        raise TypeError(f"logits_dtype must be a torch.dtype, got {type(asked).__name__}")
    allowed = {torch.float32, computed}
    if asked not in allowed:
        either = " or ".join(sorted(str(dtype) for dtype in allowed))
        raise ValueError(f"logits_dtype must be {either} where student_hidden is {computed}, got {asked}")
    return computed if computed in (torch.float32, torch.float64) else asked


def check_linear(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: LinearTeacher | TopKTeacher | Tensor,
    labels: Tensor | None,
    student_bias: Tensor | None,
    logits_dtype: torch.dtype,
    workspace_bytes: int | None,
    **options: Unpack[LossOptions],
) -> LinearArguments:
    """The call as :class:`LinearArguments`, or a ValueError or TypeError that names the argument."""
    hidden, weight, bias = student_hidden, student_weight, student_bias
    kind = hidden.device.type if isinstance(hidden, Tensor) else "cpu"
    autocast = torch.is_autocast_enabled(kind)
    _check_model(("student_hidden", "student_weight", "student_bias"), hidden, weight, bias, autocast)
    compute = torch.get_autocast_dtype(kind) if autocast and hidden.dtype != torch.float64 else None
    teacher_weight: Tensor | None = None
    teacher_bias: Tensor | None = None
    if isinstance(teacher, LinearTeacher):
        names = ("teacher.hidden", "teacher.weight", "teacher.bias")
        _check_model(names, teacher.hidden, teacher.weight, teacher.bias, autocast)
        states, teacher_weight, teacher_bias = teacher
        of_teacher, vocabulary = names[0], (names[1], teacher.weight.shape[0])
    elif isinstance(teacher, Tensor):
        _refuse_dtensor("teacher", teacher)
        check_logits("teacher", teacher)
        states, of_teacher, vocabulary = teacher, "teacher", ("teacher", teacher.shape[-1])
    elif isinstance(teacher, TopKTeacher):
        for name, given in (("teacher.ids", teacher.ids), ("teacher.logprobs", teacher.logprobs)):
            _refuse_dtensor(name, given)
        states, of_teacher, vocabulary = teacher.logprobs, "teacher.logprobs", ("teacher", weight.shape[0])
    else:
        raise TypeError(
            f"teacher must be a LinearTeacher, a TopKTeacher or a Tensor of logits (..., V), "
            f"got {type(teacher).__name__}"
        )
    if not isinstance(teacher, TopKTeacher) and states.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"{of_teacher} must have the rows of student_hidden, {tuple(hidden.shape[:-1])}, "
            f"got {tuple(states.shape[:-1])}"
        )
    if not isinstance(teacher, TopKTeacher):
        check_same_device(of_teacher, states, "student_hidden", hidden.device)
    if workspace_bytes is not None:
        if isinstance(workspace_bytes, bool) or not isinstance(workspace_bytes, (int, torch.SymInt)):
            raise TypeError(f"workspace_bytes must be an int, got {type(workspace_bytes).__name__}")
        if workspace_bytes <= 0:
            raise ValueError(f"workspace_bytes must be positive, got {workspace_bytes}")
    rows = Rows(
        shape=hidden.shape[:-1],
        device=hidden.device,
        dtype=hidden.dtype,
        widths=(weight.shape[0], vocabulary[1]),
        name="student_hidden",
        vocabularies=("student_weight", vocabulary[0]),
    )
    sparse = check_sparse(teacher, rows) if isinstance(teacher, TopKTeacher) else None
    checked = check_rows(rows, labels, sparse=sparse, **options)
    warn_if_teacher_requires_grad(states)  # its weights may: they are a model's parameters
    return LinearArguments(
        rows=checked,
        hidden=hidden,
        weight=weight,
        bias=bias,
        teacher=states.detach(),
        teacher_weight=None if teacher_weight is None else teacher_weight.detach(),
        teacher_bias=None if teacher_bias is None else teacher_bias.detach(),
        compute_dtype=compute,
        logits_dtype=_logits_dtype(logits_dtype, compute or hidden.dtype),
        workspace_bytes=workspace_bytes,
    )
