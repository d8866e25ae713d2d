"""Tables and the plot of a result of `python -m benchmarks linear`: nothing here measures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.linear_cases import Case
from benchmarks.linear_peers import BARE, EAGER_NAME, OURS
from benchmarks.report import Entry, Result, check_same_device, differing, provenance
from benchmarks.report_cuda import error_cell, not_measured

Line = dict[str, Any]

COLOURS = {
    f"{OURS}, fp32 logits": "#1f4e8c",
    f"{OURS}, bf16 logits": "#3b8fd6",
    "TRL": "#e9a227",
    "Liger, chunked": "#2a9d8f",
}
OTHER_COLOURS = ("#c0392b", "#8e5ea2", "#d46a9c", "#6b7280", "#a0522d", "#556b2f", "#000000")


def merge(old: Result, new: Result, order: Sequence[str]) -> Result:
    """``old`` with the lines of ``new`` in the place of those of the same case and implementation.

    A line of ``new`` says under "run" what of its environment differs from ``old``'s. Its time over that of the bare
    products, or its share of a limit, is one of its own run. What ``new`` left out for want of time replaces nothing.

    Args:
        order: titles of cases.

    Raises:
        ValueError: they were measured on different devices.
    """
    check_same_device(old, new)
    run = differing(old, new)
    if "copy" in new:
        run["copy"] = new["copy"]
    entries = {entry["title"]: entry for entry in old["results"]}
    kept = set(entries) - {entry["title"] for entry in new["results"]}
    for entry in new["results"]:
        lines = {line["implementation"]: line for line in entries.get(entry["title"], {"rows": []})["rows"]}
        measured_now = {}
        for line in entry["rows"]:
            name = line["implementation"]
            if name not in lines or not line.get("left_out"):
                measured_now[name] = line | {"run": run}
        if set(lines) - set(measured_now):
            kept.add(entry["title"])
        entries[entry["title"]] = {**entry, "rows": list({**lines, **measured_now}.values())}
    if not kept:
        return new
    places = {title: place for place, title in enumerate(order)}
    merged = sorted(entries.values(), key=lambda entry: places.get(entry["title"], len(places)))
    return {**old, **{key: new[key] for key in ("inputs", "timing")}, "results": merged}


def provenance_by_line(result: Result, entries: Iterable[Entry]) -> str:
    """What these entries were measured on; of lines of a later run, what differs and which they are."""
    later: list[Entry] = []
    for entry in entries:
        lines = [line for line in entry["rows"] if "run" in line]
        runs = [line["run"] for line in lines]
        if lines and len(lines) == len(entry["rows"]) and runs.count(runs[0]) == len(runs):
            later.append({"title": entry["title"], "run": runs[0]})
        else:
            later += [{"title": f"{line['implementation']} ({entry['title']})", "run": line["run"]} for line in lines]
    return provenance(result, later)


def of_kind(result: Result, kind: str) -> list[Entry]:
    return [entry for entry in result["results"] if entry["case"]["kind"] == kind]


def timed(entry: Entry) -> dict[str, Line]:
    """The lines that have a time, by implementation."""
    return {line["implementation"]: line for line in entry["rows"] if "milliseconds" in line and "error" not in line}


def shape(entry: Entry) -> str:
    return Case(**entry["case"]).shape


def gibibytes(line: Line) -> str:
    return "n/a" if line.get("peak_mib") is None else f"{line['peak_mib'] / 1024:.1f} GiB"


def percent(fraction: float) -> str:
    """Of an error: two digits."""
    return f"{100 * fraction:.0f} %" if fraction >= 0.995 else f"{100 * fraction:.2g} %"


def markdown(result: Result) -> str:
    """Every case, a line per implementation; then accuracy, what failed, and what was timed of whom."""
    lines = [
        "| case | implementation | ms | × four products | TFLOP/s | peak MiB | error of dX | error of dW |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for entry in [*of_kind(result, "loss"), *of_kind(result, "sizes")]:
        for number, (name, line) in enumerate(timed(entry).items()):
            peak = "n/a" if line.get("peak_mib") is None else f"{line['peak_mib']:.0f}"
            lines.append(
                f"| {entry['title'] if number == 0 else ''} | {name} | {line['milliseconds']:.2f} "
                f"| {line['over_bare']:.2f} | {line['teraflops']:.3g} | {peak} "
                f"| {error_cell(line.get('hidden_error'))} | {error_cell(line.get('weight_error'))} |"
            )
    parts = ["\n".join(lines), *(table(result) for table in PAGES.values())]
    if failures := not_measured(result):
        parts.append("\n".join(["Not measured:", "", *(f"- {failure}" for failure in failures)]))
    notes = dict.fromkeys((line["implementation"], line["timed"]) for e in result["results"] for line in e["rows"])
    parts.append("\n".join(["What is timed:", "", *(f"- {name}: {what}." for name, what in notes)]))
    backends = dict.fromkeys(line["backend"] for e in result["results"] for line in e["rows"] if "backend" in line)
    parts += [
        f"{result['inputs']} {result['timing']} TFLOP/s: the operations of the four products in the time of the whole. "
        f"kdkernels' backend: {', '.join(backends) or 'none'}.",
        provenance_by_line(result, result["results"]),
    ]
    return "\n\n".join(part for part in parts if part)


def summary(result: Result) -> str:
    """The README's table of a GPU: a column for each shape and loss, a line per implementation."""
    entries = of_kind(result, "loss")
    found = [timed(entry) for entry in entries]
    names = dict.fromkeys(name for lines in found for name in lines)
    heads = [f"{entry['case']['divergence']}, {shape(entry)}" for entry in entries]
    lines = [
        "Loss, gradient of the student's hidden states and of its weight, from hidden states and lm_head weights in "
        "bf16: milliseconds, times what the four matrix products alone take, and peak memory above the inputs, the "
        "gradients included.",
        "",
        f"| | {' | '.join(heads)} |",
        "|---|" + "---:|" * len(heads),
    ]
    for name in names:
        cells = []
        for at in found:
            line = at.get(name)
            if line is None:
                cells.append("–")
            elif name == BARE:
                cells.append(f"{line['milliseconds']:.1f}, {line['teraflops']:.0f} TFLOP/s")
            else:
                cells.append(f"{line['milliseconds']:.1f}, {line['over_bare']:.2f}×, {gibibytes(line)}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    curves = dict.fromkeys(line["curve"] for at in found for line in at.values() if line.get("rounds_logits"))
    note = f"Logits rounded to bf16 (what that does: [docs/linear.md](docs/linear.md)): {'; '.join(curves)}."
    return "\n".join([*lines, "", *([note, ""] if curves else []), provenance_by_line(result, entries)])


def page(result: Result, kind: str) -> str:
    """A page's table of the cases of this kind (of :data:`PAGES`) and what they were measured on; "" without any."""
    table = PAGES[kind](result)
    return f"{table}\n\n{provenance_by_line(result, of_kind(result, kind))}" if table else ""


def accuracy_table(result: Result) -> str:
    entries = [entry for entry in of_kind(result, "accuracy") if any("errors" in line for line in entry["rows"])]
    tables = []
    for entry in entries:
        case = entry["case"]
        noises = [f"{noise:g}" for noise in case["noises"]]
        lines = [
            f"Errors of dX and dW, ‖gradient - exact‖ / ‖exact‖ against fp64, forward KL of {case['rows']} × "
            f"{case['width']} logits with standard deviation 1 from hidden states of {case['student']} in bf16, by how "
            "far the teacher's logits are from the student's (standard deviation):",
            "",
            f"| | {' | '.join(noises)} |",
            "|---|" + "---:|" * len(noises),
        ]
        for line in entry["rows"]:
            if "errors" not in line:
                continue
            errors = [line["errors"].get(noise) for noise in noises]
            cells = [
                "–" if at is None else f"{percent(at['hidden_error'])}, {percent(at['weight_error'])}" for at in errors
            ]
            lines.append(f"| {line['implementation']} | {' | '.join(cells)} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def divergences_table(result: Result) -> str:
    tables = []
    for entry in of_kind(result, "divergences"):
        found = [line for line in entry["rows"] if "divergence_ms" in line]
        if not found:
            continue
        lines = [
            f"Milliseconds by divergence, {shape(entry)}, bf16, fp32 logits, measured in turns:",
            "",
            f"| {' | '.join(line['implementation'] for line in found)} |",
            "|" + "---:|" * len(found),
            "| " + " | ".join(f"{line['divergence_ms']:.1f}, {line['over_forward_kl']:.2f}×" for line in found) + " |",
        ]
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def ignored_table(result: Result) -> str:
    tables = []
    for entry in of_kind(result, "ignored"):
        found = [line for line in entry["rows"] if "by_ignored" in line]
        if not found:
            continue
        parts = list(found[0]["by_ignored"])
        lines = [
            f"Milliseconds of {entry['case']['divergence']}, {shape(entry)}, bf16, by the part of the tokens whose "
            "label is ignored:",
            "",
            f"| | {' | '.join(f'{100 * float(part):g} %' for part in parts)} |",
            "|---|" + "---:|" * len(parts),
        ]
        for line in found:
            cells = " | ".join(f"{line['by_ignored'][part]:.1f}" for part in parts)
            lines.append(f"| `{line['implementation']}` | {cells} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


PAGES: dict[str, Callable[[Result], str]] = {
    "accuracy": accuracy_table,
    "divergences": divergences_table,
    "ignored": ignored_table,
}


def cpu(result: Result) -> str:
    """The README's table of a CPU: one line per implementation, beside eager."""
    tables = []
    for entry in of_kind(result, "loss"):
        found = timed(entry)
        eager = found.get(EAGER_NAME)
        case = entry["case"]
        lines = [
            f"Loss and both gradients from hidden states ({case['rows']} × {case['student']}) and lm_head weights "
            f"({case['width']} × {case['student']}), {case['divergence']}, {case['dtype']}.",
            "",
            "| | ms | times faster than eager | peak MiB above the inputs | of eager's peak | errors of dX, dW |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        for name, line in found.items():
            faster, share = "n/a", "n/a"
            peak = line.get("peak_mib")
            if eager is not None:
                faster = f"{eager['milliseconds'] / line['milliseconds']:.1f}"
                if peak is not None and eager.get("peak_mib"):
                    share = f"{100 * peak / eager['peak_mib']:.0f} %"
            errors = f"{error_cell(line.get('hidden_error'))}, {error_cell(line.get('weight_error'))}"
            if name == BARE:
                errors = "–"
            memory = "n/a" if peak is None else f"{peak:.0f}"
            lines.append(f"| {name} | {line['milliseconds']:.0f} | {faster} | {memory} | {share} | {errors} |")
        tables.append("\n".join(lines))
    return "\n\n".join([*tables, provenance_by_line(result, of_kind(result, "loss"))])


def curves(result: Result) -> tuple[Entry | None, dict[str, list[Line]]]:
    """The case whose sizes were varied, and its lines by curve, with those of other sizes, in order of memory."""
    sizes = of_kind(result, "sizes")
    if not sizes:
        return None, {}
    keys = ("divergence", "rows", "width", "student", "teacher", "dtype")
    wanted = [sizes[0]["case"][key] for key in keys]
    entry = next((e for e in of_kind(result, "loss") if [e["case"][key] for key in keys] == wanted), None)
    lines = {**(timed(entry) if entry else {}), **timed(sizes[0])}
    found: dict[str, list[Line]] = {}
    for name, line in lines.items():
        if name != BARE and line.get("peak_mib") is not None:
            found.setdefault(line["curve"], []).append(line)
    for points in found.values():
        points.sort(key=lambda line: line["peak_mib"])
    return entry or sizes[0], found


def plot(result: Result, path: Path) -> bool:
    """Time against peak memory at every chunk size; False where there is nothing to draw."""
    entry, found = curves(result)
    if entry is None or not found:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(11, 6))
    others = iter(OTHER_COLOURS * (1 + len(found) // len(OTHER_COLOURS)))
    for curve, points in found.items():
        colour = COLOURS.get(curve) or next(others)
        places = [(line["peak_mib"] / 1024, line["milliseconds"]) for line in points]
        ours = curve.startswith(OURS)
        axis.plot(*zip(*places, strict=True), "o-", color=colour, label=curve, ms=5, lw=2 if ours else 1.2)
        for line, (memory, milliseconds) in zip(points, places, strict=True):
            if not line["size"]:
                axis.plot(memory, milliseconds, "o", ms=10, mfc="none", color=colour)
                continue
            above = (0, 6) if not ours or "fp32" in curve else (0, -12)
            axis.annotate(
                line["size"], (memory, milliseconds), above, textcoords="offset points", fontsize=7, ha="center"
            )
    bare = timed(entry).get(BARE)
    if bare is not None:
        axis.axhline(bare["milliseconds"], color="#c0392b", linewidth=1, linestyle="--", label=BARE)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_ylim(bottom=0)
    axis.set_xlabel("peak memory above the inputs, gradients included, GiB", fontsize=9)
    axis.set_ylabel("ms, forward and backward", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    environment = result["environment"]
    axis.set_title(
        f"{entry['case']['divergence']} from hidden states, {shape(entry)}, bf16; rings: each one's default\n"
        f"{environment['device']}, torch {environment['torch']}",
        fontsize=10,
    )
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return True
