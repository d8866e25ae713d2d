"""What several frameworks' conventions ask of an adapter."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

Number = TypeVar("Number")


def require_positive(name: str, value: float) -> None:
    """
    Raises:
        ValueError: it is not, or NaN.
    """
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")


def on_device(number: Number, device: torch.device) -> Number | Tensor:
    """A number as it is; a Tensor, on the device. The host waits for no GPU that is written to."""
    if not isinstance(number, Tensor):
        return number
    return number.to(device, non_blocking=device.type != "cpu")


def by_row(labels: Tensor, logits: Tensor) -> Tensor:
    """Labels in the shape of the logits' rows, where there are as many: flat where logits are not, or the other way."""
    rows = logits.shape[:-1]
    return labels.reshape(rows) if labels.numel() == rows.numel() else labels


def gathered(tensor: Any) -> Tensor:
    """A DTensor as a whole Tensor; any other as it is. Without torch.distributed.tensor, which not every build has."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
