"""Who computes a sweep over rows, and how that is chosen.

``native`` (csrc) serves the CPU and, built with nvcc, NVIDIA GPUs from compute capability 9.0 on; ``triton`` serves
whatever GPU Triton does; ``reference`` (plain PyTorch) serves everything. The automatic choice takes the first of
:data:`ORDER` that can serve the tensors at hand. A backend asked for by name, with :func:`use` or the environment
variable ``KDKERNELS_BACKEND``, is never replaced: a call that it cannot serve is an error that says why.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from kdkernels.backends import native, triton
from kdkernels.backends.native import RowOptions

Name = Literal["reference", "native", "triton"]
ORDER: tuple[str, ...] = ("native", "triton", "reference")
AUTO = "auto"  # what an operator is told where no backend was asked for by name

_SWEEPS: dict[str, ModuleType] = {"native": native, "triton": triton}
_forced: str | None = None


def why_not(name: str, device: torch.device | None = None) -> str | None:
    """Why a backend cannot serve tensors on ``device`` (None: on any device); None where it can."""
    if name not in ORDER:
        raise ValueError(f"unknown backend {name!r}; expected one of {', '.join(ORDER)}")
    if name == "reference":
        return None
    reason: str | None = _SWEEPS[name].why_not(device)
    return reason


@contextmanager
def use(name: Name) -> Iterator[None]:
    """Within the context, every loss is computed by this backend, or raises a RuntimeError that says why it cannot be.

    Args:
        name: "reference", "native" or "triton".

    Raises:
        ValueError: an unknown name.
    """
    global _forced
    why_not(name)
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def asked() -> str | None:
    """The backend asked for by name, by :func:`use` or in the environment; None: the choice is automatic."""
    return _forced or os.environ.get("KDKERNELS_BACKEND") or None


def _serves_by_itself(name: str, device: torch.device) -> bool:
    # Triton's interpreter serves the CPU too, for tests of its kernels: who asks for nothing shall not get it.
    return why_not(name, device) is None and not (name == "triton" and device.type == "cpu")


def choose(device: torch.device, *dtypes: torch.dtype) -> str:
    """The name of the backend that computes a loss on ``device`` from logits of these dtypes.

    Raises:
        RuntimeError: a backend was asked for by name and cannot serve them.
    """
    double_on_gpu = device.type == "cuda" and torch.float64 in dtypes
    name = asked()
    if name is None:
        if double_on_gpu:
            return "reference"
        return next(name for name in ORDER if _serves_by_itself(name, device))
    if name not in ORDER:
        raise RuntimeError(f"KDKERNELS_BACKEND is {name!r}; expected one of {', '.join(ORDER)}")
    reason = why_not(name, device)
    if reason is None and double_on_gpu and name != "reference":
        reason = "on a GPU the kernels compute in fp32; float64 is for the reference"
    if reason is not None:
        raise RuntimeError(f"backend {name!r} was asked for and cannot serve tensors on {device}: {reason}")
    return name


def sweep(backend: str, device: torch.device) -> ModuleType:
    """The module of a backend's sweeps: of the one asked for, or for :data:`AUTO` the first that serves ``device``."""
    if backend != AUTO:
        return _SWEEPS[backend]
    return _SWEEPS[next(name for name in _SWEEPS if _serves_by_itself(name, device))]


def row_loss(
    backend: str,
    student: Tensor,  # (..., V_s)
    teacher: Tensor,  # (..., V_t) logits, or a sparse teacher's log-probabilities (..., K)
    labels: Tensor | None,  # (...)
    row_scale: Tensor,  # (...)
    temperatures: Tensor | None,  # (...)
    weights: Tensor | None,  # (3,)
    members: Tensor | None,  # what names a strong set: a mask (V,) or (..., V), or a sparse teacher's ids (..., K)
    options: RowOptions,
    gradient: Tensor | None,  # (..., V_s), written
    loss: Tensor,  # (...), written
    stats: Tensor,  # (4, 7 or 9, ...), written
) -> None:
    """The row sweep, by the backend asked for, or for :data:`AUTO` by the first that can serve these very tensors.

    The gradient has the student's dtype; of fp32 logits it can be bfloat16 or float16 too, which is the fp32 gradient
    rounded once (see ``narrows`` of each backend), in memory of its own. The statistics and the loss do not change.

    Raises:
        RuntimeError: none can, or the one asked for cannot.
    """
    reasons = []
    for name in _SWEEPS if backend == AUTO else (backend,):
        reason = why_not(name, student.device)
        if reason is None:
            sweep = _SWEEPS[name].sparse_row_loss if options.tail else _SWEEPS[name].row_loss
            reason = sweep(
                student, teacher, labels, row_scale, temperatures, weights, members, options, gradient, loss, stats
            )
        if reason is None:
            return
        reasons.append(f"backend {name!r} cannot serve this call: {reason}")
    raise RuntimeError("; ".join(reasons) + '; kdkernels.backends.use("reference") can')
