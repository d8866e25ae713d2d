"""Bad input to the loss from hidden states: an error before any work that names the argument and what came."""

import re
import socket
import warnings

import pytest
import torch
from linear_cases import operands

import kdkernels as kd
from kdkernels import _arguments

X, W, B, T = operands(3, 4, width=10, hidden=6, teacher_hidden=5, bias=True, teacher_bias=True)
Y = operands(3, 4, width=10, teacher_logits=True).teacher
LABELS = torch.zeros(3, 4, dtype=torch.long)
K = kd.TopKTeacher(torch.zeros(3, 4, 2, dtype=torch.long), torch.full((3, 4, 2), -1.0))


def teacher(**fields):
    return T._replace(**fields)


CASES = {
    "hidden list": (([1.0], W, T), {}, TypeError, "student_hidden must be a Tensor.*list"),
    "weight none": ((X, None, T), {}, TypeError, "student_weight must be a Tensor.*NoneType"),
    "hidden integer": ((X.long(), W, T), {}, TypeError, "student_hidden must be float32.*int64"),
    "weight integer": ((X, W.int(), T), {}, TypeError, "student_weight must be float32.*int32"),
    "bias integer": ((X, W, T), {"student_bias": B.int()}, TypeError, "student_bias must be float32.*int32"),
    "bias list": ((X, W, T), {"student_bias": [0.0] * 10}, TypeError, "student_bias must be a Tensor.*list"),
    "hidden scalar": ((torch.tensor(1.0), W, T), {}, ValueError, r"student_hidden must have.*\(\)"),
    "hidden size": ((X[..., :5], W, T), {}, ValueError, r"student_weight.*student_hidden.*\(3, 4, 5\).*\(10, 6\)"),
    "weight transposed": ((X, W.T, T), {}, ValueError, r"student_weight.*student_hidden.*\(6, 10\)"),
    "weight 3-D": ((X, W[None], T), {}, ValueError, r"student_weight must have.*\(1, 10, 6\)"),
    "weight without rows": ((X, W[:0], T), {}, ValueError, r"student_weight must have at least one row.*\(0, 6\)"),
    "bias shape": ((X, W, T), {"student_bias": B[:9]}, ValueError, "student_bias.*10, got 9"),
    "bias 2-D": ((X, W, T), {"student_bias": B[None]}, ValueError, r"student_bias must have.*\(1, 10\)"),
    "dtypes": ((X.bfloat16(), W, T), {}, TypeError, "student_hidden is torch.bfloat16.*student_weight.*torch.float32"),
    "dtypes the other way": ((X, W.half(), T), {}, TypeError, "student_hidden is torch.float32.*student_weight.*float16"),
    "weight device": ((X, W.to("meta"), T), {}, ValueError, "student_weight is on meta, student_hidden on cpu"),
    "bias device": ((X, W, T), {"student_bias": B.to("meta")}, ValueError, "student_bias is on meta, student_hidden on cpu"),
    "teacher list": ((X, W, [T.hidden]), {}, TypeError, "teacher must be a LinearTeacher, a TopKTeacher or a Tensor.*list"),
    "teacher tuple": ((X, W, tuple(T)), {}, TypeError, "teacher must be a LinearTeacher, a TopKTeacher or a Tensor.*tuple"),
    "teacher none": ((X, W, None), {}, TypeError, "teacher must be a LinearTeacher, a TopKTeacher or a Tensor.*NoneType"),
    "logits integer": ((X, W, Y.int()), {}, TypeError, "teacher must be float32.*int32"),
    "logits strided": ((X, W[:5], Y[..., ::2]), {}, ValueError, "teacher must be contiguous in its last dimension"),
    "logits rows": ((X, W, Y[:2]), {}, ValueError, r"teacher must have the rows of student_hidden, \(3, 4\), got \(2, 4\)"),
    "logits flattened": ((X, W, Y.flatten(0, 1)), {}, ValueError, r"teacher must have the rows.*\(12,\)"),
    "logits device": ((X, W, Y.to("meta")), {}, ValueError, "teacher is on meta, student_hidden on cpu"),
    "logits width": ((X, W, Y[..., :9]), {}, ValueError, "student_weight has.* 10 and teacher.* 9; give vocab_size"),
    "teacher hidden list": ((X, W, teacher(hidden=[0.0])), {}, TypeError, "teacher.hidden must be a Tensor.*list"),
    "teacher weight none": ((X, W, teacher(weight=None)), {}, TypeError, "teacher.weight must be a Tensor.*NoneType"),
    "teacher hidden integer": ((X, W, teacher(hidden=T.hidden.long())), {}, TypeError, "teacher.hidden must be float32.*int64"),
    "teacher rows": ((X, W, teacher(hidden=T.hidden[:, :3])), {}, ValueError, r"teacher.hidden must have the rows of student_hidden, \(3, 4\), got \(3, 3\)"),
    "teacher hidden size": ((X, W, teacher(hidden=T.hidden[..., :4])), {}, ValueError, r"teacher.weight.*teacher.hidden.*\(3, 4, 4\).*\(10, 5\)"),
    "teacher bias shape": ((X, W, teacher(bias=B[:4])), {}, ValueError, "teacher.bias.*10, got 4"),
    "teacher dtypes": ((X, W, teacher(hidden=T.hidden.double())), {}, TypeError, "teacher.hidden is torch.float64.*teacher.weight.*torch.float32"),
    "teacher hidden device": ((X, W, teacher(hidden=T.hidden.to("meta"))), {}, ValueError, "teacher.(weight|hidden) is on (cpu|meta)"),
    "teacher weight device": ((X, W, teacher(weight=T.weight.to("meta"))), {}, ValueError, "teacher.weight is on meta"),
    "teacher bias device": ((X, W, teacher(bias=T.bias.to("meta"))), {}, ValueError, "teacher.bias is on meta"),
    "teacher on another device": ((X, W, kd.LinearTeacher(*(x.to("meta") for x in T))), {}, ValueError, "teacher.hidden is on meta, student_hidden on cpu"),
    "ids list": ((X, W, K._replace(ids=[0])), {}, TypeError, "teacher.ids must be an int32 or int64 Tensor, got list"),
    "ids rows": ((X[:2], W, K), {}, ValueError, r"teacher.ids must be.*rows of student_hidden, \(2, 4\), got \(3, 4, 2\)"),
    "ids device": ((X, W, K._replace(ids=K.ids.to("meta"))), {}, ValueError, "teacher.ids is on meta, student_hidden on cpu"),
    "ids high": ((X, W, K._replace(ids=K.ids + 10)), {}, ValueError, r"teacher.ids must be negative .* or lie in \[0, 10\), got 10"),
    "logprobs list": ((X, W, K._replace(logprobs=[0.0])), {}, TypeError, "teacher.logprobs must be a Tensor.*list"),
    "logprobs shape": ((X, W, K._replace(logprobs=K.logprobs[..., :1])), {}, ValueError, "teacher.logprobs must have the shape of teacher.ids"),
    "logprobs device": ((X, W, K._replace(logprobs=K.logprobs.to("meta"))), {}, ValueError, "teacher.logprobs is on meta, teacher.ids on cpu"),
    "vocabularies": ((X, W[:9], T), {}, ValueError, "student_weight has.* 9 and teacher.weight.* 10; give vocab_size"),
    "vocab_size": ((X, W, T), {"vocab_size": 11}, ValueError, r"vocab_size must lie in \[1, 10\].*got 11"),
    "logits_dtype in fp32": ((X, W, T), {"logits_dtype": torch.bfloat16}, ValueError, "logits_dtype must be torch.float32.*got torch.bfloat16"),
    "logits_dtype double": ((X, W, T), {"logits_dtype": torch.float64}, ValueError, "logits_dtype must be torch.float32.*got torch.float64"),
    "logits_dtype text": ((X, W, T), {"logits_dtype": "float32"}, TypeError, "logits_dtype must be a torch.dtype, got str"),
    "logits_dtype none": ((X, W, T), {"logits_dtype": None}, TypeError, "logits_dtype must be a torch.dtype, got NoneType"),
    "workspace float": ((X, W, T), {"workspace_bytes": 1e6}, TypeError, "workspace_bytes must be an int, got float"),
    "workspace bool": ((X, W, T), {"workspace_bytes": True}, TypeError, "workspace_bytes must be an int, got bool"),
    "workspace 0": ((X, W, T), {"workspace_bytes": 0}, ValueError, "workspace_bytes must be positive, got 0"),
    "workspace negative": ((X, W, T), {"workspace_bytes": -1}, ValueError, "workspace_bytes must be positive, got -1"),
    "labels shape": ((X, W, T, LABELS[:, :3]), {}, ValueError, r"labels must have one entry per row of student_hidden, shape \(3, 4\), got \(3, 3\)"),
    "labels high": ((X, W, T, LABELS + 10), {}, ValueError, r"labels must be -100 \(ignore_index\) or lie in \[0, 10\), got 10"),
    "labels device": ((X, W, T, LABELS.to("meta")), {}, ValueError, "labels is on meta, student_hidden on cpu"),
    "ce without labels": ((X, W, T), {"ce_weight": 0.5}, ValueError, "labels are needed for ce_weight = 0.5"),
    "weight shape": ((X, W, T), {"weight": torch.ones(12)}, ValueError, "weight must have one entry per row of student_hidden"),
    "temperature 0": ((X, W, T), {"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0.0"),
    "reduction": ((X, W, T), {"reduction": "batchmean"}, ValueError, "reduction must be one of mean, sum, none"),
    "divergence": ((X, W, T), {"divergence": "kl"}, ValueError, "divergence: unknown name 'kl'"),
    "strong set": ((X, W, T), {"divergence": kd.Decoupled(kd.TopK(11))}, ValueError, "TopK: k must not exceed the vocabulary, 10"),
    "mask": ((X, W, T), {"divergence": kd.Decoupled(kd.Given(torch.ones(9).bool()))}, ValueError, r"Given: mask must be.*\(9,\)"),
    "unknown option": ((X, W, T), {"temprature": 2.0}, TypeError, "temprature"),
    "inplace": ((X, W, T), {"inplace": True}, TypeError, "inplace"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "options", "error", "message"), CASES.values(), ids=CASES)
@pytest.mark.parametrize(
    "loss", [kd.linear_distillation_loss, kd.reference.linear_distillation_loss], ids=["fused", "reference"]
)
def test_bad_input(loss, arguments, options, error, message):
    with pytest.raises(error, match=message):
        loss(*arguments, **options)


@pytest.mark.parametrize(
    ("dtype", "allowed"),
    [
        (torch.float32, [torch.float32]),
        (torch.bfloat16, [torch.float32, torch.bfloat16]),
        (torch.float16, [torch.float32, torch.float16]),
    ],
    ids=str,
)
def test_logits_dtypes(dtype, allowed):
    given = operands(3, width=10, dtype=dtype)
    for asked in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32):
        if asked in allowed:
            kd.linear_distillation_loss(given.hidden, given.weight, given.teacher, logits_dtype=asked)
            continue
        with pytest.raises(ValueError, match=f"logits_dtype must be.*{re.escape(str(asked))}"):
            kd.linear_distillation_loss(given.hidden, given.weight, given.teacher, logits_dtype=asked)


