"""The loss from hidden states with Triton's row sweeps, under Triton's interpreter (see conftest.py)."""

import pytest
import torch
from checks import assert_near
from decoupled_cases import mask_of
from interpreter import interpreted
from linear_cases import NAMES, OF_16_BIT_LOGITS_GRADIENT, Operands, against_reference, losses, operands

import kdkernels as kd
from kdkernels.backends import triton

CPU = torch.device("cpu")
pytestmark = [
    pytest.mark.skipif(triton.why_not(CPU) is not None, reason=str(triton.why_not(CPU))),
    pytest.mark.usefixtures("one_thread"),
]

ROWS, WIDTH = 4, 601
LABELS = torch.tensor([3, -100, 600, 7])
TWO_ROWS = 2 * WIDTH * 12  # bytes of workspace


def check(given: Operands, labels: torch.Tensor | None = None, **options) -> None:
    """As on a GPU: of 16-bit operands, the gradient of the logits is rounded to their dtype."""
    bound = OF_16_BIT_LOGITS_GRADIENT if given.hidden.dtype.itemsize == 2 else None
    against_reference(given, labels, bound=bound, **options)


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    with interpreted(monkeypatch):
        yield


@pytest.mark.parametrize(
    ("divergence", "dtype"),
    [
        (kd.ForwardKL(), torch.bfloat16),
        (kd.JensenShannon(), torch.float32),
        (kd.Decoupled(kd.TopK(5)), torch.bfloat16),
        (kd.DKD(), torch.float32),
        (kd.AdaptiveKL(), torch.float16),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_divergences(divergence, dtype):
    given = operands(ROWS, width=WIDTH, dtype=dtype, bias=True)
    labels = LABELS.clamp(min=0)
    check(given, labels, divergence=divergence, temperature=2.0, workspace_bytes=TWO_ROWS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("teacher_logits", [False, True])
def test_labels_and_reductions(dtype, reduction, teacher_logits):
    given = operands(ROWS, width=WIDTH, dtype=dtype, teacher_logits=teacher_logits)
    weight = torch.tensor([1.0, 2.0, 0.5, 0.0])
    options = {"ce_weight": 0.5, "weight": weight, "reduction": reduction}
    check(given, LABELS, workspace_bytes=TWO_ROWS, **options)
    check(given, LABELS, compact=True, **options)


def test_options_per_row():
    given = operands(2, 2, width=WIDTH + 7, teacher_width=WIDTH, bias=True)
    masks = torch.stack([mask_of(WIDTH, seed) for seed in range(4)]).view(2, 2, WIDTH)
    temperature = torch.tensor([[1.0, 2.0], [0.7, 3.0]])
    options = {"temperature": temperature, "vocab_size": WIDTH, "workspace_bytes": TWO_ROWS}
    check(given, divergence=kd.Decoupled(kd.Given(masks), scd=torch.tensor(2.0)), **options)
    check(given, LABELS.view(2, 2), student_softcap=5.0, teacher_logit_scale=0.5, slack=4, **options)


def test_it_agrees_with_the_c_kernels():
    given = operands(ROWS, width=WIDTH)
    loss, gradients = losses(given.leaves(), LABELS)
    with kd.backends.use("native"):
        expected, theirs = losses(given.leaves(), LABELS)
    assert_near("loss", loss, expected, 1e-6)
    for name in NAMES[:2]:
        assert_near(name, gradients[name], theirs[name], 2e-6)


def test_float64_is_refused():
    with pytest.raises(RuntimeError, match=r"fp32.*float64"):
        losses(operands(2, width=10, dtype=torch.float64))
