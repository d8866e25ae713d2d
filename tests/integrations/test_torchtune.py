"""torchtune's distillation losses against its own, loaded from their file: torchtune's __init__ needs torchao."""

from functools import partial

import pytest
import torch
from checks import assert_near, logits_pair
from originals import agree, compiles, in_bfloat16, load_file, outcome

import kdkernels as kd
from kdkernels.integrations import torchtune as adapters

originals = load_file("torchtune", "modules/loss/kd_losses.py")

LABELS = torch.tensor([[3, -100, 0, 99, 1, -100], [-100, 5, 5, -100, 7, 8]])
NONE = torch.full_like(LABELS, -100)

WHOLE = [
    ("ForwardKLLoss", {}),
    ("ReverseKLLoss", {}),
    ("SymmetricKLLoss", {}),
    ("SymmetricKLLoss", {"sym_kd_ratio": 0.2}),
    ("SymmetricKLLoss", {"sym_kd_ratio": 1.0}),
    ("SymmetricKLLoss", {"sym_kd_ratio": 0.0}),
]
CHUNKED = [(name.replace("Loss", "WithChunkedOutputLoss"), options) for name, options in WHOLE]


def ids(case):
    return "-".join(map(str, (case[0], *case[1].values())))


def pair(name, **options):
    return getattr(adapters, name)(**options), getattr(originals, name)(**options)


@pytest.mark.parametrize("case", WHOLE, ids=ids)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("ignore_index", [-100, 5])
def test_as_torchtune(case, normalize, ignore_index):
    student, teacher = logits_pair(12, 101)
    labels = LABELS.flatten() if ignore_index == -100 else LABELS.flatten().clamp(min=0)
    ours, original = pair(case[0], **case[1], ignore_index=ignore_index)
    call = {"teacher_logits": teacher, "labels": labels, "normalize": normalize}
    agree(partial(ours, **call), partial(original, **call), student)


@pytest.mark.parametrize("case", CHUNKED, ids=ids)
@pytest.mark.parametrize("chunks", [1, 3, 4])  # of 6 tokens: 4 makes 3 chunks of 2
def test_chunked_as_torchtune(case, chunks):
    student, teacher = logits_pair(2, 6, 101)
    ours, original = pair(case[0], **case[1], num_output_chunks=chunks)

    def loss(module, logits):
        return module(list(logits.chunk(chunks, dim=1)), list(teacher.chunk(chunks, dim=1)), LABELS)

    agree(partial(loss, ours), partial(loss, original), student)


@pytest.mark.parametrize("case", CHUNKED, ids=ids)
def test_flat_chunks(case):
    student, teacher = logits_pair(2, 6, 101)
    ours, original = pair(case[0], **case[1], num_output_chunks=2)

    def flat(logits):
        return [chunk.reshape(-1, 101) for chunk in logits.chunk(2, dim=1)]

    def loss(module, logits):
        return module(flat(logits), flat(teacher), LABELS)

    agree(partial(loss, ours), partial(loss, original), student)


@pytest.mark.parametrize("case", WHOLE, ids=ids)
def test_views_and_shapes_of_labels(case):
    student, teacher = logits_pair(2, 7, 101)
    ours, original = pair(case[0], **case[1])
    flat = LABELS.flatten()

    def by_original(logits):
        return original(logits[:, :-1].reshape(-1, 101), teacher[:, :-1].reshape(-1, 101), flat)

    for labels in (LABELS, flat):
        agree(lambda logits, labels=labels: ours(logits[:, :-1], teacher[:, :-1], labels), by_original, student)
    agree(
        lambda logits: ours(logits[:, :-1].reshape(-1, 101), teacher[:, :-1].reshape(-1, 101), LABELS),
        by_original,
        student,
    )