def test_logits_dtype_under_autocast_goes_by_what_is_multiplied():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kd.linear_distillation_loss(X, W, T, logits_dtype=torch.bfloat16)
        with pytest.raises(ValueError, match=r"logits_dtype must be.*float16"):
            kd.linear_distillation_loss(X, W, T, logits_dtype=torch.float16)


def test_errors_come_before_any_work(monkeypatch):
    # Before a gradient is formed, and before a matrix product that would raise an error of its own.
    leaf = X.clone().requires_grad_()
    monkeypatch.setattr(torch, "mm", lambda *_, **__: pytest.fail("multiplied"))
    with pytest.raises(ValueError, match="workspace_bytes"):
        kd.linear_distillation_loss(leaf, W, T, workspace_bytes=0)


@pytest.mark.parametrize("of_logits", [False, True])
def test_a_teacher_that_requires_grad_is_warned_about_where_it_is_called(monkeypatch, of_logits):
    monkeypatch.setattr(_arguments, "_warned_about_teacher", False)
    leaf = X.clone().requires_grad_()
    hidden = (Y if of_logits else T.hidden).clone().requires_grad_()
    weight = T.weight.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a teacher's weights are parameters: nothing is wrong with that
        kd.linear_distillation_loss(leaf, W, teacher(weight=weight)).backward()
    with pytest.warns(UserWarning, match="teacher requires grad") as seen:
        kd.linear_distillation_loss(leaf, W, hidden if of_logits else teacher(hidden=hidden)).backward()
    assert seen[0].filename == __file__
    assert hidden.grad is None
    assert weight.grad is None


