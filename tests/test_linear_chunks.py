"""How rows are cut into groups and chunks: every row once, buffers within their bound, nothing written over."""

import os

from hypothesis import given, settings
from hypothesis import strategies as st

from kdkernels import _chunks
from kdkernels._chunks import CPU, GPU, Plan, RowBytes

PLANS = settings(max_examples=int(os.environ.get("KDKERNELS_EXAMPLES", "60")), deadline=None)
MACHINES = st.sampled_from([CPU, GPU])


@st.composite
def rows_of_bytes(draw):
    columns = 64 * draw(st.integers(1, 5000))
    logits, gradient = draw(st.sampled_from([(4, 4), (4, 2), (2, 2), (8, 8), (4, 0), (2, 0)]))
    over_logits = gradient == logits and draw(st.booleans())
    return RowBytes(
        student=0 if over_logits else columns * logits,
        teacher=0 if draw(st.booleans()) else columns * logits,
        gradient=columns * gradient,
    )


def check(plan: Plan, row: RowBytes, rows: int) -> None:
    """Walks through the groups as the sweep does."""
    seen = 0
    while seen < rows:
        group = min(plan.group, rows - seen)
        done = 0
        for chunk in plan.of(group):
            assert chunk.start == done
            n = chunk.stop - chunk.start
            assert n > 0
            scratch, tail = 0, plan.gradient_bytes
            for size, there in ((row.student, chunk.student_in_scratch), (row.teacher, chunk.teacher_in_scratch)):
                scratch, tail = (scratch + n * size, tail) if there else (scratch, tail - n * size)
            assert scratch <= plan.scratch_bytes
            assert tail >= chunk.stop * row.gradient, "logits lie where the gradient goes"
            done = chunk.stop
        assert done == group
        seen += group
    assert plan.gradient_bytes >= plan.group * row.gradient


@PLANS
@given(st.integers(1, 40000), rows_of_bytes(), st.integers(0, 36), MACHINES, st.booleans(), st.floats(0.1, 1.0))
def test_a_bounded_workspace(rows, row, exponent, machine, keep, share):
    workspace = 2**exponent + 17
    plan = _chunks.plan(rows, row, workspace, machine, keep=keep and row.gradient > 0, share=share)
    check(plan, row, rows)
    if plan.gradient_bytes + plan.scratch_bytes > workspace:
        assert workspace < row.gradient + row.logits, "a row would have fitted"
        assert plan.gradient_bytes + plan.scratch_bytes == row.gradient + row.logits
        assert plan.group == 1


@PLANS
@given(st.integers(1, 40000), rows_of_bytes(), st.integers(0, 2**33), MACHINES, st.booleans())
def test_the_default(rows, row, weight_bytes, machine, keep):
    keep = keep and row.gradient > 0
    plan = _chunks.default_plan(rows, row, weight_bytes, machine, keep=keep)
    check(plan, row, rows)
    held = (plan.gradient_bytes + plan.scratch_bytes) / (row.gradient + row.logits or 1)
    beside = weight_bytes / (row.gradient + row.logits or 1)
    assert held <= machine.group + machine.step + max(machine.scratch, beside), "more rows are held than is said"
