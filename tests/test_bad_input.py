"""Every bad input raises before any work, and the message names the argument, what came and what was expected."""

import re
import warnings

import pytest
import torch
from checks import logits_pair

import kdkernels as kd
from kdkernels import _arguments

Z, Y = logits_pair(3, 4, 10)
LABELS = torch.zeros(3, 4, dtype=torch.long)

CASES = {
    "student no tensor": (([1.0, 2.0], Y), {}, TypeError, "student_logits must be a Tensor.*list"),
    "teacher no tensor": ((Z, "y"), {}, TypeError, "teacher must be a Tensor.*str"),
    "student integer": ((Z.long(), Y), {}, TypeError, "student_logits must be float32.*int64"),
    "teacher integer": ((Z, Y.int()), {}, TypeError, "teacher must be float32.*int32"),
    "student complex": ((Z.to(torch.complex64), Y), {}, TypeError, "student_logits must be float32.*complex64"),
    "student scalar": ((torch.tensor(1.0), torch.tensor(1.0)), {}, ValueError, "student_logits must have at least one"),
    "no columns": ((Z[..., :0], Y[..., :0]), {}, ValueError, "student_logits must have at least one column"),
    "student strided": ((Z.transpose(-1, -2), Y), {}, ValueError, "student_logits must be contiguous in its last"),
    "teacher strided": ((Z[..., :5], Y[..., ::2]), {}, ValueError, "teacher must be contiguous in its last dimension"),
    "rows disagree": ((Z, Y[:2]), {}, ValueError, r"teacher must have the rows of student_logits, \(3, 4\), got \(2, 4\)"),
    "flattened": ((Z, Y.flatten(0, 1)), {}, ValueError, r"teacher must have the rows.*\(12,\)"),
    "widths disagree": ((Z, Y[..., :9]), {}, ValueError, "vocabulary of 10 and teacher of 9; give vocab_size"),
    "devices": ((Z, Y.to("meta")), {}, ValueError, "teacher is on meta, student_logits on cpu"),
    "vocab_size large": ((Z, Y), {"vocab_size": 11}, ValueError, r"vocab_size must lie in \[1, 10\].*got 11"),
    "vocab_size 0": ((Z, Y), {"vocab_size": 0}, ValueError, "vocab_size must lie in.*got 0"),
    "vocab_size float": ((Z, Y), {"vocab_size": 9.0}, TypeError, "vocab_size must be an int, got float"),
    "divergence name": ((Z, Y), {"divergence": "kl"}, ValueError, "divergence: unknown name 'kl'.*forward_kl"),
    "divergence class": ((Z, Y), {"divergence": kd.ForwardKL}, TypeError, r"divergence must be.*ForwardKL\(\)\?"),
    "divergence other": ((Z, Y), {"divergence": 3}, TypeError, "divergence must be a Divergence or its name, got 3"),
    "temperature 0": ((Z, Y), {"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0.0"),
    "temperature negative": ((Z, Y), {"temperature": -1}, ValueError, "temperature must be positive.*got -1"),
    "temperature nan": ((Z, Y), {"temperature": float("nan")}, ValueError, "temperature must be finite, got nan"),
    "temperature inf": ((Z, Y), {"temperature": float("inf")}, ValueError, "temperature must be finite, got inf"),
    "temperature text": ((Z, Y), {"temperature": "2"}, TypeError, "temperature must be a number, got str"),
    "temperature shape": ((Z, Y), {"temperature": torch.ones(4)}, ValueError, r"temperature must have one entry per row"),
    "temperature int": ((Z, Y), {"temperature": torch.ones(3, 4).long()}, TypeError, "temperature must be float"),
    "temperature 0-dim int": ((Z, Y), {"temperature": torch.tensor(1)}, TypeError, "temperature must be float"),
    "temperature grad": (
        (Z, Y), {"temperature": torch.ones(3, 4, requires_grad=True)}, ValueError, "temperature requires grad",
    ),
    "kd_weight": ((Z, Y), {"kd_weight": float("nan")}, ValueError, "kd_weight must be finite, got nan"),
    "kd_weight text": ((Z, Y), {"kd_weight": None}, TypeError, "kd_weight must be a number, got NoneType"),
    "ce_weight negative": ((Z, Y, LABELS), {"ce_weight": -1.0}, ValueError, "ce_weight must not be negative, got -1.0"),
    "ce without labels": ((Z, Y), {"ce_weight": 0.5}, ValueError, "labels are needed for ce_weight = 0.5"),
    "labels list": ((Z, Y, [0] * 12), {}, TypeError, "labels must be an int64 Tensor, got list"),
    "labels dtype": ((Z, Y, LABELS.int()), {}, TypeError, "labels must be int64, got torch.int32"),
    "labels shape": ((Z, Y, LABELS[:, :3]), {}, ValueError, r"labels must have one entry per row.*\(3, 4\), got \(3, 3\)"),
    "labels device": ((Z, Y, LABELS.to("meta")), {}, ValueError, "labels is on meta"),
    "labels high": ((Z, Y, LABELS + 10), {}, ValueError, r"labels must be -100 \(ignore_index\) or lie in \[0, 10\), got 10"),
    "labels low": ((Z, Y, LABELS - 1), {}, ValueError, r"labels must be -100.*got -1"),
    "labels above vocab": ((Z, Y, LABELS + 9), {"vocab_size": 9}, ValueError, r"lie in \[0, 9\), got 9"),
    "ignore_index": ((Z, Y, LABELS), {"ignore_index": 1.5}, TypeError, "ignore_index must be an int, got float"),
    "weight list": ((Z, Y), {"weight": [1.0]}, TypeError, "weight must be a float Tensor, got list"),
    "weight shape": ((Z, Y), {"weight": torch.ones(12)}, ValueError, r"weight must have one entry per row"),
    "weight int": ((Z, Y), {"weight": torch.ones(3, 4).int()}, TypeError, "weight must be float, got torch.int32"),
    "weight grad": ((Z, Y), {"weight": torch.ones(3, 4, requires_grad=True)}, ValueError, "weight requires grad"),
    "reduction": ((Z, Y), {"reduction": "batchmean"}, ValueError, "reduction must be one of mean, sum, none, got 'batchmean'"),
    "normalizer sum": ((Z, Y), {"reduction": "sum", "normalizer": 3}, ValueError, "normalizer replaces the mean's"),
    "normalizer shape": ((Z, Y), {"normalizer": torch.ones(2)}, ValueError, "normalizer must be a number or a 0-dim"),
    "normalizer negative": ((Z, Y), {"normalizer": -2}, ValueError, "normalizer must not be negative, got -2"),
    "normalizer nan": ((Z, Y), {"normalizer": float("nan")}, ValueError, "normalizer must be finite, got nan"),
    "softcap 0": ((Z, Y), {"student_softcap": 0.0}, ValueError, "student_softcap must be positive, got 0.0"),
    "softcap text": ((Z, Y), {"teacher_softcap": "30"}, TypeError, "teacher_softcap must be a number, got str"),
    "scale inf": ((Z, Y), {"teacher_logit_scale": float("inf")}, ValueError, "teacher_logit_scale must be finite"),
    "unknown option": ((Z, Y), {"temprature": 2.0}, TypeError, "temprature"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "options", "error", "message"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("loss", [kd.distillation_loss, kd.reference.distillation_loss], ids=["fused", "reference"])
def test_bad_input(loss, arguments, options, error, message):
    with pytest.raises(error, match=message):
        loss(*arguments, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: kd.JensenShannon(1.5), r"JensenShannon: beta must lie in \[0, 1\], got 1.5"),
        (lambda: kd.JensenShannon(-0.1), r"JensenShannon: beta must lie in"),
        (lambda: kd.SkewForwardKL(1.0), r"SkewForwardKL: lam must lie in \[0, 1\), got 1.0"),
        (lambda: kd.SkewReverseKL(-1), r"SkewReverseKL: lam must lie in"),
        (lambda: kd.SymmetricKL(2), r"SymmetricKL: weight must lie in"),
        (lambda: kd.AlphaBeta(float("nan"), 1), r"AlphaBeta: alpha must be finite, got nan"),
        (lambda: kd.JensenShannon("0.5"), r"JensenShannon: beta must be a number, got str"),
    ],
)
def test_bad_divergence(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_inplace_on_a_leaf():
    with pytest.raises(ValueError, match=r"inplace=True overwrites student_logits.*leaf"):
        kd.distillation_loss(Z.clone().requires_grad_(), Y, inplace=True)


def test_inplace_on_expanded_rows():
    leaf = torch.randn(1, 4, 10, requires_grad=True)
    with pytest.raises(ValueError, match="inplace=True cannot write to student_logits"):
        kd.distillation_loss((leaf * 1).expand(3, 4, 10), Y, inplace=True)


def test_labels_of_rows_without_weight_are_checked_too():
    with pytest.raises(ValueError, match="labels must be"):
        kd.distillation_loss(Z, Y, LABELS + 50, weight=torch.zeros(3, 4))


def test_a_teacher_that_requires_grad_is_warned_about_once(monkeypatch):
    monkeypatch.setattr(_arguments, "_warned_about_teacher", False)
    teacher = Y.clone().requires_grad_()
    student = Z.clone().requires_grad_()
    with pytest.warns(UserWarning, match="teacher requires grad") as seen:
        kd.distillation_loss(student, teacher).backward()
    assert seen[0].filename == __file__
    assert teacher.grad is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kd.distillation_loss(student, teacher)


def test_a_bad_row_temperature_is_nan_in_its_row(capability):
    temperature = torch.tensor([1.0, 0.0, -1.0, torch.inf, torch.nan, 2.0])
    student, teacher = logits_pair(6, 10)
    for loss in (kd.distillation_loss, kd.reference.distillation_loss):
        leaf = student.clone().requires_grad_()
        rows = loss(leaf, teacher, temperature=temperature, reduction="none")
        assert rows.isnan().tolist() == [False, True, True, True, True, False]


def test_module_options():
    with pytest.raises(TypeError, match="'temprature'"):
        kd.DistillationLoss(temprature=2.0)
    with pytest.raises(TypeError, match="'weight'; give it at call"):
        kd.DistillationLoss(weight=torch.ones(3))
    with pytest.raises(ValueError, match="unknown name 'kl'"):
        kd.DistillationLoss(divergence="kl")


def test_messages_are_one_line():
    for *_, message in CASES.values():
        assert "\n" not in re.sub(r"\\n", "\n", message)
