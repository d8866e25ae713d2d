"""Bad input to a sparse teacher's constructors raises before any work, and says which argument or position it is."""

from types import SimpleNamespace

import pytest
import torch
from checks import logits_pair
from test_sparse_sources import FlatLogprobs, Logprob

import kdkernels as kd
from kdkernels.teachers import MOST_IDS

Z, _ = logits_pair(2, 3, 10)
DRAWS = torch.zeros(2, 4, dtype=torch.long)
PLENTY = torch.zeros(1, MOST_IDS + 1)
OF_LOGITS = {
    "no tensor": (([1.0], 2), {}, TypeError, "logits must be a Tensor.*list"),
    "integers": ((Z.long(), 2), {}, TypeError, "logits must be float32.*int64"),
    "scalar": ((torch.tensor(1.0), 1), {}, ValueError, "logits must have at least one column"),
    "no columns": ((Z[..., :0], 1), {}, ValueError, "logits must have at least one column"),
    "number 0": ((Z, 0), {}, ValueError, r"{number} must lie in \[1, .*got 0"),
    "number float": ((Z, 2.0), {}, TypeError, "{number} must be an int, got float"),
    "number bool": ((Z, True), {}, TypeError, "{number} must be an int, got bool"),
    "number above the most": ((PLENTY, MOST_IDS + 1), {}, ValueError, r"{number} must lie in \[1, 4096\], got 4097"),
    "temperature": ((Z, 2), {"temperature": 0.0}, ValueError, "temperature must be positive, got 0.0"),
    "temperature nan": ((Z, 2), {"temperature": float("nan")}, ValueError, "temperature must be finite, got nan"),
    "temperature text": ((Z, 2), {"temperature": "1"}, TypeError, "temperature must be a number, got str"),
    "vocab_size": ((Z, 2), {"vocab_size": 11}, ValueError, r"vocab_size must lie in \[1, 10\], got 11"),
    "dtype": ((Z, 2), {"dtype": torch.int32}, TypeError, "dtype must be float32.*int32"),
}


@pytest.mark.parametrize("name", OF_LOGITS)
@pytest.mark.parametrize(("make", "number"), [(kd.TopKTeacher.from_logits, "k"), (kd.TopKTeacher.sample, "draws")])
def test_bad_logits(make, number, name):
    arguments, options, error, match = OF_LOGITS[name]
    with pytest.raises(error, match=match.replace("{number}", number)):
        make(*arguments, **options)


