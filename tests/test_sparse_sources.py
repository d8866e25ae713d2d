"""Sparse teachers from logits, from draws and from what vLLM returns."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import pytest
import torch
from checks import assert_near, logits_pair
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import kdkernels as kd
from kdkernels import _sparse_sources
from kdkernels.teachers import MOST_IDS

TopKTeacher = kd.TopKTeacher


def teacher_logits(*shape: int, spread: float = 3.0, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


# From logits.


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float64, 1e-14), (torch.float32, 3e-7), (torch.bfloat16, 3e-7), (torch.float16, 3e-7)],
)
@pytest.mark.parametrize("shift", [0.0, 300.0])  # log-probabilities do not depend on it; fp32 numbers of its size would
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_log_probabilities_of_the_top(dtype, bound, shift, temperature):
    logits = (teacher_logits(2, 5, 1003) + shift).to(dtype)
    exact = (logits.double() / temperature).log_softmax(-1)
    expected = exact.topk(20, -1)
    out = torch.float64 if dtype == torch.float64 else torch.float32
    teacher = TopKTeacher.from_logits(logits, 20, temperature=temperature, dtype=out)
    assert teacher.ids.dtype == torch.int32
    assert teacher.logprobs.dtype == out
    assert (teacher.tail, teacher.teacher_temperature) == ("bucket", temperature)
    # Tokens may tie in 16 bits: what is at the ids has to be the top, in its order.
    assert_near("at the ids", exact.gather(-1, teacher.ids.long()), expected.values, 1e-15)
    assert_near("log-probabilities", teacher.logprobs, expected.values, bound)
    assert (teacher.ids.sort(-1).values.diff(dim=-1) > 0).all()


@pytest.mark.parametrize("k", [1, 1003])
def test_one_and_all(k):
    logits = teacher_logits(3, 1003)
    teacher = TopKTeacher.from_logits(logits, k, tail="teacher")
    assert teacher.tail == "teacher"
    assert torch.equal(teacher.ids[:, 0].long(), logits.argmax(-1))
    if k == 1003:
        assert_near("mass", teacher.logprobs.double().exp().sum(-1), torch.ones(3), 1e-6)


def test_the_whole_vocabulary_is_the_dense_loss():
    student, logits = logits_pair(6, 101, dtype=torch.float64)
    teacher = TopKTeacher.from_logits(logits, 101, temperature=2.0, dtype=torch.float64)
    for pair in [(student, teacher), (student, teacher._replace(tail="drop"))]:
        sparse = kd.reference.distillation_loss(*pair, temperature=2.0, reduction="none")
        dense = kd.reference.distillation_loss(student, logits, temperature=2.0, reduction="none")
        assert_near("loss", sparse, dense, 1e-12)


SHAPES = {
    "one row": lambda: teacher_logits(257),
    "rows": lambda: teacher_logits(7, 257),
    "batch": lambda: teacher_logits(3, 7, 257),
    "shifted": lambda: teacher_logits(3, 8, 257)[:, :-1],  # no view as one matrix
    "transposed": lambda: teacher_logits(8, 3, 257).transpose(0, 1),
    "strided columns": lambda: teacher_logits(3, 7, 514)[..., ::2],
    "no rows": lambda: teacher_logits(0, 257),
    "no rows in a batch": lambda: teacher_logits(3, 1, 257)[:, :0],
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("rows", [1, 3, 100])  # of a chunk: one, some that do not divide the rows, all
def test_chunks_of_rows(name, rows, monkeypatch):
    logits = SHAPES[name]()
    monkeypatch.setattr(_sparse_sources, "CHUNK_BYTES", rows * 257 * 4)
    teacher = TopKTeacher.from_logits(logits, 5)
    expected = logits.double().log_softmax(-1).topk(5, -1)
    assert torch.equal(teacher.ids.long(), expected.indices)
    assert_near("log-probabilities", teacher.logprobs, expected.values, 3e-7)
    drawn = TopKTeacher.sample(logits, 5)
    assert drawn.ids.shape == drawn.logprobs.shape == (*logits.shape[:-1], 5)
    assert (drawn.ids[..., 0] >= 0).all()


class LargestMade(TorchDispatchMode):
    """The bytes of the largest tensor that is made within, views of others left out."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, x.nbytes)
        return made


