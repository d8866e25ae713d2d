"""The sparse teachers every backend is tested on."""

from __future__ import annotations

import torch
from checks import against_reference, assert_near, in_double
from torch import Tensor

import kdkernels as kd

# By name: tail and divergence.
LOSSES = {
    "bucket": ("bucket", kd.ForwardKL()),
    "renormalize": ("renormalize", kd.ForwardKL()),
    "renormalize_reverse": ("renormalize", kd.ReverseKL()),
    "renormalize_jsd": ("renormalize", kd.JensenShannon()),
    "renormalize_jsd_0.1": ("renormalize", kd.JensenShannon(0.1)),
    "teacher": ("teacher", kd.ForwardKL()),
    "drop": ("drop", kd.ForwardKL()),
}
TAILS = ("bucket", "renormalize", "teacher", "drop")

# A log-odds of masses is known to about 3e-7, however small the divergence: a row's loss and gradient are right to
# 2e-6 of themselves or of this, whichever is more.
FLOOR = 0.15


def top_k(logits: Tensor, k: int, tail: str = "bucket", *, dtype: torch.dtype = torch.float32) -> kd.TopKTeacher:
    """The k most likely tokens of dense logits (..., V), in a random order."""
    logprobs, ids = logits.double().log_softmax(-1).topk(k, -1)
    order = torch.rand(ids.shape, generator=torch.Generator().manual_seed(7)).argsort(-1)
    return kd.TopKTeacher(ids.gather(-1, order), logprobs.gather(-1, order).to(dtype), tail)


def sparse_pair(
    *shape: int,
    k: int,
    tail: str = "bucket",
    dtype: torch.dtype = torch.float32,
    spread: float = 3.0,
    noise: float = 0.5,
    seed: int = 0,
) -> tuple[Tensor, kd.TopKTeacher]:
    """Student logits (..., V), and the k most likely tokens of a teacher off by ``noise`` times their spread."""
    generator = torch.Generator().manual_seed(seed)
    student = (spread * torch.randn(*shape, generator=generator)).to(dtype)
    teacher = student.float() + noise * spread * torch.randn(*shape, generator=generator)
    return student, top_k(teacher, k, tail)


def ragged(teacher: kd.TopKTeacher, seed: int = 0) -> kd.TopKTeacher:
    """With padding in places, NaN beside it, and a row that is all padding."""
    generator = torch.Generator().manual_seed(seed)
    gone = torch.rand(teacher.ids.shape, generator=generator) < 0.4
    gone.view(-1, gone.shape[-1])[-1] = True
    return teacher._replace(
        ids=teacher.ids.masked_fill(gone, -1), logprobs=teacher.logprobs.masked_fill(gone, torch.nan)
    )


def repeated(teacher: kd.TopKTeacher, times: int = 2) -> kd.TopKTeacher:
    """Every id once more, with a log-probability that must not count."""
    ids = torch.cat([teacher.ids] * times, -1)
    others = [teacher.logprobs - i for i in range(1, times)]
    return teacher._replace(ids=ids, logprobs=torch.cat([teacher.logprobs, *others], -1))


def nearly_all(rows: int, width: int, k: int, gap: float = 20.7) -> tuple[Tensor, kd.TopKTeacher]:
    """A student who gives all but about e^-gap (1e-9) to the given ids."""
    generator = torch.Generator().manual_seed(3)
    student = torch.randn(rows, width, generator=generator)
    ids = torch.stack([torch.randperm(width, generator=generator)[:k] for _ in range(rows)])
    shift = gap + torch.tensor(width / k).log()
    student.scatter_add_(1, ids, shift.expand(rows, k))
    logprobs = torch.randn(rows, k, generator=generator).log_softmax(-1) - 0.1
    return student, kd.TopKTeacher(ids, logprobs)


def on(device: str, teacher: kd.TopKTeacher) -> kd.TopKTeacher:
    return teacher._replace(ids=teacher.ids.to(device), logprobs=teacher.logprobs.to(device))


def check(
    student: Tensor,
    teacher: kd.TopKTeacher,
    divergence: kd.Divergence | None = None,
    labels: Tensor | None = None,
    *,
    device: str = "cpu",
    floor: float = FLOOR,
    **options,
) -> None:
    """Loss and gradient against the reference in fp64; options are kd.distillation_loss's, and ``slack``."""
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
    against_reference(
        student.to(device),
        on(device, teacher),
        None if labels is None else labels.to(device),
        divergence=divergence or kd.ForwardKL(),
        floor=floor,
        **moved,
    )


def check_stats(
    student: Tensor, teacher: kd.TopKTeacher, labels: Tensor | None = None, *, device: str = "cpu", **options
) -> kd.RowStats:
    """Every statistic of the backend at hand against the reference's in fp64; the former."""
    student, teacher = student.to(device), on(device, teacher)
    labels = None if labels is None else labels.to(device)
    _, actual = kd.distillation_loss(student, teacher, labels, return_stats=True, **options)
    _, expected = kd.reference.distillation_loss(
        student.double(), in_double(teacher), labels, return_stats=True, **options
    )
    for name, ours, exact in zip(kd.RowStats._fields, actual, expected, strict=True):
        assert (ours is None) == (exact is None), name
        if ours is not None and exact is not None:
            assert_near(name, ours, exact, 4e-6, 0.1)
    return actual
