"""The benchmark of sparse teachers without a GPU: eager forms, inputs, measuring on tiny tensors, reports."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace

import pytest
import torch
from checks import assert_near

import kdkernels as kd
from benchmarks import __main__ as benchmarks_main
from benchmarks import (
    contenders,
    linear,
    linear_cases,
    linear_inputs,
    linear_peers,
    report,
    report_linear,
    report_sparse,
    rows_cuda,
    sparse,
    sparse_cases,
    sparse_inputs,
    sparse_peers,
)
from benchmarks.cases import HEADLINE
from benchmarks.contenders import CUDA, IN_PLACE, TRITON
from benchmarks.linear_peers import BARE_OF_STUDENT, COMPILED, EAGER_NAME, OURS
from benchmarks.report_sparse import OURS_FP32
from benchmarks.sparse_cases import TAILS, Case
from benchmarks.sparse_peers import FORMS, GATHERED

TINY = sparse.Effort(
    rows_cuda.Effort(turns=2, seconds=0.001, most=3, copy_elements=2**12),
    linear.Effort(turns=1, seconds=0.001, least=2, most=2, bare_calls=1),
)
FROM_LOGITS = [
    *(Case(tail, 20, 1003, ids=8, dtype="float32", field="eager") for tail in TAILS),
    Case("bucket", 20, 1003, ids=8, ce_weight=0.5, field="eager"),
]
FROM_HIDDEN = [
    Case(tail, 20, 403, "hidden", ids=8, hidden=24, dtype="float32", field="eager")
    for tail in ("bucket", "renormalize")
]
EVERY = [*FROM_LOGITS, *FROM_HIDDEN]


pytestmark = pytest.mark.usefixtures("keep_garbage")


def by_name(entry: dict) -> dict[str, dict]:
    return {line["implementation"]: line for line in entry["rows"]}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ce_weight", [0.0, 0.5])
@pytest.mark.parametrize("tail", [*TAILS, "renormalize, gathered"])
def test_eager_forms_are_the_reference_in_value_and_gradient(tail, ce_weight, dtype):
    case = Case(tail.split(",")[0], 12, 301, ids=8, dtype=dtype, ce_weight=ce_weight)
    form = sparse_peers.renormalize_gathered if "gathered" in tail else FORMS[case.tail]
    data = sparse_inputs.draw(case, "cpu")
    loss = sparse_peers.with_cross_entropy(form, data.labels, ce_weight)(data.student, data.ids, data.teacher)
    loss.backward()
    exact = data.student.detach().double().requires_grad_()
    expected = data.exact(exact) / case.rows
    expected.backward()
    assert_near("loss", loss, expected, 2e-6)
    # 1e-5: the mass outside as 1 - the mass of the ids, in fp32 as people write it.
    assert_near("gradient", data.student.grad, exact.grad, 1e-5 if dtype == "float32" else 4e-3)


def test_logits_from_the_weight_s_rows_are_those_of_the_whole_product():
    data = sparse_inputs.draw_hidden(FROM_HIDDEN[0], "cpu")
    hidden, weight = data.student_hidden, data.student_weight
    at_ids = sparse_peers.logits_at(hidden, weight, data.teacher.ids)
    assert_near("logits", at_ids, (hidden @ weight.T).gather(-1, data.teacher.ids), 1e-6)


def test_the_ids_are_the_most_likely_tokens_and_hold_most_of_the_mass(monkeypatch):
    case = Case("bucket", 40, 32000, dtype="float32")
    monkeypatch.setattr(sparse_inputs, "CHUNK", 7 * case.width)  # seven rows at a time
    data = sparse_inputs.draw(case, "cpu")
    monkeypatch.setattr(sparse_inputs, "NOISE", 0.0)
    teacher = sparse_inputs.draw(case, "cpu")
    first = teacher.student.detach()[:7].log_softmax(-1).topk(64)  # later rows follow other random numbers
    assert torch.equal(first.indices, teacher.ids[:7])
    assert_near("log-probabilities", teacher.teacher[:7], first.values, 1e-6)
    assert torch.equal(data.ids[:7], teacher.ids[:7])
    apart = (data.student.detach() - teacher.student.detach())[:7]
    assert float(apart.std()) == pytest.approx(0.5, rel=0.02)
    facts = sparse_inputs.facts(data.ids, data.teacher)
    assert 0.8 < facts["teacher_mass"] < 0.95
    assert facts["commonest_id"] < 0.2


def test_zipfian_ids_come_in_nearly_every_row():
    case = replace(FROM_HIDDEN[1], rows=200, width=32000, ids=64, zipf=True)
    data = sparse_inputs.draw_hidden(case, "cpu")
    assert data.teacher.ids.shape == data.teacher.logprobs.shape == (200, 64)
    facts = sparse_inputs.facts(data.teacher.ids, data.teacher.logprobs)
    assert facts["commonest_id"] > 0.97
    counts = data.teacher.ids.flatten().bincount(minlength=case.width)
    assert counts[:10].sum() > 5 * counts[100:110].sum() > 0


def test_some_rows_of_the_inputs_have_the_loss_of_those_rows():
    data = sparse_inputs.draw(FROM_LOGITS[-1], "cpu")
    few = data.rows(torch.tensor([1, 4]))
    known = kd.TopKTeacher(data.ids, data.teacher.double(), data.tail)
    each = kd.reference.distillation_loss(
        data.student.detach().double(), known, data.labels, ce_weight=0.5, reduction="none"
    )
    assert_near("loss", few.exact(few.student.double()), each[[1, 4]].sum(), 1e-12)


def stand_ins(case: Case, *_) -> list:
    """The reference in our kernels' place, where the eager forms run beside it."""
    if case.kind == "hidden":

        def make(data: linear_inputs.Data):
            return lambda: kd.reference.linear_distillation_loss(data.student_hidden, data.student_weight, data.teacher)

        return [linear_peers.Contender(OURS_FP32, "", make), *sparse_peers._from_hidden(case)[1:]]
    ours = [contenders.Contender(name, "", backend="reference") for name in (OURS, IN_PLACE)]
    return [*ours, *sparse_peers._from_logits(case, "cpu")[2:]]


