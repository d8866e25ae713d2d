"""Tables and the plot of a result of `python -m benchmarks sparse`: nothing here measures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.contenders import CUDA, IN_PLACE, TRITON
from benchmarks.linear_peers import BARE_OF_STUDENT, EAGER_NAME, OURS
from benchmarks.report import Entry, Result, table
from benchmarks.report_cuda import bars, copy_gigabytes, error_cell, measured, mebibytes, not_measured, percent
from benchmarks.report_linear import gibibytes, of_kind, provenance_by_line
from benchmarks.sparse_cases import Case
from benchmarks.sparse_peers import GATHERED

Line = dict[str, Any]

PANELS = 6
OURS_FP32 = f"{OURS}, fp32 logits"


def case_of(entry: Entry) -> Case:
    return Case(**{**entry["case"], "logits": tuple(entry["case"]["logits"])})


def markdown(result: Result) -> str:
    """Every case, a line per implementation; then what failed, and what was timed of whom."""
    parts = [_logits(of_kind(result, "logits")), _hidden(of_kind(result, "hidden"))]
    if failures := not_measured(result):
        parts.append("\n".join(["Not measured:", "", *(f"- {failure}" for failure in failures)]))
    timed = dict.fromkeys((line["implementation"], line["timed"]) for e in result["results"] for line in e["rows"])
    parts.append("\n".join(["What is timed:", "", *(f"- {name}: {what}." for name, what in timed)]))
    parts += [
        "Limit: what must move (the student's logits read once, the gradient written once; of renormalize the gradient "
        f"alone) at the speed of this run's fastest copy, {copy_gigabytes(result):.0f} GB/s read and written. TFLOP/s: "
        f"the operations of the three products in the time of the whole. {result['inputs']} {result['timing']}",
        _facts(result["results"]),
        provenance_by_line(result, result["results"]),
    ]
    return "\n\n".join(part for part in parts if part)


def _logits(entries: list[Entry]) -> str:
    heads = ("case", "implementation", "ms", "of the limit", "peak MiB", "error of the loss", "of the gradient")
    return table(
        heads,
        2,
        [
            [
                entry["title"] if number == 0 else "",
                name,
                f"{line['milliseconds']:.3f}",
                percent(line["fraction_of_limit"]),
                mebibytes(line),
                error_cell(line.get("loss_error")),
                error_cell(line.get("gradient_error")),
            ]
            for entry in entries
            for number, (name, line) in enumerate(measured(entry).items())
        ],
    )


def _hidden(entries: list[Entry]) -> str:
    heads = ("case", "implementation", "ms", "× three products", "TFLOP/s", "peak MiB", "error of the loss")
    return table(
        (*heads, "of dX", "of dW"),
        2,
        [
            [
                entry["title"] if number == 0 else "",
                name,
                f"{line['milliseconds']:.2f}",
                f"{line['over_bare']:.2f}",
                f"{line['teraflops']:.3g}",
                mebibytes(line),
                *(error_cell(line.get(key)) for key in ("loss_error", "hidden_error", "weight_error")),
            ]
            for entry in entries
            for number, (name, line) in enumerate(measured(entry).items())
        ],
    )


def _facts(entries: Sequence[Entry]) -> str:
    """What the ids hold of the teachers, and how often the commonest comes where the ids are Zipfian."""
    known = [entry["teacher"] for entry in entries if "teacher" in entry]
    if not known:
        return ""
    masses = [teacher["teacher_mass"] for teacher in known]
    ends = dict.fromkeys(f"{100 * mass:.0f}" for mass in (min(masses), max(masses)))
    text = f"The ids hold {' to '.join(ends)} % of the teacher's mass, a mean over rows."
    zipf = [entry["teacher"]["commonest_id"] for entry in entries if entry["case"]["zipf"] and "teacher" in entry]
    if zipf:
        text += f" Zipfian: the commonest id is in {100 * min(zipf):.0f} % of the rows."
    return text


def headline(result: Result) -> list[Entry]:
    """The cases of the summary that start from logits: those that differ from the first in their tails alone."""
    entries = of_kind(result, "logits")
    cases = [replace(case_of(entry), tail="", field="ours") for entry in entries]
    return [entry for entry, case in zip(entries, cases, strict=True) if case == cases[0]]


def _shape(entry: Entry) -> str:
    return case_of(entry).shape


def _names(found: Iterable[dict[str, Line]]) -> list[str]:
    """Who has a time, in the order of who runs; the second eager form beside the first."""
    names = list(dict.fromkeys(name for lines in found for name in lines))
    if GATHERED in names and EAGER_NAME in names:
        names.remove(GATHERED)
        names.insert(names.index(EAGER_NAME) + 1, GATHERED)
    return names


def _columns(entries: list[Entry], heads: Sequence[str], cell: Callable[[str, Line], str]) -> str:
    """A column for each case, a row for each implementation that has a time in any of them."""
    found = [measured(entry) for entry in entries]
    names = _names(found)
    rows = [[name, *(cell(name, at[name]) if name in at else "–" for at in found)] for name in names]
    return table(("", *heads), 1, rows)


def summary(result: Result) -> str:
    """The README's tables of a GPU: everyone on the logits of the headline, then everyone from hidden states."""
    parts, shown = [], []
    if entries := headline(result):
        case = case_of(entries[0])
        table = _columns(
            entries,
            [entry["case"]["tail"] for entry in entries],
            lambda name, line: f"{line['milliseconds']:.2f}, {percent(line['fraction_of_limit'])}, {mebibytes(line)}",
        )
        parts += [
            f"A teacher known by its {case.ids} most likely tokens a row, {case.shape} {_short(case.dtype)} logits: "
            "milliseconds of loss and gradient, share of the limit (the student's logits read and the gradient written "
            "once, of renormalize the gradient alone, at the speed of a device copy, "
            f"{copy_gigabytes(result):.0f} GB/s in this run), and peak MiB above the inputs.",
            table,
        ]
        shown += entries
    if entries := of_kind(result, "hidden"):
        parts += [
            "The same from hidden states and the lm_head weight: milliseconds of loss and both gradients, times what "
            "the three matrix products alone take, and peak memory, the gradients included.",
            _columns(entries, [f"{case_of(entry).name}, {_shape(entry)}" for entry in entries], _hidden_cell),
        ]
        shown += entries
    return _with_provenance(result, parts, shown)


