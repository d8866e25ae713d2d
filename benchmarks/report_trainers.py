"""Tables of a result of `python -m benchmarks trainers`: nothing here measures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.report import Entry, Result, measured_on, table

Line = dict[str, Any]


def _name(line: Line) -> str:
    return ": ".join(filter(None, (line["field"], line["implementation"])))


def _pairs(entry: Entry) -> Iterator[tuple[Line, Line | None]]:
    """Each line that was measured, and what it is compared with: the first of its field, if that is another and ran."""
    peers: dict[str, Line] = {}
    for line in entry["rows"]:
        peer = peers.setdefault(line["field"], line)
        if "milliseconds" in line:
            yield line, peer if peer is not line and "milliseconds" in peer else None


def _cells(line: Line, peer: Line | None) -> list[str]:
    peak = line["peak_mib"]
    return [
        f"{line['milliseconds']:.0f}",
        "–" if peer is None else f"{peer['milliseconds'] / line['milliseconds']:.2f}",
        "n/a" if peak is None else f"{peak:.0f}",
        "–" if peer is None or peak is None else f"{100 * peak / peer['peak_mib']:.0f} %",
    ]


def _case(entry: Entry) -> str:
    case = entry["case"]
    tokens = case["sequences"] * case["length"]
    return (
        f"a student of hidden size {case['student']['hidden']} from a teacher of {case['teacher']['hidden']}, "
        f"vocabulary {case['vocab_size']}, {tokens} tokens a step, of which a quarter is prompt; {case['dtype']}, "
        "random weights"
    )


def summary(result: Result) -> str:
    """The README's table: the cases side by side, which differ in their models' layers."""
    entries = result["results"]
    heads = [""]
    rows: dict[str, list[str]] = {}
    for number, entry in enumerate(entries):
        heads += [f"{entry['title']}: ms a step", "times faster", "peak MiB", "of its peak"]
        for line, peer in _pairs(entry):
            row = rows.setdefault(_name(line), [])
            row += ["–"] * (4 * number - len(row)) + _cells(line, peer)
    return "\n\n".join(
        [
            f"A training step of {_case(entries[0])}: milliseconds, and peak memory above weights and optimizer "
            "states. Compared: with the framework's own loss (for forward KL with eager code) in the same trainer.",
            table(heads, 1, [[name, *cells] for name, cells in rows.items()]),
            f"Measured on: {measured_on(result['environment'])}.",
        ]
    )


def markdown(result: Result) -> str:
    """A table a case; what failed; what is timed."""
    heads = ("", "ms a step", "times faster", "peak MiB", "of its peak", "first step's loss", "gradient norm")
    parts = []
    for entry in result["results"]:
        rows = [
            [_name(line), *_cells(line, peer), f"{line['loss']:.6g}", f"{line['gradient_norm']:.5g}"]
            for line, peer in _pairs(entry)
        ]
        parts += [f"{entry['title']}: {_case(entry)}.", table(heads, 1, rows)]
        failed = [f"- {_name(line)}: {line['error']}" for line in entry["rows"] if "error" in line]
        if failed:
            parts.append("\n".join(["Not measured:", "", *failed]))
    timed = [f"- {_name(line)}: {line['timed']}." for line in result["results"][0]["rows"]]
    parts.append("\n".join(["What is timed:", "", *timed]))
    parts += [result["timing"], f"Measured on: {measured_on(result['environment'])}."]
    return "\n\n".join(filter(None, parts))
