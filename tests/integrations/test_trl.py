"""kdkernels.integrations.trl against TRL's own functions, and inside TRL's own trainers."""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import random
import sys
import warnings

import pytest
import torch
from checks import assert_near, logits_pair, relative_error
from frameworks import import_quietly

from kdkernels.integrations import trl as adapter

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all that is needed is made here
datasets = import_quietly("datasets")
tokenizers = import_quietly("tokenizers")
transformers = import_quietly("transformers")
import_quietly("accelerate")
trl = import_quietly("trl")
gkd = import_quietly("trl.experimental.gkd")
gkd_trainer = import_quietly("trl.experimental.gkd.gkd_trainer")
gold_trainer = import_quietly("trl.experimental.gold.gold_trainer")
iw_opd_trainer = import_quietly("trl.experimental.iw_opd.iw_opd_trainer")
distillation_trainer = import_quietly("trl.trainer.distillation_trainer")
kernels = import_quietly("trl.kernels.chunked_divergence")

pytestmark = pytest.mark.usefixtures("one_thread")

GKD_LOSS = gkd_trainer.GKDTrainer.generalized_jsd_loss
CHUNKED_LOSS = distillation_trainer._chunked_divergence_loss
PER_TOKEN = kernels.ChunkedDivergenceFunction

EACH_BETA = pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
EACH_TEMPERATURE = pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
EACH_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
# Norm-relative, of losses and gradients against TRL's formula in fp64.
BOUNDS = {torch.float32: (2e-6, 2e-6), torch.float64: (1e-12, 1e-11)}
# TRL's chunked loss computes in fp32, whatever it is given.
OF_CHUNKED = 5e-6

LABELS = torch.tensor([[3, -100, 0, 99, 7], [-100, 5, 5, -100, 1], [17, 2, -100, 1, -100]])
NONE_VALID = torch.full_like(LABELS, -100)


# --- generalized_jsd_loss


def gkd_pair(dtype=torch.float32, noise=1.0):
    return logits_pair(3, 6, 101, dtype=dtype, noise=noise)


def of_views(loss_function, student, teacher, labels, **options):
    """Loss and gradient, of logits[:, :-1] as the trainer passes them."""
    leaf = student.clone().requires_grad_()
    loss = loss_function(leaf[:, :-1], teacher[:, :-1], labels, **options)
    loss.backward()
    return loss.detach(), leaf.grad


@EACH_DTYPE
@EACH_TEMPERATURE
@EACH_BETA
def test_generalized_jsd_loss_is_trls(beta, temperature, dtype):
    student, teacher = gkd_pair(dtype)
    for labels in (LABELS, None, NONE_VALID):
        for options in (
            {},
            {"reduction": "sum"},
            {"reduction": "mean"},
            {"num_items_in_batch": 7},
            {"num_items_in_batch": torch.tensor(7), "reduction": "none"},  # which then does not count
        ):
            if labels is NONE_VALID and options.get("reduction") == "mean":
                continue  # see test_mean_of_no_token
            options = {"beta": beta, "temperature": temperature, **options}
            expected = of_views(GKD_LOSS, student.double(), teacher.double(), labels, **options)
            actual = of_views(adapter.generalized_jsd_loss, student, teacher, labels, **options)
            for what, ours, theirs, bound in zip(("loss", "gradient"), actual, expected, BOUNDS[dtype], strict=True):
                assert ours.dtype == dtype
                assert_near(f"{what}, {options}", ours, theirs, bound)


def test_generalized_jsd_loss_of_two_dimensions():
    student, teacher = logits_pair(11, 101)
    labels = LABELS.flatten()[:11]
    for options in ({}, {"reduction": "sum"}, {"labels": labels}, {"labels": labels.int()}):
        expected = GKD_LOSS(student.double(), teacher.double(), **options)
        assert_near(str(options), adapter.generalized_jsd_loss(student, teacher, **options), expected, 2e-6)


def test_labels_are_a_mask_alone():
    student, teacher = logits_pair(3, 5, 101)
    beyond = torch.where(LABELS == -100, -100, 10**6)
    expected = GKD_LOSS(student.double(), teacher.double(), beyond)
    assert_near("loss", adapter.generalized_jsd_loss(student, teacher, beyond), expected, 2e-6)


