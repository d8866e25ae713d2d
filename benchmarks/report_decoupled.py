"""Tables of the decoupled losses beside the forward KL of the same run: nothing here measures."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.cases import HEADLINE
from benchmarks.contenders import CUDA, TRITON
from benchmarks.losses import FAMILY
from benchmarks.report import Entry, Result, cell, provenance
from benchmarks.report_cuda import measured, mebibytes, percent, steps

IMPLEMENTATIONS = (CUDA, TRITON, "eager", "torch.compile")


def cuda(result: Result, widths: Sequence[int] = (HEADLINE,)) -> str:
    """A table for each of the widths and kind of logits that the result has; "" where it has none."""
    tables, shown = [], []
    for width in widths:
        for peaked in (False, True):
            found = {name: entry for (name, at), entry in steps(result, peaked).items() if at == width}
            members = [found[name] for name in FAMILY if name in found]
            if members:
                baseline = found.get("forward_kl")
                entries = members if baseline is None else [baseline, *members]
                tables.append(_cuda_table(baseline, entries, peaked))
                shown += entries
    return "\n\n".join([*tables, provenance(result, shown)]) if tables else ""


def summary(result: Result) -> str:
    """The README's table: the headline's width, times of independent and of peaked logits; "" where there is none."""
    found = {peaked: steps(result, peaked) for peaked in (False, True)}
    names = [name for name in FAMILY if any((name, HEADLINE) in entries for entries in found.values())]
    if not names:
        return ""
    columns = [(name, peaked) for name in IMPLEMENTATIONS[:3] for peaked in found]
    heads = [f"{name}, peaked" if peaked else name for name, peaked in columns]
    lines = [
        "Decoupled losses on bf16 logits of that width, independent normal ones and peaked ones: milliseconds, and "
        "time over that of the same implementation's forward_kl (more in [docs/decoupled.md](docs/decoupled.md)).",
        "",
        f"| | {' | '.join(heads)} |",
        "|---|" + "---:|" * len(columns),
    ]
    for loss in names:
        cells = []
        for name, peaked in columns:
            entry = found[peaked].get((loss, HEADLINE))
            line = None if entry is None else measured(entry).get(name)
            if entry is None or line is None:
                cells.append("–")
                continue
            ratio = _times(line["milliseconds"], name, entry, found[peaked].get(("forward_kl", HEADLINE)))
            cells.append(f"{line['milliseconds']:.2f}, {ratio}")
        lines.append(f"| {loss} | {' | '.join(cells)} |")
    shown = [entry for entries in found.values() for (name, at), entry in entries.items() if name in FAMILY]
    later = [entry for entry in shown if "run" in entry and entry["case"]["width"] == HEADLINE]
    return "\n".join([*lines, "", provenance(result, later)] if later else lines)


def _cuda_table(baseline: Entry | None, entries: list[Entry], peaked: bool) -> str:
    names = [name for name in IMPLEMENTATIONS if any(name in measured(entry) for entry in entries)]
    case = entries[0]["case"]
    logits = "peaked (a few likely tokens)" if peaked else "independent normal"
    lines = [
        f"Loss and gradient of {case['rows']} × {case['width']} bf16 logits, {logits}: milliseconds, share of the "
        "limit, time over that of the same implementation's forward_kl in the same run. Peak: MiB above the inputs, "
        "kdkernels and eager.",
        "",
        f"| | {' | '.join(names)} | times faster than eager | peak |",
        "|---|" + "---:|" * (len(names) + 2),
    ]
    for entry in entries:
        cells = [_cuda_cell(name, entry, baseline) for name in names]
        lines.append(f"| {entry['case']['divergence']} | {' | '.join(cells)} | {_faster(entry)} | {_peaks(entry)} |")
    return "\n".join(lines)


def _cuda_cell(name: str, entry: Entry, baseline: Entry | None) -> str:
    line = measured(entry).get(name)
    if line is None:
        return "–"
    ratio = _times(line["milliseconds"], name, entry, baseline)
    return f"{line['milliseconds']:.2f}, {percent(line['fraction_of_limit'])}, {ratio}"


def _times(milliseconds: float, name: str, entry: Entry, baseline: Entry | None) -> str:
    """How many times as long as the baseline's implementation of this name, which must be of the same run."""
    if baseline is None or baseline.get("run") != entry.get("run"):
        return "n/a"
    lines = {line["implementation"]: line for line in baseline["rows"]}
    other = lines.get(name, {}).get("milliseconds")
    return "n/a" if other is None else f"{milliseconds / other:.2f}×"


def _faster(entry: Entry) -> str:
    """Eager's time over that of our backends."""
    lines = measured(entry)
    if "eager" not in lines:
        return "–"
    ours = [lines[name]["milliseconds"] if name in lines else None for name in (CUDA, TRITON)]
    return ", ".join("–" if time is None else f"{lines['eager']['milliseconds'] / time:.1f}" for time in ours)


def _peaks(entry: Entry) -> str:
    lines = measured(entry)
    ours = next((lines[name] for name in (CUDA, TRITON) if name in lines), {})
    return f"{mebibytes(ours)}, {mebibytes(lines.get('eager', {}))}"


def cpu(result: Result, brief: bool = False) -> str:
    """A line per decoupled case; "" where the result has none. ``brief``: what it was measured on stands elsewhere."""
    entries = [entry for entry in result["results"] if entry["case"]["divergence"] in FAMILY]
    if not entries:
        return ""
    names = [row["implementation"] for row in entries[0]["rows"]]
    case = entries[0]["case"]
    lines = [
        f"Decoupled losses, {case['rows']} × {case['width']} {case['dtype']} logits: milliseconds (and peak MiB above "
        "the inputs).",
        "",
        f"| | {' | '.join(names)} | times faster than eager | time over our forward_kl |",
        "|---|" + "---:|" * (len(names) + 2),
    ]
    for entry in entries:
        rows = {row["implementation"]: row for row in entry["rows"]}
        ours = rows["kdkernels"]["milliseconds"]
        ratio = _times(ours, "kdkernels", entry, _cpu_baseline(result, entry))
        cells = " | ".join(map(cell, rows.values()))
        faster = f"{rows['eager']['milliseconds'] / ours:.1f}"
        lines.append(f"| {entry['case']['divergence']} | {cells} | {faster} | {ratio} |")
    shown = [entry for entry in entries if "run" in entry or not brief]
    return "\n".join([*lines, "", provenance(result, shown)] if shown else lines)


def _cpu_baseline(result: Result, entry: Entry) -> Entry | None:
    same = ("rows", "width", "dtype")
    return next(
        (
            other
            for other in result["results"]
            if other["case"]["divergence"] == "forward_kl"
            and all(other["case"][key] == entry["case"][key] for key in same)
        ),
        None,
    )