@pytest.mark.parametrize("shape", ["matrix", "shifted"])
@pytest.mark.parametrize("make", [lambda x: TopKTeacher.from_logits(x, 4), lambda x: TopKTeacher.sample(x, 4)])
def test_no_copy_of_more_than_a_chunk(make, shape, monkeypatch):
    logits = teacher_logits(4, 9, 1003, dtype=torch.bfloat16)
    logits = logits.flatten(0, 1) if shape == "matrix" else logits[:, :-1]
    monkeypatch.setattr(_sparse_sources, "CHUNK_BYTES", 2**15)
    with LargestMade() as seen:
        make(logits)
    assert 1003 * 4 <= seen.largest <= 2**15


@pytest.mark.parametrize("shape", [(4, 12), (2, 2, 12)])
def test_padding_columns_are_no_tokens(shape):
    logits = teacher_logits(*shape)
    logits[..., 9:] = 50.0
    for padded, cut in [
        (TopKTeacher.from_logits(logits, 9, vocab_size=9), TopKTeacher.from_logits(logits[..., :9], 9)),
        (
            TopKTeacher.sample(logits, 30, vocab_size=9, generator=torch.Generator().manual_seed(1)),
            TopKTeacher.sample(logits[..., :9], 30, generator=torch.Generator().manual_seed(1)),
        ),
    ]:
        assert int(padded.ids.max()) < 9
        assert torch.equal(padded.ids, cut.ids)
        assert torch.equal(padded.logprobs, cut.logprobs)


def test_rows_without_a_distribution_are_nan():
    logits = teacher_logits(5, 20)
    logits[1, 3] = torch.nan
    logits[2, 3] = torch.inf
    logits[3] = -torch.inf
    for teacher in (TopKTeacher.from_logits(logits, 4), TopKTeacher.sample(logits, 4)):
        assert teacher.logprobs[1:4].isnan().any(-1).all()
        assert not teacher.logprobs[[0, 4]].isnan().any()
        assert ((teacher.ids >= -1) & (teacher.ids < 20)).all()


def test_tokens_without_probability():
    logits = teacher_logits(2, 20)
    logits[:, 3:] = -torch.inf
    teacher = TopKTeacher.from_logits(logits, 6)
    assert (teacher.logprobs[:, 3:] == -torch.inf).all()
    assert_near("mass", teacher.logprobs.double().exp().sum(-1), torch.ones(2), 1e-6)


def test_gives_no_gradient():
    logits = teacher_logits(2, 20).requires_grad_()
    for teacher in (TopKTeacher.from_logits(logits, 4), TopKTeacher.sample(logits, 4)):
        assert not teacher.logprobs.requires_grad


# From draws.


def test_shares_of_draws():
    samples = torch.tensor([[7, 2, 7, 7], [5, 5, 5, 5], [3, -1, 9, -1], [-1, -1, -1, -1]])
    teacher = TopKTeacher.from_samples(samples, teacher_temperature=1.5)
    assert (teacher.tail, teacher.teacher_temperature) == ("drop", 1.5)
    assert teacher.ids.dtype == torch.int32
    assert teacher.ids.tolist() == [[2, 7, -1, -1], [5, -1, -1, -1], [3, 9, -1, -1], [-1, -1, -1, -1]]
    expected = torch.tensor([[0.25, 0.75, 0, 0], [1, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 0, 0]])
    assert_near("shares", teacher.logprobs.exp(), expected, 1e-7)


