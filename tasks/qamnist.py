"""QAMNIST: see handwritten digits one after the other, then hear a question about them, and answer it.

The question is a chain of additions and subtractions modulo 10 on digits named by their place: "the second, plus the
first, minus the second". What was seen has to be kept until it is asked for.
"""

from collections.abc import Iterator
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets

from ctm.encoders import QAMNIST
from tasks.base import Task
from tasks.image import KINDS, embedded_digits, stratified
from tasks.seen import Sample

Batch = tuple[Tensor, Tensor, Tensor]
"""Digits (B, N, 1, 32, 32), question (B, 2 O + 1) of indices and operators by turns, answers (B,)."""

PLUS, MINUS = -1, -2
"""Operators as the encoder takes them."""
SIDE = 32
SPLITS = ("train", "val", "test")


def question_and_answer(digits: np.ndarray, n_operations: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """A random chain of operations on digits (N,), and its value modulo 10."""
    indices = rng.integers(len(digits), size=n_operations + 1)
    operators = rng.choice([PLUS, MINUS], size=n_operations)
    value = digits[indices[0]]
    for operator, index in zip(operators, indices[1:], strict=True):
        value = (value + (digits[index] if operator == PLUS else -digits[index])) % 10
    question = np.empty(2 * n_operations + 1, dtype=np.int64)
    question[::2], question[1::2] = indices, operators
    return question, int(value)


class Questions(Dataset):
    """Digits and a question from (seed, split, position). How many there are is the same for all of a batch."""

    def __init__(self, task: "QAMNISTTask", split: str, length: int | None):
        self.task, self.split, self.length = task, split, length
        self.images, self.labels = task.digits[split]

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("the training stream has no end")
        return self.length

    def amounts(self, position: int) -> tuple[int, int]:
        """Digits and operations of a sample: drawn for every batch of the stream, in equal shares otherwise."""
        amounts = self.task.amounts
        if self.length is not None:
            return amounts[position * len(amounts) // self.length]
        rng = np.random.default_rng((self.task.seed, len(SPLITS), position // self.task.batch_size))
        return amounts[rng.integers(len(amounts))]

    def __getitem__(self, position: int) -> tuple[Tensor, np.ndarray, int]:
        n_digits, n_operations = self.amounts(position)
        seed = self.task.seed if self.split == "train" else 0
        rng = np.random.default_rng((seed, SPLITS.index(self.split), position))
        chosen = rng.integers(len(self.labels), size=n_digits)
        question, answer = question_and_answer(self.labels[chosen], n_operations, rng)
        mean, std = self.task.normalisation
        return (self.images[chosen, None].float() / 255 - mean) / std, question, answer


class EqualAmounts:
    """Batches of a set's own samples, never of different amounts of digits and operations.

    Each of `world` processes takes every world-th sample of each amount.
    """

    def __init__(self, questions: Questions, batch_size: int, rank: int, world: int):
        groups: dict[tuple[int, int], list[int]] = {}
        for i in range(len(questions)):
            groups.setdefault(questions.amounts(i), []).append(i)
        shares = [group[rank::world] for group in groups.values()]
        self.batches = [s[i : i + batch_size] for s in shares for i in range(0, len(s), batch_size)]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class QAMNISTTask(Task):
    """Questions about handwritten digits.

    Args:
        source: mnist (from `root`), digits (scikit-learn's, no files needed), or auto: mnist where it is on the disk.
        root: where MNIST is, as torchvision keeps it.
        max_digits: digits that are shown, 1 to this many, drawn for every batch.
        max_operations: operations of a question, 1 to this many, drawn for every batch.
        n_val: validation questions, in equal shares for all amounts of digits and operations.
        n_test: test questions, the same.
        batch_size: training questions of a step, per process.
        eval_batch_size: the same in validation and test.
        num_workers: processes that make training questions; 0 makes them in the main process.
    """

    lstm_answers_last = True
    difficulty_name = "number of operations"
    lstm_encoder = {"project_question": True}
    refused = {
        "ff": "digits and question come one after the other, and a feed-forward net has one tick; take ctm or lstm"
    }

    def __init__(
        self,
        source: Literal["auto", "mnist", "digits"] = "auto",
        root: str = "data",
        max_digits: int = 4,
        max_operations: int = 4,
        n_val: int = 1600,
        n_test: int = 3200,
        batch_size: int = 64,
        eval_batch_size: int = 200,
        num_workers: int = 0,
    ):
        super().__init__(batch_size, eval_batch_size, num_workers)
        self.at_least(max_digits=(max_digits, 1), max_operations=(max_operations, 1))
        if max_digits > QAMNIST.MAX_DIGITS:
            raise ValueError(f"data.max_digits={max_digits} must be at most {QAMNIST.MAX_DIGITS}")
        self.amounts = list(product(range(1, max_digits + 1), range(1, max_operations + 1)))
        least = len(self.amounts)
        self.at_least(n_val=(n_val, least), n_test=(n_test, least))
        self.n_val, self.n_test, self.root = n_val, n_test, Path(root).expanduser()
        self.out_dims, self.sample_size = (1, 10), (SIDE, SIDE)
        found = None if source == "digits" else self._mnist()
        if source == "mnist" and found is None:
            raise ValueError(f"data.source=mnist: put its files in {self.root.absolute()} as {KINDS['mnist'].where}")
        self.mnist = found

    # ---------------------------------------------------------------------------------------------------------- data
    def _mnist(self) -> list[datasets.MNIST] | None:
        if not (self.root / "MNIST").is_dir():
            return None
        try:
            return [datasets.MNIST(self.root, train=train) for train in (True, False)]
        except Exception as error:  # torchvision raises many kinds where part of it is not there, or damaged
            reason = f"MNIST cannot be read from {self.root.absolute()} ({str(error) or type(error).__name__})"
        raise ValueError(f"data.root: {reason}; its files are {KINDS['mnist'].where}, or take data.source=digits")

    @property
    def normalisation(self) -> tuple[float, float]:
        kind = KINDS["mnist" if self.mnist else "digits"]
        return kind.mean[0], kind.std[0]

    @cached_property
    def digits(self) -> dict[str, tuple[Tensor, np.ndarray]]:
        """Pictures of each split, bytes (n, 32, 32), and their classes; no picture is in two of them."""
        if self.mnist:
            (images, labels), test = ((np.asarray(part.data), np.asarray(part.targets)) for part in self.mnist)
            rest, val = stratified(labels, 0.1)
        else:
            images, labels = embedded_digits()
            rest, taken = stratified(labels, 0.2)
            test = images[taken], labels[taken]
            images, labels = images[rest], labels[rest]
            rest, val = stratified(labels, 0.25)
        parts = {"train": (images[rest], labels[rest]), "val": (images[val], labels[val]), "test": test}
        return {split: (enlarged(part), classes) for split, (part, classes) in parts.items()}

    def dataset(self, split: str) -> Questions:
        return Questions(self, split, {"train": None, "val": self.n_val, "test": self.n_test}[split])

    def _eval_dataloader(self, split: str) -> DataLoader:
        dataset = self.dataset(split)
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        batches = EqualAmounts(dataset, self.eval_batch_size, rank, world)
        return DataLoader(dataset, batch_sampler=batches, generator=torch.Generator())

    def difficulty(self, batch: Batch) -> Tensor:
        """How many operations the question has."""
        return torch.full((len(batch[1]),), batch[1].shape[1] // 2)

    def describe(self) -> str:
        source = f"MNIST in {self.root}" if self.mnist else "scikit-learn's digits"
        (n, operations), count = self.amounts[-1], len(self.digits["train"][1])
        return f"questions on 1 to {n} digits with 1 to {operations} operations, {source}, {count:,} to train on"

    # -------------------------------------------------------------------------------------------------------- pictures
    def solving(self, sample: Sample, name: str) -> list:
        from tasks import figures

        digits, question, target = sample.batch
        signs = {PLUS: "+", MINUS: "-"}
        words = " ".join(f"d{int(part)}" if i % 2 == 0 else signs[int(part)] for i, part in enumerate(question))
        mean, std = self.normalisation
        said, right = self.words(sample)
        looked = None
        if sample.attention is not None:  # every digit is shown for equally many ticks
            looked = np.stack([part.mean(0) for part in np.array_split(sample.attention, len(digits))])
        return [
            figures.Picture(
                f"{name}-question", f"{words} modulo 10: {said}" + ("" if said == right else f", not {right}"),
                "The digits d0, d1, … as they are shown one after the other, with attention in the mean of ticks and"
                " heads below; then the question is heard; then the answer is given.",
                partial(
                    figures.question, (digits[:, 0] * std + mean).clip(0, 1), words, int(target),
                    sample.probabilities[:, 0], sample.certainty, sample.answer, sample.first, looked,
                ),
            )
        ]  # fmt: skip


def enlarged(images: np.ndarray) -> Tensor:
    """Bytes (n, h, w) -> bytes (n, 32, 32), bilinear."""
    floats = torch.from_numpy(images)[:, None].float()
    return F.interpolate(floats, size=(SIDE, SIDE), mode="bilinear", antialias=True).squeeze(1).round().byte()
