"""Modules of packages whose __init__ imports more than is installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType


def load(name: str, bare: Sequence[str] = (), given: Mapping[str, Mapping[str, object]] | None = None) -> ModuleType:
    """The module of this name; where importing it fails, alone: without the ``__init__`` of the packages it lies in.

    Args:
        name: of the module, dotted.
        bare: further packages to enter without their ``__init__``.
        given: modules that are not loaded at all, and what they hold instead; or what bare packages hold.

    Raises:
        ImportError: the package is not installed, or the module alone cannot be imported either.
    """
    try:
        return importlib.import_module(name)
    except Exception:  # an __init__ may fail in any way
        top = name.partition(".")[0]
        _forget(top)
        spec = importlib.util.find_spec(top)
        if spec is None or not spec.submodule_search_locations:
            raise
    given = given or {}
    packages = {parent for module in (name, *bare, *given) for parent in _parents(module)} | set(bare)
    for package in sorted(packages | set(given)):
        module = ModuleType(package)
        if package in packages:
            below = package.split(".")[1:]
            module.__path__ = ["/".join([folder, *below]) for folder in spec.submodule_search_locations]
        vars(module).update(given.get(package, {}))
        sys.modules[package] = module
    try:
        return importlib.import_module(name)
    except BaseException:
        _forget(top)
        raise


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _forget(top: str) -> None:
    for name in [name for name in sys.modules if name == top or name.startswith(f"{top}.")]:
        del sys.modules[name]
