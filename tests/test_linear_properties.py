"""The loss from hidden states against the reference, on many small calls of any kind."""

import os

import pytest
import torch
from checks import DIVERGENCES, assert_near
from decoupled_cases import FAMILY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from linear_cases import NAMES, against_reference, losses, operands

pytestmark = pytest.mark.usefixtures("one_thread")

CALLS = settings(
    max_examples=int(os.environ.get("KDKERNELS_EXAMPLES", "60")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
# Of a bounded divergence the gradient may vanish, and of an unbounded one everything else beside one token.
WHICH = [name for name in (*DIVERGENCES, *FAMILY) if name != "alpha_beta_c0"]


@st.composite
def calls(draw):
    rows, width = draw(st.integers(1, 12)), draw(st.integers(2, 70))
    seed = draw(st.integers(0, 2**31))
    made = operands(
        rows,
        width=width,
        hidden=draw(st.integers(1, 20)),
        teacher_width=width + draw(st.integers(0, 5)),
        teacher_hidden=draw(st.integers(1, 20)),
        bias=draw(st.booleans()),
        teacher_bias=draw(st.booleans()),
        teacher_logits=draw(st.booleans()),
        spread=draw(st.sampled_from([0.1, 1.0, 4.0])),
        seed=seed,
    )
    generator = torch.Generator().manual_seed(seed)
    vocab_size = draw(st.integers(1, width))
    name = draw(st.sampled_from(WHICH))
    which = DIVERGENCES.get(name) or FAMILY[name](vocab_size)
    labels = torch.randint(0, vocab_size, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = -100
    options = {
        "divergence": which,
        "temperature": draw(st.sampled_from([0.5, 1.0, 3.0])),
        "kd_weight": draw(st.floats(0.1, 2.0)),
        "ce_weight": draw(st.sampled_from([0.0, 0.5])),
        "scale_by_temperature": draw(st.booleans()),
        "weight": torch.rand(rows, generator=generator) if draw(st.booleans()) else None,
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "vocab_size": vocab_size,
        "student_softcap": draw(st.sampled_from([None, 30.0])),
        "teacher_logit_scale": draw(st.sampled_from([1.0, 0.7])),
        "compact": draw(st.booleans()),
        "workspace_bytes": draw(st.one_of(st.none(), st.integers(1, 12 * width * 12))),
    }
    required = tuple(draw(st.sets(st.sampled_from(NAMES))))
    return made, labels, required, options


@CALLS
@given(calls(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_any_call_agrees_with_the_reference(call, dtype):
    made, labels, required, options = call
    against_reference(made.to(dtype), labels, required=required, floor=1e-2, slack=4, **options)


@CALLS
@given(calls(), st.integers(1, 5000))
def test_neither_chunks_nor_compaction_matter(call, workspace_bytes):
    made, labels, required, options = call
    loss, gradients = losses(made.leaves(required), labels, **options)
    other = {**options, "workspace_bytes": workspace_bytes, "compact": not options["compact"]}
    same, others = losses(made.leaves(required), labels, **other)
    assert_near("loss", same, loss, 4e-6, floor=1e-2)
    for name in NAMES:
        if gradients[name] is not None:
            assert_near(name, others[name], gradients[name], 4e-6, floor=1e-2)
