"""What a task is: data, a loss, metrics and pictures around one kind of problem."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import TYPE_CHECKING

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from ctm.loss import classification_loss
from ctm.model import Thought
from tasks.metrics import classification
from tasks.seen import Sample, Seen, Survey

if TYPE_CHECKING:  # Matplotlib takes a second: whoever draws imports it
    from tasks.figures import Picture


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


class Shuffled:
    """An endless stream over n things: every pass takes each once, in an order of its own."""

    def __init__(self, n: int, seed: int):
        self.n, self.seed = n, seed
        self.order: tuple[int, np.ndarray] | None = None

    def __call__(self, position: int) -> int:
        """Which of the n stands at this position of the stream."""
        turn, place = divmod(position, self.n)
        if self.order is None or self.order[0] != turn:
            self.order = turn, np.random.default_rng((self.seed, turn)).permutation(self.n)
        return int(self.order[1][place])


class Task(LightningDataModule):
    """Base of all tasks. A subclass gives `dataset` and what else it overrides.

    Args:
        batch_size: training samples of a step, per process.
        eval_batch_size: the same in validation and test.
        num_workers: processes that make training data; 0 makes it in the main process.

    Attributes:
        headline: the metric that people ask for; the best checkpoint is the one with its highest validation value.
        out_dims: (positions, classes) of a prediction.
        sample_size: what `Encoder.n_tokens` takes.
        vector_width: width of the ready vectors that a model reads; None where it attends to tokens.
        least_ticks: how many ticks an answer takes.
        lstm_answers_last: whether an LSTM answers (and learns) at its last tick instead of its most certain one.
        lstm_encoder: arguments of the encoder that are others for the LSTM, as published.
        refused: nets that cannot do the task, each with a sentence that says why.
        no_early_exit: None, or a sentence that says why thinking cannot end at a tick of its own choice.
        difficulty_name: what `difficulty` counts, with its unit.
        position_name: what the positions of an answer are.
        collate: makes a batch of samples; None stacks them.
        replayable: whether its loss only launches kernels, the same for every batch of a shape (`ctm.ops.learn`).
        in_ticks: whether it is solved by thinking in ticks, which pictures can show.
    """

    headline: str = "accuracy"
    out_dims: tuple[int, int]
    sample_size: tuple[int, ...]
    vector_width: int | None = None
    least_ticks: int = 1
    lstm_answers_last: bool = False
    lstm_encoder: dict = {}
    refused: dict[str, str] = {}
    no_early_exit: str | None = None
    difficulty_name: str = "difficulty"
    position_name: str = "position"
    collate: Callable[[list], object] | None = None
    replayable: bool = False
    in_ticks: bool = True

    def __init__(self, batch_size: int, eval_batch_size: int, num_workers: int):
        super().__init__()
        self.at_least(batch_size=(batch_size, 1), eval_batch_size=(eval_batch_size, 1), num_workers=(num_workers, 0))
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.seed = torch.initial_seed() % 2**31  # what seed_everything set: the training stream follows it

    @staticmethod
    def at_least(**arguments: tuple[float, float]) -> None:
        """Refuses an argument, given with its least value, that is below it."""
        for name, (value, least) in arguments.items():
            if value < least:
                raise ValueError(f"data.{name}={value} must be at least {least}")

    # ------------------------------------------------------------------------------------------ what a subclass gives
    def dataset(self, split: str) -> Dataset:
        """`train`: samples by stream position, endless. `val`, `test`: fixed sets with a length."""
        raise NotImplementedError

    def targets(self, batch) -> Tensor | None:
        """The right classes, (B, P); None where the task is not to name the class of every position."""
        target = batch[-1]
        return target[:, None] if target.ndim == 1 else target

    def loss(self, thought: Thought, batch, most_certain: bool = True) -> Tensor:
        """The scalar that training minimises."""
        return classification_loss(thought.predictions, thought.certainty, self.targets(batch), most_certain)

    def metrics(self, thought: Thought, batch, most_certain: bool = True) -> dict[str, Tensor]:
        """Values of every sample: (B,) each, or (B, T) for a curve over ticks."""
        return classification(thought, self.targets(batch), self.out_dims[1], most_certain)

    def test_metrics(self, model: nn.Module, batch, most_certain: bool) -> dict[str, Tensor]:
        """More values (B,) of every test sample, for which the model has to think again."""
        return {}

    def count(self, batch) -> int:
        """How many samples of a batch the headline metric is about."""
        return len(batch[0])

    def difficulty(self, batch) -> Tensor | None:
        """How hard every sample is (B,), whole numbers: test metrics are written by it, too."""
        return None

    def describe(self) -> str:
        """One line about the data, printed when a run starts."""
        return ""

    # ------------------------------------------------------------------------------------------------------ pictures
    def explore(self, model: nn.Module, most_certain: bool) -> dict[str, tuple[np.ndarray, ...]]:
        """Arrays for `statistics` that take more thinking than the test samples."""
        return {}

    def words(self, sample: Sample) -> tuple[str, str]:
        """The answer and the right one, for tables and titles."""
        said = sample.probabilities[sample.answer].argmax(-1)
        return " ".join(map(str, said)), " ".join(map(str, np.atleast_1d(sample.batch[-1]).astype(int)))

    def solving(self, sample: Sample, name: str) -> "list[Picture]":
        """One sample being solved, tick by tick."""
        return []

    def figures(self, seen: Seen) -> "list[Picture]":
        """The pictures that this task wants, in the order of a report."""
        pictures = []
        for i, sample in enumerate(seen.samples, start=1):
            pictures += self.solving(sample, f"sample-{i}")
        pictures += self.neural(seen)
        return pictures + (self.statistics(seen.survey) if seen.survey else [])

    def neural(self, seen: Seen) -> "list[Picture]":
        """Neurons, their synchronization and decay rates: what the model has of them."""
        from tasks import figures
        from tasks.figures import Picture

        pictures, sample = [], seen.samples[0]
        if sample.post is not None:
            features = np.concatenate([other.post for other in seen.samples])
            pictures += [
                Picture(
                    "neurons", "Neurons, lit by what they do",
                    f"Neurons that are active together in {len(seen.samples)} samples ({len(features)} ticks) lie close"
                    " together: principal components of their standardised post-activations. The colour is the"
                    " post-activation while sample 1 is thought about; on the right all ticks at once.",
                    lambda: figures.neurons(*figures.plane(features), sample.post),
                ),
                Picture(
                    "traces", "Neural dynamics",
                    "Neurons of sample 1, in equal steps from the most to the least variable over ticks. Every trace"
                    " is scaled to its own range; that of the post-activation is written above it.",
                    partial(figures.traces, sample.pre, sample.post),
                ),
            ]  # fmt: skip
        if sample.syncs:
            kinds = {name: (values, seen.decays[name][1]) for name, values in sample.syncs.items()}
            pictures.append(
                Picture(
                    "synchronization", "Synchronization",
                    "Sample 1: the synchronization of every pair of neurons over the ticks (dashed: the answer), and,"
                    " where all pairs of some neurons are taken, as a matrix. This is what the model answers with and"
                    " looks with.",
                    partial(figures.synchronization, kinds, sample.first + sample.answer),
                )
            )  # fmt: skip
        if seen.decays:
            pictures.append(
                Picture(
                    "decays", "Learned decay rates",
                    "A pair with decay rate r weighs what happened k ticks ago by exp(-rk): 0 remembers all ticks"
                    " alike.",
                    partial(figures.decays, {name: rates for name, (rates, _) in seen.decays.items()}),
                )
            )  # fmt: skip
        return pictures

    def statistics(self, survey: Survey) -> "list[Picture]":
        """Many samples: accuracy, certainty and calibration, and how long it thinks about what."""
        from tasks import figures
        from tasks.figures import Picture

        done, n = "right" if self.headline == "accuracy" else self.headline, survey.n
        tick, right = survey.values["ticks"], survey.values[self.headline]
        ticks = survey.curves["certainty_by_tick"].shape[1]
        ways = {"": "at this tick", "_most_certain": "most certain so far"}
        ways |= {"_averaged": "mean so far", "_weighted": "weighted mean so far"}
        metrics = {}
        for name, curve in survey.curves.items():
            name = name.removesuffix("_by_tick")
            way = next((way for way in ways if way and name.endswith(way)), "")
            if name != "certainty":
                metrics.setdefault(name.removesuffix(way).replace("_", " "), {})[ways[way]] = curve
        pictures = [
            Picture(
                "over_ticks", "Accuracy and certainty against ticks",
                f"{n} test samples. Each tick's own prediction; what the answer would be had thinking ended there: the"
                " most certain tick's so far, and the mean of all predictions so far, plain and weighted by certainty.",
                partial(figures.over_ticks, metrics, survey.curves["certainty_by_tick"]),
            )
        ]  # fmt: skip
        if survey.right_by_tick is not None and survey.right_by_tick.shape[1] > 1:
            pictures.append(
                Picture(
                    "positions", f"Which {self.position_name} is right when",
                    f"{n} test samples: how often each tick's own prediction is right there.",
                    partial(figures.positions, survey.right_by_tick, self.position_name),
                )
            )  # fmt: skip
        if survey.confidence:
            pictures.append(
                Picture(
                    "calibration", "Calibration",
                    f"How often what is said with some probability is true, in 15 bins: {n} test samples, every"
                    " position of an answer counted. The error is the mean distance from the dashed line, weighted by"
                    " how many predictions there are (expected calibration error).",
                    partial(figures.calibration, survey.confidence),
                )
            )  # fmt: skip
        if ticks > 1:
            pictures.append(
                Picture(
                    "thinking_time", "Thinking time",
                    f"The tick at which the answer to each of {n} test samples was given.",
                    partial(figures.thinking_time, tick, right, ticks, done),
                )
            )  # fmt: skip
        if survey.difficulty is not None:
            hard = survey.difficulty
            pictures.append(
                Picture(
                    "difficulty", f"By {self.difficulty_name}",
                    f"{n} test samples by {self.difficulty_name}; bars are 95 % intervals (Wilson's for shares).",
                    partial(figures.by_difficulty, hard, tick, right, ticks, self.difficulty_name, done),
                )
            )  # fmt: skip
        return pictures

    # ------------------------------------------------------------------------------------------------------- loaders
    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        done = trainer.fit_loop.epoch_loop.batch_progress.total.completed if trainer else 0
        rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        return DataLoader(
            self.dataset("train"),
            batch_sampler=Positions(self.batch_size, done, rank, world),
            collate_fn=self.collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # its own, so that making the loader draws nothing from the model's
        )

    def _eval_dataloader(self, split: str, kind: type[DataLoader] = DataLoader, **options) -> DataLoader:
        """`options` of the loader, instead of batches of neighbours that the main process makes."""
        dataset = self.dataset(split)
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        share = Subset(dataset, range(rank, len(dataset), world))
        usual = {"batch_size": self.eval_batch_size, "generator": torch.Generator(), "collate_fn": self.collate}
        return kind(share, **usual | options)

    def val_dataloader(self) -> DataLoader:
        return self._eval_dataloader("val")

    def test_dataloader(self) -> DataLoader:
        return self._eval_dataloader("test")

    def predict_dataloader(self) -> DataLoader:
        return self._eval_dataloader("test")
