"""Who computes a sweep over rows, and how that is chosen.

``native`` (C++: csrc) serves the CPU; ``reference`` (plain PyTorch) serves everything. The automatic choice takes the
first of :data:`ORDER` that can serve the tensors at hand. A backend asked for by name, with :func:`use` or the
environment variable ``KDKERNELS_BACKEND``, is never replaced: a call that it cannot serve is an error that says why.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from kdkernels.backends import native

Name = Literal["reference", "native", "triton"]
ORDER: tuple[str, ...] = ("native", "triton", "reference")
NO_TRITON = "this version of kdkernels has no Triton kernels"

_forced: str | None = None


def why_not(name: str, device: torch.device | None = None) -> str | None:
    """Why a backend cannot serve tensors on ``device`` (None: on any device); None where it can."""
    if name == "reference":
        return None
    if name == "triton":
        return NO_TRITON
    if name != "native":
        raise ValueError(f"unknown backend {name!r}; expected one of {', '.join(ORDER)}")
    return native.why_not(device)


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


def choose(device: torch.device) -> str:
    """The name of the backend that computes a loss on ``device``.

    Raises:
        RuntimeError: a backend was asked for by name and cannot serve this device.
    """
    asked = _forced or os.environ.get("KDKERNELS_BACKEND")
    if not asked:
        return next(name for name in ORDER if why_not(name, device) is None)
    if asked not in ORDER:
        raise RuntimeError(f"KDKERNELS_BACKEND is {asked!r}; expected one of {', '.join(ORDER)}")
    reason = why_not(asked, device)
    if reason is not None:
        raise RuntimeError(f"backend {asked!r} was asked for and cannot serve tensors on {device}: {reason}")
    return asked