def test_every_kind_of_case_gives_right_lines(monkeypatch):
    monkeypatch.setattr(sparse_peers, "of_logits", stand_ins)
    monkeypatch.setattr(sparse_peers, "of_hidden", stand_ins)
    kept = []
    result = sparse.run(EVERY, "cpu", TINY, commit="abc", keep=lambda r: kept.append(len(r["results"])))
    assert kept == [*range(1, len(EVERY) + 1), len(EVERY)]
    assert result["complete"]
    assert result["environment"]["commit"] == "abc"
    assert len(result["copy"]["bytes_per_second"]) == 2
    for case, entry in zip(EVERY, result["results"], strict=True):
        assert entry["title"] == case.title
        assert 0.5 < entry["teacher"]["teacher_mass"] < 1
        lines = by_name(entry)
        names = {OURS, IN_PLACE} if case.kind == "logits" else {BARE_OF_STUDENT, OURS_FP32}
        gathered = {GATHERED} if case.tail == "renormalize" else set()
        assert set(lines) == names | {EAGER_NAME} | gathered
        for name, line in lines.items():
            assert line["milliseconds"] > 0, (case.title, line)
            if name == BARE_OF_STUDENT:
                assert line["over_bare"] == 1
                assert line["teraflops"] == pytest.approx(case.flops / line["milliseconds"] / 1e9)
                continue
            assert line["loss_error"] < 1e-5, (case.title, line)
            bound = 1e-5 if case.dtype == "float32" else 2.5e-3
            keys = ("gradient_error",) if case.kind == "logits" else ("hidden_error", "weight_error")
            assert all(line[key] < bound for key in keys), (case.title, line)
    units = [entry["limit_ms"] for entry in result["results"][:2]]
    assert units[0] == pytest.approx(2 * units[1])
    table = report_sparse.markdown(result)
    assert all(entry["title"] in table for entry in result["results"])


