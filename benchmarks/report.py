"""Result files, and the tables and plots made from them: nothing here measures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Result = dict[str, Any]


def save(result: Result, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def load(path: Path) -> Result:
    return dict(json.loads(path.read_text()))


def title(case: dict[str, Any]) -> str:
    return f"{case['divergence']}, {case['dtype']}, {case['rows']} × {case['width']}"


def measured_on(environment: dict[str, str]) -> str:
    return ", ".join(f"{key} {value}" if key != "device" else value for key, value in environment.items())


def markdown(result: Result) -> str:
    """One table of all cases: a line per implementation."""
    lines = [
        "| loss and gradient | implementation | ms | times faster than eager | fraction of limit | peak MiB "
        "| gradient error |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for entry in result["results"]:
        eager = next(row for row in entry["rows"] if row["implementation"] == "eager")
        for number, row in enumerate(entry["rows"]):
            peak = "n/a" if row["peak_mib"] is None else f"{row['peak_mib']:.1f}"
            lines.append(
                f"| {title(entry['case']) if number == 0 else ''} | {row['implementation']} "
                f"| {row['milliseconds']:.1f} | {eager['milliseconds'] / row['milliseconds']:.1f} "
                f"| {row['fraction_of_limit']:.2f} | {peak} | {row['gradient_error']:.0e} |"
            )
    note = (
        "Limit: both models' logits read and the gradient written once, at the speed of the fastest copy in this run. "
        f"Peak: above the inputs. Medians of 3 × {result['rounds']} calls. {measured_on(result['environment'])}."
    )
    return "\n".join([*lines, "", note])


def summary(result: Result) -> str:
    """The README's table: a line per case."""
    names = [row["implementation"] for row in result["results"][0]["rows"]]
    case = result["results"][0]["case"]
    lines = [
        f"Loss and gradient of {case['rows']} × {case['width']} logits: milliseconds (and peak MiB above the inputs).",
        "",
        f"| | {' | '.join(names)} | times faster than eager, torch.compile |",
        "|---|" + "---:|" * (len(names) + 1),
    ]
    for entry in result["results"]:
        rows = {row["implementation"]: row for row in entry["rows"]}
        cells = [
            f"{row['milliseconds']:.0f}" + ("" if row["peak_mib"] is None else f" ({row['peak_mib']:.0f})")
            for row in rows.values()
        ]
        ours = rows["kdkernels"]["milliseconds"]
        faster = ", ".join(f"{rows[peer]['milliseconds'] / ours:.1f}" for peer in ("eager", "torch.compile"))
        lines.append(f"| {entry['case']['divergence']}, {entry['case']['dtype']} | {' | '.join(cells)} | {faster} |")
    return "\n".join([*lines, "", f"Measured on: {measured_on(result['environment'])}."])


def write_between_markers(path: Path, name: str, text: str) -> None:
    """Replaces what stands between <!-- name --> and <!-- /name --> in a Markdown file; "" empties it."""
    before, rest = path.read_text().split(f"<!-- {name} -->\n")
    _, after = rest.split(f"<!-- /{name} -->")
    body = f"{text}\n" if text else ""
    path.write_text(f"{before}<!-- {name} -->\n{body}<!-- /{name} -->{after}")


def plot(result: Result, path: Path) -> None:
    """Bars of time per case, with the limit as a line and the peak memory written at each bar."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    entries = result["results"]
    figure, axes = plt.subplots(2, (len(entries) + 1) // 2, figsize=(13, 6.2), squeeze=False)
    for axis, entry in zip(axes.flat, entries, strict=False):
        rows = entry["rows"]
        colours = ["#3b6fb6" if row["implementation"].startswith("kdkernels") else "#b8bcc4" for row in rows]
        bars = axis.barh([row["implementation"] for row in rows], [row["milliseconds"] for row in rows], color=colours)
        for bar, row in zip(bars, rows, strict=True):
            peak = "" if row["peak_mib"] is None else f" · {row['peak_mib']:.0f} MiB"
            text = f" {row['milliseconds']:.0f} ms{peak}"
            axis.text(bar.get_width(), bar.get_y() + bar.get_height() / 2, text, va="center", fontsize=8)
        axis.axvline(entry["limit_ms"], color="#c0392b", linewidth=1, linestyle="--", label="memory limit")
        axis.invert_yaxis()
        axis.set_xlim(0, 1.45 * max(row["milliseconds"] for row in rows))
        axis.set_title(f"{entry['case']['divergence']}, {entry['case']['dtype']}", fontsize=10)
        axis.set_xlabel("ms", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes.flat[0].legend(fontsize=8, loc="lower right")
    case, environment = entries[0]["case"], result["environment"]
    figure.suptitle(
        f"Loss and gradient of {case['rows']} × {case['width']} logits: time, and peak memory above the inputs\n"
        f"{environment['device']}, {environment['threads']} threads, torch {environment['torch']}",
        fontsize=11,
    )
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
