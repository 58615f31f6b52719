"""What a task is: data, a loss, metrics and pictures around one kind of problem."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import torch
from lightning import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from ctm.model import Thought


class Positions:
    """Endless batches of stream positions, from a given batch on.

    A training set here is a function of the position in an endless stream (`dataset[position]`), so that the data of a
    run is fixed by its seed at any number of workers, and a resumed run goes on exactly where it stopped. Each of
    `world` processes takes its own share of every batch.
    """

    def __init__(self, batch_size: int, start: int = 0, rank: int = 0, world: int = 1):
        self.batch_size, self.start, self.rank, self.world = batch_size, start, rank, world

    def __iter__(self) -> Iterator[range]:
        for batch in count(self.start):
            first = (batch * self.world + self.rank) * self.batch_size
            yield range(first, first + self.batch_size)


class Task(LightningDataModule):
    """Base of all tasks. A subclass gives `datasets`, `loss`, `metrics` and what else it overrides.

    Args:
        batch_size: training samples of a step, per process.
        eval_batch_size: the same in validation and test.
        num_workers: processes that make training data; 0 makes it in the main process.

    Attributes:
        headline: the metric that people ask for; the best checkpoint is the one with its highest validation value.
        out_dims: (positions, classes) of a prediction.
        sample_size: what `Encoder.n_tokens` takes.
        lstm_answers_last: whether an LSTM answers (and learns) at its last tick instead of its most certain one.
    """

    headline: str = "accuracy"
    out_dims: tuple[int, int]
    sample_size: tuple[int, ...]
    lstm_answers_last: bool = False

    def __init__(self, batch_size: int, eval_batch_size: int, num_workers: int):
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise ValueError(f"data.{name}={value} must be at least {least}")
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.seed = torch.initial_seed() % 2**31  # what seed_everything set: the training stream follows it

    # ------------------------------------------------------------------------------------------ what a subclass gives
    def dataset(self, split: str) -> Dataset:
        """`train`: samples by stream position, endless. `val`, `test`: fixed sets with a length."""
        raise NotImplementedError

    def loss(self, thought: Thought, batch, most_certain: bool = True) -> Tensor:
        """The scalar that training minimises."""
        raise NotImplementedError

    def metrics(self, thought: Thought, batch, most_certain: bool = True) -> dict[str, Tensor]:
        """Values of every sample: (B,) each, or (B, T) for a curve over ticks."""
        raise NotImplementedError

    def describe(self) -> str:
        """One line about the data, printed when a run starts."""
        return ""

    def figures(self, model: nn.Module, folder: Path) -> list[Path]:
        """Draws pictures of the test set into a folder and returns their paths."""
        return []

    # ------------------------------------------------------------------------------------------------------- loaders
    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        done = trainer.fit_loop.epoch_loop.batch_progress.total.completed if trainer else 0
        rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        return DataLoader(
            self.dataset("train"),
            batch_sampler=Positions(self.batch_size, done, rank, world),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # its own, so that making the loader draws nothing from the model's
        )

    def _eval_dataloader(self, split: str) -> DataLoader:
        dataset = self.dataset(split)
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        share = Subset(dataset, range(rank, len(dataset), world))
        return DataLoader(share, batch_size=self.eval_batch_size, generator=torch.Generator())

    def val_dataloader(self) -> DataLoader:
        return self._eval_dataloader("val")

    def test_dataloader(self) -> DataLoader:
        return self._eval_dataloader("test")

    def predict_dataloader(self) -> DataLoader:
        return self._eval_dataloader("test")
