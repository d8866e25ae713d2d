"""The losses that adapters stand in for: how to get at them, and the comparison every test makes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from checks import assert_near, assert_rounded
from torch import Tensor


def load_file(package: str, path: str) -> ModuleType:
    """A file of an installed package, without all that its ``__init__`` imports and its losses do not need."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed: `make integrations` installs it", allow_module_level=True)
    file = Path(spec.submodule_search_locations[0]) / path
    of_file = importlib.util.spec_from_file_location(f"{package}_{file.stem}", file)
    assert of_file is not None
    assert of_file.loader is not None
    module = importlib.util.module_from_spec(of_file)
    of_file.loader.exec_module(module)
    return module


def outcome(loss_of: Callable[..., Tensor], *students: Tensor, factor: float = 1.0) -> tuple[Tensor, ...]:
    """The loss of these tensors, and their gradients after it was multiplied by ``factor``."""
    leaves = [student.clone().requires_grad_() for student in students]
    loss = loss_of(*leaves)
    (factor * loss).sum().backward()
    gradients = []
    for leaf in leaves:
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    return loss.detach(), *gradients


def agree(
    ours: Callable[..., Tensor],
    original: Callable[..., Tensor],
    *students: Tensor,
    bound: float = 2e-6,
    gradient_bound: float | None = None,
) -> None:
    """Loss and gradients of two callables of the student's tensors, after a factor that is not 1."""
    results = [outcome(loss_of, *students, factor=1.7) for loss_of in (ours, original)]
    for index, (actual, expected) in enumerate(zip(*results, strict=True)):
        name = f"gradient {index}" if index else "loss"
        assert expected.isfinite().all(), f"the original's {name}"
        assert expected.abs().max() > 0, f"the original's {name} is 0"
        limit = gradient_bound if index and gradient_bound is not None else bound
        assert_near(name, actual, expected, limit)


def in_bfloat16(
    ours: Callable[..., Tensor], exact: Callable[..., Tensor], *students: Tensor, gradient_bound: float = 4e-6
) -> None:
    """bf16 tensors: ours to fp32 and gradients rounded once, against ``exact`` on the same numbers in fp64."""
    rounded = [student.bfloat16() for student in students]
    loss, *gradients = outcome(ours, *rounded)
    expected, *wanted = outcome(exact, *(student.double() for student in rounded))
    assert loss.dtype == torch.float32
    assert_near("loss", loss, expected, 4e-6)
    for actual, want in zip(gradients, wanted, strict=True):
        assert actual.dtype == torch.bfloat16
        assert_rounded("gradient", actual, want, gradient_bound)


def compiles(module: torch.nn.Module, *arguments: object) -> None:
    """Whole, in one graph, to the same losses."""
    results = [f(*arguments) for f in (torch.compile(module, backend="aot_eager", fullgraph=True), module)]
    losses = [result if isinstance(result, tuple) else (result,) for result in results]
    for actual, expected in zip(*losses, strict=True):
        assert_near("compiled", actual, expected, 1e-6)