def test_our_kernels_give_right_lines():
    cases = [replace(case, field="ours") for case in (FROM_LOGITS[0], FROM_LOGITS[1], FROM_HIDDEN[0])]
    for entry in sparse.run(cases, "cpu", TINY)["results"]:
        lines = by_name(entry)
        assert set(lines) == ({OURS, IN_PLACE} if entry["case"]["kind"] == "logits" else {BARE_OF_STUDENT, OURS_FP32})
        lines.pop(BARE_OF_STUDENT, None)
        for line in lines.values():
            assert line["loss_error"] < 1e-5, (entry["title"], line)
            assert line.get("gradient_error", line.get("hidden_error")) < 5e-6, (entry["title"], line)


def test_a_wrong_loss_is_seen_and_a_failure_is_a_line_that_says_so(monkeypatch):
    def half(data):
        form = sparse_peers._of_logits(FORMS[data.tail])(data)
        return lambda student, teacher: 0.5 * form(student, teacher)

    def absent(data):
        raise ImportError("No module named 'absent'")

    field = [contenders.Contender("half", "", half), contenders.Contender("absent", "", absent)]
    monkeypatch.setattr(sparse_peers, "of_logits", lambda *arguments: field)
    wrong, failed = sparse.run([FROM_LOGITS[0], replace(FROM_LOGITS[0], dtype="int8")], "cpu", TINY)["results"]
    lines = by_name(wrong)
    assert lines["half"]["loss_error"] == pytest.approx(0.5, rel=1e-3)
    assert lines["half"]["gradient_error"] == pytest.approx(0.5, rel=1e-3)
    assert lines["absent"]["error"] == "ImportError: No module named 'absent'"
    assert failed["error"]


def test_peers_are_left_out_when_the_time_is_up():
    result = sparse.run([FROM_LOGITS[0], FROM_HIDDEN[0]], "cpu", replace(TINY, minutes=-1))
    for entry in result["results"]:
        lines = by_name(entry)
        assert lines[EAGER_NAME]["left_out"]
        assert not any("left_out" in line for name, line in lines.items() if name.startswith(OURS))
    assert f"{EAGER_NAME} (every case): TimeIsUp" in report_sparse.markdown(result)


def test_the_cases_and_who_runs():
    for cases in (sparse_cases.full(), sparse_cases.cpu()):
        assert len({case.title for case in cases}) == len(cases)
        assert {case.tail for case in cases} == set(TAILS)
    full = sparse_cases.full()
    matrix = 2 * 4096 * HEADLINE
    assert [case.bytes for case in full[:5]] == [2 * matrix, matrix, 2 * matrix, 2 * matrix, 2 * matrix]
    assert replace(full[1], ce_weight=0.5).bytes == 2 * matrix
    bucket, short = (next(c for c in full if c.kind == "hidden" and c.tail == tail) for tail in TAILS[:2])
    assert bucket.flops == 3 * 2 * 8192 * HEADLINE * 2048
    assert {case.ids for case in full} == {64, 256}

    def names(case, device="cuda", **choice):
        of = sparse_peers.of_hidden(case, **choice) if case.hidden else sparse_peers.of_logits(case, device, **choice)
        return [one.name for one in of]

    assert names(full[0]) == [CUDA, TRITON, IN_PLACE, EAGER_NAME, COMPILED]
    assert names(full[1]) == [CUDA, TRITON, IN_PLACE, EAGER_NAME, GATHERED, COMPILED]
    assert names(full[0], "cpu") == [OURS, IN_PLACE, EAGER_NAME, COMPILED]
    assert names(full[-1]) == [CUDA, TRITON, IN_PLACE]
    assert names(bucket) == [OURS_FP32, f"{OURS}, bf16 logits", EAGER_NAME, COMPILED]
    assert names(short) == [OURS_FP32, EAGER_NAME, GATHERED, COMPILED]
    assert names(full[0], words=["ours"]) == [CUDA, TRITON, IN_PLACE]
    assert names(short, words=["peers"]) == [EAGER_NAME, GATHERED, COMPILED]
    assert names(full[0], words=["ours", "peers"], without=["triton", "COMPILE"]) == [CUDA, IN_PLACE, EAGER_NAME]
    assert [case.zipf for case in linear_cases.select(full, ["zipf", "ours"])] == [True]
    assert linear_cases.select(full, ["no such case"]) == []


