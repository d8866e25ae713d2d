"""Tables and the plot of a CUDA result: nothing here measures."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.cases import CONTESTED, DIVERGENCES, HEADLINE
from benchmarks.contenders import CUDA, OURS, TRITON
from benchmarks.report import Entry, Result, provenance

Line = dict[str, Any]

COLOURS = ("#1f4e8c", "#3b8fd6", "#2a9d8f", "#e9a227", "#c0392b", "#8e5ea2", "#d46a9c", "#6b7280")


def _plain(entry: Entry, peaked: bool = False) -> bool:
    """Whether a case is a step on bf16 logits that are independent, or peaked."""
    case = entry["case"]
    kind = case["kind"], case["dtype"], case["close"], case.get("peaked", False)
    return kind == ("step", "bfloat16", False, peaked)


def measured(entry: Entry) -> dict[str, Line]:
    """The lines that have a time, by implementation."""
    return {line["implementation"]: line for line in entry["rows"] if "milliseconds" in line and "error" not in line}


def steps(result: Result, peaked: bool = False) -> dict[tuple[str, int], Entry]:
    """The plain cases, by divergence and width."""
    return {
        (entry["case"]["divergence"], entry["case"]["width"]): entry
        for entry in result["results"]
        if _plain(entry, peaked)
    }


def _cases(result: Result, width: int | None = None, peaked: bool = False) -> dict[tuple[str, int], dict[str, Line]]:
    """The measured lines of the plain cases, by divergence and width."""
    return {key: measured(entry) for key, entry in steps(result, peaked).items() if width in (None, key[1])}


def percent(fraction: float | None) -> str:
    return "n/a" if fraction is None else f"{100 * fraction:.0f} %"


def mebibytes(line: Line) -> str:
    return "n/a" if line.get("peak_mib") is None else f"{line['peak_mib']:.0f}"


def error_cell(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.0e}"


def not_measured(result: Result) -> list[str]:
    """What has no figure, and why: a line per implementation and reason."""
    tried: dict[str, int] = {}
    failed: dict[tuple[str, str], list[str]] = {}
    lines = []
    for entry in result["results"]:
        if "error" in entry:
            lines.append(f"{entry['title']}: {entry['error']}")
        for line in entry["rows"]:
            name = line["implementation"]
            tried[name] = tried.get(name, 0) + 1
            if "error" in line:
                failed.setdefault((name, line["error"]), []).append(entry["title"])
    for (name, reason), titles in failed.items():
        where = "every case" if len(titles) == tried[name] else "; ".join(titles)
        lines.append(f"{name} ({where}): {reason}")
    return lines


def copy_gigabytes(result: Result) -> float:
    return float(max(result["copy"]["bytes_per_second"], default=float("nan")) / 1e9)


def markdown(result: Result) -> str:
    """Every case, a line per implementation; then the small batches, what failed, and what was timed of whom."""
    lines = [
        "| case | implementation | ms | of the limit | peak MiB | gradient error |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for entry in result["results"]:
        if entry["case"]["kind"] == "small":
            continue
        for number, (name, line) in enumerate(measured(entry).items()):
            error = error_cell(line.get("gradient_error"))
            if "loss_error" in line:
                error = f"loss {error_cell(line['loss_error'])}"
            lines.append(
                f"| {entry['title'] if number == 0 else ''} | {name} | {line['milliseconds']:.3f} "
                f"| {percent(line['fraction_of_limit'])} | {mebibytes(line)} | {error} |"
            )
    lines += ["", *_views(result), *_small(result)]
    failures = not_measured(result)
    if failures:
        lines += ["Not measured:", "", *(f"- {failure}" for failure in failures), ""]
    timed = dict.fromkeys((line["implementation"], line["timed"]) for e in result["results"] for line in e["rows"])
    lines += ["What is timed:", "", *(f"- {name}: {what}." for name, what in timed), ""]
    return "\n".join(
        [
            *lines,
            "Limit: what must move (both models' rows that count read once, the gradient written once) at the speed "
            f"of this run's fastest device copy, {copy_gigabytes(result):.0f} GB/s read and written. {result['inputs']}"
            f" {result['timing']}",
            "",
            provenance(result, result["results"]),
        ]
    )


def _views(result: Result) -> list[str]:
    lines = []
    for entry in result["results"]:
        found = measured(entry) if entry["case"]["kind"] == "view" else {}
        for name in OURS:
            if name in found and f"{name}, contiguous" in found:
                ratio = found[name]["milliseconds"] / found[f"{name}, contiguous"]["milliseconds"]
                lines += [f"{name} on the view takes {ratio:.2f} times as long as on contiguous tensors.", ""]
    return lines


def _small(result: Result) -> list[str]:
    entries = [entry for entry in result["results"] if entry["case"]["kind"] == "small" and entry["rows"]]
    if not entries:
        return []
    lines = [
        "| small batches | implementation | µs a call, by the host's clock | µs on the GPU, in a CUDA graph "
        "| of the limit (by the graph, where captured) | gradient error |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for entry in entries:
        for number, (name, line) in enumerate(measured(entry).items()):
            graph = line.get("graph_ms")
            on_gpu = f"not captured: {line.get('graph_error')}" if graph is None else f"{1e3 * graph:.1f}"
            lines.append(
                f"| {entry['title'] if number == 0 else ''} | {name} | {1e3 * line['milliseconds']:.1f} | {on_gpu} "
                f"| {percent(line['fraction_of_limit'])} | {error_cell(line.get('gradient_error'))} |"
            )
    return [*lines, ""]


def summary(result: Result) -> str:
    """The README's tables: everyone at the headline's width, and ours at every width."""
    found = _cases(result, HEADLINE)
    contested = [name for name in CONTESTED if found.get((name, HEADLINE))]
    rows = next((e["case"]["rows"] for e in result["results"] if _plain(e) and e["case"]["width"] == HEADLINE), 0)
    names = dict.fromkeys(name for divergence in contested for name in found[divergence, HEADLINE])
    lines = [
        f"Loss and gradient of {rows} × {HEADLINE} bf16 logits: milliseconds, share of the limit (both models' logits "
        "read and the gradient written once at the speed of a device copy, "
        f"{copy_gigabytes(result):.0f} GB/s in this run), and peak MiB above the inputs.",
        "",
        f"| | {' | '.join(contested)} |",
        "|---|" + "---:|" * len(contested),
    ]
    for name in names:
        cells = []
        for divergence in contested:
            line = found[divergence, HEADLINE].get(name)
            cells.append(
                "–"
                if line is None
                else f"{line['milliseconds']:.2f}, {percent(line['fraction_of_limit'])}, {mebibytes(line)}"
            )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    shown = [entry for (divergence, _), entry in steps(result).items() if divergence in DIVERGENCES]
    return "\n".join([*lines, "", *_fractions(result), "", provenance(result, shown)])


def _fractions(result: Result) -> list[str]:
    found = _cases(result)
    widths = sorted({width for _, width in found})
    lines = [
        "Share of the limit by vocabulary size, in %, CUDA / Triton (50257: rows that are not aligned to 16 bytes):",
        "",
        f"| | {' | '.join(map(str, widths))} |",
        "|---|" + "---:|" * len(widths),
    ]
    for divergence in DIVERGENCES:
        cells = [
            " / ".join(
                f"{100 * line['fraction_of_limit']:.0f}" if (line := lines_of.get(name)) else "–" for name in OURS
            )
            for lines_of in (found.get((divergence, width), {}) for width in widths)
        ]
        if any((divergence, width) in found for width in widths):
            lines.append(f"| {divergence} | {' | '.join(cells)} |")
    return lines


def compact(result: Result) -> str:
    """For tuning: divergence × width and backend, milliseconds and fraction. "!": a gradient that is wrong."""
    found = {
        (divergence + (", peaked" if peaked else ""), width): lines
        for peaked in (False, True)
        for (divergence, width), lines in _cases(result, peaked=peaked).items()
    }
    columns = [(width, name) for width in dict.fromkeys(width for _, width in found) for name in OURS]
    heads = [f"{width} {'CUDA' if name == CUDA else 'Triton'}" for width, name in columns]
    lines = [" " * 32 + "".join(f"{head:>17}" for head in heads)]
    for title in dict.fromkeys(title for title, _ in found):
        cells = []
        for width, name in columns:
            line = found.get((title, width), {}).get(name)
            if line is None:
                cells.append("–")
                continue
            right = line["gradient_error"] <= 4e-3  # a bf16 gradient's rounding leaves 1.7e-3; NaN is wrong
            fraction = f"{line['fraction_of_limit']:.3f}".removeprefix("0")
            cells.append(f"{line['milliseconds']:.3f}  {fraction}{' ' if right else '!'}")
        lines.append(f"{title:32}" + "".join(f"{cell:>17}" for cell in cells))
    return "\n".join([*lines, f"copy: {copy_gigabytes(result):.0f} GB/s", *not_measured(result)])


def plot(result: Result, path: Path) -> None:
    """Ours by vocabulary size, as shares of the limit; everyone's time and memory at the headline's width."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 8.2))
    for axis, name in zip(axes[0], OURS, strict=True):
        _plot_fractions(axis, result, name)
    axes[0][1].legend(*axes[0][0].get_legend_handles_labels(), fontsize=8, loc="lower right", ncols=2)
    for axis, divergence in zip(axes[1], ("forward_kl", "jensen_shannon"), strict=True):
        _plot_times(axis, result, divergence)
    environment = result["environment"]
    figure.suptitle(
        f"kdkernels: loss and gradient from bf16 logits, {environment['device']}, torch {environment['torch']}",
        fontsize=11,
    )
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _plot_fractions(axis: Any, result: Result, name: str) -> None:
    found = _cases(result)
    widths = sorted({width for _, width in found})
    for colour, divergence in zip(COLOURS, DIVERGENCES, strict=True):
        points = [
            (place, 100 * found[divergence, width][name]["fraction_of_limit"])
            for place, width in enumerate(widths)
            if name in found.get((divergence, width), {})
        ]
        axis.plot(
            *zip(*points, strict=True) if points else ([], []), "o-", color=colour, label=divergence, ms=4, lw=1.4
        )
    axis.set_xticks(range(len(widths)), [str(width) for width in widths], fontsize=8)
    axis.set_ylim(0, 105)
    axis.axhline(100, color="#c0392b", linewidth=1, linestyle="--")
    axis.set_xlabel("vocabulary size", fontsize=9)
    axis.set_ylabel("% of the memory limit", fontsize=9)
    axis.set_title(f"{'CUDA' if name != TRITON else 'Triton'} kernels", fontsize=10)
    axis.tick_params(axis="y", labelsize=8)
    axis.grid(axis="y", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def _plot_times(axis: Any, result: Result, divergence: str) -> None:
    entries = [e for e in result["results"] if _plain(e) and e["case"]["width"] == HEADLINE]
    entry = next((e for e in entries if e["case"]["divergence"] == divergence and measured(e)), None)
    if entry is None:
        axis.set_axis_off()
        axis.set_title(f"{divergence}: not measured", fontsize=10)
        return
    bars(axis, measured(entry).values(), entry["limit_ms"], "memory limit")
    axis.set_title(f"{divergence}, {entry['case']['rows']} × {HEADLINE}: time, peak memory", fontsize=10)


def bars(axis: Any, lines: Iterable[Line], limit: float, limited_by: str) -> None:
    """Bars of time, fastest first, with the peak memory at each and the limit as a line."""
    lines = sorted(lines, key=lambda line: line["milliseconds"])
    names = [line["implementation"] for line in lines]
    times = [line["milliseconds"] for line in lines]
    colours = ["#3b6fb6" if name.startswith("kdkernels") else "#b8bcc4" for name in names]
    for bar, line in zip(axis.barh(names, times, color=colours), lines, strict=True):
        text = f" {line['milliseconds']:.2f} ms · {mebibytes(line)} MiB"
        axis.text(bar.get_width(), bar.get_y() + bar.get_height() / 2, text, va="center", fontsize=8)
    axis.axvline(limit, color="#c0392b", linewidth=1, linestyle="--", label=limited_by)
    axis.set_xscale("log")
    axis.set_xlim(0.5 * min(limit, *times), 12 * max(times))
    axis.invert_yaxis()
    axis.set_xlabel("ms (log scale)", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.legend(fontsize=8, loc="upper right")
    axis.spines[["top", "right"]].set_visible(False)
