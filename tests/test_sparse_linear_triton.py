"""Products with gathered rows, and a renormalised sparse teacher's loss of them, under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from checks import assert_near
from interpreter import interpreted
from linear_cases import BOUNDS, NAMES, against_reference, losses, operands
from sparse_cases import ragged, repeated, top_k
from torch import Tensor

import kdkernels as kd
from kdkernels import _arguments
from kdkernels import _gathered_products as products
from kdkernels.backends import triton

CPU = torch.device("cpu")
pytestmark = [
    pytest.mark.skipif(triton.why_not(CPU) is not None, reason=str(triton.why_not(CPU))),
    pytest.mark.usefixtures("one_thread"),
]
PART = 4  # entries of a token that one program adds up


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    monkeypatch.setattr(products, "PART", PART)
    with interpreted(monkeypatch):
        yield


def places_of(rows: int, ids: int, vocabulary: int, missing: float = 0.2, seed: int = 0) -> Tensor:
    """Distinct ids a row (rows, ids) int32, a part of them -1, and one row of nothing else."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(rows, max(ids, vocabulary), generator=generator).argsort(-1)[:, :ids]
    gone = (order >= vocabulary) | (torch.rand(rows, ids, generator=generator) < missing)
    gone[rows // 2] = True
    return order.masked_fill(gone, -1).to(torch.int32)


# rows, ids, vocabulary, hidden, dtype. Parts of a token's entries: a vocabulary of 1 has one token of many, which
# begins where a window does; of 3, tokens that end and begin in one; of 50, none but short ones.
SHAPES = {
    "many tokens": (7, 8, 50, 40, torch.bfloat16),
    "one token": (18, 8, 1, 16, torch.float32),
    "three tokens": (19, 8, 3, 33, torch.bfloat16),
    "hidden states of one": (9, 16, 6, 1, torch.float32),
    "hidden states of nothing": (3, 8, 9, 0, torch.bfloat16),
    "one row": (1, 8, 20, 70, torch.float32),
}


@pytest.mark.parametrize(("rows", "ids", "vocabulary", "hidden", "dtype"), SHAPES.values(), ids=SHAPES)
def test_products(rows, ids, vocabulary, hidden, dtype, monkeypatch):
    monkeypatch.setattr(products, "LOGITS_TILE", (4, 16))
    monkeypatch.setattr(products, "SUM_TILE", (2, 32))
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(n, hidden, generator=generator).to(dtype) for n in (rows, vocabulary))
    bias, gradient = torch.randn(vocabulary, generator=generator), torch.randn(rows, ids, generator=generator)
    places = places_of(rows, ids, vocabulary)
    gradient[places < 0] = 0
    selected = torch.zeros(rows, vocabulary + 1).scatter_(1, places.long() % (vocabulary + 1), gradient)[:, :-1]
    exact, exact_weight = x.double(), weight.double()
    logits = (1.5 * (exact @ exact_weight.T + bias)).gather(1, places.clamp(min=0).long())
    for fused in (False, True):
        z = torch.empty(rows, ids)
        products.logits(x, weight, bias, 1.5, places, z, fused=fused)
        assert (z[places < 0] == -torch.inf).all()
        assert_near("logits", z.masked_fill(places < 0, 0), logits.masked_fill(places < 0, 0), 1e-6)
        of_hidden = torch.full((rows, hidden), torch.nan)
        products.of_hidden(gradient, places, weight, of_hidden, fused=fused)
        assert_near("of hidden", of_hidden, selected.double() @ exact_weight, 1e-6)
        entries = products.segments(places, gradient, vocabulary)
        of_weight = torch.full((vocabulary, hidden), torch.nan)
        products.of_weight(entries, x, of_weight, add=False, fused=fused)
        expected = selected.double().T @ exact
        assert_near("of weight", of_weight, expected, 1e-6)
        products.of_weight(entries, x, of_weight, add=True, fused=fused)
        assert_near("of weight twice", of_weight, 2 * expected, 1e-6)
        once = torch.full((vocabulary, hidden), torch.nan, dtype=dtype)
        products.of_weight(entries, x, once, add=False, fused=fused)
        assert_near("of weight in its dtype", once, expected, 3e-3 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("rows", [PART - 1, PART, PART + 1])
def test_about_as_many_entries_as_a_program_adds_up(rows):
    places, gradient = torch.arange(8, dtype=torch.int32).expand(rows, 8).contiguous(), torch.ones(rows, 8)
    entries = products.segments(places.masked_fill(places > 2, -1), gradient, 4)
    of_weight = torch.full((4, 5), torch.nan)
    products.of_weight(entries, torch.ones(rows, 5), of_weight, add=False, fused=True)
    assert torch.equal(of_weight, torch.tensor([[rows], [rows], [rows], [0.0]]).expand(4, 5))


def test_products_of_strided_operands():
    x, weight = torch.randn(40, 5).T, torch.randn(40, 9).T
    places, gradient = places_of(5, 8, 9), torch.ones(5, 8)
    found = {}
    for fused in (False, True):
        z, of_hidden, of_weight = torch.empty(5, 8), torch.empty(5, 40), torch.empty(9, 40)
        products.logits(x, weight, None, 1.0, places, z, fused=fused)
        products.of_hidden(gradient.masked_fill(places < 0, 0), places, weight, of_hidden, fused=fused)
        products.of_weight(products.segments(places, gradient, 9), x, of_weight, add=False, fused=fused)
        found[fused] = z.nan_to_num(neginf=0), of_hidden, of_weight
    for ours, theirs in zip(found[True], found[False], strict=True):
        assert_near("product", ours, theirs, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_loss(dtype, reduction):
    rows, width = 6, 14
    given = operands(rows, width=width, dtype=dtype, bias=True)
    logits = 3 * torch.randn(rows, width, generator=torch.Generator().manual_seed(9))
    given = given._replace(teacher=repeated(ragged(top_k(logits, 5, "renormalize"))))
    labels = torch.where(torch.arange(rows) == 3, -100, 0)
    given.hidden[3] = torch.nan  # not read
    options = {"reduction": reduction, "temperature": 1.5}
    exact = given._replace(hidden=given.hidden.nan_to_num())
    for workspace_bytes in (4 * 16 * 64, None) if dtype == torch.float32 else (None,):
        loss, gradients = losses(given.leaves(), labels, workspace_bytes=workspace_bytes, **options)
        with kd.backends.use("native"):
            expected, theirs = losses(exact.leaves(), labels, **options)
        assert_near("loss", loss, expected, BOUNDS[dtype][0])
        for name in NAMES:
            assert_near(name, gradients[name], theirs[name], 4e-6 if dtype == torch.float32 else 3e-3)
    if dtype == torch.float32:
        against_reference(exact, labels, **options)


@pytest.mark.parametrize("divergence", [kd.ReverseKL(), kd.JensenShannon(0.1)], ids=str)
def test_other_divergences_and_transforms(divergence):
    given = operands(5, width=13, bias=True)
    logits = 3 * torch.randn(5, 13, generator=torch.Generator().manual_seed(9))
    given = given._replace(teacher=ragged(top_k(logits, 4, "renormalize"))._replace(teacher_temperature=2.0))
    options = {"student_softcap": 5.0, "student_logit_scale": 0.5, "temperature": torch.rand(5) + 0.5, "slack": 4}
    against_reference(given, divergence=divergence, compact=True, **options)


def test_ids_out_of_range_are_not_read(monkeypatch):
    monkeypatch.setattr(_arguments, "out_of_range", lambda *_: torch.zeros((), dtype=torch.bool))
    given = operands(3, width=7)
    ids = torch.tensor([[1, 2], [3, 2**40], [-5, 6]])
    given = given._replace(teacher=kd.TopKTeacher(ids, torch.full((3, 2), -1.0), "renormalize"))
    loss, gradients = losses(given.leaves(), reduction="none")
    assert loss.isnan().tolist() == [False, True, False]
    assert gradients["hidden"].isnan().all(-1).tolist() == [False, True, False]
