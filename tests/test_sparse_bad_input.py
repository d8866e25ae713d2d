"""Bad sparse teachers raise before any work, and the message names the argument, what came and what was expected."""

import re
import warnings

import pytest
import torch
from checks import logits_pair
from sparse_cases import TAILS, sparse_pair

import kdkernels as kd
from kdkernels import _arguments

Z, T = sparse_pair(3, 4, 10, k=3)
RENORMALIZE, TEACHER = T._replace(tail="renormalize"), T._replace(tail="teacher")
HOT, ROWS = {"temperature": 2.0}, torch.full((3, 4), 2.0)


def with_id(number: int) -> kd.TopKTeacher:
    ids = T.ids.clone()
    ids[1, 2, 0] = number
    return T._replace(ids=ids)


CASES = {
    "no TopKTeacher": ((Z, tuple(T)), {}, TypeError, "teacher must be a Tensor.*tuple"),
    "ids list": ((Z, T._replace(ids=[[1]])), {}, TypeError, "teacher.ids must be an int32 or int64 Tensor, got list"),
    "ids float": ((Z, T._replace(ids=T.ids.float())), {}, TypeError, "teacher.ids must be int32 or int64, got torch.float32"),
    "ids int16": ((Z, T._replace(ids=T.ids.short())), {}, TypeError, "teacher.ids must be int32 or int64, got torch.int16"),
    "ids scalar": ((Z, T._replace(ids=torch.tensor(1))), {}, ValueError, r"teacher.ids must be \(..., K\).*\(3, 4\), got \(\)"),
    "ids of other rows": ((Z, T._replace(ids=T.ids[:2])), {}, ValueError, r"rows of student_logits, \(3, 4\), got \(2, 4, 3\)"),
    "ids flattened": ((Z, T._replace(ids=T.ids.flatten(0, 1))), {}, ValueError, r"teacher.ids must be.*got \(12, 3\)"),
    "no ids": ((Z, T._replace(ids=T.ids[..., :0])), {}, ValueError, "teacher.ids must have between 1 and 4096 ids a row, got 0"),
    "too many ids": ((Z, T._replace(ids=T.ids[..., :1].expand(3, 4, 4097))), {}, ValueError, "between 1 and 4096.*got 4097"),
    "ids device": ((Z, T._replace(ids=T.ids.to("meta"))), {}, ValueError, "teacher.ids is on meta, student_logits on cpu"),
    "id high": ((Z, with_id(10)), {}, ValueError, r"teacher.ids must be negative \(no token\) or lie in \[0, 10\), got 10"),
    "id above vocab_size": ((Z, with_id(9)), {"vocab_size": 9}, ValueError, r"teacher.ids must be.*\[0, 9\), got 9"),
    "logprobs list": ((Z, T._replace(logprobs=[1.0])), {}, TypeError, r"teacher.logprobs must be a Tensor \(..., K\), got list"),
    "logprobs int": ((Z, T._replace(logprobs=T.ids)), {}, TypeError, "teacher.logprobs must be float32.*torch.int64"),
    "logprobs shape": ((Z, T._replace(logprobs=T.logprobs[..., :2])), {}, ValueError, r"the shape of teacher.ids, \(3, 4, 3\), got \(3, 4, 2\)"),
    "logprobs device": ((Z, T._replace(logprobs=T.logprobs.to("meta"))), {}, ValueError, "teacher.logprobs is on meta, teacher.ids on cpu"),
    "tail": ((Z, T._replace(tail="other")), {}, ValueError, "teacher.tail must be one of bucket, renormalize, teacher, drop, got 'other'"),
    "teacher_temperature 0": ((Z, T._replace(teacher_temperature=0.0)), {}, ValueError, "teacher.teacher_temperature must be positive, got 0.0"),
    "teacher_temperature nan": ((Z, T._replace(teacher_temperature=float("nan"))), {}, ValueError, "teacher.teacher_temperature must be finite, got nan"),
    "teacher_temperature text": ((Z, T._replace(teacher_temperature="1")), {}, TypeError, "teacher.teacher_temperature must be a number, got str"),
    "bucket, T": ((Z, T), HOT, ValueError, "temperature must be 1.0, the teacher_temperature.*tail='bucket', got 2.0: the mass outside.*tail='renormalize'"),
    "drop, T": ((Z, T._replace(tail="drop")), HOT, ValueError, "temperature must be 1.0.*tail='drop', got 2.0"),
    "bucket, other T": ((Z, T._replace(teacher_temperature=2.0)), {}, ValueError, "temperature must be 2.0, the teacher_temperature.*got 1.0"),
    "bucket, T per row": ((Z, T), {"temperature": ROWS}, ValueError, r"temperature must be 1.0.*got a Tensor \(3, 4\)"),
    "bucket, reverse": ((Z, T), {"divergence": "reverse_kl"}, ValueError, "divergence must be forward_kl for a TopKTeacher with tail='bucket', got reverse_kl; .* need tail='renormalize'"),
    "teacher, jsd": ((Z, TEACHER), {"divergence": kd.JensenShannon(0.3)}, ValueError, "divergence must be forward_kl.*tail='teacher', got jensen_shannon"),
    "renormalize, tv": ((Z, RENORMALIZE), {"divergence": "total_variation"}, ValueError, "divergence must be forward_kl or reverse_kl or jensen_shannon.*got total_variation"),
    "decoupled": ((Z, RENORMALIZE), {"divergence": kd.Decoupled(kd.TopK(2))}, ValueError, "divergence must be forward_kl or.*got decoupled"),
    "teacher scale": ((Z, T), {"teacher_logit_scale": 2.0}, ValueError, "teacher_logit_scale and teacher_softcap are for logits; a TopKTeacher has"),
    "teacher softcap": ((Z, T), {"teacher_softcap": 2.0}, ValueError, "teacher_logit_scale and teacher_softcap are for logits"),
    "vocab_size": ((Z, T), {"vocab_size": 11}, ValueError, r"vocab_size must lie in \[1, 10\].*got 11"),
    "ce without labels": ((Z, T), {"ce_weight": 0.5}, ValueError, "labels are needed for ce_weight = 0.5"),
    "unknown option": ((Z, T), {"tail": "drop"}, TypeError, "tail"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "options", "error", "message"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("loss", [kd.distillation_loss, kd.reference.distillation_loss], ids=["fused", "reference"])
def test_bad_input(loss, arguments, options, error, message):
    with pytest.raises(error, match=message):
        loss(*arguments, **options)


def test_messages_are_one_line():
    for *_, message in CASES.values():
        assert "\n" not in re.sub(r"\\n", "\n", message)


@pytest.mark.parametrize("tail", TAILS)
def test_what_is_no_bad_input(tail):
    temperature = {"temperature": 2.0} if tail == "bucket" else {}
    teacher = T._replace(tail=tail, teacher_temperature=2.0 if tail in ("bucket", "drop") else 3)
    if tail == "drop":
        temperature = {"temperature": 2}
    ids = teacher.ids.clone()
    ids[0, 0] = torch.tensor([-1, -100, torch.iinfo(torch.int64).min])
    assert torch.isfinite(kd.distillation_loss(Z, teacher._replace(ids=ids), **temperature))


@pytest.mark.parametrize("temperature", [ROWS * torch.tensor([1.0, 0.0, torch.nan, -1.0])], ids=["per row"])
def test_a_bad_row_temperature_is_nan_in_its_row(capability, temperature):
    for teacher in (RENORMALIZE, TEACHER):
        for loss in (kd.distillation_loss, kd.reference.distillation_loss):
            rows = loss(Z.clone().requires_grad_(), teacher, temperature=temperature, reduction="none")
            assert rows.isnan().tolist() == [[False, True, True, True]] * 3


def test_logprobs_that_require_grad_are_warned_about_once(monkeypatch):
    monkeypatch.setattr(_arguments, "_warned_about_teacher", False)
    logprobs, student = T.logprobs.clone().requires_grad_(), logits_pair(3, 4, 10)[0].requires_grad_()
    with pytest.warns(UserWarning, match="teacher requires grad"):
        kd.distillation_loss(student, T._replace(logprobs=logprobs)).backward()
    assert logprobs.grad is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kd.distillation_loss(student, T._replace(logprobs=logprobs))


def test_inplace_on_a_leaf():
    with pytest.raises(ValueError, match=r"inplace=True overwrites student_logits.*leaf"):
        kd.distillation_loss(Z.clone().requires_grad_(), T, inplace=True)