def _hidden_cell(name: str, line: Line) -> str:
    if name == BARE_OF_STUDENT:
        return f"{line['milliseconds']:.1f}, {line['teraflops']:.0f} TFLOP/s"
    return f"{line['milliseconds']:.1f}, {line['over_bare']:.2f}×, {gibibytes(line)}"


def _short(dtype: str) -> str:
    return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[dtype]


def _with_provenance(result: Result, parts: Sequence[str], shown: list[Entry]) -> str:
    """ "" where none of the tables has a line."""
    if not any(measured(entry) for entry in shown):
        return ""
    return "\n\n".join([*(part for part in parts if part), provenance_by_line(result, shown)])


def page(result: Result) -> str:
    """The page's tables of a GPU: ours beside eager in every case, and how much less "renormalize" takes."""
    logits, hidden = of_kind(result, "logits"), of_kind(result, "hidden")
    parts = [
        "From bf16 logits: milliseconds of loss and gradient, and share of the limit; peaks in MiB above the inputs; "
        "errors of loss and gradient against fp64.",
        table(
            ("", "CUDA", "Triton", "in place", "times faster than eager", "peak, eager's", "errors"),
            1,
            [_logits_row(entry) for entry in logits],
        ),
    ]
    if hidden:
        parts += [
            "From hidden states: milliseconds of loss and both gradients, and times what the three products alone "
            "take; errors of dX and dW.",
            table(
                ("", "fp32 logits", "bf16 logits", "times faster than eager", "peak, eager's", "errors"),
                1,
                [_hidden_row(entry) for entry in hidden],
            ),
            less_than_bucket(hidden),
        ]
    return _with_provenance(result, [*parts, _facts([*logits, *hidden])], [*logits, *hidden])


def _logits_row(entry: Entry) -> list[str]:
    found = measured(entry)
    times = [
        f"{found[name]['milliseconds']:.2f}, {percent(found[name]['fraction_of_limit'])}" if name in found else "–"
        for name in (CUDA, TRITON, IN_PLACE)
    ]
    ours = next((found[name] for name in (CUDA, TRITON) if name in found), None)
    beside = _beside_eager(ours, found.get(EAGER_NAME), mebibytes)
    return [f"{case_of(entry).name}, {_shape(entry)}", *times, *beside, _errors(ours, "loss_error", "gradient_error")]


