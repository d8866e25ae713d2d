"""The benchmark from hidden states without a GPU: its measuring on tiny tensors, its reports on a synthetic result."""

import copy
import math
from dataclasses import asdict, replace

import pytest
import torch
from checks import assert_near

import kdkernels as kd
from benchmarks import __main__ as benchmarks_main
from benchmarks import linear, linear_cases, linear_inputs, linear_peers, report, report_linear
from benchmarks.linear_cases import Case
from benchmarks.linear_inputs import Exact, draw
from benchmarks.linear_peers import BARE, COMPILED, EAGER_NAME, Contender
from benchmarks.loading import load

pytestmark = pytest.mark.usefixtures("keep_garbage")
TINY = linear.Effort(turns=2, seconds=0.001, least=2, most=2, bare_calls=1)
SHAPE = (40, 203, 16, 24)
PLAIN = Case("forward_kl", *SHAPE, dtype="float32", logits=("float32",), workspaces=(2**14,), field="kernels")
CASES = [
    PLAIN,
    replace(PLAIN, divergence="jensen_shannon", workspaces=()),
    replace(PLAIN, divergence="CAKD top-k 32", field="ours"),
    replace(PLAIN, kind="sizes", workspaces=(2**13, 2**14), chunks=(8,)),
    Case("forward_kl", 24, 301, 32, 32, kind="accuracy", noises=(1.0, 0.01), field="kernels"),
]
FP32, BF16 = "kdkernels, fp32 logits", "kdkernels, bf16 logits"


def by_name(entry: dict) -> dict[str, dict]:
    return {line["implementation"]: line for line in entry["rows"]}


def test_every_kind_of_case_gives_right_lines():
    kept = []
    result = linear.run(CASES, "cpu", TINY, commit="abc", keep=lambda r: kept.append(len(r["results"])))
    assert kept == [1, 2, 3, 4, 5, 5]
    assert result["complete"]
    assert result["environment"]["commit"] == "abc"
    for case, entry in zip(CASES[:-1], result["results"], strict=False):
        assert entry["title"] == case.title
        lines = by_name(entry)
        assert lines.keys() >= {BARE, FP32} if case.kind == "loss" else {BARE, f"{FP32}, 0.015625 MiB"}
        assert lines[BARE]["over_bare"] == 1
        for name, line in lines.items():
            assert line["teraflops"] == pytest.approx(case.flops / line["milliseconds"] / 1e9)
            if name != BARE:
                assert line["hidden_error"] < 2e-6, (entry["title"], line)
                assert line["weight_error"] < 3e-6, (entry["title"], line)
                assert line["loss_error"] < 3e-6, (entry["title"], line)
        assert (EAGER_NAME in lines) == (case.kind == "loss" and case.field != "ours")
    errors = {name: line["errors"] for name, line in by_name(result["results"][-1]).items()}
    for noise in ("1", "0.01"):
        assert 1e-3 < errors["exact, rounded to bf16"][noise]["hidden_error"] < 2.5e-3
        assert errors[FP32][noise]["hidden_error"] < 2.5e-3
        assert errors[FP32][noise]["weight_error"] < 2.5e-3
    assert errors[BF16]["0.01"]["hidden_error"] > 10 * errors[BF16]["1"]["hidden_error"]
    table = report_linear.markdown(result)
    assert all(entry["title"] in table for entry in result["results"][:-1])
    assert "exact, rounded to bf16 | 0.1" in table
    assert "kdkernels' backend: native" in table


@pytest.mark.parametrize("divergence", linear_cases.DIVERGENCES)
def test_the_exact_gradients_are_those_of_the_whole_batch(divergence, monkeypatch):
    monkeypatch.setattr(linear_inputs, "CHUNK_BYTES", 8 * 203 * 7)  # chunks of 7 rows
    case = replace(PLAIN, divergence=divergence)
    data = draw(case, "cpu")
    whole, some = Exact(data, rows=None, tokens=None), Exact(data)
    leaves = [x.detach().double().requires_grad_() for x in (data.student_hidden, data.student_weight)]
    teacher = kd.LinearTeacher(data.teacher_hidden.double(), data.teacher_weight.double())
    loss = kd.reference.linear_distillation_loss(*leaves, teacher, divergence=data.divergence)
    loss.backward()
    for exact in (whole, some):
        assert_near("loss", exact.loss, loss, 1e-13)
        assert_near("dX", exact.hidden_gradient, leaves[0].grad[exact.rows], 1e-12)
        assert_near("dW", exact.weight_gradient, leaves[1].grad[exact.tokens], 1e-12)
    assert (len(some.rows), len(some.tokens)) == (linear_inputs.CHECKED_ROWS, linear_inputs.CHECKED_TOKENS)
    assert (len(whole.rows), len(whole.tokens)) == (case.rows, case.width)


