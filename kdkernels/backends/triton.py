"""The Triton kernels: whatever Triton runs on."""

from __future__ import annotations

import torch


def why_not(device: torch.device | None = None) -> str | None:
    """Why the Triton kernels cannot serve tensors on ``device``; None where they can."""
    return "this version of kdkernels has no Triton kernels"
