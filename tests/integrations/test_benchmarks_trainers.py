"""The benchmark of training steps, with tiny models on the CPU: it runs, and the losses it compares are the same."""

from __future__ import annotations

import pytest
from frameworks import import_quietly

from benchmarks import __main__ as benchmarks_main
from benchmarks import report, report_trainers, trainers

import_quietly("datasets")
import_quietly("trl.experimental.gkd")


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("results")
    benchmarks_main.main(["trainers", "--quick", "--output", str(folder)])
    assert (folder / "trainers-cpu.md").read_text().startswith(trainers.QUICK.title)
    return report.load(folder / "trainers-cpu.json")


def test_every_trainer_runs(result):
    lines = result["results"][0]["rows"]
    assert [line["implementation"] for line in lines] == [one.name for one in trainers.CONTENDERS]
    for line in lines:
        assert "error" not in line, line
        assert line["milliseconds"] > 0
        assert len(line["times"]) == trainers.QUICK.steps


def test_what_is_compared_is_the_same_loss(result):
    lines = {line["implementation"]: line for line in result["results"][0]["rows"]}
    for peer, ours in (
        ("eager", "kdkernels, compute_loss_func"),
        ("eager", "kdkernels, DistillationTrainerMixin"),
        ("TRL", "kdkernels, patch_trl"),
    ):
        for figure in ("loss", "gradient_norm"):
            assert lines[ours][figure] == pytest.approx(lines[peer][figure], rel=2e-5)
    assert lines["eager"]["loss"] > 2 * lines["TRL"]["loss"] > 0


def test_the_tables(result):
    text = report_trainers.summary(result)
    assert text.count("\n| Trainer, forward KL: ") == 3
    assert text.count("\n| GKDTrainer, beta 0.5: ") == 2
    failed = {**result["results"][0]["rows"][1], "error": "OutOfMemoryError: none left"}
    del failed["milliseconds"]
    rows = [result["results"][0]["rows"][0], failed, *result["results"][0]["rows"][2:]]
    broken = {**result, "results": [{**result["results"][0], "rows": rows}]}
    assert "- Trainer, forward KL: eager: OutOfMemoryError: none left" in report_trainers.markdown(broken)


def test_one_that_fails_does_not_end_the_run(monkeypatch, capsys):
    def fail(*given):
        raise RuntimeError("no such trainer")

    broken = trainers.Contender("broken", "", "nothing", fail)
    monkeypatch.setattr(trainers, "CONTENDERS", (broken, trainers.CONTENDERS[0]))
    lines = trainers.run((trainers.QUICK,), "cpu")["results"][0]["rows"]
    assert lines[0]["error"] == "RuntimeError: no such trainer"
    assert lines[1]["milliseconds"] > 0