def test_mean_of_no_token():
    student, teacher = gkd_pair()
    assert of_views(GKD_LOSS, student, teacher, NONE_VALID, reduction="mean")[0].isnan()
    loss, gradient = of_views(adapter.generalized_jsd_loss, student, teacher, NONE_VALID, reduction="mean")
    assert loss == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_masked_rows_are_not_read(beta):
    student, teacher = gkd_pair()
    expected = of_views(adapter.generalized_jsd_loss, student, teacher, LABELS, beta=beta)
    student[:, :-1][LABELS == -100] = torch.nan
    teacher[:, :-1][LABELS == -100] = torch.inf
    loss, gradient = of_views(GKD_LOSS, student, teacher, LABELS, beta=beta)
    assert loss.isfinite()
    assert gradient.isnan().any()
    loss, gradient = of_views(adapter.generalized_jsd_loss, student, teacher, LABELS, beta=beta)
    assert torch.equal(loss, expected[0])
    assert torch.equal(gradient, expected[1])


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_token_that_both_models_mask(beta):
    student, teacher = gkd_pair()
    student[..., 100] = teacher[..., 100] = -torch.inf
    assert of_views(GKD_LOSS, student, teacher, LABELS, beta=beta)[0].isnan()
    loss, gradient = of_views(adapter.generalized_jsd_loss, student, teacher, LABELS, beta=beta)
    without = student[..., :100].double(), teacher[..., :100].double()
    expected_loss, expected = of_views(GKD_LOSS, *without, LABELS, beta=beta)
    assert_near("loss", loss, expected_loss, 2e-6)
    assert_near("gradient", gradient[..., :100], expected, 2e-6)
    assert (gradient[..., 100] == 0).all()


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_bf16_logits_have_an_fp32_loss(beta):
    student, teacher = gkd_pair(torch.bfloat16, noise=0.1)
    expected_loss, expected = of_views(GKD_LOSS, student.double(), teacher.double(), LABELS, beta=beta)
    loss, gradient = of_views(adapter.generalized_jsd_loss, student, teacher, LABELS, beta=beta)
    assert (loss.dtype, gradient.dtype) == (torch.float32, torch.bfloat16)
    assert_near("loss", loss, expected_loss, 2e-6)
    assert_near("gradient", gradient, expected, 2.5e-3)
    theirs, their_gradient = of_views(GKD_LOSS, student, teacher, LABELS, beta=beta)
    assert theirs.dtype == torch.bfloat16
    assert relative_error(theirs, expected_loss) > 1e-3
    assert relative_error(their_gradient, expected) > 1e-2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduction": "none"}, "^reduction must be 'batchmean', 'sum' or 'mean', got 'none'"),
        ({"labels": LABELS[:, :4]}, r"^labels must have one entry per token, shape \(3, 5\), got \(3, 4\)"),
        ({"beta": 1.5}, "beta"),
        ({"temperature": 0.0}, "^temperature"),
    ],
)
def test_generalized_jsd_loss_refuses(change, message):
    student, teacher = logits_pair(3, 5, 101)
    with pytest.raises(ValueError, match=message):
        adapter.generalized_jsd_loss(student, teacher, **change)


# --- hidden states in