def test_the_models_of_an_accuracy_case_differ_by_the_noise():
    case = Case("forward_kl", 64, 4000, 256, 256, kind="accuracy")
    for noise in (1.0, 0.01):
        data = draw(case, "cpu", noise)
        student = data.student_hidden.detach().double() @ data.student_weight.detach().double().T
        teacher = data.teacher_hidden.double() @ data.teacher_weight.double().T
        assert float(student.std()) == pytest.approx(1, rel=0.05)
        assert float((student - teacher).std()) == pytest.approx(noise, rel=0.05)


def of(name: str, make) -> Contender:
    return Contender(name, "", make)


def test_a_contender_that_fails_or_errs_is_a_line_that_says_so(monkeypatch):
    calls = []

    def fails_late(data):
        def loss():
            calls.append(1)
            if len(calls) > 3:
                raise torch.OutOfMemoryError("no memory\nleft")
            return data.student_hidden.sum()

        return loss

    def absent(data):
        raise ImportError("No module named 'absent'")

    def half(data):
        plain = linear_peers._plain("forward_kl")
        return lambda: 0.5 * plain(data.student_hidden, data.student_weight, data.teacher_hidden, data.teacher_weight)

    field = [of("late", fails_late), of("absent", absent), of("half", half), linear_peers.ours("float32")]
    monkeypatch.setattr(linear, "contenders", lambda *arguments: field)
    result = linear.run([PLAIN, CASES[-1], replace(PLAIN, dtype="int8")], "cpu", TINY)
    timed, accuracy, failed = result["results"]
    lines = by_name(timed)
    assert lines["late"]["error"] == "OutOfMemoryError: no memory left"
    assert math.isnan(lines["late"]["weight_error"])
    assert "milliseconds" not in lines["late"]
    assert lines["absent"]["error"] == "ImportError: No module named 'absent'"
    assert lines["half"]["hidden_error"] == pytest.approx(0.5, rel=1e-3)
    assert lines["half"]["weight_error"] == pytest.approx(0.5, rel=1e-3)
    assert "milliseconds" in lines[FP32]
    assert "errors" not in by_name(accuracy)["absent"]
    assert "errors" in by_name(accuracy)[FP32]
    assert failed["error"]
    table = report_linear.markdown(result)
    assert "absent (every case): ImportError: No module named 'absent'" in table
    assert f"- {failed['title']}: " in table


def test_peers_are_left_out_when_the_time_is_up():
    result = linear.run([PLAIN, CASES[-1]], "cpu", replace(TINY, minutes=-1))
    for entry in result["results"]:
        lines = by_name(entry)
        assert lines[EAGER_NAME]["left_out"]
        assert "error" not in lines[FP32]
    assert f"{EAGER_NAME} (every case): TimeIsUp" in report_linear.markdown(result)


def test_the_cases_and_who_runs():
    full = linear_cases.full()
    for cases in (full, linear_cases.quick(), linear_cases.cpu()):
        assert len({case.title for case in cases}) == len(cases)
        for case in cases:
            names = [contender.name for contender in linear_peers.contenders(case, "cuda")]
            assert len(set(names)) == len(names)
            assert names[0].startswith(FP32)
    assert {case.kind for case in full} == {"loss", "sizes", "accuracy", "ignored", "divergences"}
    assert {case.divergence for case in full} == set(linear_cases.DIVERGENCES)
    headline = linear_peers.contenders(full[0], "cuda")
    assert [c.name for c in headline if c.ours] == [FP32, BF16, f"{FP32}, 512 MiB", f"{BF16}, 512 MiB"]
    curves = {c.curve for c in headline}
    assert {c.curve for c in linear_peers.contenders(full[-1], "cuda")} < curves
    assert {c.curve for c in linear_peers.contenders(full[0], "cuda", words=["peers"])} == curves - {FP32, BF16}
    assert all(c.ours for c in linear_peers.contenders(full[0], "cuda", words=["ours"]))
    assert linear_peers.contenders(full[0], "cuda", words=["ours", "peers"]) != []
    assert [c.name for c in linear_peers.contenders(linear_cases.cpu()[0], "cpu")] == [FP32, EAGER_NAME, COMPILED]
    without = linear_peers.contenders(full[0], "cuda", without=["liger", "bf16"])
    assert {c.curve for c in without} == {c for c in curves if "Liger" not in c and "bf16" not in c}