@settings(deadline=None, max_examples=50)
@given(
    rows=st.lists(st.lists(st.integers(-2, 9), min_size=6, max_size=6), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.int64, torch.int32, torch.int16, torch.int8]),
)
def test_shares_are_counts(rows, dtype):
    teacher = TopKTeacher.from_samples(torch.tensor(rows, dtype=dtype), vocab_size=10, dtype=torch.float64)
    for row, ids, logprobs in zip(rows, teacher.ids.tolist(), teacher.logprobs.exp().tolist(), strict=True):
        drawn = [token for token in row if token >= 0]
        found = {token: share for token, share in zip(ids, logprobs, strict=True) if token >= 0}
        assert found == pytest.approx({token: drawn.count(token) / len(drawn) for token in drawn})
        assert ids == sorted(found) + [-1] * (6 - len(found))


def deviation(gradients: torch.Tensor, expected: torch.Tensor, p: torch.Tensor, draws: int) -> float:
    """How far the mean of rows of gradients is from what is expected, in standard errors of a mean of shares."""
    error = (p * (1 - p) / (len(gradients) * draws)).sqrt()
    return float(((gradients.mean(0) - expected).abs() / error).max())


def test_the_mean_gradient_is_the_dense_one():
    """And none of what else could be made of the same draws, or of a top-k as long."""
    rows, width, draws = 6000, 30, 6
    student, logits = logits_pair(1, width, dtype=torch.float64, seed=3)
    p, q = logits[0].softmax(-1), student[0].softmax(-1)

    def gradients(teacher: kd.TopKTeacher) -> torch.Tensor:
        leaf = student.expand(rows, -1).clone().requires_grad_()
        kd.reference.distillation_loss(leaf, teacher, reduction="sum").backward()
        assert leaf.grad is not None
        return leaf.grad

    drawn = TopKTeacher.sample(logits.expand(rows, -1), draws, generator=torch.Generator().manual_seed(4))
    assert deviation(gradients(drawn), q - p, p, draws) < 5
    alike = torch.where(drawn.ids >= 0, -(drawn.ids >= 0).sum(-1, keepdim=True).double().log(), -torch.inf)
    assert deviation(gradients(drawn._replace(logprobs=alike)), q - p, p, draws) > 20
    own = torch.where(drawn.ids >= 0, p.log()[drawn.ids.long()], -torch.inf)
    assert deviation(gradients(drawn._replace(logprobs=own)), q - p, p, draws) > 20
    assert deviation(gradients(drawn._replace(logprobs=own, tail="teacher")), q - p, p, draws) > 20
    top = TopKTeacher.from_logits(logits.expand(rows, -1), draws, tail="teacher")
    assert deviation(gradients(top), q - p, p, draws) > 20


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_draws_are_the_teachers(temperature):
    logits = teacher_logits(1, 40, spread=2.0)
    p = (logits[0].double() / temperature).softmax(-1)
    generator = torch.Generator().manual_seed(0)
    drawn = TopKTeacher.sample(logits.expand(500, -1), 1000, temperature=temperature, generator=generator)
    assert drawn.teacher_temperature == temperature
    shares = torch.zeros(500, 41).scatter_(-1, drawn.ids.long() % 41, drawn.logprobs.exp())[:, :40]
    assert deviation(shares.double(), p, p, 1000) < 5


def fix_levels(monkeypatch: pytest.MonkeyPatch, levels: torch.Tensor) -> None:
    """Has sampling take these for its random numbers, where it draws one a row."""
    monkeypatch.setattr(torch, "rand", lambda *_, **__: levels[:, None].clone())


def test_rare_tokens_have_their_share(monkeypatch):
    """Each has less than half the spacing of fp32 numbers at 1: sums rounded to fp32 would pass over most of them."""
    tokens = torch.arange(40000, 40020)
    logits = torch.full((len(tokens), 2**16), -18.0)
    logits[:, 0] = 0
    p = logits[0].double().softmax(-1)
    assert float(p[1]) < 2**-25
    for part in (0.01, 0.5, 0.99):  # where in a token's share
        fix_levels(monkeypatch, p[0] + (tokens.double() - 1 + part) * p[1])
        assert torch.equal(TopKTeacher.sample(logits, 1).ids[:, 0].long(), tokens)


