from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from hypothesis import settings

# Without a GPU, the Triton kernels run under Triton's interpreter, which is chosen when they are imported.
if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    os.environ["TRITON_INTERPRET"] = "1"

from kdkernels import backends
from kdkernels.backends import native

# In CI the same examples every time; elsewhere new ones.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch.cuda.is_available() is False"))


def cpu_capabilities() -> list[str]:
    return [] if native.why_not() else native._built().cpu_capabilities()


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test once for each instruction set of the C++ kernels."""
    if request.param not in cpu_capabilities():
        pytest.skip(f"this processor does not run the {request.param} kernels")
    monkeypatch.setenv("KDKERNELS_CPU_CAPABILITY", request.param)
    return request.param


@pytest.fixture(params=["native", "triton"])
def backend(request: pytest.FixtureRequest):
    reason = backends.why_not(request.param, torch.device("cuda"))
    if reason is not None:
        pytest.skip(reason)
    with backends.use(request.param):
        yield request.param


@pytest.fixture(params=["triton", "automatic choice"])
def any_dtypes(request: pytest.FixtureRequest):
    """For calls that the CUDA kernels leave to Triton."""
    reason = backends.why_not("triton", torch.device("cuda"))
    if reason is not None:
        pytest.skip(reason)
    if request.param == "triton":
        with backends.use("triton"):
            yield
    else:
        yield


@pytest.fixture
def one_thread():
    """For tests of many small tensors, which threads on shared cores make a dozen times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def plan():
    """Sets how the CUDA kernels lay rows over the chip, for one test."""

    def use(*numbers: int) -> None:
        native.cuda_plan[:] = numbers

    yield use
    native.cuda_plan.clear()


@pytest.fixture
def keep_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    """For benchmarks of tiny tensors: collecting after each implementation takes a sixth of a second."""
    monkeypatch.setattr("benchmarks.guard.gc.collect", lambda: None)


@pytest.fixture(autouse=True)
def _native_is_built() -> None:
    assert native.why_not() is None, native.why_not()