@pytest.mark.parametrize("case", WHOLE, ids=ids)
def test_bfloat16(case):
    student, teacher = logits_pair(12, 101)
    teacher = teacher.bfloat16()
    share = case[1].get("sym_kd_ratio", {"ForwardKLLoss": 1.0, "ReverseKLLoss": 0.0}.get(case[0], 0.5))
    ours, original = pair(*case[:1], **case[1])
    labels = LABELS.flatten()

    def exact(logits):
        log_q, log_p = logits.log_softmax(-1), teacher.double().log_softmax(-1)
        forward = -(log_p.exp() * log_q).sum(-1)
        reverse = (log_q.exp() * (log_q - log_p)).sum(-1)
        return (share * forward + (1 - share) * reverse)[labels != -100].mean()

    in_bfloat16(partial(ours, teacher_logits=teacher, labels=labels), exact, student)
    by_original = outcome(partial(original, teacher_logits=teacher, labels=labels), student.bfloat16())
    assert_near("torchtune's loss", by_original[0], exact(student.bfloat16().double()), 4e-6)


@pytest.mark.parametrize("case", [WHOLE[0], WHOLE[3], CHUNKED[0], CHUNKED[3]], ids=ids)
def test_the_teachers_entropy_is_a_constant(case):
    name, options = case
    student, teacher = logits_pair(2, 6, 101)
    log_p = teacher.double().log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)[LABELS != -100].mean()
    arguments = (lambda x: x.chunk(8, dim=1)) if "Chunked" in name else (lambda x: x)
    results = []
    for teacher_entropy in (True, False):
        ours = getattr(adapters, name)(**options, teacher_entropy=teacher_entropy)
        results.append(outcome(lambda logits, ours=ours: ours(arguments(logits), arguments(teacher), LABELS), student))
    (cross, gradient), (divergence, same) = results
    assert_near("entropy", cross - divergence, options.get("sym_kd_ratio", 1.0) * entropy, 2e-6)
    assert torch.equal(gradient, same)
    # What is left is the divergence itself: 0 where the models agree.
    equal = getattr(adapters, name)(**options, teacher_entropy=False)
    assert abs(float(equal(arguments(teacher), arguments(teacher), LABELS))) < 1e-6


@pytest.mark.parametrize("case", WHOLE + CHUNKED, ids=ids)
def test_no_label_counts(case):
    student, teacher = logits_pair(2, 6, 101)
    ours, original = pair(case[0], **case[1])
    arguments = (lambda x: x.chunk(8, dim=1)) if "Chunked" in case[0] else (lambda x: x)
    loss, gradient = outcome(lambda logits: ours(arguments(logits), arguments(teacher), NONE), student)
    assert float(loss) == 0
    assert (gradient == 0).all()
    leaf = student.clone().requires_grad_()
    theirs = original(arguments(leaf), arguments(teacher), NONE)
    if case[0] in ("ReverseKLWithChunkedOutputLoss", "SymmetricKLWithChunkedOutputLoss"):
        assert theirs.isnan()
    else:
        assert float(theirs) == 0
        with pytest.raises(RuntimeError, match="does not require grad"):
            theirs.backward()
    if "Chunked" not in case[0]:
        loss, gradient = outcome(lambda logits: ours(logits, teacher, NONE, normalize=False), student)
        assert float(loss) == 0
        assert (gradient == 0).all()


@pytest.mark.parametrize("case", WHOLE, ids=ids)
def test_ignored_tokens_are_not_read(case):
    student, teacher = logits_pair(2, 6, 101)
    ours, _ = pair(case[0], **case[1])
    expected = outcome(lambda logits: ours(logits, teacher, LABELS), student)
    student[LABELS == -100] = torch.nan
    teacher[LABELS == -100] = torch.inf
    for actual, want in zip(outcome(lambda logits: ours(logits, teacher, LABELS), student), expected, strict=True):
        assert torch.equal(actual, want)


def test_the_teacher_gets_no_gradient(monkeypatch):
    monkeypatch.setattr("kdkernels._arguments._warned_about_teacher", True)
    student, teacher = logits_pair(2, 6, 101)
    adapters.SymmetricKLLoss()(student.requires_grad_(), teacher.requires_grad_(), LABELS).backward()
    assert student.grad is not None
    assert teacher.grad is None


def masked(of_student, of_teacher):
    student, teacher = logits_pair(12, 101)
    student[:, of_student] = -torch.inf
    teacher[:, of_teacher] = -torch.inf
    return student, {"teacher_logits": teacher, "labels": LABELS.flatten()}


