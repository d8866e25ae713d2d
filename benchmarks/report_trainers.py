"""Tables of a result of `python -m benchmarks trainers`: nothing here measures."""

from __future__ import annotations

from typing import Any

from benchmarks.report import Result, measured_on

HEADS = ("", "ms a step", "times faster", "peak MiB", "of its peak", "first step's loss", "gradient norm")


def _rows(result: Result, every: bool) -> list[list[str]]:
    """A line per implementation that ran; the others of a field are compared with its first, if that ran."""
    rows = []
    peers: dict[str, dict[str, Any]] = {}
    for line in result["results"][0]["rows"]:
        peer = peers.setdefault(line["field"], line)
        if "milliseconds" not in line:
            continue
        compared = peer is not line and "milliseconds" in peer
        peak = line["peak_mib"]
        cells = [
            f"{line['field']}: {line['implementation']}" if line["field"] else line["implementation"],
            f"{line['milliseconds']:.1f}" if every else f"{line['milliseconds']:.0f}",
            f"{peer['milliseconds'] / line['milliseconds']:.2f}" if compared else "–",
            "n/a" if peak is None else f"{peak:.0f}",
            f"{100 * peak / peer['peak_mib']:.0f} %" if compared and peak is not None else "–",
        ]
        if line["field"]:
            cells += [f"{line['loss']:.6g}", f"{line['gradient_norm']:.5g}"]
        else:
            cells += ["–", "–"]
        rows.append(cells)
    return rows


def _table(result: Result, every: bool) -> str:
    lines = [HEADS, *_rows(result, every)]
    drawn = ["|" + "|".join(f" {cell} " if cell else " " for cell in line) + "|" for line in lines]
    return "\n".join([drawn[0], "|---|" + "---:|" * (len(HEADS) - 1), *drawn[1:]])


def _case(result: Result) -> str:
    case = result["results"][0]["case"]
    tokens = case["sequences"] * case["length"]
    return (
        f"a student of hidden size {case['student']['hidden']} and {case['student']['layers']} layers from a teacher "
        f"of {case['teacher']['hidden']} and {case['teacher']['layers']}, vocabulary {case['vocab_size']}, {tokens} "
        f"tokens a step, of which a quarter is prompt; {case['dtype']}, random weights"
    )


def summary(result: Result) -> str:
    """The README's table."""
    return "\n\n".join(
        [
            f"A training step, {_case(result)}: milliseconds, and peak memory above weights and optimizer states. "
            "Times and shares: against the framework's own loss (of forward KL: eager code) in the same trainer.",
            _table(result, every=False),
            f"Measured on: {measured_on(result['environment'])}.",
        ]
    )


def markdown(result: Result) -> str:
    """The table; what is timed; what failed."""
    lines = result["results"][0]["rows"]
    parts = [f"{result['results'][0]['title']}: {_case(result)}.", _table(result, every=True)]
    failed = [f"- {line['implementation']}: {line['error']}" for line in lines if "error" in line]
    if failed:
        parts.append("\n".join(["Not measured:", "", *failed]))
    timed = [
        f"- {line['field'] or line['implementation']}, {line['implementation']}: {line['timed']}." for line in lines
    ]
    parts.append("\n".join(["What is timed:", "", *timed]))
    parts += [result["timing"], f"Measured on: {measured_on(result['environment'])}."]
    return "\n\n".join(parts)
