"""The Trainer's adapters against a Trainer whose loss is the formula on logits, in plain PyTorch."""

import copy
import pickle
import weakref
from types import SimpleNamespace

import pytest
import torch
from checks import assert_near, relative_error
from frameworks import import_quietly
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers_cases import (
    ADAPTERS,
    BOUND,
    LENGTH,
    OPTIONS,
    VOCABULARY,
    DistillationLossFunction,
    DistillationTrainer,
    Trainer,
    arguments,
    assert_loss_alike,
    assert_trains_alike,
    batch,
    causal,
    eager_loss,
    formula,
    integration,
    one_loss,
    rows,
    student_of,
    teacher_of,
    trained,
    trainer_of,
    transformers,
)

import kdkernels as kd

pytestmark = [
    pytest.mark.usefixtures("one_thread", "no_collection"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning"),
]


@pytest.fixture
def no_collection(monkeypatch):
    """Accelerate collects garbage before each training, which takes longer than the training."""
    monkeypatch.setattr("accelerate.utils.memory.gc", SimpleNamespace(collect=lambda: None))


def against_eager(tmp_path, student, teacher, options=OPTIONS, **changed):
    args = arguments(tmp_path, **changed)
    expected = trained("eager", copy.deepcopy(student), teacher, args, options)
    for adapter in ADAPTERS:
        actual = trained(adapter, copy.deepcopy(student), teacher, arguments(tmp_path, **changed), options)
        assert_trains_alike(actual, expected)


@pytest.mark.parametrize(
    "options",
    [OPTIONS, {"divergence": "reverse_kl", "temperature": 0.7}, {"divergence": "forward_kl", "ce_weight": 1.0}],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_trains_like_eager(tmp_path, options):
    against_eager(tmp_path, student_of(), teacher_of(), options)


@pytest.mark.parametrize(
    "changed",
    [
        {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"average_tokens_across_devices": False, "gradient_accumulation_steps": 2, "max_grad_norm": 0.5},
    ],
    ids=lambda changed: next(iter(changed)) + ("-reentrant" if "gradient_checkpointing_kwargs" in changed else ""),
)
def test_training_arguments(tmp_path, changed):
    against_eager(tmp_path, student_of(), teacher_of(), **changed)


def test_tied_embeddings(tmp_path):
    student = student_of(tie_word_embeddings=True)
    assert student.lm_head.weight is student.model.embed_tokens.weight
    against_eager(tmp_path, student, teacher_of(tie_word_embeddings=True))


def test_frozen_head(tmp_path):
    student = student_of()
    student.lm_head.weight.requires_grad_(False)
    against_eager(tmp_path, student, teacher_of())


def test_scale_by_temperature(tmp_path):
    runs = []
    for scaled in (True, False):
        options = {"temperature": 2.0, "scale_by_temperature": scaled}
        for adapter in ADAPTERS:
            runs.append(one_loss(tmp_path, adapter, student_of(), teacher_of(), batch(), options=options))
        assert_loss_alike(runs[-2], runs[-1])
    assert_loss_alike(runs[0], [4 * value for value in runs[2]])


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_accumulation_is_one_batch(tmp_path, adapter):
    """Four micro-batches of unequal numbers of labels that count, one of none: the gradient of all as one batch."""
    dataset = rows(4)
    dataset[1]["labels"][:] = -100
    counts = [int((row["labels"][1:] != -100).sum()) for row in dataset]
    assert len(set(counts)) == 4
    runs = []
    for size in (4, 1):
        changed = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size, "max_steps": 1}
        args = arguments(tmp_path, **changed)
        runs.append(trained(adapter, student_of(), teacher_of(), args, train_dataset=dataset))
    assert_trains_alike(runs[1], runs[0])


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_autocast(tmp_path, adapter):
    """Both models' own products round to bf16, in backward too: no closer to fp32 than eager, nor further."""
    precise = trained("eager", student_of(), teacher_of(), arguments(tmp_path))
    expected = trained(
        "eager", student_of(), teacher_of(), arguments(tmp_path, bf16=True), teacher_autocast=adapter == "hidden states"
    )
    actual = trained(adapter, student_of(), teacher_of(), arguments(tmp_path, bf16=True))
    off = relative_error(expected[1], precise[1])
    assert 1e-3 < off < 5e-2  # it was bf16
    assert relative_error(actual[1], precise[1]) < 1.5 * off
    # The function reads the logits that eager does; from hidden states the loss takes them in fp32.
    assert_near("first loss", actual[0][0], expected[0][0], BOUND if adapter == "function" else 3e-3)
    assert_near("changes", actual[1], expected[1], 3e-3 if adapter == "function" else 3e-2)


@pytest.mark.parametrize("bf16", [False, True])
def test_autocast_covers_heads_and_teacher(tmp_path, monkeypatch, bf16):
    student, teacher = student_of(), teacher_of()
    trainer = trainer_of("hidden states", student, teacher, arguments(tmp_path, bf16=bf16))
    seen, loss = [], kd.linear_distillation_loss

    def spied(*args, **kwargs):
        seen.append(torch.is_autocast_enabled("cpu"))
        return loss(*args, **kwargs)

    monkeypatch.setattr(kd, "linear_distillation_loss", spied)
    teacher.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    trainer.compute_loss(student, batch())
    assert seen == [bf16, bf16]


@pytest.mark.filterwarnings("ignore")
def test_torch_compile(tmp_path):
    student, teacher = student_of(), teacher_of()
    expected = trained("eager", copy.deepcopy(student), teacher, arguments(tmp_path))
    for adapter in ADAPTERS:
        args = arguments(tmp_path, torch_compile=True, torch_compile_backend="eager")
        assert_trains_alike(trained(adapter, copy.deepcopy(student), teacher, args), expected)


LOGIT_TRANSFORMS = {
    "softcap (Gemma 2)": ("Gemma2", {"final_logit_softcapping": 2.0, "sliding_window": 8}),
    "softcap (Gemma 3)": ("Gemma3", {"final_logit_softcapping": 3.0, "sliding_window": 8}),
    "logit_scale (Cohere)": ("Cohere", {"logit_scale": 0.25}),
    "logits_scaling (Granite)": ("Granite", {"logits_scaling": 4.0}),
    "bias (Phi)": ("Phi", {"partial_rotary_factor": 1.0}),
    "before the head (MiniCPM3)": (
        "MiniCPM3",
        {
            "dim_model_base": 16,
            "num_key_value_heads": 4,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
}


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize(("kind", "config"), LOGIT_TRANSFORMS.values(), ids=LOGIT_TRANSFORMS)
def test_what_a_model_does_to_its_logits(tmp_path, adapter, kind, config):
    transformers_has = hasattr(transformers, f"{kind}ForCausalLM")
    if not transformers_has:
        pytest.skip(f"this transformers has no {kind}")
    student, teacher = causal(kind, 32, 0, **config), causal(kind, 48, 1, **config)
    for model in (student, teacher):
        if model.lm_head.bias is not None:
            nn.init.normal_(model.lm_head.bias)
    inputs = batch()
    expected = eager_loss(student, teacher, inputs)
    assert_loss_alike(one_loss(tmp_path, adapter, student, teacher, inputs), expected)


def test_one_models_transform_is_not_the_others(tmp_path):
    student, teacher = causal("Gemma2", 32, 0, final_logit_softcapping=2.0), causal("Cohere", 48, 1, logit_scale=0.25)
    inputs = batch()
    expected = eager_loss(student, teacher, inputs)
    assert_loss_alike(one_loss(tmp_path, "hidden states", student, teacher, inputs), expected)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("items", [None, 29, 29.0, torch.tensor(29), torch.tensor([29.0])], ids=repr)
def test_num_items_in_batch(tmp_path, adapter, items):
    student, teacher, inputs = student_of(), teacher_of(), batch()
    expected = eager_loss(student, teacher, inputs, items)
    assert_loss_alike(one_loss(tmp_path, adapter, student, teacher, inputs, items), expected)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("items", [None, 0, torch.tensor(0), torch.tensor(7)], ids=repr)
def test_no_label_counts(tmp_path, adapter, items):
    inputs = batch()
    inputs["labels"].fill_(-100)
    loss, gradients = one_loss(tmp_path, adapter, student_of(), teacher_of(), inputs, items)
    assert loss == 0
    assert (gradients == 0).all()


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("averaged", [True, False])
def test_loss_is_for_the_mean_over_processes(tmp_path, monkeypatch, adapter, averaged):
    student = student_of()
    trainer = trainer_of(
        adapter, student, teacher_of(), arguments(tmp_path, average_tokens_across_devices=averaged), OPTIONS
    )
    one = trainer.compute_loss(student, batch(), num_items_in_batch=29)
    mean = trainer.compute_loss(student, batch())
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", property(lambda self: 3))
    counted = trainer.compute_loss(student, batch(), num_items_in_batch=29)
    assert_near("loss", counted, one * (3 if averaged else 1), 1e-6)
    assert_near("mean", trainer.compute_loss(student, batch()), mean, 1e-6)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_shift_labels_take_the_place_of_labels(tmp_path, adapter):
    student, teacher, inputs = student_of(), teacher_of(), batch()
    expected = eager_loss(student, teacher, inputs)
    inputs["shift_labels"] = F.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    assert_loss_alike(one_loss(tmp_path, adapter, student, teacher, inputs), expected)
    inputs["labels"] = torch.full_like(inputs["labels"], 5)
    assert_loss_alike(one_loss(tmp_path, adapter, student, teacher, inputs), expected)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_inputs_reach_the_teacher(tmp_path, adapter):
    """Two sequences packed into a row by position_ids: neither model sees the first from the second."""
    student, teacher, inputs = student_of(), teacher_of(), batch()
    del inputs["attention_mask"]
    inputs["position_ids"] = torch.arange(LENGTH).remainder(7).expand(4, LENGTH)
    expected = eager_loss(student, teacher, inputs)
    assert_loss_alike(one_loss(tmp_path, adapter, student, teacher, inputs), expected)
    del inputs["position_ids"]
    assert relative_error(eager_loss(student, teacher, inputs)[0], expected[0]) > 1e-3


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_teacher_is_in_eval_mode(tmp_path, adapter):
    student, teacher = student_of(), teacher_of(attention_dropout=0.5).train()
    actual = one_loss(tmp_path, adapter, student, teacher, batch())
    assert not teacher.training
    assert student.training
    assert_loss_alike(actual, eager_loss(student, teacher, batch()))
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_heads_of_different_widths(tmp_path, adapter):
    student, teacher = student_of(width=VOCABULARY + 9), teacher_of(width=VOCABULARY)
    with pytest.raises(ValueError, match="vocab_size"):
        one_loss(tmp_path, adapter, student, teacher, batch())
    options = {**OPTIONS, "vocab_size": VOCABULARY}
    loss, gradients = one_loss(tmp_path, adapter, student, teacher, batch(), options=options)
    inputs = batch()
    labels = inputs.pop("labels")
    with torch.no_grad():
        expected = formula(student(**inputs).logits[..., :VOCABULARY], teacher(**inputs).logits, labels, **OPTIONS)
    assert_near("loss", loss, expected, BOUND)
    assert gradients.isfinite().all()


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_other_ignore_index(tmp_path, adapter):
    student, teacher, inputs = student_of(), teacher_of(), batch()
    expected = eager_loss(student, teacher, inputs)
    inputs["labels"] = inputs["labels"].masked_fill(inputs["labels"] == -100, -1)
    options = {**OPTIONS, "ignore_index": -1}
    assert_loss_alike(one_loss(tmp_path, adapter, student, teacher, inputs, options=options), expected)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_metrics_see_the_students_logits(tmp_path, adapter):
    student, teacher = student_of(), teacher_of()
    seen = {}

    def compute_metrics(evaluation):
        seen["logits"], seen["labels"] = (torch.from_numpy(array) for array in evaluation)
        return {"tokens": int((seen["labels"] != -100).sum())}

    trainer = trainer_of(adapter, student, teacher, arguments(tmp_path), compute_metrics=compute_metrics)
    evaluated = trainer.evaluate()
    inputs = batch(6, seed=1)
    labels = inputs.pop("labels")
    with torch.no_grad():
        logits = student.eval()(**inputs).logits
    assert evaluated["eval_tokens"] == int((labels != -100).sum())
    assert torch.equal(seen["labels"], labels)
    assert_near("logits", seen["logits"], logits, BOUND)
    predicted = trainer.predict(rows(6, seed=1))
    assert_near("predicted", torch.from_numpy(predicted.predictions), logits, BOUND)
    assert predicted.metrics["test_loss"] == pytest.approx(evaluated["eval_loss"], rel=1e-6)
    loss, outputs = trainer.compute_loss(student, {**inputs, "labels": labels}, return_outputs=True)
    assert_near("outputs", outputs.logits, logits, BOUND)
    with torch.no_grad():
        expected = formula(logits, teacher(**inputs).logits, labels, **OPTIONS)
    assert_near("loss", loss, expected, BOUND)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_models_that_return_tuples(tmp_path, adapter):
    student, teacher, inputs = student_of(), teacher_of(), batch()
    expected = eager_loss(student, teacher, inputs)
    inputs["return_dict"] = False
    assert_loss_alike(one_loss(tmp_path, adapter, student, teacher, inputs), expected)


def test_tuples_begin_with_the_loss_for_the_trainer(tmp_path):
    student, inputs = student_of(), {**batch(), "return_dict": False}
    trainer = trainer_of("hidden states", student, teacher_of(), arguments(tmp_path))
    loss, outputs = trainer.compute_loss(student, inputs, return_outputs=True)
    assert outputs[0] is loss
    assert outputs[1].shape == (4, LENGTH, VOCABULARY)


class Sizes(TorchDispatchMode):
    """The number of entries of the largest floating-point tensor that an operator returned."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.largest = max(self.largest, tensor.numel())
        return made


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_neither_models_logits_exist_from_hidden_states(tmp_path, adapter):
    student, teacher, inputs = student_of(width=3000), teacher_of(width=3000), batch(24)
    trainer = trainer_of(adapter, student, teacher, arguments(tmp_path))
    trainer.compute_loss(student, dict(inputs))
    all_logits = 24 * LENGTH * 3000
    for training in (True, False):
        with Sizes() as sizes, torch.set_grad_enabled(training):
            loss = trainer.compute_loss(student.train(training), dict(inputs), num_items_in_batch=100)
            if training:
                loss.backward()
        # Both heads' weights are larger than the chunks of logits.
        assert (sizes.largest < all_logits / 4) == (adapter == "hidden states"), sizes.largest


def test_inplace_writes_the_gradient_over_the_logits():
    student, teacher, inputs = student_of(), teacher_of(), batch()
    labels = inputs.pop("labels")
    gradients = []
    for inplace in (False, True):
        loss = DistillationLossFunction(student, teacher, **OPTIONS, inplace=inplace)
        outputs = student(**inputs)
        seen = []
        outputs.logits.register_hook(lambda gradient, seen=seen: seen.append(gradient.data_ptr()))
        loss(outputs, labels).backward()
        assert (seen == [outputs.logits.data_ptr()]) == inplace
        gradients.append(student.lm_head.weight.grad)
        student.zero_grad()
        loss.remove()
    assert torch.equal(*gradients)


def test_a_function_as_teacher():
    student, model, inputs = student_of(), teacher_of(), batch()
    labels = inputs.pop("labels")
    seen = []

    def logits(**given):
        seen.append(given)
        return model(**given).logits

    def top(input_ids, attention_mask):
        return kd.TopKTeacher.from_logits(model(input_ids=input_ids, attention_mask=attention_mask).logits, 150)

    losses = []
    for teacher in (model, logits, top):
        loss = DistillationLossFunction(student, teacher)
        losses.append(loss(student(**inputs), labels).detach())
        loss.remove()
    assert seen[0].keys() == inputs.keys()
    assert torch.equal(losses[0], losses[1])
    assert 0 < relative_error(losses[2], losses[0]) < 0.1


def test_inputs_are_let_go_after_use():
    student = student_of()
    loss = DistillationLossFunction(student, teacher_of())
    inputs = batch()
    labels = inputs.pop("labels")
    outputs = student(**inputs, use_cache=True)
    ids = weakref.ref(inputs["input_ids"])
    loss(outputs, labels)
    with pytest.raises(RuntimeError, match="no forward of the student was seen"):
        loss(outputs, labels)
    del inputs, outputs
    assert ids() is None
    # What a generation leaves behind has no keys and values.
    student.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3, do_sample=False)
    assert "past_key_values" not in loss._inputs.last[1]
    loss.remove()
    loss._inputs.last = None
    student(torch.tensor([[1, 2, 3]]))
    assert loss._inputs.last is None


def test_the_students_copies_do_not_hold_the_teacher(tmp_path):
    student, teacher = student_of(), teacher_of()
    ours = DistillationLossFunction(student, teacher)
    trainer = trainer_of("hidden states", student, teacher, arguments(tmp_path))
    trainer.compute_loss(student, batch())
    alone = len(pickle.dumps(student_of()))
    assert len(pickle.dumps(student)) < alone + 5000 < len(pickle.dumps((student, teacher)))
    other = copy.deepcopy(student)
    other(**{name: value for name, value in batch().items() if name != "labels"})
    ours._inputs.last = None
    # Neither does the hook of the output embedding change what the model does elsewhere.
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(student(ids).logits, other(ids).logits)
    assert student(ids).logits.shape == (1, 3, VOCABULARY)


def test_a_new_head_is_found(tmp_path):
    student, teacher = student_of(), teacher_of()
    trainer = trainer_of("hidden states", student, teacher, arguments(tmp_path), {**OPTIONS, "vocab_size": VOCABULARY})
    trainer.compute_loss(student, batch())
    old = student.lm_head
    student.lm_head = copy.deepcopy(old)
    trainer.compute_loss(student, batch())
    assert not old._forward_pre_hooks


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}], ids=repr)
@pytest.mark.filterwarnings("ignore:find_unused_parameters=True was specified:UserWarning")
@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel(tmp_path, adapter, options):
    """DDP's next forward raises where a parameter's gradient did not come to its hooks."""
    student, teacher = student_of(tie_word_embeddings=True), teacher_of()
    expected = eager_loss(student, teacher, batch())
    student.zero_grad()
    trainer = trainer_of(adapter, student, teacher, arguments(tmp_path))
    model = DistributedDataParallel(student, **options)
    for _ in range(2):
        model.zero_grad()
        loss = trainer.compute_loss(model, batch())
        loss.backward()
    gradients = torch.cat([parameter.grad.flatten() for parameter in student.parameters()])
    assert_loss_alike((loss.detach(), gradients), expected)


@pytest.mark.usefixtures("process_group")
def test_distributed_models_that_are_refused(tmp_path):
    fully_shard = import_quietly("torch.distributed.fsdp").fully_shard
    student, teacher = student_of(), teacher_of()
    trainer = trainer_of("hidden states", student, teacher, arguments(tmp_path))
    with pytest.raises(NotImplementedError, match="static_graph"):
        trainer.compute_loss(DistributedDataParallel(student, static_graph=True), batch())
    expected = eager_loss(student, teacher, batch())
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    fully_shard(student, mesh=mesh)
    with pytest.raises(TypeError, match="got a DTensor"):
        trainer.compute_loss(student, batch())
    function = trainer_of("function", student, teacher, arguments(tmp_path))
    loss = function.compute_loss(student, batch())
    loss.backward()
    gradients = torch.cat([parameter.grad.full_tensor().flatten() for parameter in student.parameters()])
    assert_loss_alike((loss.detach(), gradients), expected)


def test_names():
    assert DistillationTrainer.__mro__[:3] == (DistillationTrainer, integration.DistillationTrainerMixin, Trainer)
    assert pickle.loads(pickle.dumps(DistillationTrainer)) is DistillationTrainer
    assert integration.DistillationTrainer is DistillationTrainer
    with pytest.raises(AttributeError, match="no attribute 'Distilation'"):
        integration.Distilation  # noqa: B018