def test_what_has_no_probability_is_never_drawn():
    logits = torch.full((100, 7), -torch.inf)
    logits[:, 2] = 1.0
    logits[:, 4] = 0.0
    drawn = TopKTeacher.sample(logits, 500)
    assert set(drawn.ids.unique().tolist()) == {-1, 2, 4}


def test_the_least_and_the_largest_level(monkeypatch):
    """Of random numbers in [0, 1), times a total: rounding may make that the total itself."""
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]]).expand(2, -1)
    fix_levels(monkeypatch, torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert TopKTeacher.sample(logits, 1).ids.tolist() == [[1], [2]]


def test_a_generator_repeats_the_draws():
    logits = teacher_logits(4, 30)
    first, again, other = (
        TopKTeacher.sample(logits, 20, generator=torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)
    )
    assert torch.equal(first.ids, again.ids)
    assert not torch.equal(first.ids, other.ids)


# From vLLM.


@dataclass
class Logprob:
    """As vLLM's."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class FlatLogprobs:
    """The layout of vLLM's, which keeps the token that came beside the top-k even where it is among them."""

    start_indices: list[int] = field(default_factory=list)
    end_indices: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, positions: list, came: list[int]) -> FlatLogprobs:
        flat = cls()
        for row, token in zip(positions, came, strict=True):
            flat.start_indices.append(len(flat.token_ids))
            if row is not None:
                flat.token_ids += [token, *row]
                flat.logprobs += [row[token], *row.values()]
            flat.end_indices.append(len(flat.token_ids))
        return flat

    def __len__(self) -> int:
        return len(self.start_indices)


# A prompt of four tokens, the two most likely and the one that came: among them, or far below.
POSITIONS = [None, {11: -0.5, 12: -1.0}, {21: -0.25, 22: -2.0, 7: -9.0}, {5: -9.5, 31: -0.125, 32: -3.0}]
CAME = [4, 12, 7, 5]
IDS = [[-1, -1, -1], [11, 12, -1], [21, 22, 7], [5, 31, 32]]
LOGPROBS = [[-torch.inf] * 3, [-0.5, -1.0, -torch.inf], [-0.25, -2.0, -9.0], [-9.5, -0.125, -3.0]]

ENTRIES = {
    "numbers": lambda row: dict(row.items()),
    "objects": lambda row: {token: Logprob(x, rank) for rank, (token, x) in enumerate(row.items())},
    "dicts": lambda row: {token: {"logprob": x, "rank": 1} for token, x in row.items()},
    "text": lambda row: {str(token): x for token, x in row.items()},
    "ids as text": lambda row: {f"token_id:{token}": x for token, x in row.items()},
    "json": lambda row: json.loads(json.dumps({token: vars(Logprob(x, 1, "a")) for token, x in row.items()})),
    "several kinds": lambda row: {
        (token if i else str(token)): ([Logprob(x), {"logprob": x}, x][i % 3])
        for i, (token, x) in enumerate(row.items())
    },
}


def vllm_positions(kind: str) -> list:
    return [None if row is None else ENTRIES[kind](row) for row in POSITIONS]


def as_sets(teacher: kd.TopKTeacher) -> list:
    """Each row as a dict, whatever the order."""
    return [
        {token: x for token, x in zip(ids, logprobs, strict=True) if token >= 0}
        for ids, logprobs in zip(teacher.ids.tolist(), teacher.logprobs.tolist(), strict=True)
    ]


