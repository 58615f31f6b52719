"""Sorting: see some numbers once a tick, and say their order, smallest first, one index at a time, when ready.

The answer is a sequence of symbols over ticks, learned by connectionist temporal classification: at every tick the
index of a number, or the blank.
"""

from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ctm.loss import ctc_loss
from ctm.model import Thought
from tasks.base import Task
from tasks.seen import Sample

Batch = tuple[Tensor, Tensor]
"""Numbers (B, N) and the indices that sort them (B, N)."""

SPLITS = ("train", "val", "test")


class Said(NamedTuple):
    """What a model said, N symbols and no more."""

    symbols: Tensor
    """(B, N), -1 where it said fewer."""
    tick: Tensor
    """When it said them, (B, N), from 1; 0 where it said fewer."""
    count: Tensor
    """How many it said in all, (B,)."""


def greedy(predictions_BTC: Tensor, n: int) -> Said:
    """The best symbol of every tick, repetitions and blanks (the last class) left out: a blank between two equal
    symbols makes them two."""
    best_BT = predictions_BTC.argmax(-1)
    before_BT = torch.cat([torch.full_like(best_BT[:, :1], -1), best_BT[:, :-1]], dim=1)
    new_BT = (best_BT != predictions_BTC.shape[-1] - 1) & (best_BT != before_BT)
    place_BT = torch.where(new_BT, new_BT.cumsum(1) - 1, n).clamp(max=n)  # what is too much goes to an extra place
    tick_T = torch.arange(1, best_BT.shape[1] + 1, device=best_BT.device)
    symbols = torch.full((len(best_BT), n + 1), -1, device=best_BT.device).scatter(1, place_BT, best_BT)
    tick = torch.zeros_like(symbols).scatter(1, place_BT, tick_T.expand_as(place_BT))
    return Said(symbols[:, :n], tick[:, :n], new_BT.sum(1))


class Numbers(Dataset):
    """Standard normal numbers from (seed, split, position). Val and test are the same for every seed of a run."""

    def __init__(self, task: "SortTask", split: str, length: int | None):
        self.task, self.split, self.length = task, split, length

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("the training stream has no end")
        return self.length

    def __getitem__(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        seed = self.task.seed if self.split == "train" else 0
        rng = np.random.default_rng((seed, SPLITS.index(self.split), position))
        numbers = rng.standard_normal(self.task.n, dtype=np.float32)
        return numbers, numbers.argsort()


class SortTask(Task):
    """Sorting random numbers.

    Args:
        n: how many numbers; the model's d_input is the same.
        n_val: validation lists.
        n_test: test lists.
        batch_size: training lists of a step, per process.
        eval_batch_size: the same in validation and test.
        num_workers: processes that make training lists; 0 makes them in the main process.
    """

    headline = "solved"
    refused = {"ff": "sorting is said one number a tick, and a feed-forward net has one tick; take ctm or lstm"}
    difficulty_name = "smallest gap (halvings of 1)"
    no_early_exit = "the answer of sorting is what is said at all ticks"

    def __init__(
        self,
        n: int = 30,
        n_val: int = 1000,
        n_test: int = 2000,
        batch_size: int = 32,
        eval_batch_size: int = 500,
        num_workers: int = 0,
    ):
        super().__init__(batch_size, eval_batch_size, num_workers)
        self.at_least(n=(n, 2), n_val=(n_val, 1), n_test=(n_test, 1))
        self.n, self.n_val, self.n_test = n, n_val, n_test
        self.out_dims, self.sample_size, self.vector_width, self.least_ticks = (1, n + 1), (n,), n, n

    def dataset(self, split: str) -> Numbers:
        return Numbers(self, split, {"train": None, "val": self.n_val, "test": self.n_test}[split])

    def targets(self, batch: Batch) -> None:
        """There is no right class of a tick."""

    def loss(self, thought: Thought, batch: Batch, most_certain: bool = True) -> Tensor:
        return ctc_loss(thought.predictions, batch[1])

    @torch.no_grad()
    def metrics(self, thought: Thought, batch: Batch, most_certain: bool = True) -> dict[str, Tensor]:
        """`solved`: the whole list is right, and nothing is said beyond it. `accuracy`: share of its places. `ticks`:
        when the last was said."""
        said = greedy(thought.predictions, self.n)
        right_BN = said.symbols == batch[1]
        ticks_T = torch.arange(1, thought.certainty.shape[1] + 1, device=right_BN.device)
        right_by_tick_BTN = right_BN[:, None] & (said.tick[:, None] <= ticks_T[None, :, None])
        return {
            "solved": (right_BN.all(1) & (said.count == self.n)).float(),
            "accuracy": right_BN.float().mean(1),
            "ticks": said.tick.amax(1).float(),
            "certainty": thought.certainty.mean(1),
            "accuracy_by_tick": right_by_tick_BTN.float().mean(2),
            "certainty_by_tick": thought.certainty,
        }

    def difficulty(self, batch: Batch) -> Tensor:
        """How many times 1 must be halved to come under the smallest gap between two numbers."""
        gap = batch[0].sort(1).values.diff(dim=1).amin(1)
        return (-gap.clamp(min=1e-9).log2()).ceil().clamp(min=0).long()

    def describe(self) -> str:
        return f"sorting {self.n} normally distributed numbers"

    def words(self, sample: Sample) -> tuple[str, str]:
        said = greedy(torch.from_numpy(sample.probabilities[None, :, 0]), self.n).symbols[0].tolist()
        return " ".join(str(i) for i in said if i >= 0), " ".join(str(int(i)) for i in sample.batch[1])

    def solving(self, sample: Sample, name: str) -> list:
        from tasks import figures

        result = "right" if sample.values["solved"] else f"{sample.values['accuracy']:.0%} of the places right"
        return [
            figures.Picture(
                f"{name}-sort", f"{self.n} numbers sorted, {result}",
                "The probability of every number's index, in the right order from below, at each tick; on top the"
                " blank, which says nothing.",
                partial(
                    figures.sorting, sample.batch[0], sample.batch[1].astype(int), sample.probabilities[:, 0]
                ),
            )
        ]  # fmt: skip