def test_tokens_that_are_ruled_out():
    nothing, some = [], [3, 50, 100]
    forward, reverse = pair("ForwardKLLoss"), pair("ReverseKLLoss")
    # Forward KL agrees where the teacher rules out what the student does.
    for of_student, of_teacher in ((some, some), (nothing, some)):
        student, call = masked(of_student, of_teacher)
        agree(*(partial(module, **call) for module in forward), student)
    # Where the student alone does, the divergence is infinite; torchtune leaves the teacher's probability out.
    student, call = masked(some, nothing)
    assert forward[0](student, **call) == torch.inf
    assert forward[1](student, **call).isfinite()
    # Reverse KL has torchtune's value, whose gradient is NaN, where the student rules out what the teacher does.
    for of_student, of_teacher in ((some, some), (some, nothing)):
        student, call = masked(of_student, of_teacher)
        loss, gradient = outcome(partial(reverse[0], **call), student)
        theirs, broken = outcome(partial(reverse[1], **call), student)
        assert_near("loss", loss, theirs, 2e-6)
        assert broken.isnan().any()
        log_q, log_p = (x.double().log_softmax(-1) for x in (student, call["teacher_logits"]))
        inner = torch.where(log_q > -torch.inf, log_q - log_p, 0)
        kl = (log_q.exp() * inner).sum(-1, keepdim=True)
        counts = (call["labels"] != -100).double()[:, None]
        assert_near("gradient", gradient, log_q.exp() * (inner - kl) * counts / counts.sum(), 2e-6)
    student, call = masked(nothing, some)
    assert reverse[0](student, **call) == torch.inf
    assert reverse[1](student, **call).isfinite()


def test_float64_is_kept():
    student, teacher = (logits.double() for logits in logits_pair(12, 101))
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    loss = adapters.ForwardKLLoss()(student, teacher, LABELS.flatten())
    expected = -(log_p.exp() * log_q).sum(-1)[LABELS.flatten() != -100].mean()
    assert_near("loss", loss, expected, 1e-12)
    assert originals.ForwardKLLoss()(student, teacher, LABELS.flatten()).dtype == torch.float32


def test_chunks_are_swept_where_they_lie(monkeypatch):
    student, teacher = logits_pair(2, 6, 101)
    student.requires_grad_()
    swept = []
    distillation_loss = kd.distillation_loss

    def recorded(logits, *rest, **options):
        swept.append(logits.data_ptr())
        return distillation_loss(logits, *rest, **options)

    monkeypatch.setattr(kd, "distillation_loss", recorded)
    chunks = student.chunk(3, dim=1)
    adapters.ReverseKLWithChunkedOutputLoss(3)(list(chunks), list(teacher.chunk(3, dim=1)), LABELS)
    assert swept == [chunk.data_ptr() for chunk in chunks]


@pytest.mark.parametrize("case", [WHOLE[3], CHUNKED[3]], ids=ids)
def test_compiled(case):
    student, teacher = logits_pair(2, 6, 101)
    name, options = case
    if "Chunked" in name:
        options = {**options, "num_output_chunks": 2}
        student, teacher = ([chunk.clone() for chunk in logits.chunk(2, dim=1)] for logits in (student, teacher))
        for chunk in student:
            chunk.requires_grad_()
    else:
        student.requires_grad_()
    compiles(getattr(adapters, name)(**options), student, teacher, LABELS)


def test_bad_input():
    student, teacher = logits_pair(2, 6, 101)
    loss = adapters.ForwardKLWithChunkedOutputLoss(3)
    three, two = list(student.chunk(3, dim=1)), list(teacher.chunk(2, dim=1))
    with pytest.raises(ValueError, match="teacher_logits must have 3 chunks"):
        loss(three, two, LABELS)
    with pytest.raises(ValueError, match="student_logits must have 3 chunks"):
        loss(two, three, LABELS)
    with pytest.raises(ValueError, match="labels must have one entry per row"):
        adapters.ForwardKLLoss()(student, teacher, LABELS[:, :-1])
    with pytest.raises(ValueError, match="vocabulary of 101"):
        adapters.ForwardKLLoss()(student, teacher[..., :-1], LABELS)
    for ratio in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="sym_kd_ratio"):
            adapters.SymmetricKLLoss(ratio)
        with pytest.raises(ValueError, match="sym_kd_ratio"):
            adapters.SymmetricKLWithChunkedOutputLoss(sym_kd_ratio=ratio)
