"""The Triton kernels: whatever Triton runs on."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels.backends.native import RowOptions


def why_not(device: torch.device | None = None) -> str | None:
    """Why the Triton kernels cannot serve tensors on ``device``; None where they can."""
    return "this version of kdkernels has no Triton kernels"


def why_not_rows(student: Tensor, teacher: Tensor, gradient: Tensor | None, options: RowOptions) -> str | None:
    """Why :func:`row_loss` cannot serve these tensors, on a device that it serves; None where it can."""
    return None
