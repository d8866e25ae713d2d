"""Distillation with the Trainer of Hugging Face transformers 5.

- :class:`DistillationLossFunction`: for ``Trainer(compute_loss_func=...)``, from both models' logits.
- :class:`DistillationTrainerMixin`, and :class:`DistillationTrainer` made with it: from hidden states, so that neither
  model's logits exist (:func:`kdkernels.linear_distillation_loss`).

Both keep the Trainer's conventions: labels as the models take them, shifted here; the mean over all tokens that count
in all micro-batches of an optimizer step, and in all processes, where the Trainer counts them. T² multiplies the
divergence (Hinton et al.); ``scale_by_temperature=False`` drops it.

Importing this module imports no transformers; ``DistillationTrainer`` does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import kdkernels as kd
from kdkernels.integrations._conventions import on_device

# What Trainer and collators hand to a model for its loss, or to steer what it returns: not for a model without a loss.
_NOT_INPUTS = frozenset(
    ("labels", "shift_labels", "num_items_in_batch", "logits_to_keep", "skip_logits", "return_loss", "past_key_values")
)
# Losses of transformers whose labels are not the next tokens.
_ALIGNED_LOSSES = ("ForMaskedLM", "ForTokenClassification")
_DATA_PARALLEL = "torch.nn.DataParallel is not served; start one process per GPU with torchrun"
# Of the norm of a token's logits, in the first batch: bfloat16 rounds by a fifth of it at most.
_LOGITS_BOUND = 0.02


def _check_options(options: Mapping[str, Any]) -> None:
    for name in ("reduction", "return_stats"):
        if name in options:
            raise ValueError(f"{name} is the Trainer's to say: it takes one loss, the mean over all its tokens")


def _causal(name: str, model: object) -> None:
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise NotImplementedError(f"{name} is an encoder-decoder model, whose labels are not shifted: not served")
    if getattr(model, "loss_type", None) in _ALIGNED_LOSSES:
        raise NotImplementedError(f"{name} is a {type(model).__name__}, whose labels are not shifted: not served")


def _inputs(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in _NOT_INPUTS}


def _without_cache(teacher: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A teacher's inputs, for a forward that keeps no keys and values, as the Trainer sees to for the student.

    Not only for memory: where it makes a cache, transformers does not look for packed sequences in position_ids.
    """
    parameters = inspect.signature(teacher.forward).parameters
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())  # a PeftModel
    takes = "use_cache" in parameters or (anything and hasattr(getattr(teacher, "config", None), "use_cache"))
    return {**inputs, "use_cache": False} if takes else dict(inputs)


def _next_tokens(labels: Tensor | None, shifted: Tensor | None, ignore_index: int, device: torch.device) -> Tensor:
    """(B, L): what the logits of each position are to predict; nothing, of the last.

    Padding the labels leaves the logits whole. A slice of them would be read in place as well, but backward of a slice
    writes a gradient of the whole.
    """
    if shifted is None:
        if labels is None:
            raise ValueError("labels are needed: they tell which tokens count (those that are not ignore_index)")
        shifted = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    return on_device(shifted, device)


def _output(outputs: Any, name: str) -> Any:
    """An entry of what a model returned: a ModelOutput, or a tuple, which begins with the logits."""
    if isinstance(outputs, tuple):
        return outputs[0] if name == "logits" else None
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)


def _check_no_other_loss(outputs: Any) -> None:
    if _output(outputs, "aux_loss") is not None:
        raise NotImplementedError(
            "the student returned an aux_loss (of its experts' router), which would not be added to the loss; "
            "set output_router_logits = False in its config"
        )


