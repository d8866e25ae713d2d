"""Imports of the frameworks whose losses the adapters stand in for."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from types import ModuleType

import pytest


def import_quietly(name: str) -> ModuleType:
    """The module, or a skip where its package is not installed; its own warnings on import are its own."""
    package = name.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: `make integrations` installs it", allow_module_level=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)
