"""python -m benchmarks rows: ours, the peers and the ceiling in one run; a table, a JSON file and a plot.

With --device cuda: every case of benchmarks/cases.py, or --quick: our two backends alone, for tuning.
--family decoupled: those losses and the forward KL they are compared with, alone. --merge: what was measured goes into
the result files that are there.
python -m benchmarks linear: the same from hidden states and lm_head weights; cases in benchmarks/linear_cases.py.
python -m benchmarks sparse: a teacher known by a few tokens a row, from logits and from hidden states; cases in
benchmarks/sparse_cases.py.
python -m benchmarks trainers: training steps of transformers' Trainer and TRL's GKDTrainer, with and without us.
python -m benchmarks readme: the tables of README.md and of docs from those files.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from benchmarks import (
    cases,
    linear,
    linear_cases,
    report,
    report_cuda,
    report_decoupled,
    report_linear,
    report_sparse,
    report_trainers,
    rows,
    rows_cuda,
    sparse,
    sparse_cases,
    trainers,
)
from benchmarks.environment import ROOT

RESULTS = Path(__file__).parent / "results"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    bench = commands.add_parser("rows", help="logits in, loss and gradient out")
    bench.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    bench.add_argument("--width", type=int, nargs="+", default=[cases.HEADLINE], help="vocabulary size; --quick: sizes")
    bench.add_argument(
        "--output", type=Path, default=None, help=f"folder of the result files (default: {RESULTS.name}/)"
    )
    bench.add_argument(
        "--family",
        choices=cases.FAMILIES,
        help="these losses and forward KL alone; no files without --output or --merge",
    )
    bench.add_argument(
        "--merge", action="store_true", help="replace the cases measured in the result files, and keep the others"
    )
    cpu = bench.add_argument_group("on a CPU")
    cpu.add_argument("--rows", type=int, default=256)
    cpu.add_argument("--rounds", type=int, default=5, help="timed calls a turn, of three turns (median)")
    cpu.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's)")
    gpu = bench.add_argument_group("on a GPU")
    gpu.add_argument("--quick", action="store_true", help="our two backends, few calls, a compact table, no files")
    gpu.add_argument(
        "--only", metavar="PATTERN", help="cases whose title contains this; no files without --output, --merge"
    )
    gpu.add_argument(
        "--without", metavar="NAME", nargs="+", default=[], help="leave out implementations whose name contains this"
    )
    gpu.add_argument("--commit", help="the commit to record, where the sources are no git checkout")
    bench = commands.add_parser("linear", help="hidden states and lm_head weights in, loss and gradients out")
    _add_options(
        bench,
        quick="small shapes, to see that everything works; no files",
        words="plot, accuracy, ignored, divergences, or a part of a case's title",
        minutes=linear.FULL.minutes,
    )
    bench = commands.add_parser("sparse", help="a teacher known by a few tokens a row")
    _add_options(
        bench,
        quick="ours alone, few calls; no files",
        words="a part of a case's title",
        minutes=sparse.FULL.minutes,
    )
    bench = commands.add_parser("trainers", help="training steps of transformers and TRL, with and without us")
    bench.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu, and tiny models)")
    bench.add_argument("--quick", action="store_true", help="tiny models, to see that everything works; no files")
    bench.add_argument("--without", metavar="NAME", nargs="+", default=[], help="leave out what contains this")
    bench.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's)")
    bench.add_argument(
        "--output", type=Path, default=None, help=f"folder of the result files (default: {RESULTS.name}/)"
    )
    bench.add_argument("--commit", help="the commit to record, where the sources are no git checkout")
    commands.add_parser("readme", help="write the tables of README.md and docs from the result files")
    options = parser.parse_args(arguments)
    if options.command == "rows" and len(options.width) > 1 and not options.quick:
        bench.error("several widths go with --device cuda --quick alone")
    if options.command not in ("readme", "trainers") and options.merge and options.quick:
        parser.error("--quick writes no files to merge into")
    return options


def _add_options(bench: argparse.ArgumentParser, quick: str, words: str, minutes: float) -> None:
    bench.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    bench.add_argument("--quick", action="store_true", help=quick)
    bench.add_argument(
        "--only",
        metavar="WORD",
        nargs="+",
        default=[],
        help=f"ours, peers: the others are left out; {words}: the other cases are. No files without --output, --merge",
    )
    bench.add_argument(
        "--without", metavar="NAME", nargs="+", default=[], help="leave out implementations whose name contains this"
    )
    bench.add_argument(
        "--merge", action="store_true", help="replace the lines measured in the result files, and keep the others"
    )
    bench.add_argument(
        "--output", type=Path, default=None, help=f"folder of the result files (default: {RESULTS.name}/)"
    )
    bench.add_argument("--minutes", type=float, default=minutes, help="peers that would begin later are left out")
    bench.add_argument("--commit", help="the commit to record, where the sources are no git checkout")
    bench.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's)")


def document_blocks() -> dict[Path, dict[str, str]]:
    """What stands between each pair of markers in the documents that there are: the tables of the result files."""
    results = {
        name: report.load(file)
        for name in ("rows-cpu", "rows-cuda", "linear-cpu", "linear-cuda", "sparse-cpu", "sparse-cuda", "trainers-cuda")
        if (file := RESULTS / f"{name}.json").exists()
    }
    names = ("rows-cuda", "rows-cpu", "linear-cuda", "linear-cpu", "sparse-cuda", "sparse-cpu", "trainers-cuda")
    readme = dict.fromkeys(names, "")
    linear_page = {f"linear-{kind}": "" for kind in report_linear.PAGES}
    page = dict.fromkeys(("decoupled-cuda", "decoupled-cpu"), "")
    sparse_page = {"sparse-cases": ""}
    if "rows-cpu" in results:
        cpu = results["rows-cpu"]
        page["decoupled-cpu"] = report_decoupled.cpu(cpu)
        picture = "![rows on a CPU](benchmarks/results/rows-cpu.png)"
        readme["rows-cpu"] = _paragraphs(report.summary(cpu), report_decoupled.cpu(cpu, brief=True), picture)
    if "rows-cuda" in results:
        gpu = results["rows-cuda"]
        page["decoupled-cuda"] = report_decoupled.cuda(gpu, tuple(cases.ROWS))
        picture = "![rows on a GPU](benchmarks/results/rows-cuda.png)"
        readme["rows-cuda"] = _paragraphs(report_cuda.summary(gpu), report_decoupled.summary(gpu), picture)
    if "linear-cpu" in results:
        readme["linear-cpu"] = report_linear.cpu(results["linear-cpu"])
    if "linear-cuda" in results:
        gpu = results["linear-cuda"]
        picture = "![time and memory from hidden states](benchmarks/results/linear-cuda.png)"
        drawn = (RESULTS / "linear-cuda.png").exists()
        readme["linear-cuda"] = _paragraphs(report_linear.summary(gpu), picture if drawn else "")
        linear_page = {f"linear-{kind}": report_linear.page(gpu, kind) for kind in report_linear.PAGES}
    if "sparse-cpu" in results:
        readme["sparse-cpu"] = report_sparse.cpu(results["sparse-cpu"])
    if "sparse-cuda" in results:
        gpu = results["sparse-cuda"]
        picture = "![time and memory of a sparse teacher](benchmarks/results/sparse-cuda.png)"
        drawn = (RESULTS / "sparse-cuda.png").exists()
        readme["sparse-cuda"] = _paragraphs(report_sparse.summary(gpu), picture if drawn else "")
        sparse_page = {"sparse-cases": report_sparse.page(gpu)}
    if "trainers-cuda" in results:
        readme["trainers-cuda"] = report_trainers.summary(results["trainers-cuda"])
    documents = {
        ROOT / "README.md": readme,
        ROOT / "docs/decoupled.md": page,
        ROOT / "docs/linear.md": linear_page,
        ROOT / "docs/sparse-teachers.md": sparse_page,
    }
    return {document: blocks for document, blocks in documents.items() if document.exists()}


def _paragraphs(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part)


def write_documents() -> None:
    for document, blocks in document_blocks().items():
        for name, text in blocks.items():
            report.write_between_markers(document, name, text)


def _folder(options: argparse.Namespace) -> Path | None:
    """Where the result files go; None: nowhere, since a part of the cases is no result."""
    part = (options.only or options.family) and not options.merge
    folder: Path | None = options.output or (None if part else RESULTS)
    return folder


def _to_merge_into(options: argparse.Namespace, file: Path | None) -> report.Result | None:
    """The result that is there, read before anything is measured."""
    if not options.merge or file is None:
        return None
    try:
        return report.load(file)
    except (OSError, ValueError) as error:
        raise SystemExit(f"--merge: cannot read {file}: {error}") from error


def _merged(old: report.Result | None, new: report.Result, order: list[cases.Case]) -> report.Result:
    if old is None:
        return new
    try:
        return report.merge(old, new, [case.title for case in order])
    except ValueError as error:
        raise SystemExit(f"--merge: {error}") from error


def run_cpu(options: argparse.Namespace) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)
    order = cases.cpu(options.rows, options.width[0])
    wanted = _wanted(options, order)
    folder, name = _folder(options), f"rows-{torch.device(options.device).type}"
    old = _to_merge_into(options, folder and folder / f"{name}.json")
    result = rows.run(wanted, options.device, options.rounds)
    print(f"\n{report.markdown(result)}\n\n{report_decoupled.cpu(result)}")
    if folder is not None:
        write_cpu(_merged(old, result, order), folder, name)


def write_cpu(result: report.Result, folder: Path, name: str) -> None:
    """The result files of a finished CPU run."""
    report.save(result, folder / f"{name}.json")
    (folder / f"{name}.md").write_text(report.markdown(result) + "\n")
    report.plot(result, folder / f"{name}.png")
    print(f"written: {folder / name}.json, .md, .png")


def _wanted(options: argparse.Namespace, every: list[cases.Case]) -> list[cases.Case]:
    wanted = cases.family(options.family, every) if options.family else every
    if options.only:
        wanted = [case for case in wanted if options.only.lower() in case.title.lower()]
    if not wanted:
        raise SystemExit(f"no case's title contains {options.only!r}")
    return wanted


def write_cuda(result: dict[str, Any], folder: Path) -> None:
    """The result files of a finished CUDA run."""
    report.save(result, folder / "rows-cuda.json")
    (folder / "rows-cuda.md").write_text(report_cuda.markdown(result) + "\n")
    try:
        report_cuda.plot(result, folder / "rows-cuda.png")
    except Exception as error:  # the figures are safe; no plot is no reason to lose them
        print(f"no plot: {error}")
    print(f"written: {folder / 'rows-cuda'}.json, .md, .png")


def run_cuda(options: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch.cuda.is_available() is False")
    order = cases.quick(options.width) if options.quick else cases.full()
    wanted = _wanted(options, order)
    without = tuple(options.without)
    if options.quick:
        result = rows_cuda.run(wanted, options.device, rows_cuda.QUICK, without=without, commit=options.commit)
        print(f"\n{report_cuda.compact(result)}\n{result['seconds']:.0f} s")
        return
    folder = _folder(options)
    old = _to_merge_into(options, folder and folder / "rows-cuda.json")
    unfinished = None if folder is None else folder / "rows-cuda.unfinished.json"

    def keep(result: dict[str, Any]) -> None:
        if unfinished is not None:
            report.save(result, unfinished)

    result = rows_cuda.run(wanted, options.device, without=without, commit=options.commit, keep=keep)
    tables = _paragraphs(report_cuda.markdown(result), report_decoupled.cuda(result, tuple(cases.ROWS)))
    print(f"\n{tables}\n\n{result['seconds']:.0f} s")
    if folder is not None and unfinished is not None:
        write_cuda(_merged(old, result, order), folder)
        unfinished.unlink()


class Reports(Protocol):
    """A module of the reports of one benchmark."""

    def markdown(self, result: report.Result) -> str: ...
    def plot(self, result: report.Result, path: Path) -> bool: ...


def write(result: report.Result, folder: Path, name: str, reports: Reports) -> None:
    """The result files of a finished run of ``linear`` or ``sparse``; a plot where there is something to draw."""
    report.save(result, folder / f"{name}.json")
    (folder / f"{name}.md").write_text(reports.markdown(result) + "\n")
    drawn = False
    try:
        drawn = reports.plot(result, folder / f"{name}.png")
    except Exception as error:  # the figures are safe; no plot is no reason to lose them
        print(f"no plot: {error}")
    print(f"written: {folder / name}.json, .md{', .png' if drawn else ''}")


def _on_gpu(options: argparse.Namespace) -> bool:
    """Whether the device is a GPU, which must be there; on a CPU the threads asked for are set."""
    on_gpu = torch.device(options.device).type == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch.cuda.is_available() is False")
    if options.threads:
        torch.set_num_threads(options.threads)
    return on_gpu


Keep = Callable[[report.Result], None]
Some = TypeVar("Some", linear_cases.Case, sparse_cases.Case)


def _run(
    options: argparse.Namespace,
    order: list[Some],
    measure: Callable[[list[Some], Keep], report.Result],
    reports: Reports,
    table: Callable[[report.Result], str],
) -> None:
    """Measures the cases that are asked for, prints their tables and writes or merges the result files.

    Args:
        order: every case, in the order of the result files.
        table: the README's, printed of a CPU.
    """
    wanted = linear_cases.select(order, options.only)
    if not wanted:
        raise SystemExit(f"no case is named by --only {' '.join(options.only)}")
    part = (options.only or options.without) and not options.merge
    folder: Path | None = None if options.quick else options.output or (None if part else RESULTS)
    kind = torch.device(options.device).type
    name = f"{options.command}-{kind}"
    old = _to_merge_into(options, folder and folder / f"{name}.json")

    def keep(result: report.Result) -> None:
        if folder is not None:
            report.save(result, folder / f"{name}.unfinished.json")

    result = measure(wanted, keep)
    if kind == "cpu":
        print(f"\n{table(result)}")
    print(f"\n{reports.markdown(result)}\n\n{result['seconds']:.0f} s")
    if folder is not None:
        titles = [case.title for case in order]
        try:
            write(result if old is None else report_linear.merge(old, result, titles), folder, name, reports)
        except ValueError as error:
            raise SystemExit(f"--merge: {error}") from error
        (folder / f"{name}.unfinished.json").unlink()


def run_linear(options: argparse.Namespace) -> None:
    on_gpu = _on_gpu(options)
    order = linear_cases.full() if on_gpu else linear_cases.cpu()
    if options.quick:
        order = linear_cases.quick() if on_gpu else linear_cases.cpu(rows=32, width=1000, hidden=64)
    effort = replace(linear.FULL if on_gpu else linear.ON_CPU, minutes=options.minutes)
    asked = {"words": options.only, "without": options.without, "commit": options.commit}

    def measure(wanted: list[linear_cases.Case], keep: Keep) -> report.Result:
        return linear.run(wanted, options.device, effort, **asked, keep=keep)

    _run(options, order, measure, report_linear, report_linear.cpu)


def run_sparse(options: argparse.Namespace) -> None:
    on_gpu = _on_gpu(options)
    order = sparse_cases.full() if on_gpu else sparse_cases.cpu()
    effort = replace(sparse.FULL if on_gpu else sparse.ON_CPU, minutes=options.minutes)
    if options.quick:
        order, effort = [replace(case, field="ours") for case in order], sparse.QUICK if on_gpu else sparse.QUICK_ON_CPU
    asked = {"words": options.only, "without": options.without, "commit": options.commit}

    def measure(wanted: list[sparse_cases.Case], keep: Keep) -> report.Result:
        return sparse.run(wanted, options.device, effort, **asked, keep=keep)

    _run(options, order, measure, report_sparse, report_sparse.cpu)


def run_trainers(options: argparse.Namespace) -> None:
    """On a CPU, models that fit it, and no files: no result."""
    full = _on_gpu(options) and not options.quick
    result = trainers.run(
        trainers.FULL if full else (trainers.QUICK,), options.device, commit=options.commit, without=options.without
    )
    print(f"\n{report_trainers.markdown(result)}\n\n{result['seconds']:.0f} s")
    folder = options.output or (RESULTS if full and not options.without else None)
    if folder is not None:
        name = folder / f"trainers-{torch.device(options.device).type}"
        report.save(result, name.with_suffix(".json"))
        name.with_suffix(".md").write_text(report_trainers.markdown(result) + "\n")
        print(f"written: {name}.json, .md")


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.command == "readme":
        write_documents()
    elif options.command == "linear":
        run_linear(options)
    elif options.command == "sparse":
        run_sparse(options)
    elif options.command == "trainers":
        run_trainers(options)
    elif torch.device(options.device).type == "cuda":
        run_cuda(options)
    else:
        run_cpu(options)


if __name__ == "__main__":
    main()
