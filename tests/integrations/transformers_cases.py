"""What the tests of the Trainer's adapters share: tiny models, data, and the Trainer that they are held to."""

import torch
from checks import assert_near
from frameworks import import_quietly
from torch import nn
from torch.nn import functional as F

transformers = import_quietly("transformers")
import_quietly("accelerate")
Trainer = import_quietly("transformers.trainer").Trainer
import_quietly("transformers.models.llama.modeling_llama")
integration = import_quietly("kdkernels.integrations.transformers")
DistillationLossFunction, DistillationTrainer = integration.DistillationLossFunction, integration.DistillationTrainer

VOCABULARY = 199
LENGTH = 12
ADAPTERS = ["function", "hidden states"]
OPTIONS = {"divergence": "forward_kl", "temperature": 2.0, "ce_weight": 0.3}
# Norm-relative. Measured: 2e-7 of losses, 4e-7 of gradients (the models' own fp32 products), 2e-6 of what three steps
# change, which is the difference of fp32 parameters.
LOSS_BOUND, BOUND, CHANGE_BOUND = 1e-6, 2e-6, 1e-5


def causal(kind, hidden, seed, *, width=VOCABULARY, **config):
    """A random causal language model of two layers, whose logits spread over several units."""
    torch.manual_seed(seed)
    config_class = getattr(transformers, f"{kind}TextConfig", None) or getattr(transformers, f"{kind}Config")
    settings = config_class(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=width,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=0,
        **{"head_dim": hidden // 4, "num_key_value_heads": 2, **config},
    )
    return getattr(transformers, f"{kind}ForCausalLM")(settings)


def student_of(**config):
    return causal("Llama", 32, 0, **config)


def teacher_of(**config):
    return causal("Llama", 48, 1, **config)


def rows(count, seed=0):
    """Token ids with unequal numbers of labels that count, padded on the right from row to row."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for row in range(count):
        ids = torch.randint(1, VOCABULARY, (LENGTH,), generator=generator)
        labels, mask = ids.clone(), torch.ones_like(ids)
        labels[: 3 * (row % 4)] = -100
        if row % 3 == 1:
            ids[-2:], mask[-2:], labels[-2:] = 0, 0, -100
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


def batch(count=4, seed=0):
    return transformers.default_data_collator(rows(count, seed))


def arguments(tmp_path, **changed):
    given = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "optim": "sgd",  # changes are gradients
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "logging_first_step": True,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
    }
    return transformers.TrainingArguments(output_dir=str(tmp_path), **{**given, **changed})


def formula(student, teacher, labels, items=None, *, divergence="forward_kl", temperature=1.0, ce_weight=0.0, scale=1):
    """T² of the divergence and cross-entropy from logits (B, L, V), in fp64, by the textbook."""
    student, teacher, labels = student[:, :-1].double(), teacher[:, :-1].double(), labels[:, 1:]
    log_q, log_p = (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
    if divergence == "forward_kl":
        per_token = (log_p.exp() * (log_p - log_q)).sum(-1)
    else:
        per_token = (log_q.exp() * (log_q - log_p)).sum(-1)
    per_token = temperature**2 * per_token
    counts = labels != -100
    hard = F.cross_entropy(student.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
    total = ((per_token + ce_weight * hard.view_as(per_token)) * counts).sum()
    return (scale * total / (counts.sum() if items is None else items)).float()


class EagerTrainer(Trainer):
    """Distillation as one writes it: both models' logits."""

    def __init__(self, *args, teacher_model, loss_options, teacher_autocast=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher_model = teacher_model.eval()
        self.loss_options = loss_options
        self.teacher_autocast = teacher_autocast

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=self.teacher_autocast):
            teacher = self.teacher_model(**inputs).logits
        loss = formula(outputs.logits, teacher, labels, num_items_in_batch, **self.loss_options)
        return (loss, outputs) if return_outputs else loss


def trainer_of(adapter, student, teacher, args, options=OPTIONS, **kwargs):
    kwargs = {"train_dataset": rows(48), "eval_dataset": rows(6, seed=1), **kwargs}
    if adapter == "function":
        loss = DistillationLossFunction(student, teacher, **options)
        return Trainer(model=student, args=args, compute_loss_func=loss, **kwargs)
    trainer = DistillationTrainer if adapter == "hidden states" else EagerTrainer
    return trainer(model=student, args=args, teacher_model=teacher, loss_options=options, **kwargs)


def trained(adapter, student, teacher, args, options=OPTIONS, **kwargs):
    """Losses by step, what training changed, and the loss of evaluation."""
    before = nn.utils.parameters_to_vector(student.parameters()).clone()
    trainer = trainer_of(adapter, student, teacher, args, options, **kwargs)
    trainer.train()
    losses = torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    evaluated = torch.tensor(trainer.evaluate()["eval_loss"])
    return losses, nn.utils.parameters_to_vector(student.parameters()) - before, evaluated


def assert_trains_alike(actual, expected):
    assert len(actual[0]) == len(expected[0]) > 0
    assert actual[1].norm() > 0
    bounds = {"losses": LOSS_BOUND, "changes": CHANGE_BOUND, "evaluation": LOSS_BOUND}
    for (what, bound), ours, theirs in zip(bounds.items(), actual, expected, strict=True):
        assert_near(what, ours, theirs, bound)


def one_loss(tmp_path, adapter, student, teacher, inputs, items=None, options=OPTIONS):
    """The loss of one batch and the student's gradients."""
    trainer = trainer_of(adapter, student, teacher, arguments(tmp_path), options)
    loss = trainer.compute_loss(student.train(), dict(inputs), num_items_in_batch=items)
    student.zero_grad()
    loss.backward()
    return loss.detach(), torch.cat([parameter.grad.flatten() for parameter in student.parameters()])


def eager_loss(student, teacher, inputs, items=None, options=OPTIONS):
    # Without a cache, which would hide packed sequences from transformers' masks.
    given = {**{name: value for name, value in inputs.items() if name != "labels"}, "use_cache": False}
    with torch.no_grad():
        said = teacher.eval()(**given).logits
    loss = formula(student.train()(**given).logits, said, inputs["labels"], items, **options)
    student.zero_grad()
    loss.backward()
    return loss.detach(), torch.cat([parameter.grad.flatten() for parameter in student.parameters()])


def assert_loss_alike(actual, expected):
    assert actual[0].dtype == torch.float32
    assert_near("loss", actual[0], expected[0].reshape(()), LOSS_BOUND)
    assert_near("gradients", actual[1], expected[1], BOUND)