OTHERS = {
    "k above the vocabulary": (
        lambda: kd.TopKTeacher.from_logits(Z, 11),
        ValueError,
        r"k must lie in \[1, 10\], got 11",
    ),
    "k above vocab_size": (
        lambda: kd.TopKTeacher.from_logits(Z, 9, vocab_size=8),
        ValueError,
        r"k must lie in \[1, 8\]",
    ),
    "tail": (lambda: kd.TopKTeacher.from_logits(Z, 2, tail="none"), ValueError, "tail must be one of bucket.*'none'"),
    "generator": (
        lambda: kd.TopKTeacher.sample(Z.to("meta"), 2, generator=torch.Generator()),
        ValueError,
        "generator is on cpu, logits on meta",
    ),
    "samples no tensor": (lambda: kd.TopKTeacher.from_samples([[1]]), TypeError, "samples must be a Tensor.*list"),
    "samples float": (lambda: kd.TopKTeacher.from_samples(Z), TypeError, "samples must be integers, got torch.float32"),
    "samples bool": (lambda: kd.TopKTeacher.from_samples(Z > 0), TypeError, "samples must be integers"),
    "samples empty": (
        lambda: kd.TopKTeacher.from_samples(DRAWS[:, :0]),
        ValueError,
        r"samples must be \(..., N\) with N",
    ),
    "samples scalar": (lambda: kd.TopKTeacher.from_samples(DRAWS[0, 0]), ValueError, r"samples must be \(..., N\)"),
    "samples many": (lambda: kd.TopKTeacher.from_samples(PLENTY.long()), ValueError, r"N in \[1, 4096\].*4097"),
    "samples high": (
        lambda: kd.TopKTeacher.from_samples(DRAWS + 9, vocab_size=9),
        ValueError,
        r"samples must be negative \(none\) or lie in \[0, 9\), got 9",
    ),
    "samples no int32": (
        lambda: kd.TopKTeacher.from_samples(DRAWS + 2**31),
        ValueError,
        "samples must be.*got 2147483648",
    ),
    "samples dtype": (lambda: kd.TopKTeacher.from_samples(DRAWS, dtype=torch.int8), TypeError, "dtype must be float32"),
    "samples temperature": (
        lambda: kd.TopKTeacher.from_samples(DRAWS, teacher_temperature=-1.0),
        ValueError,
        "teacher_temperature must be positive, got -1.0",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_bad_arguments(name):
    call, error, match = OTHERS[name]
    with pytest.raises(error, match=match):
        call()


FLAT = FlatLogprobs([0], [2], [1, 2], [-1.0, -2.0])
OF_VLLM = {
    "None": (None, {}, TypeError, "positions must be a list of None or dicts.*NoneType; none were asked for"),
    "a request": (
        SimpleNamespace(prompt_logprobs=[None]), {}, TypeError, "positions must be a list.*got SimpleNamespace"
    ),
    "a dict": ({1: -1.0}, {}, TypeError, "positions must be a list of None or dicts.*got dict"),
    "a number for a dict": ([None, 3.0], {}, TypeError, r"positions\[1\] must be None or a dict.*got float"),
    "a list among dicts": ([{1: -1.0}, [None]], {}, TypeError, r"positions\[1\] must be None or a dict.*got list"),
    "a request without": ([[None], None], {}, TypeError, r"positions\[1\] must be a list.*none were asked for"),
    "text for an id": ([None, {1: -1.0}, {"the": -1.0}], {}, ValueError, r"positions\[2\]: 'the' is no token id"),
    "text among text": ([{"1": -1.0, "the": -2.0}], {}, ValueError, r"positions\[0\]: 'the' is no token id"),
    "a float for an id": ([{1.5: -1.0}], {}, ValueError, r"positions\[0\]: 1.5 is no token id"),
    "an id too large": ([{2**70: -1.0}], {}, ValueError, r"positions\[0\]: 1180591620717411303424 is no token id"),
    "no int32": ([{1: -1.0}, {}, {3: -1.0, 2**31: -1.0}], {}, ValueError, r"positions\[2\]: 2147483648 is no token id"),
    "an id below 0": ([[None], [None, {-3: -1.0}]], {}, ValueError, r"positions\[1\]\[1\]: -3 is no token id"),
    "no log-probability": (
        [None, {1: Logprob(-1.0), 2: "x"}], {}, TypeError, r"positions\[1\]: token 2 must come with an object.*'x'"
    ),
    "an empty dict": ([{1: {"rank": 1}}], {}, TypeError, r"positions\[0\]: token 1 must come with"),
    "its logprob None": ([{1: Logprob(None)}], {}, TypeError, r"positions\[0\]: token 1 must come with"),
    "in a batch": ([[{1: -1.0}], [None, {1: "x"}]], {}, TypeError, r"positions\[1\]\[1\]: token 1 must come with"),
    "NaN": ([None, {1: -1.0, 2: float("nan")}], {}, ValueError, r"positions\[1\]: the log-probability of token 2 is NaN"),
    "logits": ([{1: 3.5}], {}, ValueError, r"positions\[0\]: the log-probability of token 1 is 3.5, and tail='bucket'"),
    "logits to drop": ([{1: 3.5}], {"tail": "drop"}, ValueError, "and tail='drop' needs probabilities; are these logits"),
    "too many": ([dict.fromkeys(range(4097), -9.0)], {}, ValueError, "positions: one has 4097 ids.*4096.*give k"),
    "k": ([None], {"k": 0}, ValueError, r"k must lie in \[1, 4096\], got 0"),
    "tail": ([None], {"tail": "none"}, ValueError, "tail must be one of bucket"),
    "temperature": ([None], {"teacher_temperature": 0}, ValueError, "teacher_temperature must be positive"),
    "flat lengths": (FlatLogprobs([0], [1], [1], []), {}, ValueError, "positions: its start_indices.*do not fit"),
    "flat ends": (FlatLogprobs([0], [3], [1], [-1.0]), {}, ValueError, "positions: end_indices go to 3, but there are 1"),
    "flat order": (FlatLogprobs([1], [0], [1], [-1.0]), {}, ValueError, "positions: its start_indices.*do not fit"),
    "flat in a batch": ([FLAT, FlatLogprobs([0], [1], [-2], [-1.0])], {}, ValueError, r"positions\[1\]\[0\]: -2 is no"),
}  # fmt: skip


@pytest.mark.parametrize("name", OF_VLLM)
def test_bad_positions(name):
    positions, options, error, match = OF_VLLM[name]
    with pytest.raises(error, match=match):
        kd.TopKTeacher.from_vllm(positions, **options)