@pytest.mark.parametrize("kind", ENTRIES)
def test_every_form_of_an_entry(kind):
    teacher = TopKTeacher.from_vllm(vllm_positions(kind), tail="teacher", teacher_temperature=0.5)
    assert teacher.ids.dtype == torch.int32
    assert teacher.logprobs.dtype == torch.float32
    assert teacher.ids.tolist() == IDS
    assert teacher.logprobs.tolist() == LOGPROBS
    assert (teacher.tail, teacher.teacher_temperature) == ("teacher", 0.5)


def test_flat_log_probabilities():
    teacher = TopKTeacher.from_vllm(FlatLogprobs.of(POSITIONS, CAME))
    assert teacher.ids.shape == (4, 3)
    assert as_sets(teacher) == [row or {} for row in POSITIONS]
    gap = FlatLogprobs([2, 0], [3, 1], [7, 8, 9], [-1.0, -2.0, -3.0])  # in another order, and with one left out
    assert as_sets(TopKTeacher.from_vllm(gap)) == [{9: -3.0}, {7: -1.0}]


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_the_most_likely(k, flat):
    positions = FlatLogprobs.of(POSITIONS, CAME) if flat else vllm_positions("objects")
    teacher = TopKTeacher.from_vllm(positions, k=k)
    assert teacher.ids.shape == (4, k)
    expected = [sorted((row or {}).items(), key=lambda entry: -entry[1])[:k] for row in POSITIONS]
    assert as_sets(teacher) == [dict(row) for row in expected]


def test_no_probability_counts_before_no_token():
    teacher = TopKTeacher.from_vllm(FlatLogprobs([0], [4], [2, 2, 2, 1], [-1.0, -1.0, -1.0, -torch.inf]))
    assert teacher.ids.tolist() == [[2, 1]]
    assert teacher.logprobs.tolist() == [[-1.0, -torch.inf]]


@pytest.mark.parametrize("k", [None, 4])
def test_a_batch(k):
    short = [{40: -0.75}]
    batch = [vllm_positions("objects"), FlatLogprobs.of(short, [40]), [], tuple(vllm_positions("json"))]
    teacher = TopKTeacher.from_vllm(batch, k=k)
    assert teacher.ids.shape == teacher.logprobs.shape == (4, 4, k or 3)
    alone = [TopKTeacher.from_vllm(one, k=k) for one in batch]
    for b, one in enumerate(alone):
        row = TopKTeacher(teacher.ids[b], teacher.logprobs[b])
        assert as_sets(row) == as_sets(one) + [{}] * (4 - len(one.ids))


@pytest.mark.parametrize(
    ("positions", "shape"), [([], (0, 1)), ([None], (1, 1)), ([None, {}], (2, 1)), ([[], [None]], (2, 1, 1))]
)
def test_nothing_given(positions, shape):
    teacher = TopKTeacher.from_vllm(positions)
    assert teacher.ids.shape == shape
    assert (teacher.ids == -1).all()


def test_which_row_belongs_to_which():
    """The loss of a prompt: entry i is the distribution of token i, which the student tells at i - 1."""
    student, logits = logits_pair(6, 50)
    log_p = logits.log_softmax(-1)
    prompt_logprobs = [None, *({i: Logprob(float(x)) for i, x in enumerate(row)} for row in log_p[:-1])]
    assert len(prompt_logprobs) == 6
    teacher = TopKTeacher.from_vllm(prompt_logprobs[1:])
    loss = kd.reference.distillation_loss(student[:-1], teacher, reduction="none")
    dense = kd.reference.distillation_loss(student[:-1], logits[:-1], reduction="none")
    assert_near("loss", loss, dense, 1e-5)


def test_logits_serve_the_tails_that_do_not_need_probabilities():
    assert TopKTeacher.from_vllm([{1: 3.5}], tail="renormalize").logprobs.tolist() == [[3.5]]


def test_more_than_the_most_are_cut_to_k():
    teacher = TopKTeacher.from_vllm([{i: -float(i) for i in range(MOST_IDS + 5)}], k=3)
    assert teacher.ids.tolist() == [[0, 1, 2]]
