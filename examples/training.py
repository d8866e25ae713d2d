"""Small Llama models, their training and their held-out loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

Batch = tuple[Tensor, Tensor]  # token ids and their labels, (sequences, tokens) each
Loss = Callable[[Tensor, Tensor], Tensor]  # of last hidden states (..., H) and the head's weight (V, H)


@dataclass(frozen=True)
class Shape:
    """Size of a Llama model; embedding and head share their weight."""

    width: int
    layers: int
    heads: int
    mlp_width: int


@dataclass(frozen=True)
class Rates:
    """Peak learning rates. The embedding has its own: a batch holds few of its rows, each is updated rarely."""

    blocks: float
    embedding: float


def build_model(shape: Shape, vocab_size: int, context: int, seed: int, device: torch.device) -> nn.Module:
    """A Llama model that starts as a bigram model: every block adds nothing to the residual stream at first."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.mlp_width,
        max_position_embeddings=context,
        # Transformers' 0.02 is for widths of thousands; here it would drown the token in its first block's output.
        initializer_range=0.06,
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    return model.to(device)


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def head_weight(model: nn.Module) -> nn.Parameter:
    """(vocabulary, width), the embedding's too."""
    return model.get_parameter("lm_head.weight")


def windows(stream: Tensor, context: int) -> Batch:
    """The stream cut into sequences, with the next token as label: aligned here, so that logits are never sliced."""
    count = (len(stream) - 1) // context
    return stream[: count * context].view(count, context), stream[1 : count * context + 1].view(count, context)


def random_batches(stream: Tensor, context: int, sequences: int, seed: int) -> Iterator[Batch]:
    """Batches without end, every epoch in another order; the order depends on the seed alone."""
    ids, labels = windows(stream, context)
    generator = torch.Generator().manual_seed(seed)
    while True:
        for chosen in torch.randperm(len(ids), generator=generator).split(sequences):
            if len(chosen) == sequences:
                yield ids[chosen], labels[chosen]


def held_out_batches(stream: Tensor, context: int, sequences: int, count: int, seed: int) -> list[Batch]:
    """A fixed sample of the held-out windows, at most `count` batches of them."""
    available = (len(stream) - 1) // context // sequences
    batches = random_batches(stream, context, sequences, seed)
    return [next(batches) for _ in range(min(count, available))]


def product_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 matrix products on a GPU, float32 on the CPU; parameters are float32 on both."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def precision(device: torch.device) -> torch.autocast:
    """Autocast to that dtype."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=product_dtype(device) == torch.bfloat16)


def compute_hidden(model: nn.Module, ids: Tensor) -> Tensor:
    """What the head gets to see, (sequences, tokens, width)."""
    with precision(ids.device):
        return model.get_submodule("model")(input_ids=ids).last_hidden_state


def hard_label_loss(hidden: Tensor, weight: Tensor, *, labels: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


@torch.no_grad()
def held_out_loss(model: nn.Module, batches: list[Batch], device: torch.device) -> float:
    """Mean cross-entropy per token in nats."""
    model.eval()
    total = 0.0
    for ids, labels in batches:
        hidden = compute_hidden(model, ids.to(device))
        with precision(device):
            total += hard_label_loss(hidden, head_weight(model), labels=labels.to(device)).item()
    model.train()
    return total / len(batches)


class Trainer:
    """A model, its optimiser and its learning-rate schedule: linear warm-up, then linear decay to zero."""

    def __init__(self, model: nn.Module, steps: int, rates: Rates) -> None:
        self.model = model
        embedding = model.get_parameter("model.embed_tokens.weight")
        blocks = [parameter for parameter in model.parameters() if parameter is not embedding]
        groups = [{"params": blocks, "lr": rates.blocks}, {"params": [embedding], "lr": rates.embedding}]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0, fused=True)
        warm_up = max(1, steps // 20)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / (steps - warm_up + 1))
        )

    def backward(self, ids: Tensor, loss_of_hidden: Loss) -> Tensor:
        """Gradients of the loss; returns the loss, detached and still on its device."""
        hidden = compute_hidden(self.model, ids)
        with precision(ids.device):
            loss = loss_of_hidden(hidden, head_weight(self.model))
        loss.backward()
        return loss.detach()

    def step(self, ids: Tensor, loss_of_hidden: Loss) -> Tensor:
        """One update; returns the loss."""
        loss = self.backward(ids, loss_of_hidden)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        return loss
