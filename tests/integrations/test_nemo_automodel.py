"""NeMo Automodel's KDLoss against NeMo Automodel's own."""

import warnings
from functools import partial

import pytest
import torch
from checks import assert_near, logits_pair
from frameworks import import_quietly
from originals import agree, compiles, in_bfloat16, outcome

from kdkernels.integrations.nemo_automodel import KDLoss

original = import_quietly("nemo_automodel.components.loss.kd_loss").KDLoss

LABELS = torch.tensor([[3, -100, 0, 99, 1, -100], [-100, 5, 5, -100, 7, 8]])


@pytest.fixture
def mesh():
    """Makes a mesh of one rank, or of two of which this process is one and the other does not exist."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def make(ranks):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if ranks == 1:
                dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            else:
                dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
            return dist.init_device_mesh("cpu", (ranks,))

    yield make
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("temperature", [1.0, 2.5, 0.7])
@pytest.mark.parametrize("num_batch_labels", [None, 17, 1, torch.tensor(17), torch.tensor(17.0)], ids=str)
@pytest.mark.parametrize("ignore_index", [-100, 5])
def test_as_nemo(temperature, num_batch_labels, ignore_index):
    student, teacher = logits_pair(2, 6, 101)
    call = {
        "teacher_logits": teacher,
        "labels": LABELS if ignore_index == -100 else LABELS.clamp(min=0),
        "num_batch_labels": num_batch_labels,
    }
    losses = [loss(ignore_index=ignore_index, temperature=temperature) for loss in (KDLoss, original)]
    agree(*(partial(loss, **call) for loss in losses), student)


@pytest.mark.parametrize(
    "options", [{"chunk_size": 5}, {"fp32_upcast": False}, {"chunk_size": 3, "temperature": 2.0}], ids=str
)
def test_settings_without_effect(options):
    student, teacher = logits_pair(12, 101)
    call = {"teacher_logits": teacher, "labels": LABELS}  # flat logits, labels that are not
    agree(partial(KDLoss(**options), **call), partial(original(**options), **call), student)
    plain = {name: value for name, value in options.items() if name == "temperature"}
    assert torch.equal(KDLoss(**options)(student, **call), KDLoss(**plain)(student, **call))


def test_views_are_read_where_they_lie():
    student, teacher = logits_pair(2, 7, 101)
    ours, theirs = KDLoss(temperature=2.0), original(temperature=2.0)

    def contiguous(logits):
        return theirs(logits[:, :-1].contiguous(), teacher[:, :-1].contiguous(), LABELS)

    agree(lambda logits: ours(logits[:, :-1], teacher[:, :-1], LABELS), contiguous, student)
    with pytest.raises(RuntimeError, match="view"):
        theirs(student[:, :-1], teacher[:, :-1], LABELS)


def test_bfloat16():
    student, teacher = logits_pair(2, 6, 101)
    teacher = teacher.bfloat16()
    t = 3.0

    def exact(logits):
        log_q, log_p = (logits / t).log_softmax(-1), (teacher.double() / t).log_softmax(-1)
        return t * t * (log_p.exp() * (log_p - log_q)).sum(-1)[LABELS != -100].mean()

    call = {"teacher_logits": teacher, "labels": LABELS}
    in_bfloat16(partial(KDLoss(temperature=t), **call), exact, student)
    agree(
        partial(KDLoss(temperature=t), **call),
        partial(original(temperature=t), **call),
        student.bfloat16(),
        bound=4e-6,
        gradient_bound=2**-7,
    )


@pytest.mark.parametrize("num_batch_labels", [None, 17, torch.tensor(17)], ids=str)
def test_no_label_counts(num_batch_labels):
    student, teacher = logits_pair(2, 6, 101)
    call = {
        "teacher_logits": teacher,
        "labels": torch.full_like(LABELS, -100),
        "num_batch_labels": num_batch_labels,
    }
    student[0, 0, 0] = -torch.inf
    loss, gradient = outcome(partial(KDLoss(), **call), student)
    assert float(loss) == 0
    assert (gradient == 0).all()
    assert original()(student, **call).isnan()


def test_no_labels_in_the_whole_step():
    student, teacher = logits_pair(2, 6, 101)
    for number in (0, torch.tensor(0)):
        loss, gradient = outcome(lambda logits, n=number: KDLoss()(logits, teacher, LABELS, n), student)
        assert float(loss) == 0
        assert (gradient == 0).all()


def test_ignored_tokens_are_not_read():
    student, teacher = logits_pair(2, 6, 101)
    expected = outcome(lambda logits: KDLoss()(logits, teacher, LABELS), student)
    student[LABELS == -100] = torch.nan
    teacher[LABELS == -100] = torch.inf
    for actual, want in zip(outcome(lambda logits: KDLoss()(logits, teacher, LABELS), student), expected, strict=True):
        assert torch.equal(actual, want)


def test_tokens_that_are_ruled_out():
    student, teacher = logits_pair(2, 6, 101)
    teacher[..., 7] = -torch.inf
    call = {"teacher_logits": teacher, "labels": LABELS}
    agree(partial(KDLoss(), **call), partial(original(), **call), student)
    student[..., 7] = -torch.inf
    loss, gradient = outcome(partial(KDLoss(), **call), student)
    assert_near("loss", loss, original()(student, **call), 2e-6)
    assert gradient.isfinite().all()
    teacher[..., 7] = 0.0
    assert KDLoss()(student, **call) == original()(student, **call) == torch.inf


@pytest.mark.filterwarnings("ignore:torch.distributed.nn.functional.all_reduce is deprecated:FutureWarning")
@pytest.mark.parametrize("where", ["replicated", "batch", "vocabulary"])
def test_dtensors(mesh, where):
    from torch.distributed.tensor import DTensor, Replicate, Shard

    student, teacher = logits_pair(2, 6, 101)
    on = mesh(1)
    placement = {"replicated": Replicate(), "batch": Shard(0), "vocabulary": Shard(2)}[where]

    def placed(tensor):
        return DTensor.from_local(tensor, on, [placement], run_check=False)

    ours, theirs = KDLoss(temperature=2.0), original(temperature=2.0)
    agree(
        lambda logits: ours(placed(logits), placed(teacher), LABELS),
        lambda logits: theirs(placed(logits), placed(teacher), LABELS),
        student,
    )
    if where != "vocabulary":
        assert torch.equal(ours(placed(student), teacher, placed(LABELS)), ours(student, teacher, LABELS))


def test_a_vocabulary_split_over_ranks_is_refused(mesh):
    from torch.distributed.tensor import DTensor, Replicate, Shard

    student, teacher = logits_pair(2, 6, 101)
    on = mesh(2)
    for dim in (-1, 2):
        logits = DTensor.from_local(student, on, [Shard(dim)], run_check=False)
        with pytest.raises(NotImplementedError, match="student_logits are a DTensor whose vocabulary is split"):
            KDLoss()(logits, teacher, LABELS)
    logits = DTensor.from_local(student, on, [Replicate()], run_check=False)
    assert torch.equal(KDLoss()(logits, teacher, LABELS), KDLoss()(student, teacher, LABELS))


def test_compiled():
    student, teacher = logits_pair(2, 6, 101)
    compiles(KDLoss(temperature=2.5), student.requires_grad_(), teacher, LABELS, 17)


def test_bad_input():
    student, teacher = logits_pair(2, 6, 101)
    with pytest.raises(NotImplementedError, match="tp_group"):
        KDLoss(tp_group=object())
    later = KDLoss()
    later.tp_group = object()
    with pytest.raises(NotImplementedError, match="tp_group"):
        later(student, teacher, LABELS)
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature must be positive"):
            KDLoss(temperature=temperature)
    with pytest.raises(ValueError, match="labels must have one entry per row"):
        KDLoss()(student, teacher, LABELS[:, :-1])
    with pytest.raises(ValueError, match="vocabulary of 101"):
        KDLoss()(student, teacher[..., :-1], LABELS)
