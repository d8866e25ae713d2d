"""Peak memory of the loss from hidden states: its gradients and its workspace, and no logits beyond."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

MIB = 2**20
WIDTH = 16384
# What a call may take beyond its gradients and its workspace: rows' numbers, and where a weight of 16 bits is
# multiplied in fp32, a block of it (8 MiB).
SLACK = {"float32": MIB, "bfloat16": 9 * MIB}

# rows, hidden, dtype, workspace in MiB, what requires grad, reduction, the teacher: hidden states, logits or a tail.
# Both models' logits and their gradient would take 24 MiB of fp32, in the default 96 MiB.
CASES = {
    "one group": (128, 64, "float32", 24, "hidden weight", "mean", "hidden"),
    "chunks": (128, 128, "float32", 2, "hidden weight", "mean", "hidden"),
    "chunks in 16 bits": (128, 128, "bfloat16", 2, "hidden weight", "mean", "hidden"),
    "no weight gradient": (128, 128, "float32", 2, "hidden", "mean", "hidden"),
    "loss alone": (128, 64, "float32", 2, "", "mean", "hidden"),
    "loss per row": (128, 128, "float32", 2, "hidden weight", "none", "hidden"),
    "a teacher's logits": (128, 64, "float32", 2, "hidden weight", "mean", "logits"),
    "the default": (512, 32, "float32", None, "hidden weight", "mean", "hidden"),
    "a sparse teacher": (128, 128, "float32", 2, "hidden weight", "mean", "bucket"),
    "a sparse teacher by default": (512, 32, "float32", None, "hidden weight", "mean", "bucket"),
    # One copy of the student's logits would take 64 MiB.
    "renormalized": (1024, 32, "float32", 8, "hidden weight", "mean", "renormalize"),
    "renormalized in chunks": (1024, 32, "float32", 1, "hidden weight", "mean", "renormalize"),
    "renormalized in 16 bits": (1024, 32, "bfloat16", 1, "hidden weight", "none", "renormalize"),
    "renormalized by default": (1024, 32, "float32", None, "hidden weight", "mean", "renormalize"),
}
# In plain PyTorch, a piece of the rows that are gathered, twice where they have to be converted.
PIECES = 16 * MIB
IDS = 64
MEASURE = """
import json, sys, torch, kdkernels as kd
from benchmarks.memory import peak_above_now
torch.set_num_threads(1)
found = {}
cases, ids = json.loads(sys.argv[1])
for name, (rows, size, dtype, workspace, required, reduction, kind) in cases.items():
    dtype = getattr(torch, dtype)
    hidden, weight = torch.randn(rows, size).to(dtype), torch.randn(16384, size).to(dtype)
    hidden.requires_grad_("hidden" in required)
    weight.requires_grad_("weight" in required)
    if kind == "logits":
        teacher = torch.randn(rows, 16384).to(dtype)
    elif kind != "hidden":
        given = torch.randint(0, 16384, (rows, ids))
        teacher = kd.TopKTeacher(given, torch.randn(rows, ids).log_softmax(-1) - 0.1, kind)
    else:
        teacher = kd.LinearTeacher(torch.randn(rows, size).to(dtype), torch.randn(16384, size).to(dtype))
    labels = torch.arange(rows)
    def step():
        loss = kd.linear_distillation_loss(
            hidden, weight, teacher, labels, ce_weight=0.0 if kind == "renormalize" else 0.5, reduction=reduction,
            workspace_bytes=workspace and workspace * 2**20,
        ).sum()
        if required:
            loss.backward()
        hidden.grad = weight.grad = None
    step()
    found[name] = peak_above_now(step)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def peaks() -> dict[str, int | None]:
    command = [sys.executable, "-c", MEASURE, json.dumps([CASES, IDS])]
    # Memory of a quarter of a MiB and more goes back to the system as soon as it is freed.
    settings = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MIB // 4)}
    run = subprocess.run(command, capture_output=True, text=True, env=settings)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc/self")
@pytest.mark.parametrize("name", CASES)
def test_peak_memory(peaks, name):
    peak = peaks[name]
    if peak is None:
        pytest.skip("this system does not let a process reset its peak")
    rows, size, dtype, workspace, required, _, kind = CASES[name]
    itemsize = 4 if dtype == "float32" else 2
    gradients = sum(
        count * size * itemsize for operand, count in (("hidden", rows), ("weight", WIDTH)) if operand in required
    )
    # Over several groups of chunks, a weight's gradient is added up in fp32.
    accumulated = WIDTH * size * 4 if itemsize == 2 and "weight" in required else 0
    # By default less than one copy of either model's logits; of those of the ids alone, what these take.
    default = rows * IDS * 64 if kind == "renormalize" else rows * WIDTH * 4
    room = default if workspace is None else workspace * MIB
    bound = gradients + accumulated + room + (PIECES if kind == "renormalize" else SLACK[dtype])
    assert peak <= bound, f"{peak / MIB:.1f} MiB, where {bound / MIB:.1f} were expected"
    assert peak >= gradients * 0.9, f"{peak / MIB:.1f} MiB: the measurement does not see the gradients"