def test_only_selects_cases_by_word_or_title():
    full = linear_cases.full()
    select = linear_cases.select
    assert select(full, []) == select(full, ["ours"]) == select(full, ["ours", "peers"]) == full
    assert [case.kind for case in select(full, ["plot", "ours"])] == ["sizes"]
    assert [case.kind for case in select(full, ["accuracy"])] == ["accuracy"]
    assert [case.width for case in select(full, ["151936"])] == [151936]
    assert {case.divergence for case in select(full, ["CAKD", "jensen"])} == {"CAKD top-k 32", "jensen_shannon"}
    assert select(full, ["no such case"]) == []


def synthetic(cases: list[Case], milliseconds: dict[str, float], **environment: str) -> report.Result:
    """A made-up result, for the reports alone: these round times in every case, all others not to be had."""
    entries = []
    for case in cases:
        rows: list[dict] = [{"implementation": BARE, "curve": BARE, "size": "", "timed": "Synthetic"}]
        for contender in linear_peers.contenders(case, "cuda"):
            rows.append(linear._line(contender))
        for number, line in enumerate(rows):
            spent = milliseconds.get(line["curve"])
            errors = {"hidden_error": 2e-3, "weight_error": 0.5}
            if spent is None:
                line["error"] = "ImportError: synthetic"
            elif case.kind == "accuracy":
                line["errors"] = {f"{noise:g}": errors for noise in case.noises}
            else:
                line |= {"milliseconds": spent, "teraflops": 600.0, "over_bare": spent / milliseconds[BARE]}
                if line["curve"] != BARE:
                    line |= {"peak_mib": 1024.0 * (1 + number), **errors}
        entries.append({"case": asdict(case), "title": case.title, "rows": rows})
    return {
        "environment": {"device": "synthetic device", "torch": "0", **environment},
        "inputs": "Synthetic.",
        "timing": "Synthetic.",
        "results": entries,
    }


TIMES = {BARE: 30.0, FP32: 36.0, BF16: 33.0, EAGER_NAME: 75.0, "TRL": 60.0}


def test_the_reports_of_a_synthetic_result(tmp_path):
    full = linear_cases.full()
    result = synthetic(full, TIMES)
    summary = report_linear.summary(result)
    assert f"| {BARE} |" + " 30.0, 600 TFLOP/s |" * 5 in summary
    assert f"| {FP32} | 36.0, 1.20×, 2.0 GiB |" in summary
    assert f"| {FP32}, 512 MiB | 36.0, 1.20×, 4.0 GiB | – | – | – | – |" in summary
    assert "Liger" not in summary
    assert "CAKD top-k 32, 8192 × 128256, hidden 2048 and 4096" in summary
    assert "forward_kl, 8192 × 151936, hidden 4096 |" in summary
    assert f"(docs/linear.md)): {BF16}; {EAGER_NAME}." in summary
    table = report_linear.markdown(result)
    assert "fla (" in table.split("Not measured")[1]
    accuracy = report_linear.page(result, "accuracy")
    assert f"| {FP32} | 0.2 %, 50 % | 0.2 %, 50 % | 0.2 %, 50 % |" in accuracy
    assert "| | 1 | 0.1 | 0.01 |" in accuracy
    benchmarks_main.write(result, tmp_path, "linear-cuda", report_linear)
    assert (tmp_path / "linear-cuda.png").stat().st_size > 20_000
    assert report_linear.summary(report.load(tmp_path / "linear-cuda.json")) == summary


def test_the_plot_s_curves_hold_the_defaults_and_every_size():
    full = linear_cases.full()
    entry, curves = report_linear.curves(synthetic(full, TIMES))
    assert entry is not None
    assert entry["title"] == full[0].title
    assert {name: len(lines) for name, lines in curves.items()} == {FP32: 8, BF16: 8, EAGER_NAME: 1, "TRL": 4}
    assert sorted(line["size"] for line in curves["TRL"]) == ["", "1024 tokens", "2048 tokens", "512 tokens"]
    for lines in curves.values():
        assert [line["peak_mib"] for line in lines] == sorted(line["peak_mib"] for line in lines)