def chunked_operands(dtype=torch.float32, rows=(3, 5), width=203):
    """Student's hidden states, weight and bias; the teacher's."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    student = normal(*rows, 16), normal(width, 16) / 2, normal(width)
    return student, (normal(*rows, 24), normal(width, 24) / 2, normal(width))


MASK = (LABELS != -100).long()
CHUNKED_OPTIONS = (
    {},
    {"temperature": 0.7, "bias": True},
    {"temperature": 2.0, "bias": True, "num_items_in_batch": 7},
    {"num_items_in_batch": torch.tensor(3.5), "student_logit_scale": 0.5, "teacher_logit_scale": 2.0},
    {
        "temperature": 0.7,
        "bias": True,
        "student_final_logit_softcapping": 3.0,
        "teacher_final_logit_softcapping": 5.0,
        "student_logit_scale": 2.0,
    },
)


def chunked(loss_function, student, teacher, mask, beta, **options):
    """Loss, entropy, number of tokens, and the gradients of hidden states, weight and bias."""
    leaves = [tensor.clone().requires_grad_() for tensor in student]
    bias = options.pop("bias", False)
    loss, entropy, valid = loss_function(
        leaves[0],
        teacher[0],
        leaves[1],
        teacher[1],
        mask,
        beta,
        student_lm_head_bias=leaves[2] if bias else None,
        teacher_lm_head_bias=teacher[2] if bias else None,
        **options,
    )
    loss.backward()
    assert loss.requires_grad
    assert not entropy.requires_grad
    assert not valid.is_floating_point()
    gradients = [leaf.grad for leaf in (leaves if bias else leaves[:2])]
    return {
        "loss": loss.detach(),
        "entropy": entropy,
        "valid": valid,
        **dict(zip(("hidden", "weight", "bias"), gradients, strict=False)),
    }


def transformed(hidden, weight, bias, scale, softcap):
    logits = scale * (hidden @ weight.T + (0 if bias is None else bias))
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def from_logits(
    student_hidden,
    teacher_hidden,
    student_weight,
    teacher_weight,
    mask,
    beta,
    num_items_in_batch=None,
    student_lm_head_bias=None,
    teacher_lm_head_bias=None,
    student_logit_scale=1.0,
    teacher_logit_scale=1.0,
    student_final_logit_softcapping=None,
    teacher_final_logit_softcapping=None,
    temperature=1.0,
):
    """The chunked loss by TRL's other one, of both models' logits, in whatever dtype they have: fp64 here."""
    student = transformed(
        student_hidden, student_weight, student_lm_head_bias, student_logit_scale, student_final_logit_softcapping
    )
    teacher = transformed(
        teacher_hidden, teacher_weight, teacher_lm_head_bias, teacher_logit_scale, teacher_final_logit_softcapping
    )
    labels = torch.where(mask != 0, 0, -100)
    loss = GKD_LOSS(student, teacher, labels, beta, temperature, num_items_in_batch=num_items_in_batch)
    log_q = (student.detach() / temperature).log_softmax(-1)
    return loss, -(log_q.exp() * log_q).sum(-1)[mask != 0].sum(), (mask != 0).sum()


def in_double(tensors):
    return tuple(tensor.double() for tensor in tensors)


@EACH_DTYPE
@EACH_BETA
@pytest.mark.parametrize("options", CHUNKED_OPTIONS, ids=lambda options: "-".join(options) or "plain")
def test_chunked_divergence_loss_is_trls(options, beta, dtype):
    student, teacher = chunked_operands(dtype)
    exact = chunked(from_logits, in_double(student), in_double(teacher), MASK, beta, **options)
    theirs = chunked(CHUNKED_LOSS, student, teacher, MASK, beta, **options)
    ours = chunked(adapter.chunked_divergence_loss, student, teacher, MASK, beta, **options)
    capped = "student_final_logit_softcapping" in options  # tanh is rounded before the temperature
    for name, actual in ours.items():
        assert actual.dtype == (torch.int64 if name == "valid" else dtype)
        of_loss, of_gradient = BOUNDS[dtype]
        bound = of_loss if name in ("loss", "entropy") else of_gradient
        assert_near(name, actual, exact[name], bound * (2 if capped and dtype == torch.float32 else 1))
        assert_near(f"{name}, TRL's", actual, theirs[name], OF_CHUNKED)


@EACH_DTYPE
@EACH_TEMPERATURE
@EACH_BETA
def test_per_token_divergence_and_entropy_are_trls(beta, temperature, dtype):
    student, teacher = chunked_operands(dtype, rows=(15,))
    transforms = (beta, temperature, 0.5, 4.0, 2.0, None)
    incoming = torch.randn(15, generator=torch.Generator().manual_seed(1))
    found = []
    for function in (adapter.ChunkedDivergenceFunction, PER_TOKEN):
        leaves = [tensor.clone().requires_grad_() for tensor in student]
        divergence, entropy = function.apply(*leaves, *teacher, *transforms)
        assert not entropy.requires_grad
        divergence.backward(incoming.to(divergence.dtype))
        found.append((divergence.detach(), entropy, *(leaf.grad for leaf in leaves)))
    for what, ours, theirs in zip(("divergence", "entropy", "hidden", "weight", "bias"), *found, strict=True):
        assert ours.dtype == dtype
        assert_near(what, ours, theirs, OF_CHUNKED)


def test_per_token_defaults_and_without_entropy():
    student, teacher = chunked_operands(rows=(15,))
    expected = PER_TOKEN.apply(student[0], student[1], None, teacher[0], teacher[1], None, 0.5)
    divergence, entropy = adapter.ChunkedDivergenceFunction.apply(
        student[0].requires_grad_(), student[1], None, teacher[0], teacher[1], None, 0.5, entropy=False
    )
    assert_near("divergence", divergence, expected[0], OF_CHUNKED)
    assert divergence.requires_grad
    assert entropy.shape == (15,)
    assert entropy.isnan().all()
    assert not entropy.requires_grad


@pytest.mark.parametrize("peak", [1, 3, 8])
def test_entropy_against_fp64(peak):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 32, generator=generator)
    weight = peak * torch.randn(8000, 32, generator=generator) / math.sqrt(32)
    log_q = (hidden.double() @ weight.double().T).log_softmax(-1)
    exact = -(log_q.exp() * log_q).sum(-1)
    if peak == 8:
        assert exact.min() < 0.01  # there, log V - KL cancels
    for function in (adapter.ChunkedDivergenceFunction, PER_TOKEN):
        _, entropy = function.apply(hidden, weight, None, hidden, weight, None, 1.0)
        assert (entropy - exact).abs().max() < 3e-5
        assert_near("sum", entropy.sum(), exact.sum(), 1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_hidden_states(beta, autocast):
    student, teacher = chunked_operands(torch.bfloat16)
    exact = chunked(from_logits, in_double(student), in_double(teacher), MASK, beta, bias=True)
    if autocast:  # fp32 parameters, which hold the same numbers
        student, teacher = (x[:1] + tuple(p.float() for p in x[1:]) for x in (student, teacher))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        theirs = chunked(CHUNKED_LOSS, student, teacher, MASK, beta, bias=True)
        ours = chunked(adapter.chunked_divergence_loss, student, teacher, MASK, beta, bias=True)
    for name, actual in ours.items():
        assert actual.dtype == theirs[name].dtype, name
        bound = 2e-6 if name in ("loss", "entropy", "valid") else 5e-3
        assert_near(name, actual, exact[name], bound)
        assert_near(f"{name}, TRL's", actual, theirs[name], 2 * bound)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_weights_of_another_dtype_without_autocast(dtypes):
    (hidden, *parameters), (teacher_hidden, *teacher_parameters) = chunked_operands(torch.bfloat16)
    student = (hidden.to(dtypes[0]), *(p.to(dtypes[1]) for p in parameters))
    teacher = (teacher_hidden.to(dtypes[0]), *(p.to(dtypes[1]) for p in teacher_parameters))
    theirs = chunked(CHUNKED_LOSS, student, teacher, MASK, 0.5, bias=True)
    ours = chunked(adapter.chunked_divergence_loss, student, teacher, MASK, 0.5, bias=True)
    for name, actual in ours.items():
        assert actual.dtype == theirs[name].dtype, name
        assert_near(name, actual, theirs[name], OF_CHUNKED if name in ("loss", "entropy", "valid") else 1e-2)


def test_masked_tokens_may_hold_anything_finite():
    student, teacher = chunked_operands()
    expected = chunked(adapter.chunked_divergence_loss, student, teacher, MASK, 0.5, bias=True)
    for other, options in ((1e4, {}), (torch.nan, {"compact": True})):
        student[0][MASK == 0] = other
        teacher[0][MASK == 0] = other
        actual = chunked(adapter.chunked_divergence_loss, student, teacher, MASK, 0.5, bias=True, **options)
        for name, value in expected.items():
            assert_near(name, actual[name], value, 1e-6)
        assert (actual["hidden"][MASK == 0] == 0).all()


@pytest.mark.parametrize("num_items_in_batch", [None, 4])
@pytest.mark.parametrize("compact", [False, True])
def test_no_token_counts(num_items_in_batch, compact):
    student, teacher = chunked_operands()
    found = chunked(
        adapter.chunked_divergence_loss,
        student,
        teacher,
        torch.zeros_like(MASK),
        0.5,
        bias=True,
        num_items_in_batch=num_items_in_batch,
        compact=compact,
    )
    for name, value in found.items():
        assert (value == 0).all(), name


def test_without_entropy_all_else_is_the_same():
    student, teacher = chunked_operands()
    expected = chunked(adapter.chunked_divergence_loss, student, teacher, MASK, 0.5)
    found = chunked(adapter.chunked_divergence_loss, student, teacher, MASK, 0.5, entropy=False)
    assert found.pop("entropy").isnan()
    for name, value in found.items():
        assert torch.equal(value, expected[name])


def test_without_gradients():
    student, teacher = chunked_operands()
    expected = chunked(adapter.chunked_divergence_loss, student, teacher, MASK, 0.5)
    with torch.no_grad():
        found = adapter.chunked_divergence_loss(student[0], teacher[0], student[1], teacher[1], MASK, 0.5)
    for actual, name in zip(found, ("loss", "entropy", "valid"), strict=True):
        assert_near(name, actual, expected[name], 1e-6)


def test_a_teacher_of_more_tokens():
    student, teacher = chunked_operands()
    wider = torch.cat([teacher[1], torch.full((5, 24), 7.0)])
    expected = CHUNKED_LOSS(student[0], teacher[0], student[1], wider, MASK, 0.5)
    actual = adapter.chunked_divergence_loss(student[0], teacher[0], student[1], wider, MASK, 0.5)
    assert_near("loss", actual[0], expected[0], OF_CHUNKED)
    with pytest.raises(ValueError, match="vocab_size"):
        adapter.chunked_divergence_loss(student[0], teacher[0], student[1], teacher[1][:100], MASK, 0.5)


@pytest.fixture
def mesh():
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch.distributed with gloo is not available")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_dtensor_weights_are_gathered(mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    student, teacher = chunked_operands()
    expected = chunked(adapter.chunked_divergence_loss, student, teacher, MASK, 0.5, bias=True)
    sharded = [
        (hidden, *(distribute_tensor(parameter, mesh, [Shard(0)]) for parameter in parameters))
        for hidden, *parameters in (student, teacher)
    ]
    for loss_function in (CHUNKED_LOSS, adapter.chunked_divergence_loss):
        found = chunked(loss_function, *sharded, MASK, 0.5, bias=True)
        for name, value in found.items():
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value
            assert_near(name, whole, expected[name], OF_CHUNKED)


def test_partitioned_parameters_are_gathered(monkeypatch):
    # As DeepSpeed ZeRO-3 partitions them: empty but where gathered, gradients made from whole ones.
    student, teacher = chunked_operands()
    expected = chunked(adapter.chunked_divergence_loss, student, teacher, MASK, 0.5)
    arrived = []

    def partitioned(tensor):
        parameter = torch.nn.Parameter(tensor.clone())
        node = parameter.expand_as(parameter).grad_fn.next_functions[0][0]
        parameter.ds_id, parameter.node, parameter.whole = 0, node, parameter.data

        def gather(gradients):
            arrived.extend(gradient.clone() for gradient in gradients if gradient is not None)
            parameter.data = parameter.whole

        node.register_prehook(gather)
        parameter.data = torch.empty(0)
        return parameter

    @contextlib.contextmanager
    def gathered(*parameters):
        given = [parameter for parameter in parameters if parameter is not None]
        for parameter in given:
            parameter.data = parameter.whole
        yield
        for parameter in given:
            parameter.data = torch.empty(0)

    for module in (import_quietly("trl.trainer.utils"), kernels):
        monkeypatch.setattr(module, "maybe_gather_lm_head_ctx", gathered)
    for loss_function in (CHUNKED_LOSS, adapter.chunked_divergence_loss):
        weight, teacher_weight = partitioned(student[1]), partitioned(teacher[1])
        loss, entropy, _ = loss_function(student[0], teacher[0], weight, teacher_weight, MASK, 0.5)
        loss.backward()
        assert_near("loss", loss, expected["loss"], OF_CHUNKED)
        assert_near("entropy", entropy, expected["entropy"], OF_CHUNKED)
        assert_near("gradient", arrived.pop(), expected["weight"], OF_CHUNKED)
    assert not arrived
    with pytest.raises(ValueError, match="student_weight"):
        adapter.ChunkedDivergenceFunction.apply(
            student[0], partitioned(student[1]), None, teacher[0], teacher[1], None, 0.5
        )


# --- patch_trl


def parameters_of(function, skip=()):
    given = inspect.signature(function).parameters.values()
    return [(one.name, one.kind, one.default) for one in given if one.name not in skip]


def test_signatures_are_trls():
    assert parameters_of(adapter.generalized_jsd_loss) == parameters_of(GKD_LOSS)
    ours = ("entropy", "compact")
    assert parameters_of(adapter.chunked_divergence_loss, ours) == parameters_of(CHUNKED_LOSS)
    assert parameters_of(adapter.ChunkedDivergenceFunction.apply, ours) == parameters_of(PER_TOKEN.forward, ("ctx",))
    for function in (adapter.chunked_divergence_loss, adapter.ChunkedDivergenceFunction.apply):
        added = [one for one in inspect.signature(function).parameters.values() if one.name in ours]
        assert all(one.kind == one.KEYWORD_ONLY for one in added)


def places():
    """All that patch_trl replaces, as it is now."""
    return [
        distillation_trainer._chunked_divergence_loss,
        distillation_trainer.ChunkedDivergenceFunction,
        kernels.ChunkedDivergenceFunction,
        vars(gkd_trainer.GKDTrainer)["generalized_jsd_loss"],
        vars(gold_trainer.GOLDTrainer)["generalized_jsd_loss"],
        vars(iw_opd_trainer.IWOPDTrainer)["generalized_jsd_loss"],
    ]


ORIGINALS = places()


def replaced():
    return [now is not before for now, before in zip(places(), ORIGINALS, strict=True)]


@pytest.fixture(autouse=True)
def _unpatched():
    yield
    adapter.unpatch_trl()
    assert not any(replaced())


def test_patch_and_unpatch():
    adapter.unpatch_trl()
    assert not any(replaced())
    adapter.patch_trl()
    assert all(replaced())
    assert gkd.GKDTrainer.generalized_jsd_loss is adapter.generalized_jsd_loss
    adapter.patch_trl()
    assert all(replaced())
    adapter.unpatch_trl()
    assert not any(replaced())


def test_patched_for_the_length_of_a_with():
    with contextlib.suppress(KeyError), adapter.patched_trl():
        assert all(replaced())
        raise KeyError
    assert not any(replaced())


def test_options_of_patch_trl():
    student, teacher = chunked_operands()
    expected = CHUNKED_LOSS(student[0], teacher[0], student[1], teacher[1], MASK, 0.5)
    per_token = student[0].flatten(0, 1), student[1], None, teacher[0].flatten(0, 1), teacher[1], None, 0.5
    for options in ({}, {"entropy": False}, {"compact": True}):
        adapter.patch_trl(**options)
        # As the trainer calls it.
        found = distillation_trainer._chunked_divergence_loss(
            student[0], teacher[0], student[1], teacher[1], MASK, 0.5, num_items_in_batch=None, temperature=1.0
        )
        assert_near("loss", found[0], expected[0], OF_CHUNKED)
        assert found[1].isnan() == ("entropy" in options)
        assert kernels.ChunkedDivergenceFunction.apply(*per_token)[1].isnan().all() == ("entropy" in options)
    student[0][MASK == 0] = torch.nan
    found = distillation_trainer._chunked_divergence_loss(student[0], teacher[0], student[1], teacher[1], MASK, 0.5)
    assert_near("loss, compact", found[0], expected[0], OF_CHUNKED)


@pytest.mark.parametrize(
    ("trainer", "same", "other"),
    [
        (gold_trainer.GOLDTrainer, {"logits_are_probs": False}, {"logits_are_probs": True}),
        (iw_opd_trainer.IWOPDTrainer, {"add_tail": False}, {"top_k": 4}),
        (iw_opd_trainer.IWOPDTrainer, {"top_k": 0}, {"top_k": 1, "add_tail": False}),
    ],
    ids=["gold", "iw_opd", "iw_opd top_k"],
)
def test_trainers_with_arguments_of_their_own(trainer, same, other):
    theirs = trainer.generalized_jsd_loss
    signature = inspect.signature(theirs)
    student, teacher = logits_pair(3, 5, 101)
    options = {"beta": 0.9, "temperature": 2.0, "num_items_in_batch": torch.tensor(7)}
    others = (student.softmax(-1), teacher.softmax(-1)) if "logits_are_probs" in other else (student, teacher)
    expected = theirs(student, teacher, LABELS, **same, **options)
    expected_other = theirs(*others, LABELS, **other, **options)
    with adapter.patched_trl():
        ours = trainer.generalized_jsd_loss
        assert inspect.signature(ours) == signature
        assert_near("loss", ours(student, teacher, LABELS, **same, **options), expected, OF_CHUNKED)
        assert torch.equal(ours(*others, LABELS, **other, **options), expected_other)
        assert relative_error(expected_other, expected) > 1e-2
        with pytest.raises(ValueError, match="reduction"):
            ours(student, teacher, reduction="none", **same)
        assert ours(*others, reduction="none", **other).dim() == 3


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (distillation_trainer, "_chunked_divergence_loss"),
        (distillation_trainer, "ChunkedDivergenceFunction"),
        (kernels, "ChunkedDivergenceFunction"),
        (gkd_trainer, "GKDTrainer"),
        (gkd_trainer.GKDTrainer, "generalized_jsd_loss"),
        (gold_trainer.GOLDTrainer, "generalized_jsd_loss"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_version_that_lacks_one(monkeypatch, owner, name):
    with monkeypatch.context() as context:
        context.delattr(owner, name)
        with pytest.raises(RuntimeError, match=rf"^trl {trl.__version__} has no trl\..*{name}.* is for trl 1\.16"):
            adapter.patch_trl()
    assert not any(replaced())


def test_a_version_with_other_arguments(monkeypatch):
    def other(student_logits, teacher_logits, labels=None, beta=0.1):
        raise AssertionError

    with monkeypatch.context() as context:
        context.setattr(gkd_trainer.GKDTrainer, "generalized_jsd_loss", staticmethod(other))
        with pytest.raises(RuntimeError, match=r"has the arguments \(student_logits, .*beta=0\.1\)\. .* trl 1\.16"):
            adapter.patch_trl()
    assert not any(replaced())


def test_trainers_that_cannot_be_imported_are_left_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl.experimental.gold.gold_trainer", None)
    adapter.patch_trl()
    assert replaced() == [True, True, True, True, False, True]


# --- TRL's own trainers

VOCABULARY = {"<pad>": 0, "</s>": 1, "<unk>": 2, "user": 3, "assistant": 4} | {f"w{i}": i for i in range(5, 200)}


def make_tokenizer():
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(VOCABULARY, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        chat_template="{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}",
    )


def make_model(seed, hidden_size):
    config = transformers.LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=hidden_size,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(config)


def make_text(chooser, shortest, longest):
    return " ".join(f"w{chooser.randrange(5, 200)}" for _ in range(chooser.randint(shortest, longest)))


def train(trainer_class, config_class, examples, folder, **options):
    """What a short training on the CPU logs, and by how much it moves each parameter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the frameworks' own
        student = make_model(0, 16)
        before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
        settings = {
            "output_dir": str(folder),
            "max_steps": 3,
            "per_device_train_batch_size": 2,
            "optim": "sgd",  # moves parameters by their gradients, where Adam would by little more than their signs
            "learning_rate": 0.5,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
        }
        trainer = trainer_class(
            model=student,
            teacher_model=make_model(1, 24),
            args=config_class(**settings | options),
            train_dataset=datasets.Dataset.from_list(examples),
            processing_class=make_tokenizer(),
        )
        trainer.train()
        evaluated = trainer.evaluate(trainer.train_dataset)
    moved = {name: (parameter.detach() - before[name]) for name, parameter in student.named_parameters()}
    return [line for line in trainer.state.log_history if "loss" in line], moved, evaluated