class _ForwardInputs:
    """A forward pre-hook that keeps a module's last inputs until they are taken.

    It knows nothing of the teacher: whoever copies or pickles the student takes its hooks along.
    """

    def __init__(self) -> None:
        self.last: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if getattr(module, "_is_replica", False):
            raise NotImplementedError(_DATA_PARALLEL)
        kept = _inputs(kwargs)
        if kwargs.get("shift_labels") is not None:
            kept["shift_labels"] = kwargs["shift_labels"]
        self.last = (args, kept)

    def take(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self.last is None:
            raise RuntimeError("no forward of the student was seen since the last loss: is it the model being trained?")
        last, self.last = self.last, None
        return last


class DistillationLossFunction:
    r"""A ``compute_loss_func`` for :class:`transformers.Trainer`: distillation from the logits of a teacher.

    A Trainer hands its loss function the student's outputs and the labels, but no inputs for a teacher. They are taken
    from the student by a forward pre-hook: everything it is called with, but labels and other arguments of a loss.

    Example::

        loss = DistillationLossFunction(student, teacher, divergence="forward_kl", temperature=2.0, ce_weight=0.1)
        Trainer(model=student, args=args, train_dataset=dataset, compute_loss_func=loss).train()

    With N the number of labels that count, :math:`\sum_i row_i / N` with the rows of
    :func:`kdkernels.distillation_loss`: ``num_items_in_batch`` for N where the Trainer gives it, else the number in
    this batch. The Trainer counts the labels other than -100, whatever ``ignore_index`` is.

    Works with gradient accumulation and checkpointing, torch.compile, and in evaluation; however the student is wrapped
    or sharded, for the loss starts from its outputs (tested: DDP, FSDP2). Not with torch.nn.DataParallel, nor for
    encoder-decoder and masked models. Auxiliary losses of the student are refused: they would not be added.

    Both models' logits exist, the student's under the Trainer's mixed precision as the fp32 copy that accelerate makes.
    :class:`DistillationTrainer` does without.

    Args:
        student: the model that the Trainer is given. Its ``model_init`` cannot be used: it makes others.
        teacher: a model, which is set to eval mode, moved to the logits' device where it is not spread over devices,
            and called in its own dtype without gradients, also where the Trainer's autocast covers the student; or any
            function of the student's inputs. Returns what has ``logits`` (B, L, V), a Tensor of them, or a
            :class:`~kdkernels.TopKTeacher`; with the student's rows: position i is the prediction of token i + 1.
        **options: the keyword arguments of :class:`kdkernels.DistillationLoss`, but ``reduction`` and
            ``return_stats``. ``inplace=True`` writes the gradient where the student's logits were; ``vocab_size`` is
            needed where the models' widths differ.

    Raises:
        TypeError, ValueError: unknown options, a teacher that is the student.
        NotImplementedError: an encoder-decoder or masked language model.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module | Callable[..., Any], **options: Any) -> None:
        _check_options(options)
        if teacher is student:
            raise ValueError("teacher is the student; pass a copy of it")
        _causal("student", student)
        _causal("teacher", teacher)
        self.teacher = teacher
        self.loss = kd.DistillationLoss(**options)
        self.ignore_index: int = options.get("ignore_index", -100)
        self._placed = not isinstance(teacher, nn.Module) or getattr(teacher, "hf_device_map", None) is not None
        self._inputs = _ForwardInputs()
        self._hook = student.register_forward_pre_hook(self._inputs, with_kwargs=True)

    def remove(self) -> None:
        """Takes the hook off the student."""
        self._hook.remove()

    def __call__(
        self,
        outputs: Any,
        labels: Tensor | None,  # (B, L)
        num_items_in_batch: Tensor | float | None = None,
    ) -> Tensor:
        """The loss of one micro-batch, a float32 scalar; 0 with a gradient of 0 where no label counts.

        Args:
            outputs: what the student returned: a ModelOutput with ``logits`` (B, L, V), or a tuple that begins with
                them.
            labels: (B, L) int64, not shifted. A ``shift_labels`` among the student's inputs takes their place.
            num_items_in_batch: a number or a Tensor with one entry on any device, which is not read back.

        Raises:
            ValueError: neither ``labels`` nor ``shift_labels``; what :func:`kdkernels.distillation_loss` raises.
            RuntimeError: the student was not called since the last loss.
            NotImplementedError: the student's outputs have an ``aux_loss``.
        """
        args, inputs = self._inputs.take()
        _check_no_other_loss(outputs)
        logits = _output(outputs, "logits")
        targets = _next_tokens(labels, inputs.pop("shift_labels", None), self.ignore_index, logits.device)
        teacher = self._ask(args, inputs, logits.device)
        return self.loss(logits, teacher, targets, normalizer=on_device(num_items_in_batch, logits.device))

    def _ask(
        self, args: tuple[Any, ...], inputs: dict[str, Any], device: torch.device
    ) -> Tensor | kd.TopKTeacher:  # (B, L, V)
        if isinstance(self.teacher, nn.Module):
            self.teacher.eval()
            if not self._placed:
                self.teacher.to(device)
                self._placed = True
            inputs = _without_cache(self.teacher, inputs)
        with torch.no_grad():
            said = self.teacher(*args, **inputs)
        return said if isinstance(said, (Tensor, kd.TopKTeacher)) else _output(said, "logits")


class _HeadInput:
    """A forward pre-hook of an output embedding: keeps the hidden states it is given, and leaves it the last token's.

    What a model does to its hidden states before the output embedding is in them, and its own forward, with the hooks
    of DDP and others, comes to its end as always.
    """

    def __init__(self, head: nn.Linear) -> None:
        self.head = head
        self.active = False
        self.whole = False  # leave all tokens to the head
        self.hidden: Tensor | None = None  # (B, L, H)
        self.handle = head.register_forward_pre_hook(self)

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not self.active:
            return None
        if self.hidden is not None:
            raise NotImplementedError("a model whose output embedding is called twice in a forward is not served")
        self.hidden = args[0]
        return None if self.whole else (args[0][:, -1:],)


def _head_of(name: str, model: Any) -> nn.Linear:
    """A model's output embedding, of which this process has all."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise TypeError(
            f"{name}: its output embedding must be a plain torch.nn.Linear, the weight of which is all there is to it; "
            f"got {type(head).__name__} (of an adapter, or quantized). DistillationLossFunction takes any"
        )
    weight = head.weight
    if type(weight) not in (Tensor, nn.Parameter) or weight.is_meta:
        kind = "on the meta device" if weight.is_meta else f"a {type(weight).__name__}"
        raise TypeError(
            f"{name}: the weight of its output embedding must be a plain Tensor, got {kind} (sharded, offloaded or "
            "quantized). DistillationLossFunction takes any"
        )
    if weight.shape != (head.out_features, head.in_features):
        raise ValueError(
            f"{name}: the weight of its output embedding must have shape {(head.out_features, head.in_features)}, got "
            f"{tuple(weight.shape)}: it is partitioned (FSDP, DeepSpeed ZeRO-3, tensor parallel). "
            "DistillationLossFunction works with sharded models"
        )
    return head


