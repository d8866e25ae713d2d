"""The installed package at work, with torch alone beside it: `python -I smoke.py VERSION`, in an empty folder."""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
import re
import sys
from pathlib import Path

import torch

import kdkernels as kd
from kdkernels import integrations

(version,) = sys.argv[1:]
assert Path(kd.__file__).is_relative_to(sys.prefix), kd.__file__
assert kd.__version__ == version, kd.__version__

with kd.backends.use("native"):
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 2.5e-3)):
        torch.manual_seed(0)
        student, teacher = (3 * torch.randn(2, 16, 1000) for _ in range(2))
        student, teacher = student.to(dtype).requires_grad_(), teacher.to(dtype)
        labels = torch.randint(0, 1000, (2, 16))
        labels[0, :3] = -100
        options = {"divergence": "jensen_shannon", "temperature": 2.0, "kd_weight": 0.7, "ce_weight": 0.3}
        kd.distillation_loss(student, teacher, labels, **options).backward()
        exact = student.detach().double().requires_grad_()
        kd.reference.distillation_loss(exact, teacher.double(), labels, **options).backward()
        error = ((student.grad.double() - exact.grad).norm() / exact.grad.norm()).item()
        assert error <= tolerance, (dtype, error)
        print(f"{dtype}: gradient off by {error:.1e} of its norm")

# Adapters need no framework to be imported; the Triton kernels do need Triton.
for module in pkgutil.iter_modules(integrations.__path__, "kdkernels.integrations."):
    importlib.import_module(module.name)
    print(f"imported {module.name}")

# The README is in the metadata: its first example, as pasted.
readme = importlib.metadata.metadata("kdkernels").get_payload()
(example,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)[:1]
names: dict = {}
exec(example, names)
assert names["student_logits"].grad.isfinite().all()
print(f"README's first example: loss {names['loss'].item():.4f}")