def test_reports_of_results_without_figures(tmp_path):
    result = synthetic(linear_cases.full(), {})
    assert report_linear.summary(result)
    assert report_linear.page(result, "accuracy") == ""
    assert report_linear.cpu(result)
    assert "Not measured" in report_linear.markdown(result)
    assert not report_linear.plot(result, tmp_path / "empty.png")
    alone = synthetic(linear_cases.full()[:1], TIMES)
    assert not report_linear.plot(alone, tmp_path / "empty.png")
    assert not list(tmp_path.iterdir())


def test_the_table_of_a_cpu():
    result = synthetic(linear_cases.cpu(), TIMES)
    table = report_linear.cpu(result)
    assert f"| {FP32} | 36 | 2.1 | 2048 | 67 % | 2e-03, 5e-01 |" in table
    assert f"| {BARE} | 30 | 2.5 | n/a | n/a | – |" in table
    assert "In a later run" not in table


def test_merging_replaces_lines_and_says_where():
    full = linear_cases.full()
    older = synthetic(full, TIMES, commit="old")
    newer = synthetic(full[:1], {BARE: 20.0, FP32: 22.0, BF16: 21.0}, commit="new")
    for line in newer["results"][0]["rows"]:
        if "error" in line:
            line["left_out"] = True
    merged = report_linear.merge(older, newer, [case.title for case in full])
    assert [entry["title"] for entry in merged["results"]] == [case.title for case in full]
    first, second = (by_name(entry) for entry in merged["results"][:2])
    assert first[FP32]["milliseconds"] == 22
    assert first[FP32]["over_bare"] == pytest.approx(1.1)
    assert first[FP32]["run"] == {"environment": {"commit": "new"}}
    assert first["TRL"]["milliseconds"] == 60
    assert first["TRL"]["over_bare"] == 2
    assert second[FP32]["milliseconds"] == 36
    said = report_linear.summary(merged).split("In a later run, commit new: ")[1]
    assert f"{FP32} ({full[0].title})" in said
    assert "TRL" not in said
    whole = synthetic(full[:1], TIMES, commit="newer")
    again = report_linear.merge(merged, whole, [])
    assert f"commit newer: {full[0].title}." in report_linear.summary(again)
    assert report_linear.merge(older, full_again := synthetic(full, TIMES), []) is full_again
    with pytest.raises(ValueError, match="another device into one of synthetic device"):
        report_linear.merge(older, synthetic(full, TIMES, device="another device"), [])


def test_command_line(monkeypatch, tmp_path, capsys):
    seen = []

    def run(wanted, device, effort, *, words, without, commit, keep):
        seen.append((len(wanted), device, effort.minutes, words, without, commit))
        result = synthetic(wanted, TIMES, commit=commit or "none") | {"seconds": 1.0}
        keep(result)
        return result

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(linear, "run", run)
    monkeypatch.setattr(benchmarks_main, "RESULTS", tmp_path / "results")
    command = ["linear", "--device", "cuda"]
    for part in (["--only", "ours"], ["--only", "accuracy"], ["--without", "fla"], ["--quick"]):
        benchmarks_main.main([*command, *part])
        assert not (tmp_path / "results").exists()
    assert FP32 in capsys.readouterr().out
    with pytest.raises(SystemExit, match="cannot read"):
        benchmarks_main.main([*command, "--merge"])
    with pytest.raises(SystemExit, match="no case is named"):
        benchmarks_main.main([*command, "--only", "no such case"])
    with pytest.raises(SystemExit):
        benchmarks_main.main([*command, "--quick", "--merge"])
    benchmarks_main.main([*command, "--minutes", "9", "--commit", "abc"])
    files = {path.name for path in (tmp_path / "results").iterdir()}
    assert files == {"linear-cuda.json", "linear-cuda.md", "linear-cuda.png"}
    benchmarks_main.main([*command, "--only", "1024 ×", "--merge", "--commit", "def"])
    merged = report.load(tmp_path / "results/linear-cuda.json")
    assert len(merged["results"]) == len(linear_cases.full())
    assert seen[-2:] == [
        (len(linear_cases.full()), "cuda", 9.0, [], [], "abc"),
        (1, "cuda", linear.FULL.minutes, ["1024 ×"], [], "def"),
    ]
    blocks = {name: text for page in benchmarks_main.document_blocks().values() for name, text in page.items()}
    assert "commit def: forward_kl, bfloat16, 1024 × 128256" in blocks["linear-cuda"]
    assert blocks["linear-cuda"].endswith("(benchmarks/results/linear-cuda.png)")
    assert blocks["linear-accuracy"] == report_linear.page(merged, "accuracy")
    assert blocks["linear-cpu"] == ""