def synthetic(cases: list[Case], milliseconds: dict[str, float], device: str = "cuda", **environment: str) -> dict:
    """A made-up result, for the reports alone: these round times in every case, all others not to be had."""
    entries = []
    for case in cases:
        rows = [{"implementation": BARE_OF_STUDENT, "curve": BARE_OF_STUDENT, "size": "", "timed": "Synthetic"}]
        who = sparse_peers.of_hidden(case) if case.kind == "hidden" else sparse_peers.of_logits(case, device)
        lines: list[dict] = [*rows] if case.kind == "hidden" else []
        lines += [{"implementation": one.name, "timed": one.timed} for one in who]
        for number, line in enumerate(lines):
            name = line["implementation"]
            if name not in milliseconds:
                line["error"] = "ImportError: synthetic"
                continue
            # What is ours takes a third of the time on "renormalize".
            spent = milliseconds[name] / (3 if case.tail == "renormalize" and name.startswith(OURS) else 1)
            line |= {"milliseconds": spent, "loss_error": 1e-6}
            if case.kind == "hidden":
                line |= {"teraflops": 600.0, "over_bare": spent / milliseconds[BARE_OF_STUDENT]}
                line |= {"hidden_error": 2e-3, "weight_error": 3e-3}
            else:
                line["gradient_error"] = 1e-3
            if name != BARE_OF_STUDENT:
                line["peak_mib"] = 1024.0 * (1 + number)
        entry = {"case": asdict(case), "title": case.title, "rows": lines}
        entry["teacher"] = {"teacher_mass": 0.875, "commonest_id": 0.999 if case.zipf else 0.01}
        if case.kind == "logits":
            entry["bytes"] = 10**9 if case.tail == "renormalize" else 2 * 10**9
        entries.append(entry)
    result = {
        "environment": {"device": "synthetic device", "torch": "0", **environment},
        "inputs": "Synthetic.",
        "timing": "Synthetic.",
        "copy": {"bytes_per_second": [1e12, 2e12]},
        "results": entries,
        "seconds": 1.0,
    }
    rows_cuda.add_limits(result)
    return result


TIMES = {CUDA: 1.5, TRITON: 2.0, EAGER_NAME: 30.0, BARE_OF_STUDENT: 20.0, OURS_FP32: 24.0}
EVERYONE = {**TIMES, IN_PLACE: 1.5, GATHERED: 3.0, COMPILED: 9.0, f"{OURS}, bf16 logits": 22.0}


