"""The comparison that the tests of the loss from hidden states make can fail."""

import pytest
import torch
from checks import assert_near, cosine
from linear_cases import OF_16_BIT_LOGITS_GRADIENT, against_reference, assert_gradients, losses, operands

import kdkernels as kd

ROWS = 12


def exact(**options):
    return losses(operands(ROWS, bias=True).to(torch.float64).leaves(), reference=True, **options)[1]


def gradients_of_part(rows: slice) -> dict[str, torch.Tensor | None]:
    """Of the sum over these rows alone: what is left where other groups' weight gradients are overwritten."""
    given = operands(ROWS, bias=True).to(torch.float64)
    part = given._replace(hidden=given.hidden[rows], teacher=given.teacher._replace(hidden=given.teacher.hidden[rows]))
    return losses(part.leaves(), reference=True, reduction="sum")[1]


@pytest.mark.parametrize("name", ["hidden", "weight", "bias"])
@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda g: torch.zeros_like(g), id="zero"),
        pytest.param(lambda g: 2 * g, id="off by T"),
        pytest.param(lambda g: g / 4, id="off by T squared"),
        pytest.param(lambda g: -g, id="sign"),
        pytest.param(lambda g: g * torch.nan, id="nan"),
        pytest.param(lambda g: None, id="missing"),
        pytest.param(lambda g: torch.cat([g[:-1], 0 * g[-1:]]), id="last row missing"),
        pytest.param(lambda g: g.roll(1, 0), id="rows off by one"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_wrong_gradient_fails(name, wrong, dtype):
    expected = exact(temperature=2.0)
    right = {key: gradient.to(dtype) for key, gradient in expected.items()}
    assert_gradients(right, expected)
    # The widest bound there is: that of 16-bit gradients on a GPU.
    for bound in (None, OF_16_BIT_LOGITS_GRADIENT):
        assert_gradients(right, expected, bound=bound)
        with pytest.raises(AssertionError):
            assert_gradients({**right, name: wrong(right[name])}, expected, bound=bound)


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize(
    "rows", [slice(None, 8), slice(8, None), slice(None, 11)], ids=["first", "last", "but one row"]
)
def test_a_missing_group_fails(name, rows):
    expected = exact(reduction="sum")
    parts = [gradients_of_part(slice(None, 8)), gradients_of_part(slice(8, None))]
    whole = {key: None if key == "hidden" else parts[0][key] + parts[1][key] for key in expected}
    assert_gradients({**whole, "hidden": expected["hidden"]}, expected)
    one = {**whole, "hidden": expected["hidden"], name: gradients_of_part(rows)[name]}
    for bound in (None, OF_16_BIT_LOGITS_GRADIENT):
        with pytest.raises(AssertionError, match=f"gradient of {name}"):
            assert_gradients(one, expected, bound=bound)


def test_a_gradient_where_none_was_asked_for_fails():
    expected = exact()
    with pytest.raises(AssertionError, match="gradient of bias"):
        assert_gradients(expected, {**expected, "bias": None})


def test_rounding_twice_fails_and_the_dtype_counts():
    expected = exact()
    twice = {name: (3 * (gradient / 3).bfloat16()).bfloat16() for name, gradient in expected.items()}
    with pytest.raises(AssertionError, match="beyond rounding"):
        assert_gradients(twice, expected)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        pytest.param(lambda loss: 1.00001 * loss, "loss: relative error", id="factor"),
        pytest.param(lambda loss: loss + 1e-4, "loss: relative error", id="term"),
        pytest.param(lambda loss: loss.double(), "loss is torch.float64", id="dtype"),
    ],
)
def test_a_wrong_loss_fails(monkeypatch, wrong, message):
    right = kd.reference.linear_distillation_loss
    monkeypatch.setattr(kd, "linear_distillation_loss", lambda *x, **options: right(*x, **options))
    against_reference(operands(ROWS))
    monkeypatch.setattr(kd, "linear_distillation_loss", lambda *x, **options: wrong(right(*x, **options)))
    with pytest.raises(AssertionError, match=message):
        against_reference(operands(ROWS))


def test_the_cases_tell_directions_apart():
    # A gradient of nearly the right norm in another direction is no near miss.
    expected = exact()
    for name, gradient in expected.items():
        other = gradient.roll(1, 0)
        assert abs(cosine(other, gradient)) < 0.9, name
        with pytest.raises(AssertionError):
            assert_near(name, other, gradient, 0.1)