def test_a_cpu_run_end_to_end(tmp_path, capsys):
    command = ["linear", "--output", str(tmp_path), "--without", "compile"]
    cases = linear_cases.cpu(rows=16, width=301, hidden=24)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_cases, "cpu", lambda **sizes: copy.deepcopy(cases))
        patch.setattr(linear, "ON_CPU", TINY)
        benchmarks_main.main(command)
    result = report.load(tmp_path / "linear-cpu.json")
    assert set(by_name(result["results"][0])) == {BARE, FP32, EAGER_NAME}
    assert report_linear.cpu(result) in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"linear-cpu.json", "linear-cpu.md"}


def test_a_module_is_loaded_without_the_packages_around_it(tmp_path, monkeypatch):
    def write(path, text):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    write("whole_peer/__init__.py", "")
    write("whole_peer/loss.py", "answer = 1")
    write("broken_peer/__init__.py", "import no_such_dependency")
    write("broken_peer/tools/__init__.py", "raise RuntimeError('too old')")
    write("broken_peer/tools/mathematics.py", "factor = 3")
    write("broken_peer/heavy.py", "raise AssertionError('loaded')")
    write(
        "broken_peer/kernels/loss.py",
        "from broken_peer import __version__\nfrom ..heavy import double\nfrom ..tools.mathematics import factor\n"
        "answer = double(factor)",
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert load("whole_peer.loss").answer == 1
    given = {"broken_peer": {"__version__": "0"}, "broken_peer.heavy": {"double": lambda x: 2 * x}}
    assert load("broken_peer.kernels.loss", bare=("broken_peer.tools",), given=given).answer == 6
    with pytest.raises(ImportError):
        load("no_such_peer.loss")
    with pytest.raises(ImportError):
        load("broken_peer.no_such_module")


@pytest.mark.gpu
def test_every_kind_of_case_on_a_gpu():
    cases = linear_cases.quick()
    result = linear.run(cases, "cuda", replace(TINY, turns=1), without=("compile", "Liger", "TRL", "fla"))
    for case, entry in zip(cases, result["results"], strict=True):
        lines = by_name(entry)
        assert entry.get("error") is None
        for name, line in lines.items():
            assert "error" not in line, (case.title, line)
            if FP32 in name:
                errors = line.get("errors", {"": line}).values()
                assert all(at["hidden_error"] < 5e-3 and at["weight_error"] < 5e-3 for at in errors), line


def test_ignored_tokens_are_timed_with_and_without_compact():
    case = replace(PLAIN, kind="ignored", ignored=(0.0, 0.5))
    (entry,) = linear.run([case], "cpu", TINY)["results"]
    assert "error" not in entry
    lines = by_name(entry)
    assert set(lines) == {"compact=False", "compact=True"}
    assert all(ms > 0 for line in lines.values() for ms in line["by_ignored"].values())
    made_up = {"compact=False": {"0": 10.0, "0.5": 9.0}, "compact=True": {"0": 11.0, "0.5": 6.0}}
    rows = [{"implementation": name, "by_ignored": by} for name, by in made_up.items()]
    table = report_linear.ignored_table({"results": [{**entry, "rows": rows}]})
    assert "| | 0 % | 50 % |" in table
    assert "| `compact=True` | 11.0 | 6.0 |" in table


def test_divergences_are_timed_in_turns():
    (entry,) = linear.run([replace(PLAIN, kind="divergences")], "cpu", TINY)["results"]
    assert "error" not in entry
    assert set(by_name(entry)) == set(linear_cases.DIVERGENCES)
    assert by_name(entry)["forward_kl"]["over_forward_kl"] == 1
    rows = [{"implementation": "forward_kl", "divergence_ms": 10.0, "over_forward_kl": 1.0}]
    rows.append({"implementation": "jensen_shannon", "divergence_ms": 10.5, "over_forward_kl": 1.05})
    table = report_linear.divergences_table({"results": [{**entry, "rows": rows}]})
    assert "| 10.0, 1.00× | 10.5, 1.05× |" in table
