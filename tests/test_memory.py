"""Peak memory: the gradient and next to nothing else; in place, next to nothing at all."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys

import pytest

MIB = 2**20
ROWS, WIDTH = 72, 128256  # a gradient of 35 MiB in fp32
CASES = list(itertools.product((False, True), ("forward_kl", "jensen_shannon"), ("float32", "bfloat16")))
MEASURE = """
import json, sys, torch, kdkernels as kd
from benchmarks.memory import peak_above_now
rows, width, cases = json.loads(sys.argv[1])
found = []
for inplace, divergence, dtype in cases:
    teacher = torch.randn(rows, width).to(getattr(torch, dtype))
    leaf = torch.randn(rows, width).to(getattr(torch, dtype)).requires_grad_()
    def step():
        logits = leaf.view_as(leaf) if inplace else leaf
        loss = kd.distillation_loss(
            logits, teacher, torch.arange(rows), divergence=divergence, ce_weight=0.5, inplace=inplace
        )
        loss.backward()
        leaf.grad = None
    step()
    found.append(peak_above_now(step))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def peaks() -> list[int | None]:
    command = [sys.executable, "-c", MEASURE, json.dumps([ROWS, WIDTH, CASES])]
    # Memory of a quarter of a MiB and more goes back to the system as soon as it is freed.
    settings = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MIB // 4)}
    run = subprocess.run(command, capture_output=True, text=True, env=settings)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc/self")
@pytest.mark.parametrize(("inplace", "divergence", "dtype"), CASES)
def test_peak_memory(peaks, inplace, divergence, dtype):
    peak = peaks[CASES.index((inplace, divergence, dtype))]
    if peak is None:
        pytest.skip("this system does not let a process reset its peak")
    gradient = 0 if inplace else ROWS * WIDTH * (4 if dtype == "float32" else 2)
    assert peak <= gradient + MIB, f"{peak / MIB:.2f} MiB"
    assert peak >= gradient * 0.9, f"{peak / MIB:.2f} MiB: the measurement does not see the gradient"
