"""Training steps inside transformers' Trainer and TRL's GKDTrainer, with their own losses and with the adapters.

Each run is a few steps of the framework's own training loop on random weights and random tokens. Nothing is learned:
what counts is what a step takes, its peak memory, and that both losses are the same.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.environment import describe
from benchmarks.guard import release, said

Line = dict[str, Any]
Model = Any  # a transformers.PreTrainedModel

TIMING = (
    "Steps of the framework's own loop: both models' forward passes, the loss, the student's backward pass, gradient "
    "clipping, AdamW. The host's clock from one step's end to the next, the device waited for; medians. Peak memory: "
    "the allocator's over those steps, above what lies there between two steps (weights, optimizer states). Loss and "
    "gradient norm: of the first step, as the framework logs them."
)


@dataclass(frozen=True)
class Shape:
    """A causal language model of Qwen3's architecture, embeddings tied."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int = 128


@dataclass(frozen=True)
class Case:
    """Both models and a batch of ``sequences`` × ``length`` tokens, of which a quarter is prompt and ignored."""

    title: str
    student: Shape
    teacher: Shape
    vocab_size: int
    sequences: int
    length: int
    dtype: str = "bfloat16"
    warm: int = 5
    steps: int = 20


HEAD = Case(
    "four layers",
    Shape(1024, 3072, 4, 16, 8),
    Shape(2048, 6144, 4, 16, 8),
    vocab_size=151936,
    sequences=4,
    length=1024,
)
#: The shapes of Qwen3-0.6B and Qwen3-1.7B, and what is left of them with a few layers: the host launches a step of
#: all 28 more slowly than a GPU computes it, and hides what the loss takes.
FULL = (
    HEAD,
    replace(HEAD, title="28 layers", student=Shape(1024, 3072, 28, 16, 8), teacher=Shape(2048, 6144, 28, 16, 8)),
)
QUICK = Case(
    "two layers",
    Shape(32, 64, 2, 2, 1, 16),
    Shape(48, 96, 2, 3, 1, 16),
    vocab_size=2000,
    sequences=2,
    length=64,
    dtype="float32",
    warm=1,
    steps=2,
)


def build(shape: Shape, case: Case, device: str, seed: int) -> Model:
    """A model of random weights, on the device."""
    import transformers

    config = transformers.Qwen3Config(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        vocab_size=case.vocab_size,
        max_position_embeddings=case.length,
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(seed)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, case.dtype))


