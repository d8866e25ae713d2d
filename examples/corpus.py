"""Text that every Python installation ships with, split by document and cut into windows of byte-pair tokens."""

from __future__ import annotations

import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm

END_OF_DOCUMENT = "<|end|>"

# Tests and lookup tables are most of the standard library's bytes and little of its language.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}


@dataclass(frozen=True)
class Corpus:
    """Token streams of the training and the held-out documents, and the tokenizer trained on the former."""

    tokenizer: Tokenizer
    train: Tensor
    held_out: Tensor
    train_documents: int
    held_out_documents: int

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.get_vocab_size()

    @property
    def description(self) -> str:
        return (
            f"{self.train_documents} documents to train on ({len(self.train):,} tokens), "
            f"{self.held_out_documents} held out ({len(self.held_out):,} tokens), vocabulary {self.vocab_size:,}"
        )


def standard_library_modules() -> dict[str, str]:
    """Source of every standard library module, docstrings included, by its path in the library."""
    root = Path(sysconfig.get_path("stdlib"))
    modules = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not _SKIPPED_FOLDERS.intersection(name.parts):
            modules[name.as_posix()] = path.read_text(encoding="utf-8", errors="replace")
    return modules


def documents() -> list[str]:
    """Pydoc's topics and the standard library's modules, without repeats, in a fixed order."""
    texts = [topics[name] for name in sorted(topics)] + list(standard_library_modules().values())
    return [text for text in dict.fromkeys(texts) if text.strip()]


def split_documents(texts: list[str], held_out_fraction: float, seed: int) -> tuple[list[str], list[str]]:
    """Whole documents to one side or the other, so that no held-out window has a neighbour in training."""
    order = list(range(len(texts)))
    random.Random(seed).shuffle(order)
    held_out = set(order[: max(1, round(held_out_fraction * len(texts)))])
    train = [texts[i] for i in order if i not in held_out]
    return train, [texts[i] for i in sorted(held_out)]


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level byte-pair tokenizer of at most `vocab_size` entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return tokenizer


def tokenize(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """One stream of token ids in which every document is followed by the end-of-document token."""
    ids: list[int] = []
    for encoding in tokenizer.encode_batch([text + END_OF_DOCUMENT for text in texts]):
        ids += encoding.ids
    return torch.tensor(ids)


def load_corpus(vocab_size: int, limit: int | None, seed: int) -> Corpus:
    """The first `limit` documents, or all: split, tokenized by a tokenizer trained on the training part."""
    with tqdm(total=4, desc="text and tokenizer", unit="part") as bar:
        texts = documents()[:limit]
        bar.update()
        train, held_out = split_documents(texts, held_out_fraction=0.08, seed=seed)
        tokenizer = train_tokenizer(train, vocab_size)
        bar.update()
        train_stream = tokenize(tokenizer, train)
        bar.update()
        held_out_stream = tokenize(tokenizer, held_out)
        bar.update()
    return Corpus(tokenizer, train_stream, held_out_stream, len(train), len(held_out))