def test_module_options():
    with pytest.raises(TypeError, match="'temprature'"):
        kd.LinearDistillationLoss(temprature=2.0)
    with pytest.raises(TypeError, match="'weight'; give it at call"):
        kd.LinearDistillationLoss(weight=torch.ones(3))
    with pytest.raises(TypeError, match="'inplace'"):
        kd.LinearDistillationLoss(inplace=True)
    with pytest.raises(TypeError, match="'student_bias'"):
        kd.LinearDistillationLoss(student_bias=B)
    with pytest.raises(ValueError, match="unknown name 'kl'"):
        kd.LinearDistillationLoss(divergence="kl")


@pytest.fixture
def mesh():
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch.distributed with gloo is not available")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_a_dtensor_is_refused_and_told_what_to_do(mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    def spread(x):
        return distribute_tensor(x, mesh, [Shard(0)])

    calls = {
        "student_hidden": lambda: kd.linear_distillation_loss(spread(X), W, T),
        "student_weight": lambda: kd.linear_distillation_loss(X, spread(W), T),
        "student_bias": lambda: kd.linear_distillation_loss(X, W, T, student_bias=spread(B)),
        "teacher.hidden": lambda: kd.linear_distillation_loss(X, W, teacher(hidden=spread(T.hidden))),
        "teacher.weight": lambda: kd.linear_distillation_loss(X, W, teacher(weight=spread(T.weight))),
        "teacher.bias": lambda: kd.linear_distillation_loss(X, W, teacher(bias=spread(T.bias))),
        "teacher": lambda: kd.linear_distillation_loss(X, W, spread(Y)),
        "teacher.ids": lambda: kd.linear_distillation_loss(X, W, K._replace(ids=spread(K.ids))),
        "teacher.logprobs": lambda: kd.linear_distillation_loss(X, W, K._replace(logprobs=spread(K.logprobs))),
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match=rf"^{re.escape(name)} is a DTensor.*full_tensor\(\).*to_local\(\)"):
            call()
    expected = kd.linear_distillation_loss(X, W, T)
    assert torch.equal(kd.linear_distillation_loss(X, spread(W).full_tensor(), T), expected)
    assert torch.equal(kd.linear_distillation_loss(spread(X).to_local(), W, T), expected)
