"""The CUDA benchmark without a GPU: its measuring on tiny tensors of a CPU, its reports on a synthetic result."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from benchmarks import __main__ as benchmarks_main
from benchmarks import cases, contenders, report, report_cuda, rows_cuda
from benchmarks.cases import HEADLINE, Case
from benchmarks.contenders import CUDA, IN_PLACE, TRITON, Contender
from benchmarks.losses import FAMILY, GIVEN_PER_ROW
from kdkernels.backends import triton

TINY = rows_cuda.Effort(turns=2, seconds=0.001, most=3, copy_elements=2**12, small_bytes=2**15)
pytestmark = pytest.mark.usefixtures("keep_garbage")
KINDS = [
    Case("forward_kl", 16, 203, field="all"),
    Case("total_variation", 16, 203, dtype="float32"),
    Case("jensen_shannon", 16, 203, close=True),
    Case("forward_kl", 130, 203, kind="forward"),
    Case("reverse_kl", 64, 203, kind="masked"),
    Case("forward_kl", 16, 203, kind="view"),
    Case("decoupled top-k 32", 16, 203, field="eager"),
    Case("decoupled given per row", 16, 203, peaked=True, field="eager"),
    Case("forward_kl", 2, 203, kind="small"),
]


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch):
    """Without a GPU the Triton kernels run interpreted, which is nothing to time: here they are not to be had."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(triton, "why_not", lambda device=None: "interpreted only")


def test_every_kind_of_case_gives_right_lines_or_reasons():
    kept = []
    result = rows_cuda.run(KINDS, "cpu", TINY, without=("compile", "TRL"), commit="abc", keep=lambda r: kept.append(1))
    assert result["complete"]
    assert len(kept) == len(KINDS) + 1
    assert result["environment"]["commit"] == "abc"
    for case, entry in zip(KINDS, result["results"], strict=True):
        assert entry["title"] == case.title
        lines = {line["implementation"]: line for line in entry["rows"]}
        assert lines[CUDA].keys() >= {"milliseconds", "fraction_of_limit", "peak_mib", "timed"}
        for line in lines.values():
            if "error" in line:
                assert "milliseconds" not in line
                continue
            bound = 2e-6 if case.dtype == "float32" else 2.5e-3
            assert line.get("gradient_error", 0) < bound, (case.title, line)
            assert line.get("loss_error", 0) < 1e-5, (case.title, line)
    first = {line["implementation"]: line for line in result["results"][0]["rows"]}
    assert "milliseconds" in first["eager"]
    assert first[IN_PLACE]["backend"] == "native"
    assert f"{CUDA}, contiguous" in [line["implementation"] for line in result["results"][5]["rows"]]
    table = report_cuda.markdown(result)
    assert all(case.title in table for case in KINDS)
    assert "on the view takes" in table


def test_a_contender_that_fails_is_a_line_that_says_so(monkeypatch):
    calls = []

    def fails_late(data):
        def loss(student, teacher):
            calls.append(1)
            if len(calls) > 4:
                raise torch.OutOfMemoryError("no memory\nleft")
            return student.float().mean()

        return loss

    def absent(data):
        raise ImportError("No module named 'absent'")

    field = [Contender("late", "", fails_late), Contender("absent", "", absent), *contenders.contenders(KINDS[1])]
    monkeypatch.setattr(rows_cuda, "contenders", lambda case, without: field)
    result = rows_cuda.run([KINDS[1]], "cpu", TINY)
    lines = {line["implementation"]: line for line in result["results"][0]["rows"]}
    assert lines["late"]["error"] == "OutOfMemoryError: no memory left"
    assert lines["late"]["gradient_error"] > 0.1  # a wrong gradient is seen
    assert lines["absent"]["error"] == "ImportError: No module named 'absent'"
    assert "milliseconds" in lines[CUDA]
    assert "absent (every case): ImportError: No module named 'absent'" in report_cuda.not_measured(result)


def test_a_case_that_fails_does_not_end_the_run():
    result = rows_cuda.run([replace(KINDS[1], dtype="int8"), KINDS[1]], "cpu", TINY)
    failed, measured = result["results"]
    assert failed["error"]
    assert measured["rows"]
    assert failed["title"] in "\n".join(report_cuda.not_measured(result))


def test_the_cases():
    full = cases.full()
    assert len({case.title for case in full}) == len(full)
    for case in full:
        mask = case.rows * case.width if case.divergence == GIVEN_PER_ROW else 0
        matrix = (case.bytes - mask) / {"forward": 2, "masked": 2}.get(case.kind, 3)
        assert case.kind == "small" or 0.5e9 < matrix < 2e9, case.title
    steps = [case for case in full if case.kind == "step" and case.dtype == "bfloat16" and not case.peaked]
    split = {(name, width) for name in FAMILY for width in (HEADLINE, 151936)}
    assert {(c.divergence, c.width) for c in steps} == split | set(product(cases.DIVERGENCES, cases.ROWS))
    assert {case.kind for case in full} == set(cases.SUFFIXES)
    for case in full:
        assert contenders.contenders(case)[0].name == CUDA
    assert [c.name for c in contenders.contenders(full[0], without=("liger", "TRL", "spec"))] == [
        CUDA,
        TRITON,
        IN_PLACE,
        "eager",
        "torch.compile",
    ]
    assert all(0.4e9 < 2 * cases.rows_for(width) * width < 2e9 for width in (1000, 32064, 100000, 200064))


