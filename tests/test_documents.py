"""The documents' examples run as they stand, and their figures are those of the result files."""

import re
import warnings

import pytest
import torch

from benchmarks import __main__ as benchmarks_main
from benchmarks import report
from benchmarks.environment import ROOT

README = (ROOT / "README.md").read_text()
FRAMEWORKS = "\n## Use it with\n"  # examples that need more: tests/integrations/test_readme.py


@pytest.mark.parametrize("document", ["README.md", "docs/decoupled.md", "docs/sparse-teachers.md"])
def test_the_examples_run_in_order(document):
    text = (ROOT / document).read_text()
    if FRAMEWORKS in text:
        before, section = text.split(FRAMEWORKS)
        text = before + section.partition("\n## ")[2]
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) >= 3
    torch.manual_seed(0)
    names: dict = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for block in blocks:
            # The same code on a smaller vocabulary: what is tested is that it runs as pasted.
            exec(block.replace("32000", "320"), names)
    if document == "README.md":
        assert names["student_weight"].grad.abs().sum() > 0
    gradient = names["student_logits"].grad
    assert gradient.shape == (4, 512, 320)
    assert gradient.isfinite().all()


def test_the_choices_run():
    """After the README's first example, whose names they use."""
    page = (ROOT / "docs/choosing.md").read_text()
    first, *choices = re.findall(r"```python\n(.*?)```", README.split("\n## ")[0] + page, flags=re.DOTALL)
    assert len(choices) >= 1
    names: dict = {}
    for block in (first, *choices):
        exec(block.replace("32000", "320"), names)


def test_the_examples_from_hidden_states_run_in_order():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/linear.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    torch.manual_seed(0)
    names: dict = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for block in blocks:
            exec(block, names)
    assert names["hidden"].grad.isfinite().all()
    assert names["weight"].grad.abs().sum() > 0


@pytest.mark.parametrize("document", benchmarks_main.document_blocks(), ids=lambda path: path.name)
def test_the_documents_tables_are_the_result_files_(document):
    """A table without results is empty."""
    text = document.read_text()
    for name, block in benchmarks_main.document_blocks()[document].items():
        between = text.split(f"<!-- {name} -->\n")[1].split(f"<!-- /{name} -->")[0]
        assert between.removesuffix("\n") == block


def test_writing_a_table_changes_only_what_is_between_the_markers(tmp_path):
    copy = tmp_path / "README.md"
    copy.write_text(README)
    report.write_between_markers(copy, "rows-cuda", "a table")
    assert "<!-- rows-cuda -->\na table\n<!-- /rows-cuda -->" in copy.read_text()
    for name, text in benchmarks_main.document_blocks()[ROOT / "README.md"].items():
        report.write_between_markers(copy, name, text)
    assert copy.read_text() == README


def test_links_lead_somewhere():
    for document in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_every_page_is_in_the_index():
    index = (ROOT / "docs/README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name in index


def test_every_divergence_is_in_the_documents():
    import kdkernels as kd

    losses = (ROOT / "docs/losses.md").read_text()
    for name, cls in kd.divergences.BY_NAME.items():
        assert f"`{name}`" in losses
        assert cls.__name__ in losses


def test_benchmark_end_to_end(tmp_path, capsys):
    benchmarks_main.main(["rows", "--rows", "4", "--width", "1000", "--rounds", "1", "--output", str(tmp_path)])
    result = report.load(tmp_path / "rows-cpu.json")
    assert {"device", "torch", "commit"} <= result["environment"].keys()
    for entry in result["results"]:
        for row in entry["rows"]:
            assert row["milliseconds"] > 0
            assert row["gradient_error"] < 1e-2
    assert (tmp_path / "rows-cpu.png").stat().st_size > 10_000
    assert report.markdown(result) in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [["--device", "tpu"], ["columns"]])
def test_benchmark_refuses_what_it_does_not_know(wrong):
    with pytest.raises((SystemExit, RuntimeError)):
        benchmarks_main.main(["rows", *wrong] if len(wrong) > 1 else wrong)