def test_the_reports_of_a_synthetic_result(tmp_path):
    full = sparse_cases.full()
    result = synthetic(full, TIMES)
    summary = report_sparse.summary(result)
    assert "| | bucket | renormalize | teacher | drop |" in summary
    assert "2000 GB/s" in summary
    assert f"| {CUDA} | 1.50, 67 %, 1024 | 0.50, 100 %, 1024 | 1.50, 67 %, 1024 | 1.50, 67 %, 1024 |" in summary
    assert f"| {EAGER_NAME} | 30.00, 3 %, 4096 |" in summary
    assert COMPILED not in summary
    names = [line.split(" | ")[0] for line in report_sparse.summary(synthetic(full, EVERYONE)).splitlines()]
    assert names[names.index(f"| {EAGER_NAME}") + 1] == f"| {GATHERED}"
    assert "| | bucket, 8192 × 128256, hidden 2048 | renormalize, 8192 × 128256, hidden 2048 |" in summary
    assert f"| {BARE_OF_STUDENT} |" + " 20.0, 600 TFLOP/s |" * 5 in summary
    assert f"| {OURS_FP32} | 24.0, 1.20×, 2.0 GiB | 8.0, 0.40×, 2.0 GiB | 8.0, 0.40×, 2.0 GiB |" in summary
    page = report_sparse.page(result)
    row = "1.50, 67 % | 2.00, 50 % | – | 20.0 | 1024, 4096 | 1e-06, 1e-03 |"
    assert f"| bucket, 4096 × 128256 | {row}" in page
    assert f"| bucket + cross-entropy, 4096 × 128256 | {row}" in page
    assert "| bucket, 256 ids, 4096 × 128256 | 1.50, 67 % | 2.00, 50 % | – | – | 1024 | 1e-06, 1e-03 |" in page
    assert "| renormalize, Zipfian ids, 8192 × 128256, hidden 2048 | 8.0, 0.40× | – | 3.8 | 2.0 GiB, 3.0 GiB |" in page
    assert "3.0 times as long at 8192 × 128256, hidden 2048, 3.0 times as long at 1024 ×" in page
    assert "The ids hold 88 % of the teacher's mass" in page
    assert "the commonest id is in 100 % of the rows" in page
    table = report_sparse.markdown(result)
    assert f"- {COMPILED} (every case): ImportError: synthetic" in table
    assert f"| {full[0].title} | {CUDA} | 1.500 | 67 % | 1024 | 1e-06 | 1e-03 |" in table
    benchmarks_main.write(result, tmp_path, "sparse-cuda", report_sparse)
    assert (tmp_path / "sparse-cuda.png").stat().st_size > 20_000
    read = report.load(tmp_path / "sparse-cuda.json")
    assert (report_sparse.summary(read), report_sparse.page(read)) == (summary, page)


def test_reports_of_results_without_figures(tmp_path):
    result = synthetic(sparse_cases.full(), {})
    assert report_sparse.summary(result) == report_sparse.page(result) == report_sparse.cpu(result) == ""
    assert "Not measured" in report_sparse.markdown(result)
    assert not report_sparse.plot(result, tmp_path / "empty.png")
    failed = synthetic(sparse_cases.full()[:1], TIMES)
    failed["results"][0] = {"case": asdict(FROM_LOGITS[0]), "title": "failed", "rows": [], "error": "out of memory"}
    assert report_sparse.summary(failed) == ""
    assert "- failed: out of memory" in report_sparse.markdown(failed)


def test_the_table_of_a_cpu():
    table = report_sparse.cpu(synthetic(sparse_cases.cpu(), {OURS: 3.0, EAGER_NAME: 24.0}, device="cpu"))
    assert "| bucket, float32 | 3.0 (1024) | 24.0 (3072) | 8.0 | 33 % |" in table
    assert "| renormalize, bfloat16 | 1.0 (1024) | 24.0 (3072) | 24.0 | 33 % |" in table


def test_merging_replaces_lines_and_says_where():
    full = sparse_cases.full()
    older = synthetic(full, TIMES, commit="old")
    newer = synthetic(full[:1], {CUDA: 1.0, TRITON: 1.25}, commit="new")
    newer["copy"] = {"bytes_per_second": [2.5e12]}
    rows_cuda.add_limits(newer)
    merged = report_linear.merge(older, newer, [case.title for case in full])
    assert [entry["title"] for entry in merged["results"]] == [case.title for case in full]
    first = by_name(merged["results"][0])
    assert first[CUDA]["milliseconds"] == 1.0
    assert first[CUDA]["fraction_of_limit"] == pytest.approx(0.8)
    assert first[EAGER_NAME]["error"]
    said = report_sparse.summary(merged).split("In a later run, commit new, copy 2500 GB/s: ")[1]
    assert said.startswith(full[0].title)


