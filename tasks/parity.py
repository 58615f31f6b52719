"""Parity: read a sequence of -1 and 1, and say for each of its places whether the number of -1 so far is odd.

Training, validation and test sequences are never the same ones: a hash of the sequence decides where it belongs.
"""

import zlib
from functools import partial

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from ctm.loss import beginning, paced_loss
from ctm.model import Thought
from tasks.base import Task
from tasks.seen import Sample

Batch = tuple[Tensor, Tensor]
"""Sequences (B, L) of -1.0 and 1.0, and cumulative parities (B, L), 1 for odd."""

SPLITS = ("train", "val", "test")


def split_of(negative: np.ndarray) -> str:
    """train (80 %), val (10 %) or test (10 %) by the sequence alone; `negative` (L,) is true where it is -1."""
    return {8: "val", 9: "test"}.get(zlib.crc32(np.packbits(negative).tobytes()) % 10, "train")


class Sequences(Dataset):
    """Sequences made from (seed, split, position). Those of val and test are the same for every seed of a run."""

    def __init__(self, task: "ParityTask", split: str, length: int | None):
        self.task, self.split, self.length = task, split, length

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("the training stream has no end")
        return self.length

    def __getitem__(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        seed = self.task.seed if self.split == "train" else 0
        rng = np.random.default_rng((seed, SPLITS.index(self.split), position))
        while split_of(negative := rng.random(self.task.length) < 0.5) != self.split:
            pass
        return np.where(negative, -1, 1).astype(np.float32), negative.cumsum() % 2


class ParityTask(Task):
    """Parity of random sequences.

    Args:
        length: of a sequence, at least 8.
        lookahead: null for the published loss. A number asks for the places one after the other at an even pace
            (`ctm.loss.paced_loss`), of those not nearly always right only for the next so many, and adds the published
            loss when all are asked for.
        n_val: validation sequences.
        n_test: test sequences.
        batch_size: training sequences of a step, per process.
        eval_batch_size: the same in validation and test.
        num_workers: processes that make training sequences; 0 makes them in the main process.
    """

    headline = "solved"
    replayable = True
    lstm_answers_last = True
    difficulty_name = "number of flips (bits of -1)"
    position_name = "place in the sequence"

    def __init__(
        self,
        length: int = 64,
        lookahead: int | None = None,
        n_val: int = 1000,
        n_test: int = 2000,
        batch_size: int = 64,
        eval_batch_size: int = 500,
        num_workers: int = 0,
    ):
        super().__init__(batch_size, eval_batch_size, num_workers)
        self.at_least(length=(length, 8), n_val=(n_val, 1), n_test=(n_test, 1))
        if lookahead is not None:
            self.at_least(lookahead=(lookahead, 1))
        self.length, self.lookahead, self.n_val, self.n_test = length, lookahead, n_val, n_test
        self.out_dims, self.sample_size = (length, 2), (length,)

    def dataset(self, split: str) -> Sequences:
        return Sequences(self, split, {"train": None, "val": self.n_val, "test": self.n_test}[split])

    def loss(self, thought: Thought, batch: Batch, most_certain: bool = True) -> Tensor:
        published = super().loss(thought, batch, most_certain)
        if self.lookahead is None:
            return published
        asked_P = beginning(thought.predictions, batch[1], self.lookahead)
        # At an even pace nothing says that the most certain tick must not come before the last places are due.
        return paced_loss(thought.predictions, batch[1], asked_P) + asked_P.min() * published

    def difficulty(self, batch: Batch) -> Tensor:
        """How often the parity flips."""
        return (batch[0] < 0).sum(1)

    def describe(self) -> str:
        return f"parity of {self.length} bits, train, val and test sequences kept apart by a hash"

    def words(self, sample: Sample) -> tuple[str, str]:
        said = sample.probabilities[sample.answer].argmax(-1)
        return "".join(map(str, said)), "".join(str(int(odd)) for odd in sample.batch[1])

    def solving(self, sample: Sample, name: str) -> list:
        from tasks import figures

        said, right = self.words(sample)
        wrong = sum(a != b for a, b in zip(said, right, strict=True))
        return [
            figures.Picture(
                f"{name}-parity", f"{self.length} bits, {wrong or 'none'} of the parities wrong",
                "Which bits are attended to at each tick, downwards, and what is said of the parity at each place.",
                partial(
                    figures.parity, sample.batch[0] < 0, sample.batch[1], sample.probabilities[..., 1],
                    sample.certainty, sample.answer, sample.attention,
                ),
            )
        ]  # fmt: skip