def conversations():
    chooser = random.Random(0)
    return [
        {
            "messages": [
                {"role": "user", "content": make_text(chooser, 2, 6)},
                {"role": "assistant", "content": make_text(chooser, 3, 9)},
            ]
        }
        for _ in range(12)
    ]


def prompts():
    chooser = random.Random(0)
    return [{"prompt": make_text(chooser, 2, 6)} for _ in range(12)]


def counted(monkeypatch, name):
    calls = []
    call = getattr(adapter.kd, name)
    monkeypatch.setattr(adapter.kd, name, lambda *args, **kwargs: calls.append(kwargs) or call(*args, **kwargs))
    return calls


def assert_same_training(theirs, ours):
    their_log, their_moves, their_evaluation = theirs
    our_log, our_moves, our_evaluation = ours
    assert len(our_log) == len(their_log) == 3
    for before, after in zip([*their_log, their_evaluation], [*our_log, our_evaluation], strict=True):
        assert before.keys() == after.keys()
        for name in ("loss", "grad_norm", "entropy", "num_tokens", "eval_loss", "eval_entropy"):
            if name in before:
                assert after[name] == pytest.approx(before[name], rel=1e-5), name
    for name, moved in our_moves.items():
        assert moved.norm() > 0, name
        assert_near(name, moved, their_moves[name], 2e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 0.0, "gradient_accumulation_steps": 2},
        {"beta": 0.9, "gradient_accumulation_steps": 2, "gradient_checkpointing": True},
        {"beta": 1.0, "lmbda": 1.0, "max_new_tokens": 5},  # on policy
        {"bf16": True},
    ],
    ids=["plain", "accumulated", "accumulated, checkpointed", "on policy", "bf16"],
)
def test_gkd_trainer(tmp_path, monkeypatch, options):
    options = {"lmbda": 0.0, **options}
    theirs = train(gkd.GKDTrainer, gkd.GKDConfig, conversations(), tmp_path, **options)
    calls = counted(monkeypatch, "distillation_loss")
    with adapter.patched_trl():
        ours = train(gkd.GKDTrainer, gkd.GKDConfig, conversations(), tmp_path, **options)
    assert len(calls) >= 3 * options.get("gradient_accumulation_steps", 1)
    assert_same_training(theirs, ours)