def test_command_line(monkeypatch, tmp_path, capsys):
    seen = []

    def run(wanted, device, effort, *, words, without, commit, keep):
        seen.append((len(wanted), device, effort.minutes, words, without, commit))
        result = synthetic(wanted, TIMES, commit=commit or "none")
        keep(result)
        return result

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sparse, "run", run)
    monkeypatch.setattr(benchmarks_main, "RESULTS", tmp_path / "results")
    command = ["sparse", "--device", "cuda"]
    for part in (["--only", "ours"], ["--only", "renormalize"], ["--without", "eager"], ["--quick"]):
        benchmarks_main.main([*command, *part])
        assert not (tmp_path / "results").exists()
    assert CUDA in capsys.readouterr().out
    with pytest.raises(SystemExit, match="cannot read"):
        benchmarks_main.main([*command, "--merge"])
    with pytest.raises(SystemExit, match="no case is named"):
        benchmarks_main.main([*command, "--only", "no such case"])
    with pytest.raises(SystemExit):
        benchmarks_main.main([*command, "--quick", "--merge"])
    assert all(text == "" for name, text in blocks().items() if name.startswith("sparse"))
    benchmarks_main.main([*command, "--minutes", "9", "--commit", "abc"])
    files = {path.name for path in (tmp_path / "results").iterdir()}
    assert files == {"sparse-cuda.json", "sparse-cuda.md", "sparse-cuda.png"}
    benchmarks_main.main([*command, "--only", "256 ids", "--merge", "--commit", "def"])
    merged = report.load(tmp_path / "results/sparse-cuda.json")
    assert len(merged["results"]) == len(sparse_cases.full())
    assert seen[-2:] == [
        (len(sparse_cases.full()), "cuda", 9.0, [], [], "abc"),
        (1, "cuda", sparse.FULL.minutes, ["256 ids"], [], "def"),
    ]
    assert blocks()["sparse-cuda"].endswith("(benchmarks/results/sparse-cuda.png)")
    assert report_sparse.summary(merged) in blocks()["sparse-cuda"]
    assert blocks()["sparse-cpu"] == ""
    assert "commit def" in report_sparse.page(merged)


def blocks() -> dict[str, str]:
    return {name: text for page in benchmarks_main.document_blocks().values() for name, text in page.items()}


def test_a_cpu_run_end_to_end(tmp_path, capsys, monkeypatch):
    cases = copy.deepcopy(FROM_LOGITS[:2])
    monkeypatch.setattr(sparse_cases, "cpu", lambda: cases)
    monkeypatch.setattr(sparse, "ON_CPU", TINY)
    benchmarks_main.main(["sparse", "--output", str(tmp_path)])
    result = report.load(tmp_path / "sparse-cpu.json")
    assert set(by_name(result["results"][0])) == {OURS, IN_PLACE, EAGER_NAME}
    assert report_sparse.cpu(result) in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"sparse-cpu.json", "sparse-cpu.md"}


@pytest.mark.gpu
def test_every_kind_of_case_on_a_gpu():
    cases = [replace(case, dtype="bfloat16", field="compiled") for case in EVERY]
    for case, entry in zip(cases, sparse.run(cases, "cuda", TINY)["results"], strict=True):
        assert entry.get("error") is None
        for name, line in by_name(entry).items():
            assert "error" not in line, (case.title, line)
            keys = ("gradient_error", "hidden_error", "weight_error")
            bound = 5e-3 if case.kind == "logits" or name == OURS_FP32 else 0.2  # logits rounded to bf16
            assert all(line.get(key, 0) < bound for key in keys), (case.title, line)
