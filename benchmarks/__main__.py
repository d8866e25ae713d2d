"""python -m benchmarks rows: ours, the peers and the ceiling in one run; a table, a JSON file and a plot.

With --device cuda: every case of benchmarks/cases.py, or --quick: our two backends alone, for tuning.
python -m benchmarks readme: the README's tables from those files.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks import cases, report, report_cuda, rows, rows_cuda
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
    cpu = bench.add_argument_group("on a CPU")
    cpu.add_argument("--rows", type=int, default=256)
    cpu.add_argument("--rounds", type=int, default=5, help="timed calls a turn, of three turns (median)")
    cpu.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's)")
    gpu = bench.add_argument_group("on a GPU")
    gpu.add_argument("--quick", action="store_true", help="our two backends, few calls, a compact table, no files")
    gpu.add_argument("--only", metavar="PATTERN", help="cases whose title contains this; no files without --output")
    gpu.add_argument(
        "--without", metavar="NAME", nargs="+", default=[], help="leave out implementations whose name contains this"
    )
    gpu.add_argument("--commit", help="the commit to record, where the sources are no git checkout")
    commands.add_parser("readme", help="write the tables of README.md from the result files")
    options = parser.parse_args(arguments)
    if options.command == "rows" and len(options.width) > 1 and not options.quick:
        bench.error("several widths go with --device cuda --quick alone")
    return options


def readme_blocks() -> dict[str, str]:
    """What stands between each pair of markers in README.md: the tables of the result files that there are."""
    blocks = {}
    tables = {"rows-cpu": ("a CPU", report.summary), "rows-cuda": ("a GPU", report_cuda.summary)}
    for name, (where, table) in tables.items():
        file = RESULTS / f"{name}.json"
        picture = f"![rows on {where}](benchmarks/results/{name}.png)"
        blocks[name] = f"{table(report.load(file))}\n\n{picture}" if file.exists() else ""
    return blocks


def write_readme() -> None:
    for name, text in readme_blocks().items():
        report.write_between_markers(ROOT / "README.md", name, text)


def run_cpu(options: argparse.Namespace) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)
    result = rows.run(options.device, options.rows, options.width[0], options.rounds)
    folder = options.output or RESULTS
    name = f"rows-{torch.device(options.device).type}"
    report.save(result, folder / f"{name}.json")
    report.plot(result, folder / f"{name}.png")
    table = report.markdown(result)
    (folder / f"{name}.md").write_text(table + "\n")
    print(f"\n{table}\n\nwritten: {folder / name}.json, .md, .png")


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
    wanted = cases.quick(options.width) if options.quick else cases.full()
    if options.only:
        wanted = [case for case in wanted if options.only.lower() in case.title.lower()]
    if not wanted:
        raise SystemExit(f"no case's title contains {options.only!r}")
    without = tuple(options.without)
    if options.quick:
        result = rows_cuda.run(wanted, options.device, rows_cuda.QUICK, without=without, commit=options.commit)
        print(f"\n{report_cuda.compact(result)}\n{result['seconds']:.0f} s")
        return
    folder = options.output or (None if options.only else RESULTS)
    unfinished = None if folder is None else folder / "rows-cuda.unfinished.json"

    def keep(result: dict[str, Any]) -> None:
        if unfinished is not None:
            report.save(result, unfinished)

    result = rows_cuda.run(wanted, options.device, without=without, commit=options.commit, keep=keep)
    print(f"\n{report_cuda.markdown(result)}\n\n{result['seconds']:.0f} s")
    if folder is not None and unfinished is not None:
        write_cuda(result, folder)
        unfinished.unlink()


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.command == "readme":
        write_readme()
    elif torch.device(options.device).type == "cuda":
        run_cuda(options)
    else:
        run_cpu(options)


if __name__ == "__main__":
    main()