@pytest.mark.parametrize(
    "options",
    [{}, {"beta": 0.5, "gradient_accumulation_steps": 2, "temperature": 0.8}],
    ids=["plain", "accumulated"],
)
def test_distillation_trainer(tmp_path, monkeypatch, options):
    # On policy: the completions are drawn anew, from the seed of the settings.
    options = {"max_completion_length": 6, **options}
    given = (trl.DistillationTrainer, trl.DistillationConfig, prompts(), tmp_path)
    theirs = train(*given, **options)
    calls = counted(monkeypatch, "linear_distillation_loss")
    with adapter.patched_trl():
        ours = train(*given, **options)
    assert len(calls) >= 2 * 3 * options.get("gradient_accumulation_steps", 1)  # the loss, and the entropy
    assert_same_training(theirs, ours)
    assert all(line["entropy"] > 1 for line in ours[0])


def test_distillation_trainer_without_entropy(tmp_path):
    given = (trl.DistillationTrainer, trl.DistillationConfig, prompts(), tmp_path)
    theirs = train(*given, max_completion_length=6)
    with adapter.patched_trl(entropy=False, compact=True):
        ours = train(*given, max_completion_length=6)
    for line in (*theirs[0], *ours[0], theirs[2], ours[2]):
        entropy = line.pop("entropy" if "entropy" in line else "eval_entropy")
        assert (entropy is None) == (line in ours[0] or line is ours[2])
    assert_same_training(theirs, ours)
