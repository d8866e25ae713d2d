"""ModelOpt's LogitsDistillationLoss against ModelOpt's own, loaded from its file: ModelOpt's __init__ needs scipy."""

from functools import partial

import pytest
import torch
from checks import assert_near, logits_pair
from originals import agree, compiles, in_bfloat16, load_file, outcome
from torch.nn.modules.loss import _Loss

from kdkernels.integrations.modelopt import LogitsDistillationLoss

# torch's, of the original's default.
pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning")

original = load_file("modelopt", "torch/distill/losses.py").LogitsDistillationLoss

SETTINGS = [
    {},
    {"temperature": 2.5},
    *({"temperature": 0.7, "reduction": reduction} for reduction in ("mean", "batchmean", "sum", "none")),
]


def ids(options):
    return "-".join(map(str, options.values())) or "defaults"


@pytest.mark.parametrize("options", SETTINGS, ids=ids)
@pytest.mark.parametrize("shape", [(12, 101), (3, 4, 101)], ids=str)
def test_as_modelopt(options, shape):
    student, teacher = logits_pair(*shape)
    ours, theirs = LogitsDistillationLoss(**options), original(**options)
    agree(partial(ours, logits_t=teacher), partial(theirs, logits_t=teacher), student, bound=3e-6)
    student, teacher = student.double(), teacher.double()
    agree(partial(ours, logits_t=teacher), partial(theirs, logits_t=teacher), student, bound=1e-12)
    shifted = teacher[..., :-1, :]
    agree(lambda s: ours(s[..., :-1, :], shifted), lambda s: theirs(s[..., :-1, :], shifted), student, bound=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_bfloat16(reduction):
    student, teacher = logits_pair(12, 101)
    teacher = teacher.bfloat16()
    options = {"temperature": 3.0, "reduction": reduction}
    exact = partial(original(**options), logits_t=teacher.double())
    in_bfloat16(partial(LogitsDistillationLoss(**options), logits_t=teacher), exact, student)
    assert original(**options)(student.bfloat16(), teacher).dtype == torch.bfloat16


def test_mean_divides_by_the_vocabulary_too():
    student, teacher = logits_pair(12, 101)
    per_token = LogitsDistillationLoss(reduction="none")(student, teacher)
    assert per_token.shape == (12,)
    assert_near("mean", LogitsDistillationLoss()(student, teacher), per_token.mean() / 101, 2e-6)
    assert_near("batchmean", LogitsDistillationLoss(reduction="batchmean")(student, teacher), per_token.mean(), 2e-6)


def test_a_criterion_of_modelopt():
    # KDLossConfig takes instances of this class; loss balancers know a loss by its class's name.
    assert issubclass(LogitsDistillationLoss, _Loss)
    assert LogitsDistillationLoss.__name__ == original.__name__
    assert LogitsDistillationLoss(2.0, "sum")._temperature == original(2.0, "sum")._temperature
    assert LogitsDistillationLoss(2.0, "sum")._reduction == original(2.0, "sum")._reduction


def test_the_teacher_gets_no_gradient():
    student, teacher = logits_pair(12, 101)
    teacher.requires_grad_()
    agree(*(partial(loss, logits_t=teacher) for loss in (LogitsDistillationLoss(), original())), student)
    assert teacher.grad is None


def test_tokens_that_both_rule_out():
    student, teacher = logits_pair(12, 101)
    wide = [torch.nn.functional.pad(logits, (0, 27), value=-torch.inf) for logits in (student, teacher)]
    ours = LogitsDistillationLoss(2.0, "batchmean")
    loss, gradient = outcome(partial(ours, logits_t=wide[1]), wide[0])
    expected, narrow = outcome(partial(ours, logits_t=teacher), student)
    assert_near("loss", loss, expected, 2e-6)
    assert_near("gradient", gradient[:, :101], narrow, 2e-6)
    assert (gradient[:, 101:] == 0).all()
    assert original(2.0, "batchmean")(*wide).isnan()


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum", "none"])
def test_no_tokens(reduction):
    student, teacher = torch.empty(0, 101), torch.empty(0, 101)
    loss, gradient = outcome(partial(LogitsDistillationLoss(reduction=reduction), logits_t=teacher), student)
    assert (loss == 0).all()
    assert gradient.shape == (0, 101)


def test_compiled():
    student, teacher = logits_pair(12, 101)
    compiles(LogitsDistillationLoss(2.5), student.requires_grad_(), teacher)


def test_bad_input():
    student, teacher = logits_pair(12, 101)
    with pytest.raises(ValueError, match="reduction must be one of"):
        LogitsDistillationLoss(reduction="median")
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature must be positive"):
            LogitsDistillationLoss(temperature)
    with pytest.raises(ValueError, match="teacher must have the rows"):
        LogitsDistillationLoss()(student, teacher[:1])  # the original broadcasts it
    assert original()(student, teacher[:1]).isfinite()