def draw_tokens(case: Case) -> Any:
    """Random tokens for every step; the first quarter of each sequence is prompt."""
    import datasets

    count = case.sequences * (case.warm + case.steps)
    ids = torch.randint(0, case.vocab_size, (count, case.length), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[:, : case.length // 4] = -100
    columns = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return datasets.Dataset.from_dict({name: tensor.tolist() for name, tensor in columns.items()})


def _collate(rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def _settings(case: Case, device: str, folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "max_steps": case.warm + case.steps,
        "per_device_train_batch_size": case.sequences,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "bf16": case.dtype == "bfloat16",
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "use_cpu": torch.device(device).type == "cpu",
        "seed": 0,
    }


@dataclass(frozen=True)
class Contender:
    """A way to train: who it is compared with, what it does, its trainer of (student, teacher, case, device, folder),
    and within what that trains."""

    name: str
    field: str
    timed: str
    make: Callable[[Model, Model, Case, str, str], Any]
    within: Callable[[], AbstractContextManager[None]] = nullcontext


def _trainer(cls: type, student: Model, case: Case, device: str, folder: str, **given: Any) -> Any:
    import transformers

    arguments = transformers.TrainingArguments(**_settings(case, device, folder))
    return cls(model=student, args=arguments, train_dataset=draw_tokens(case), data_collator=_collate, **given)


def _eager_trainer(student: Model, teacher: Model, case: Case, device: str, folder: str) -> Any:
    import transformers

    class Eager(transformers.Trainer):
        """What people write: both models' logits, log-softmax in fp32, F.kl_div, the mean over the labels."""

        def compute_loss(
            self, model: Model, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            labels = inputs.pop("labels")[:, 1:]
            outputs = model(**inputs)
            with torch.no_grad():
                target = teacher(**inputs).logits[:, :-1]
            log_q = F.log_softmax(outputs.logits[:, :-1], dim=-1, dtype=torch.float32)
            log_p = F.log_softmax(target, dim=-1, dtype=torch.float32)
            rows = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
            loss = (rows * (labels != -100)).sum() / num_items_in_batch
            return (loss, outputs) if return_outputs else loss

    return _trainer(Eager, student, case, device, folder)


def _logits_trainer(student: Model, teacher: Model, case: Case, device: str, folder: str) -> Any:
    import transformers

    from kdkernels.integrations.transformers import DistillationLossFunction

    loss = DistillationLossFunction(student, teacher, divergence="forward_kl")
    return _trainer(transformers.Trainer, student, case, device, folder, compute_loss_func=loss)


def _hidden_trainer(student: Model, teacher: Model, case: Case, device: str, folder: str) -> Any:
    import transformers

    from kdkernels.integrations.transformers import DistillationTrainerMixin

    class Distillation(DistillationTrainerMixin, transformers.Trainer):
        pass

    return _trainer(
        Distillation, student, case, device, folder, teacher_model=teacher, loss_options={"divergence": "forward_kl"}
    )


def _no_loss_trainer(student: Model, teacher: Model, case: Case, device: str, folder: str) -> Any:
    import transformers

    class Backbones(transformers.Trainer):
        def compute_loss(
            self, model: Model, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            inputs.pop("labels")
            with torch.no_grad():
                teacher.get_decoder()(**inputs)
            return student.get_decoder()(**inputs).last_hidden_state.float().square().mean()

    return _trainer(Backbones, student, case, device, folder)


def _gkd_trainer(student: Model, teacher: Model, case: Case, device: str, folder: str) -> Any:
    import transformers
    from tokenizers import Tokenizer, models
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    # Asked for by the trainer, and not used: the tokens are there.
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, "<pad>")),
        pad_token="<pad>",
        eos_token="</s>",
    )
    # lmbda = 0: no generation. beta = 0.5 is TRL's default.
    arguments = GKDConfig(**_settings(case, device, folder), lmbda=0.0, beta=0.5)
    return GKDTrainer(
        model=student,
        teacher_model=teacher,
        args=arguments,
        data_collator=_collate,
        train_dataset=draw_tokens(case),
        processing_class=tokenizer,
    )


def _patched() -> AbstractContextManager[None]:
    from kdkernels.integrations.trl import patched_trl

    return patched_trl()


BACKBONES = "both models without their heads, no loss"
FORWARD_KL = "Trainer, forward KL"
GKD = "GKDTrainer, beta 0.5"
CONTENDERS = (
    Contender(BACKBONES, "", "Trainer, with the mean square of the student's hidden states", _no_loss_trainer),
    Contender("eager", FORWARD_KL, "compute_loss from both models' logits in plain PyTorch", _eager_trainer),
    Contender("kdkernels, compute_loss_func", FORWARD_KL, "from both models' logits", _logits_trainer),
    Contender("kdkernels, DistillationTrainerMixin", FORWARD_KL, "from both models' hidden states", _hidden_trainer),
    Contender("TRL", GKD, "its own generalized_jsd_loss, from both models' logits", _gkd_trainer),
    Contender("kdkernels, patch_trl", GKD, "the same trainer", _gkd_trainer, _patched),
)


class Clock:
    """Called back by a trainer: when each step ended, and the memory of those after the warm ones."""

    def __init__(self, case: Case, device: str) -> None:
        self.warm, self.cuda = case.warm, torch.device(device).type == "cuda"
        self.ends: list[float] = []
        self.between = 0

    def end_of_step(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        if self.cuda and len(self.ends) == self.warm:
            release()
            torch.cuda.reset_peak_memory_stats()
            self.between = torch.cuda.memory_allocated()
            self.ends[-1] = time.perf_counter()

    def line(self) -> Line:
        spent = [1e3 * (end - begin) for begin, end in zip(self.ends[self.warm - 1 :], self.ends[self.warm :])]  # noqa: B905
        peak = (torch.cuda.max_memory_allocated() - self.between) / 2**20 if self.cuda else None
        return {"milliseconds": statistics.median(spent), "calls": len(spent), "peak_mib": peak, "times": spent}


def measure(contender: Contender, case: Case, device: str) -> Line:
    """A line: the step's time and peak memory, and the first step's loss and gradient norm."""
    import transformers

    clock = Clock(case, device)

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, *given: Any, **named: Any) -> None:
            clock.end_of_step()

    teacher = build(case.teacher, case, device, seed=1).requires_grad_(False).eval()
    student = build(case.student, case, device, seed=0)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the frameworks' own
        with contender.within():
            trainer = contender.make(student, teacher, case, device, folder)
            trainer.add_callback(Watch())
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.train()
    first = trainer.state.log_history[0]
    return clock.line() | {"loss": float(first["loss"]), "gradient_norm": float(first["grad_norm"])}


def measure_all(case: Case, device: str, without: Sequence[str] = ()) -> Iterator[Line]:
    """A line per contender, one after another; one that fails does not end the run."""
    for contender in CONTENDERS:
        if any(word.lower() in contender.name.lower() for word in without):
            continue
        line: Line = {"implementation": contender.name, "field": contender.field, "timed": contender.timed}
        try:
            line |= measure(contender, case, device)
        except Exception as error:
            line["error"] = said(error)
        release()
        yield line


def run(
    cases: Sequence[Case], device: str = "cuda", *, commit: str | None = None, without: Sequence[str] = ()
) -> dict[str, Any]:
    """Every contender on every case."""
    started = time.perf_counter()
    entries = []
    for case in cases:
        lines = []
        for line in measure_all(case, device, without):
            cells = [f"{name} {line[name]:.6g}" for name in ("milliseconds", "peak_mib", "loss") if line.get(name)]
            about = f"[{time.perf_counter() - started:4.0f} s] {case.title}: {line['implementation']}"
            print(about, *cells, line.get("error", ""), flush=True)
            lines.append(line)
        entries.append({"case": asdict(case), "title": case.title, "rows": lines})
    return {
        "benchmark": "trainers",
        "complete": True,
        "environment": describe(device, commit, ("transformers", "accelerate", "trl")),
        "timing": TIMING,
        "results": entries,
        "seconds": time.perf_counter() - started,
    }