def _transform(model: Any) -> tuple[float, float | None]:
    """(scale, softcap) of x = softcap·tanh(scale·z / softcap), by which a model's logits come from its head's."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    scale = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):  # Cohere; Muse; Falcon-H1
        if isinstance(getattr(config, name, None), (int, float)):
            scale = float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)  # Granite divides logits by it, MiniCPM3 hidden states
    if scaling is not None and config.model_type != "minicpm3":
        scale = float(scaling) if config.model_type == "hyperclovax" else 1 / scaling
    softcap = None
    # Gemma 2 and later; RecurrentGemma; xLSTM
    for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"):
        softcap = getattr(config, name, None) if softcap is None else softcap
    return scale, softcap


def _forward(states: _HeadInput, model: Any, inputs: Mapping[str, Any], whole: bool = False) -> tuple[Tensor, Any]:
    """The hidden states (B, L, H) that come to a model's head, on its device, and what the model returns."""
    states.active, states.whole = True, whole
    try:
        outputs = model(**inputs)
        hidden = states.hidden
    finally:
        states.active, states.hidden = False, None
    if hidden is None:
        raise NotImplementedError(f"{type(model).__name__} never called its output embedding: not served")
    return hidden.to(states.head.weight.device), outputs


class DistillationTrainerMixin:
    r"""Makes a :class:`transformers.Trainer` distil a teacher from hidden states, with both output embeddings fused.

    ``class MyTrainer(DistillationTrainerMixin, Trainer)``; :class:`DistillationTrainer` is the plain one::

        DistillationTrainer(
            model=student, args=args, train_dataset=dataset, teacher_model=teacher,
            loss_options={"divergence": "forward_kl", "temperature": 2.0, "ce_weight": 0.1},
        ).train()

    The loss of :class:`DistillationLossFunction`, by :func:`kdkernels.linear_distillation_loss`: the student is called
    through its wrappers, without labels; hidden states are what comes to its output embedding (lm_head), which goes on
    with the last token alone. The teacher is called likewise, without gradients, in eval mode, under the Trainer's
    autocast. Softcap (``final_logit_softcapping``) and scale (``logit_scale``, ``logits_scaling``, ...) of each model
    come from its config. In the first batch the last token's logits are compared with what head and config make of
    its hidden state, for which the host waits for the device, once: a model that does more to its logits is refused.

    ``model_accepts_loss_kwargs`` is set, whatever the student accepts: the Trainer counts ``num_items_in_batch`` over
    all micro-batches of a step, and divides by nothing more. With ``average_tokens_across_devices`` (the default) that
    count is over all processes, and the loss is multiplied by their number, as DDP takes the gradients' mean.

    ``evaluate()`` computes the loss in the same way. Where logits are asked for (``predict()``, or ``evaluate()`` with
    ``compute_metrics``; ``compute_loss(return_outputs=True)``), the student's are formed by its own head, for all
    tokens.

    Served: DDP without ``static_graph``, gradient accumulation and checkpointing, autocast, torch.compile, frozen and
    tied embeddings, adapters that leave the output embedding alone. Refused, as each would give wrong results or none:
    an output embedding that is no plain Linear or is sharded (FSDP, DeepSpeed ZeRO-3, tensor parallel),
    torch.nn.DataParallel, sequence parallelism, encoder-decoder and masked models, auxiliary losses, label smoothing,
    ``compute_loss_func``.

    Args:
        teacher_model: a causal language model, moved to the Trainer's device where it is not spread over devices.
        loss_options: the keyword arguments of :class:`kdkernels.LinearDistillationLoss`, but ``reduction`` and
            ``return_stats``. ``vocab_size`` is needed where the models' output embeddings differ in width; ``compact``
            pays where many labels are ignored. Scales and softcaps given here replace those of the configs.
        *args, **kwargs: the Trainer's.

    Raises:
        TypeError, ValueError, NotImplementedError: at construction or in the first batch, for what is refused.
    """

    accelerator: Any
    args: Any
    model: Any
    label_smoother: Any
    compute_loss_func: Any
    model_accepts_loss_kwargs: bool

    def __init__(
        self,
        *args: Any,
        teacher_model: nn.Module,
        loss_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.loss_options = dict(loss_options or {})
        _check_options(self.loss_options)
        kd.LinearDistillationLoss(**self.loss_options)
        if self.compute_loss_func is not None:
            raise ValueError("compute_loss_func would not be called: the loss is the teacher's and loss_options'")
        if self.label_smoother is not None:
            raise ValueError("label_smoothing_factor must be 0: it is no part of this loss")
        if self.args.n_gpu > 1:
            raise NotImplementedError(_DATA_PARALLEL)
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        if parallelism is not None and getattr(parallelism, "sp_enabled", False):
            raise NotImplementedError("sequence parallelism is not served")
        if teacher_model is self.model:
            raise ValueError("teacher_model is the student; pass a copy of it")
        _causal("model", self.model)
        _causal("teacher_model", teacher_model)
        self.model_accepts_loss_kwargs = True
        self.teacher_model = teacher_model
        if getattr(teacher_model, "hf_device_map", None) is None:
            self.teacher_model.to(self.args.device)
        self._heads: dict[str, _HeadInput] = {}
        self._compared: set[str] = set()
        self._loss_only = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | float | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The loss of one micro-batch, a float32 scalar, and with ``return_outputs`` the student's outputs."""
        wrapped = getattr(model, "_orig_mod", model)  # by torch.compile
        if isinstance(wrapped, DistributedDataParallel) and wrapped.static_graph:
            raise NotImplementedError("DDP's static_graph is not served: the loss does not start from DDP's outputs")
        student, teacher = self.accelerator.unwrap_model(model), self.teacher_model
        student_states, teacher_states = self._states("model", student), self._states("teacher_model", teacher)
        student_head, teacher_head = student_states.head, teacher_states.head
        whole = return_outputs and not self._loss_only
        arguments = _inputs(inputs)

        hidden, outputs = _forward(student_states, model, arguments, whole)
        _check_no_other_loss(outputs)
        teacher.eval()
        with torch.no_grad(), self.accelerator.autocast():
            teacher_hidden, teacher_outputs = _forward(teacher_states, teacher, _without_cache(teacher, arguments))

        student_scale, student_softcap = _transform(student)
        teacher_scale, teacher_softcap = _transform(teacher)
        options = {
            "student_logit_scale": student_scale,
            "student_softcap": student_softcap,
            "teacher_logit_scale": teacher_scale,
            "teacher_softcap": teacher_softcap,
            **self.loss_options,
        }
        with self.accelerator.autocast():
            self._compare("model", student_head, hidden, outputs, "student", options)
            self._compare("teacher_model", teacher_head, teacher_hidden, teacher_outputs, "teacher", options)
            ignore_index = options.get("ignore_index", -100)
            targets = _next_tokens(inputs.get("labels"), inputs.get("shift_labels"), ignore_index, hidden.device)
            loss = kd.linear_distillation_loss(
                hidden,
                student_head.weight,
                kd.LinearTeacher(teacher_hidden, teacher_head.weight, teacher_head.bias),
                targets,
                student_bias=student_head.bias,
                normalizer=on_device(num_items_in_batch, hidden.device),
                **options,
            )
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            same_batch = self.get_tp_size() if hasattr(self, "get_tp_size") else 1
            loss = loss * (self.accelerator.num_processes // same_batch)
        if not return_outputs:
            return loss
        return loss, (loss, *outputs) if isinstance(outputs, tuple) else outputs

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Any, Any]:
        """The Trainer's; it tells :meth:`compute_loss` whether anyone reads the logits."""
        self._loss_only = prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)  # type: ignore[misc]
        finally:
            self._loss_only = False

    def _states(self, name: str, model: Any) -> _HeadInput:
        head = _head_of(name, model)
        known = self._heads.get(name)
        if known is None or known.head is not head:
            if known is not None:
                known.handle.remove()
            self._heads[name] = known = _HeadInput(head)
            self._compared.discard(name)
        return known

    def _compare(
        self, name: str, head: nn.Linear, hidden: Tensor, outputs: Any, side: str, options: Mapping[str, Any]
    ) -> None:
        """That a model's own logits of the last token are what its head, scale and softcap make of its hidden state."""
        if name in self._compared:
            return
        scale, softcap = options[f"{side}_logit_scale"], options[f"{side}_softcap"]
        with torch.no_grad():
            expected = scale * nn.functional.linear(hidden[:, -1:], head.weight, head.bias).float()
            if softcap is not None:
                expected = softcap * torch.tanh(expected / softcap)
            actual = _output(outputs, "logits")[:, -1:].to(expected)
            off, size = (actual - expected).nan_to_num().norm(), expected.nan_to_num().norm()
        if not bool(off <= _LOGITS_BOUND * size):
            raise ValueError(
                f"{name}: its logits are off by {float(off / size):.2g} of their norm from {scale} · lm_head(hidden)"
                + (f" with softcap {softcap}" if softcap is not None else "")
                + f"; give loss_options {side}_logit_scale and {side}_softcap, or use DistillationLossFunction"
            )
        self._compared.add(name)


if TYPE_CHECKING:
    from transformers import Trainer

    class DistillationTrainer(DistillationTrainerMixin, Trainer):
        """A :class:`transformers.Trainer` with :class:`DistillationTrainerMixin`."""


def __getattr__(name: str) -> Any:
    if name != "DistillationTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from transformers import Trainer

    about = {"__module__": __name__, "__doc__": "A transformers.Trainer with DistillationTrainerMixin."}
    made = type(name, (DistillationTrainerMixin, Trainer), about)
    globals()[name] = made
    return made
