"""What the Trainer's adapters refuse, as it would give wrong results or none."""

import copy

import pytest
import torch
from torch import nn
from transformers_cases import (
    ADAPTERS,
    OPTIONS,
    VOCABULARY,
    DistillationLossFunction,
    arguments,
    assert_loss_alike,
    batch,
    causal,
    eager_loss,
    one_loss,
    student_of,
    teacher_of,
    trainer_of,
    transformers,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("of", ["student", "teacher"])
def test_unknown_transform_is_refused(tmp_path, of):
    student, teacher = causal("Cohere", 32, 0, logit_scale=0.25), causal("Cohere", 48, 1, logit_scale=0.25)
    expected = eager_loss(student, teacher, batch())
    (student if of == "student" else teacher).config.logit_scale = None  # what the model does is as before
    with pytest.raises(ValueError, match=f"give loss_options {of}_logit_scale"):
        one_loss(tmp_path, "hidden states", student, teacher, batch())
    options = {**OPTIONS, f"{of}_logit_scale": 0.25}
    assert_loss_alike(one_loss(tmp_path, "hidden states", student, teacher, batch(), options=options), expected)


def test_without_labels(tmp_path):
    student = student_of()
    inputs = batch()
    del inputs["labels"]
    for adapter in ADAPTERS:
        trainer = trainer_of(adapter, student, teacher_of(), arguments(tmp_path))
        with pytest.raises(ValueError, match="labels are needed"):
            trainer.compute_loss(student, dict(inputs))


class ScaledLinear(nn.Linear):
    def forward(self, hidden):
        return 2 * super().forward(hidden)


def adapted(model):
    model.lm_head = nn.Sequential(model.lm_head)


def subclassed(model):
    model.lm_head = ScaledLinear(model.config.hidden_size, VOCABULARY, bias=False)


def partitioned(model):
    model.lm_head.weight = nn.Parameter(torch.empty(0))


def on_meta(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.to("meta"))


def twice(model):
    again = torch.zeros(1, 1, model.lm_head.in_features)
    model.register_forward_hook(lambda module, args, outputs: module.lm_head(again))


def never(model):
    model.forward = lambda input_ids, attention_mask: transformers.modeling_outputs.CausalLMOutput(
        logits=model.model(input_ids, attention_mask).last_hidden_state @ model.lm_head.weight.T
    )


def router(model):
    def with_aux_loss(module, args, outputs):
        outputs["aux_loss"] = outputs.logits.sum()

    model.register_forward_hook(with_aux_loss)


@pytest.mark.parametrize("of", ["model", "teacher_model"])
@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (adapted, TypeError, "output embedding must be a plain torch.nn.Linear.*got Sequential"),
        (subclassed, TypeError, "got ScaledLinear"),
        (partitioned, ValueError, r"got \(0,\): it is partitioned"),
        (on_meta, TypeError, "on the meta device"),
        (twice, NotImplementedError, "called twice"),
        (never, NotImplementedError, "never called its output embedding"),
    ],
)
def test_heads_that_are_refused(tmp_path, of, spoil, error, message):
    student, teacher = student_of(), teacher_of()
    trainer = trainer_of("hidden states", student, teacher, arguments(tmp_path))
    spoil(student if of == "model" else teacher)
    with pytest.raises(error, match=message):
        trainer.compute_loss(student, batch())


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_auxiliary_losses_are_refused(tmp_path, adapter):
    student = student_of()
    router(student)
    trainer = trainer_of(adapter, student, teacher_of(), arguments(tmp_path))
    with pytest.raises(NotImplementedError, match="aux_loss"):
        trainer.compute_loss(student, batch())


def masked_model():
    return transformers.BertForMaskedLM(
        transformers.BertConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=VOCABULARY
        )
    )


def encoder_decoder():
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=VOCABULARY)
    )


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_bad_input(tmp_path, adapter):
    student, teacher = student_of(), teacher_of()
    args = arguments(tmp_path)
    for model in (masked_model(), encoder_decoder()):
        with pytest.raises(NotImplementedError, match=r"^teacher.*not shifted"):
            trainer_of(adapter, student, model, args)
        with pytest.raises(NotImplementedError, match=r"^(student|model) is .*not shifted"):
            trainer_of(adapter, model, teacher, args)
    with pytest.raises(ValueError, match="is the student"):
        trainer_of(adapter, student, student, args)
    with pytest.raises(ValueError, match="reduction is the Trainer's"):
        trainer_of(adapter, student, teacher, args, {"reduction": "sum"})
    with pytest.raises(ValueError, match="return_stats is the Trainer's"):
        trainer_of(adapter, student, teacher, args, {"return_stats": True})
    with pytest.raises(TypeError, match="unexpected keyword argument 'temprature'"):
        trainer_of(adapter, student, teacher, args, {"temprature": 2.0})
    with pytest.raises(TypeError, match="'normalizer'; give it at call"):
        trainer_of(adapter, student, teacher, args, {"normalizer": 2.0})


def test_trainers_options_that_are_refused(tmp_path):
    student, teacher = student_of(), teacher_of()
    with pytest.raises(ValueError, match="label_smoothing_factor must be 0"):
        trainer_of("hidden states", student, teacher, arguments(tmp_path, label_smoothing_factor=0.1))
    with pytest.raises(ValueError, match="compute_loss_func would not be called"):
        trainer_of("hidden states", student, teacher, arguments(tmp_path), compute_loss_func=lambda *_: None)
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(NotImplementedError, match="DataParallel"):
        trainer_of("hidden states", student, teacher, args)
    replica = copy.deepcopy(student)
    replica._is_replica = True  # as torch.nn.DataParallel marks them
    replica.register_forward_pre_hook(DistillationLossFunction(student, teacher)._inputs, with_kwargs=True)
    with pytest.raises(NotImplementedError, match="DataParallel"):
        replica(torch.tensor([[1, 2]]))
