"""The Triton kernels under Triton's interpreter, made quick enough for tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kdkernels import backends
from kdkernels.backends import triton

BLOCK = 512  # columns of a block, so that 1301 are two blocks and a part

_patched: set[str] = set()


@contextmanager
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The Triton backend, asked for by name, in blocks of :data:`BLOCK`."""
    monkeypatch.setattr(triton, "BLOCKS", [(2**31, BLOCK)])
    _patch_once(monkeypatch)
    with backends.use("triton"):
        yield


def _patch_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter patches triton.language at every call of a function: once a module is enough."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")

    def call(self, *args, **options):
        module = self.fn.__module__
        if module not in _patched:
            _patched.add(module)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **options)

    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)
