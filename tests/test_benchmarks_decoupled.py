"""The benchmark's decoupled losses: inputs, eager forms, tables, and results merged into older ones."""

import copy
import re

import pytest
import torch
from checks import assert_near
from test_benchmarks_cuda import synthetic

import kdkernels as kd
from benchmarks import __main__ as benchmarks_main
from benchmarks import cases, contenders, report, report_cuda, report_decoupled, rows, rows_cuda
from benchmarks.cases import HEADLINE, Case
from benchmarks.contenders import CUDA, TRITON
from benchmarks.inputs import LIKELY, draw
from benchmarks.losses import FAMILY, reads_labels
from benchmarks.peers import EAGER, eager

EACH = pytest.mark.parametrize("name", FAMILY)
TIMES = {CUDA: 1.5, TRITON: 2.0, "eager": 30.0}
BASELINE = {CUDA: 1.0, TRITON: 1.6, "eager": 20.0}


@pytest.mark.parametrize("name", [*FAMILY, *EAGER])
@pytest.mark.parametrize("peaked", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # bf16: ties at the edge of a top-k
def test_eager_forms_are_the_reference_in_value_and_gradient(name, peaked, dtype):
    data = draw(Case(name, 9, 301, dtype, peaked=peaked), "cpu")
    student, exact = data.student, data.student.detach().double().requires_grad_()
    loss = eager(data.divergence, data.labels)(student, data.teacher)
    expected = kd.reference.distillation_loss(exact, data.teacher.double(), data.labels, divergence=data.divergence)
    loss.backward()
    expected.backward()
    assert_near("loss", loss, expected, 2e-6)
    # 1e-5: DKD's 1 - p of a likely label, in fp32 as people write it.
    assert_near("gradient", student.grad, exact.grad, 1e-5 if dtype == "float32" else 4e-3)


@EACH
def test_some_rows_of_the_inputs_have_the_loss_of_those_rows(name):
    data = draw(Case(name, 6, 203, "float32"), "cpu")
    each = kd.reference.distillation_loss(
        data.student.detach(), data.teacher, data.labels, divergence=data.divergence, reduction="none"
    )
    few = data.rows(torch.tensor([1, 4]))
    assert (few.labels is not None) == reads_labels(data.divergence)
    assert_near(
        "loss",
        kd.reference.distillation_loss(
            few.student, few.teacher, few.labels, divergence=few.divergence, reduction="none"
        ),
        each[[1, 4]],
        1e-6,
    )


def test_peaked_logits_have_a_few_likely_tokens_that_the_models_agree_on():
    data = draw(Case("decoupled label", 64, 32000, "float32", peaked=True), "cpu")
    p, q = data.teacher.softmax(-1), data.student.detach().softmax(-1)
    likely = p.topk(LIKELY)
    assert 0.7 < float(likely.values.sum(-1).median()) < 1
    assert float(q.gather(-1, likely.indices).sum(-1).median()) > 0.7
    ordered = p.sort(-1, descending=True).values.cumsum(-1)
    assert (ordered < 0.5).sum(-1).max() < LIKELY
    assert (data.labels.unsqueeze(-1) == p.topk(3 * LIKELY).indices).any(-1).all()
    assert torch.equal(data.student, draw(Case("dkd", 64, 32000, "float32", peaked=True), "cpu").student)


def test_masks_hold_a_percent_of_the_tokens():
    for name, shape in (("decoupled given", (32000,)), ("decoupled given per row", (5, 32000))):
        mask = draw(Case(name, 5, 32000), "cpu").divergence.strong_set().mask
        assert mask.shape == shape
        assert 0.005 < float(mask.double().mean()) < 0.02
        assert mask[..., 0].all()


def test_a_mask_of_every_row_counts_among_the_bytes():
    assert Case("decoupled given per row", 8, 100).bytes == Case("decoupled given", 8, 100).bytes + 800


def test_the_family_comes_with_what_it_is_compared_with():
    chosen = cases.family("decoupled", cases.full())
    kinds = {(case.width, case.peaked) for case in chosen}
    assert kinds == {(HEADLINE, False), (HEADLINE, True), (151936, False)}
    for width, peaked in kinds:
        names = [case.divergence for case in chosen if (case.width, case.peaked) == (width, peaked)]
        assert sorted(names) == sorted([*FAMILY, "forward_kl"])
    assert all(case.kind == "step" and not case.close for case in chosen)
    on_cpu = cases.family("decoupled", cases.cpu(4, 100))
    assert [case.divergence for case in on_cpu] == ["forward_kl", *cases.DECOUPLED_ON_CPU]
    assert {case.dtype for case in on_cpu} == {"float32"}


@EACH
def test_who_runs(name):
    who = [contender.name for contender in contenders.contenders(Case(name, 4, 100, field="compiled"))]
    assert who == [CUDA, TRITON, "eager", "torch.compile"]
    assert [c.name for c in contenders.contenders(Case(name, 4, 100))] == [CUDA, TRITON]


@pytest.mark.parametrize("name", ["decoupled top-p 0.5", "dkd", "adaptive_kl"])
def test_torch_compile_runs_the_eager_form(name):
    data = draw(Case(name, 4, 67, "float32"), "cpu")
    plain = eager(data.divergence, data.labels)(data.student, data.teacher)
    compiled = eager(data.divergence, data.labels, compiled=True)(data.student, data.teacher)
    assert_near("loss", compiled, plain, 1e-6)


def of_run(times: dict[str, float] = TIMES, **environment: str) -> report.Result:
    """A made-up result whose decoupled losses take these times and its forward KL those of BASELINE."""
    result = synthetic(times)
    for entry in result["results"]:
        if entry["case"]["divergence"] == "forward_kl":
            for line in entry["rows"]:
                if line["implementation"] in BASELINE:
                    line["milliseconds"] = BASELINE[line["implementation"]]
    result["environment"] |= environment
    rows_cuda.add_limits(result)
    return result


def without_the_family(result: report.Result) -> report.Result:
    """A result as they were before there were decoupled cases."""
    older = copy.deepcopy(result)
    older["results"] = [
        entry for entry in older["results"] if entry["case"]["divergence"] not in FAMILY and not entry["case"]["peaked"]
    ]
    for entry in older["results"]:
        del entry["case"]["peaked"]
    return older


def the_family_of(result: report.Result) -> report.Result:
    titles = {case.title for case in cases.family("decoupled", cases.full())}
    return {**result, "results": [entry for entry in result["results"] if entry["title"] in titles]}


def test_the_tables():
    result = of_run()
    table = report_decoupled.cuda(result, (HEADLINE, 151936))
    assert table.count("| dkd | 1.50, 33 %, 1.50× | 2.00, 25 %, 1.25× | 30.00, 2 %, 1.50× ") == 3
    assert table.count("| 20.0, 15.0 | 100, 100 |") == 3 * len(FAMILY)
    assert table.count("| forward_kl | 1.00, 50 %, 1.00× |") == 3
    assert "peaked (a few likely tokens)" in table
    summary = report_decoupled.summary(result)
    row = "| 1.50, 1.50× | 1.50, 1.50× | 2.00, 1.25× | 2.00, 1.25× | 30.00, 1.50× | 30.00, 1.50× |"
    assert summary.count(row) == len(FAMILY)
    assert "Measured on" not in summary
    assert "decoupled top-p 0.5, peaked" in report_cuda.compact(result)
    assert "dkd, bfloat16, 4096 × 128256, peaked |" in report_cuda.markdown(result)


def test_results_from_before_have_no_decoupled_tables():
    older = without_the_family(of_run())
    assert report_decoupled.cuda(older, tuple(cases.ROWS)) == ""
    assert report_decoupled.summary(older) == ""
    assert report_cuda.summary(older) == report_cuda.summary(of_run())
    assert report_cuda.compact(older)
    assert report_decoupled.cpu({"results": [{"case": {"divergence": "forward_kl"}}]}) == ""


def test_a_table_without_its_baseline_or_without_lines_says_so():
    result = of_run()
    result["results"] = [entry for entry in result["results"] if entry["case"]["divergence"] != "forward_kl"]
    assert "| dkd | 1.50, 33 %, n/a |" in report_decoupled.cuda(result)
    assert "| dkd | 1.50, n/a |" in report_decoupled.summary(result)
    empty = of_run({})
    assert "| dkd |" in report_decoupled.cuda(empty)
    assert "| dkd | – | – |" in report_decoupled.summary(empty)


def test_merging_replaces_what_was_measured_and_says_where():
    older = without_the_family(of_run(commit="old"))
    newer = the_family_of(of_run(commit="new"))
    newer["copy"] = {"bytes_per_second": [3e12]}
    merged = report.merge(older, newer, [case.title for case in cases.full()])
    assert [entry["title"] for entry in merged["results"]] == [case.title for case in cases.full()]
    for entry in merged["results"]:
        measured_now = entry["title"] in {other["title"] for other in newer["results"]}
        assert ("run" in entry) == measured_now
        if measured_now:
            assert entry["run"]["environment"] == {"commit": "new"}
    assert merged["environment"]["commit"] == "old"
    assert "1.50, 33 %, 1.50×" in report_decoupled.cuda(merged)
    said = "In a later run, commit new, copy 3000 GB/s: forward_kl, bfloat16, 4096 × 128256; "
    assert said in report_cuda.summary(merged)
    assert "dkd" in report_decoupled.summary(merged).split("commit new")[1]
    assert "decoupled top-k 32" in report_cuda.markdown(merged).split("commit new")[1]
    # Measured once more without its forward KL, a loss has no ratio: runs are not compared.
    alone = {**newer, "environment": {**newer["environment"], "commit": "newer"}}
    alone["results"] = [entry for entry in newer["results"] if entry["case"]["divergence"] == "dkd"]
    again = report.merge(merged, alone, [])
    assert "| dkd | 1.50, 33 %, n/a |" in report_decoupled.cuda(again)
    assert len(again["results"]) == len(merged["results"])


def test_merging_a_whole_run_is_that_run():
    assert report.merge(of_run(commit="old"), newer := of_run(commit="new"), []) is newer


def test_merging_refuses_another_device():
    with pytest.raises(ValueError, match="another device into one of synthetic device"):
        report.merge(of_run(), of_run(device="another device"), [])


def test_command_line_merges_a_family(monkeypatch, tmp_path, capsys):
    def run(wanted, device, effort=rows_cuda.FULL, *, without, commit, keep):
        assert [case.title for case in wanted] == [case.title for case in cases.family("decoupled", cases.full())]
        return the_family_of(of_run(commit="new")) | {"seconds": 1.0}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(rows_cuda, "run", lambda *args, keep, **options: keep({}) or run(*args, keep=keep, **options))
    monkeypatch.setattr(benchmarks_main, "RESULTS", tmp_path)
    command = ["rows", "--device", "cuda", "--family", "decoupled"]
    benchmarks_main.main(command)
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit, match="cannot read"):
        benchmarks_main.main([*command, "--merge"])
    report.save(without_the_family(of_run(commit="old")), tmp_path / "rows-cuda.json")
    benchmarks_main.main([*command, "--merge"])
    merged = report.load(tmp_path / "rows-cuda.json")
    assert len(merged["results"]) == len(cases.full())
    assert "independent normal" in capsys.readouterr().out
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".png"}
    blocks = {path.name: block for path, block in benchmarks_main.document_blocks().items()}
    assert "Decoupled losses on bf16 logits" in blocks["README.md"]["rows-cuda"]
    assert blocks["decoupled.md"]["decoupled-cuda"] == report_decoupled.cuda(merged, tuple(cases.ROWS))


def test_cpu_results_merge_too(tmp_path, capsys):
    result = rows.run(cases.family("decoupled", cases.cpu(4, 500)), "cpu", 1)
    for entry in result["results"]:
        for line in entry["rows"]:
            assert line["gradient_error"] < 1e-5, (entry["title"], line)
    table = report_decoupled.cpu(result)
    assert len(re.findall(r"\| decoupled .* \| \d+\.\d\d× \|", table)) == len(cases.DECOUPLED_ON_CPU)
    assert table.startswith(report_decoupled.cpu(result, brief=True))
    assert "Measured on" not in report_decoupled.cpu(result, brief=True)
    older = report.load(benchmarks_main.RESULTS / "rows-cpu.json")
    older["environment"]["device"] = result["environment"]["device"]
    merged = report.merge(older, result, [case.title for case in cases.cpu(4, 500)])
    assert len(merged["results"]) == len(older["results"]) + len(result["results"])
    benchmarks_main.write_cpu(merged, tmp_path, "rows-cpu")
    assert "decoupled label" in (tmp_path / "rows-cpu.md").read_text()