def _hidden_row(entry: Entry) -> list[str]:
    found = measured(entry)
    names = (OURS_FP32, f"{OURS}, bf16 logits")
    times = [
        f"{found[name]['milliseconds']:.1f}, {found[name]['over_bare']:.2f}×" if name in found else "–"
        for name in names
    ]
    ours = found.get(OURS_FP32)
    beside = _beside_eager(ours, found.get(EAGER_NAME), gibibytes)
    return [f"{case_of(entry).name}, {_shape(entry)}", *times, *beside, _errors(ours, "hidden_error", "weight_error")]


def _beside_eager(ours: Line | None, eager: Line | None, peak: Callable[[Line], str]) -> list[str]:
    """Times faster than eager, and both peaks."""
    if ours is None:
        return ["–", "–"]
    if eager is None:
        return ["–", peak(ours)]
    return [f"{eager['milliseconds'] / ours['milliseconds']:.1f}", f"{peak(ours)}, {peak(eager)}"]


def _errors(line: Line | None, *keys: str) -> str:
    return "–" if line is None else ", ".join(error_cell(line.get(key)) for key in keys)


def less_than_bucket(entries: Iterable[Entry]) -> str:
    """How many times as long as "renormalize" our "bucket" takes from the same hidden states; "" where none does."""
    lines = {(_shape(entry), case_of(entry).name): measured(entry).get(OURS_FP32) for entry in entries}
    parts = []
    for (shape, name), line in lines.items():
        short = lines.get((shape, "renormalize"))
        if name == "bucket" and line is not None and short is not None:
            parts.append(f"{line['milliseconds'] / short['milliseconds']:.1f} times as long at {shape}")
    return f"Beside renormalize from the same hidden states, bucket takes {', '.join(parts)}." if parts else ""


def cpu(result: Result) -> str:
    """The README's table of a CPU: a line per tail and dtype."""
    entries = of_kind(result, "logits")
    names = _names(map(measured, entries))
    rows = []
    for entry in entries:
        found = measured(entry)
        cells = [_cpu_cell(found[name]) if name in found else "–" for name in names]
        faster, share = "–", "–"
        if OURS in found and EAGER_NAME in found:
            ours, eager = found[OURS], found[EAGER_NAME]
            faster = f"{eager['milliseconds'] / ours['milliseconds']:.1f}"
            if ours.get("peak_mib") is not None and eager.get("peak_mib"):
                share = f"{100 * ours['peak_mib'] / eager['peak_mib']:.0f} %"
        rows.append([f"{case_of(entry).name}, {entry['case']['dtype']}", *cells, faster, share])
    parts = [table(("", *names, "times faster than eager", "of eager's peak"), 1, rows)]
    if entries:
        case = case_of(entries[0])
        parts.insert(
            0,
            f"A teacher known by its {case.ids} most likely tokens a row, {case.shape} logits: milliseconds of loss "
            "and gradient (and peak MiB above the inputs).",
        )
    return _with_provenance(result, parts, entries)


def _cpu_cell(line: Line) -> str:
    peak = "" if line.get("peak_mib") is None else f" ({line['peak_mib']:.0f})"
    return f"{line['milliseconds']:.1f}{peak}"


def plot(result: Result, path: Path) -> bool:
    """Time and memory of everyone: every tail from logits, and the first cases from hidden states.

    False, and no file, where nothing started from hidden states: then the tables say as much.
    """
    entries = [entry for entry in [*headline(result), *of_kind(result, "hidden")] if measured(entry)][:PANELS]
    if not entries or entries[-1]["case"]["kind"] != "hidden":
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(len(entries), 3)
    height = -(-len(entries) // columns)
    figure, axes = plt.subplots(height, columns, figsize=(5.2 * columns, 3.1 * height + 0.6), squeeze=False)
    for axis in axes.flat[len(entries) :]:
        axis.set_axis_off()
    for axis, entry in zip(axes.flat, entries, strict=False):
        lines = measured(entry)
        products = lines.pop(BARE_OF_STUDENT, None)
        limit = entry["limit_ms"] if products is None else products["milliseconds"]
        bars(axis, lines.values(), limit, "memory limit" if products is None else BARE_OF_STUDENT)
        axis.set_title(f"{case_of(entry).name}, {_shape(entry)}", fontsize=10)
    environment = result["environment"]
    figure.suptitle(
        f"A teacher known by a few tokens a row: loss and gradient, {_short(entries[0]['case']['dtype'])}, time and "
        f"peak memory\n{environment['device']}, torch {environment['torch']}",
        fontsize=11,
    )
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return True
