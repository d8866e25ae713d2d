"""Result files, and the tables and plots made from them: nothing here measures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.losses import FAMILY

Result = dict[str, Any]
Entry = dict[str, Any]  # one case of a result


def save(result: Result, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def load(path: Path) -> Result:
    return dict(json.loads(path.read_text()))


def title(entry: Entry) -> str:
    if "title" in entry:
        return str(entry["title"])
    case = entry["case"]
    return f"{case['divergence']}, {case['dtype']}, {case['rows']} × {case['width']}"


def table(heads: Sequence[str], texts: int, rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose first ``texts`` columns are text; "" without rows."""
    lines = ["|" + "|".join(f" {cell} " if cell else " " for cell in row) + "|" for row in (heads, *rows)]
    rule = "|" + "---|" * texts + "---:|" * (len(heads) - texts)
    return "\n".join([lines[0], rule, *lines[1:]]) if len(lines) > 1 else ""


def measured_on(environment: dict[str, str]) -> str:
    return ", ".join(f"{key} {value}" if key != "device" else value for key, value in environment.items())


def provenance(result: Result, entries: Sequence[Entry]) -> str:
    """What these entries were measured on, and what differs for those of a later run that was merged."""
    parts = [f"Measured on: {measured_on(result['environment'])}."]
    later: dict[str, list[str]] = {}
    for entry in entries:
        if "run" in entry:
            later.setdefault(_differences(entry["run"]), []).append(title(entry))
    parts += [f"In a later run, {what}: {'; '.join(titles)}." for what, titles in later.items()]
    return " ".join(parts)


def _differences(run: dict[str, Any]) -> str:
    parts = [measured_on(run["environment"])] if run["environment"] else []
    if "copy" in run:
        parts.append(f"copy {max(run['copy']['bytes_per_second'], default=float('nan')) / 1e9:.0f} GB/s")
    if "rounds" in run:
        parts.append(f"rounds {run['rounds']}")
    return ", ".join(parts) or "of the same day and commit"


def merge(old: Result, new: Result, order: Sequence[str]) -> Result:
    """``old`` with the entries of ``new`` in the place of those of the same title; all in the order of these titles.

    An entry of ``new`` says under "run" what of its run differs from ``old``'s: environment, copy, number of calls.

    Raises:
        ValueError: they were measured on different devices.
    """
    check_same_device(old, new)
    names = {title(entry) for entry in new["results"]}
    kept = [entry for entry in old["results"] if title(entry) not in names]
    if not kept:
        return new
    run = differing(old, new)
    run |= {key: new[key] for key in ("copy", "effort", "rounds") if key in new and new[key] != old.get(key)}
    places = {name: place for place, name in enumerate(order)}
    entries = [*kept, *({**entry, "run": run} for entry in new["results"])]
    entries.sort(key=lambda entry: places.get(title(entry), len(places)))
    return {**old, **{key: new[key] for key in ("inputs", "timing") if key in new}, "results": entries}


def check_same_device(old: Result, new: Result) -> None:
    """
    Raises:
        ValueError: the results are of different devices.
    """
    if old["environment"]["device"] != new["environment"]["device"]:
        devices = f"{new['environment']['device']} into one of {old['environment']['device']}"
        raise ValueError(f"a result of {devices} cannot be merged")


def differing(old: Result, new: Result) -> dict[str, Any]:
    """What of the environment of ``new``'s run differs from ``old``'s."""
    before, now = old["environment"], new["environment"]
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return {"environment": {key: now.get(key, "none") for key in keys}}


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
                f"| {title(entry) if number == 0 else ''} | {row['implementation']} "
                f"| {row['milliseconds']:.1f} | {eager['milliseconds'] / row['milliseconds']:.1f} "
                f"| {row['fraction_of_limit']:.2f} | {peak} | {row['gradient_error']:.0e} |"
            )
    note = (
        "Limit: both models' logits read and the gradient written once, at the speed of the fastest copy in this run. "
        f"Peak: above the inputs. Medians of 3 × {result['rounds']} calls. {provenance(result, result['results'])}"
    )
    return "\n".join([*lines, "", note])


def plain(result: Result) -> list[Entry]:
    """The entries of divergences that split no vocabulary."""
    return [entry for entry in result["results"] if entry["case"]["divergence"] not in FAMILY]


def summary(result: Result) -> str:
    """The README's table: a line per case that splits no vocabulary."""
    entries = plain(result)
    names = [row["implementation"] for row in entries[0]["rows"]]
    case = entries[0]["case"]
    lines = [
        f"Loss and gradient of {case['rows']} × {case['width']} logits: milliseconds (and peak MiB above the inputs).",
        "",
        f"| | {' | '.join(names)} | times faster than eager, torch.compile |",
        "|---|" + "---:|" * (len(names) + 1),
    ]
    for entry in entries:
        rows = {row["implementation"]: row for row in entry["rows"]}
        ours = rows["kdkernels"]["milliseconds"]
        faster = ", ".join(f"{rows[peer]['milliseconds'] / ours:.1f}" for peer in ("eager", "torch.compile"))
        cells = " | ".join(map(cell, rows.values()))
        lines.append(f"| {entry['case']['divergence']}, {entry['case']['dtype']} | {cells} | {faster} |")
    return "\n".join([*lines, "", provenance(result, entries)])


def cell(row: dict[str, Any]) -> str:
    """Milliseconds and peak memory of a line."""
    return f"{row['milliseconds']:.0f}" + ("" if row["peak_mib"] is None else f" ({row['peak_mib']:.0f})")


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

    entries = plain(result)
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
