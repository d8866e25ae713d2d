"""python -m benchmarks rows: ours, the peers and the ceiling in one run; a table, a JSON file and a plot.

python -m benchmarks readme: the README's tables from those files.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks import report, rows
from benchmarks.environment import ROOT

RESULTS = Path(__file__).parent / "results"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    bench = commands.add_parser("rows", help="logits in, loss and gradient out")
    bench.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    bench.add_argument("--rows", type=int, default=256)
    bench.add_argument("--width", type=int, default=128256, help="vocabulary size")
    bench.add_argument("--rounds", type=int, default=5, help="timed calls a turn, of three turns (median)")
    bench.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's)")
    bench.add_argument(
        "--output", type=Path, default=None, help=f"folder of the result files (default: {RESULTS.name}/)"
    )
    commands.add_parser("readme", help="write the tables of README.md from the result files")
    return parser.parse_args(arguments)


def write_readme() -> None:
    text = (
        f"{report.summary(report.load(RESULTS / 'rows-cpu.json'))}\n\n![rows on a CPU](benchmarks/results/rows-cpu.png)"
    )
    report.write_between_markers(ROOT / "README.md", "rows-cpu", text)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.command == "readme":
        write_readme()
        return
    if options.threads:
        torch.set_num_threads(options.threads)
    result = rows.run(options.device, options.rows, options.width, options.rounds)
    folder = options.output or RESULTS
    name = f"rows-{torch.device(options.device).type}"
    report.save(result, folder / f"{name}.json")
    report.plot(result, folder / f"{name}.png")
    table = report.markdown(result)
    (folder / f"{name}.md").write_text(table + "\n")
    print(f"\n{table}\n\nwritten: {folder / name}.json, .md, .png")


if __name__ == "__main__":
    main()