def synthetic(milliseconds: dict[str, float]) -> report.Result:
    """A made-up result, for the reports alone: every plain case of a full run, the same round times in each."""
    entries = []
    for case in cases.full():
        lines: list[dict] = [
            {
                "implementation": contender.name,
                "timed": contender.timed,
                "milliseconds": milliseconds[contender.name],
                "peak_mib": 100.0,
                "gradient_error": 1e-3,
            }
            if contender.name in milliseconds
            else {"implementation": contender.name, "timed": contender.timed, "error": "ImportError: synthetic"}
            for contender in contenders.contenders(case)
        ]
        entries.append({"case": vars(case), "title": case.title, "bytes": 10**9, "rows": lines})
    result = {
        "environment": {"device": "synthetic device", "torch": "0"},
        "inputs": "Synthetic.",
        "timing": "Synthetic.",
        "copy": {"bytes_per_second": [1e12, 2e12]},
        "results": entries,
    }
    rows_cuda.add_limits(result)
    return result


def test_the_reports_of_a_synthetic_result(tmp_path):
    result = synthetic({CUDA: 1.0, TRITON: 2.0, "eager": 10.0})
    summary = report_cuda.summary(result)
    assert f"| {CUDA} |" + " 1.00, 50 %, 100 |" * 4 in summary
    assert "| eager |" + " 10.00, 5 %, 100 |" * 4 in summary
    assert "torch.compile" not in summary
    assert "| skew_reverse_kl |" + " 50 / 25 |" * len(cases.ROWS) in summary
    assert "2000 GB/s" in summary
    assert "- torch.compile (every case): ImportError: synthetic" in report_cuda.markdown(result)
    assert "1.000  .500" in report_cuda.compact(result)
    assert "!" not in report_cuda.compact(result)
    result["results"][0]["rows"][0]["gradient_error"] = float("nan")
    assert ".500!" in report_cuda.compact(result)
    benchmarks_main.write_cuda(result, tmp_path)
    assert (tmp_path / "rows-cuda.png").stat().st_size > 30_000
    assert report_cuda.summary(report.load(tmp_path / "rows-cuda.json")) == summary


def test_reports_of_a_result_without_figures(tmp_path):
    result = synthetic({})
    assert "of the limit" in report_cuda.markdown(result)
    assert report_cuda.summary(result)
    assert "–" in report_cuda.compact(result)
    report_cuda.plot(result, tmp_path / "empty.png")


@pytest.mark.parametrize(
    "arguments", [["--width", "1000", "2000"], ["--device", "cuda", "--only", "no such case"]], ids=str
)
def test_command_line_refuses(arguments):
    with pytest.raises(SystemExit):
        benchmarks_main.main(["rows", *arguments])


def test_command_line_writes_a_full_run_and_nothing_of_a_part(monkeypatch, tmp_path, capsys):
    def run(wanted, device, effort=rows_cuda.FULL, *, without, commit, keep=lambda result: None):
        assert (device, without, commit) == ("cuda", ("trl",), "abc")
        result = synthetic({CUDA: 1.0, TRITON: 2.0}) | {"seconds": 1.0}
        titles = {case.title for case in wanted}
        result["results"] = [entry for entry in result["results"] if entry["title"] in titles]
        keep(result)
        return result

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(rows_cuda, "run", run)
    monkeypatch.setattr(benchmarks_main, "RESULTS", tmp_path / "results")
    command = ["rows", "--device", "cuda", "--without", "trl", "--commit", "abc"]
    benchmarks_main.main([*command, "--only", "close models"])
    assert "forward_kl, bfloat16, 4096 × 128256, close models | kdkernels, CUDA" in capsys.readouterr().out
    benchmarks_main.main([*command, "--quick", "--width", "32000", "50304"])
    assert "32000 CUDA" in capsys.readouterr().out
    assert not (tmp_path / "results").exists()
    benchmarks_main.main(command)
    files = {path.name for path in (tmp_path / "results").iterdir()}
    assert files == {"rows-cuda.json", "rows-cuda.md", "rows-cuda.png"}


@pytest.mark.gpu
def test_every_kind_of_case_on_a_gpu(tmp_path):
    small = replace(KINDS[-1], field="compiled")
    result = rows_cuda.run([*KINDS[:-1], small], "cuda", TINY, without=("Liger", "speculators", "TRL"))
    for entry in result["results"]:
        assert entry.get("error") is None
        assert {line["implementation"] for line in entry["rows"] if "error" not in line} & {CUDA, TRITON}
    assert result["copy"]["bytes_per_second"]
    benchmarks_main.write_cuda(result, tmp_path)


def test_headline_is_the_cpu_s_too():
    assert report.load(benchmarks_main.RESULTS / "rows-cpu.json")["results"][0]["case"]["width"] == HEADLINE
