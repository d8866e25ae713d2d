"""The README's examples of each framework run as they stand, after its first one."""

from __future__ import annotations

import re
import sys
import warnings
from types import ModuleType, SimpleNamespace

import pytest
import torch
from frameworks import import_quietly

from benchmarks.environment import ROOT

README = (ROOT / "README.md").read_text()
SECTION = README.split("\n## Use it with\n")[1].split("\n## ")[0]
EXAMPLES = dict(re.findall(r"### (.*?)\n\n```python\n(.*?)```", SECTION, flags=re.DOTALL))
FRAMEWORKS = (
    "transformers",
    "TRL",
    "Liger Kernel",
    "ModelOpt",
    "NeMo Automodel",
    "torchtune",
    "verl",
    "DistillKit",
    "mdistiller",
)


def first_example() -> dict:
    """Names of the README's first example, on a smaller vocabulary."""
    names: dict = {}
    exec(re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)[0].replace("32000", "320"), names)
    names["student_logits"].grad = None
    return names


def run(framework: str, names: dict) -> dict:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(EXAMPLES[framework].replace("32000", "320"), names)
    return names


def test_there_is_an_example_of_each():
    assert tuple(EXAMPLES) == FRAMEWORKS
    for example in EXAMPLES.values():
        assert len([line for line in example.splitlines() if line]) <= 5


@pytest.mark.parametrize("framework", [name for name in FRAMEWORKS if name not in ("transformers", "verl")])
def test_examples(framework):
    if framework == "TRL":
        import_quietly("trl.experimental.gkd")
    torch.manual_seed(0)
    names = first_example()
    try:
        run(framework, names)
    finally:
        if framework == "TRL":
            from kdkernels.integrations.trl import unpatch_trl

            unpatch_trl()
    trained = [names["hidden"], names["head"]] if framework == "Liger Kernel" else [names["student_logits"]]
    for tensor in trained:
        assert tensor.grad.isfinite().all()
        assert tensor.grad.norm() > 0


def test_transformers(tmp_path):
    transformers = import_quietly("transformers")
    import_quietly("accelerate")

    def build(hidden: int) -> torch.nn.Module:
        shape = {"intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(vocab_size=320, hidden_size=hidden, max_position_embeddings=16, **shape)
        )

    student, teacher = build(32), build(48)
    before = student.get_input_embeddings().weight.detach().clone()
    ids = torch.randint(0, 320, (8, 16))
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True
    )
    run(
        "transformers",
        {
            "student": student,
            "teacher": teacher,
            "args": args,
            "dataset": [{"input_ids": row, "labels": row} for row in ids],
            "Trainer": transformers.Trainer,
        },
    )
    assert (student.get_input_embeddings().weight - before).norm() > 0


def test_verl(monkeypatch):
    """verl itself needs ray to be imported: a stand-in holds the name that is assigned to."""
    package = ""
    for part in ("verl", "trainer", "distillation", "fsdp", "losses"):
        parent, package = package, f"{package}.{part}".lstrip(".")
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
        if parent:
            setattr(sys.modules[parent], part, sys.modules[package])
    names = run("verl", first_example())
    values, ids = names["teacher_logits"].log_softmax(-1).topk(64)
    config = SimpleNamespace(distillation_loss=SimpleNamespace(log_prob_min_clamp=-10.0))
    losses = sys.modules["verl.trainer.distillation.fsdp.losses"]
    found = losses.compute_forward_kl_topk(names["student_logits"], values, ids, config, "bshd")  # type: ignore[attr-defined]
    found["distillation_losses"].sum().backward()
    assert names["student_logits"].grad.norm() > 0
