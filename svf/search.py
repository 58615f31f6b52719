"""Search without gradients over a box of a few numbers: the cross-entropy method, and sep-CMA-ES (package `cmaes`)."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Score = tuple[float, ...]
"""The higher the better; what comes first counts, the rest breaks ties."""


class CEM:
    """Cross-entropy method as in arXiv 2501.06252, appendix: a diagonal normal, refitted to the best fifth.

    Unlike there its width has a floor, so that a lucky first population does not end the search.
    """

    def __init__(self, mean: Tensor, population: int, seed: int, low: float, high: float):
        self.mean, self.std = mean.clone(), torch.full_like(mean, (high - low) / 2)
        self.population, self.low, self.high = population, low, high
        self.random = torch.Generator().manual_seed(seed)

    def ask(self) -> Tensor:
        noise = torch.randn(self.population, len(self.mean), generator=self.random)
        return (self.mean + self.std * noise).clamp(self.low, self.high)

    def tell(self, candidates: Tensor, order: Sequence[int]) -> None:
        """`order`: the candidates from the best on."""
        elite = candidates[list(order[: max(2, int(0.2 * len(candidates)))])]
        self.mean = elite.mean(0)
        self.std = elite.std(0).clamp(min=0.02 * (self.high - self.low))


class SepCMA:
    """Separable CMA-ES of the package `cmaes`, told ranks."""

    def __init__(self, mean: Tensor, population: int, seed: int, low: float, high: float):
        try:
            import cmaes
        except ModuleNotFoundError:
            raise ValueError("method='cmaes' needs the package cmaes: pip install cmaes") from None
        if len(mean) < 2:
            raise ValueError("method='cmaes' needs at least two numbers to search over; use method='cem'")
        bounds = np.tile([low, high], (len(mean), 1)).astype(float)
        self.search = cmaes.SepCMA(
            mean.double().numpy(), 0.3 * (high - low), bounds=bounds, population_size=population, seed=seed
        )

    def ask(self) -> Tensor:
        return torch.tensor(np.array([self.search.ask() for _ in range(self.search.population_size)])).float()

    def tell(self, candidates: Tensor, order: Sequence[int]) -> None:
        self.search.tell([(candidates[i].double().numpy(), float(rank)) for rank, i in enumerate(order)])


METHODS = {"cem": CEM, "cmaes": SepCMA}
Method = Literal["cem", "cmaes"]


@dataclass
class Found:
    """What a search has come to."""

    best: Tensor
    score: Score
    history: list[Score] = field(default_factory=list)
    """Best score so far, after every generation."""
    evaluated: int = 0


def maximize(
    evaluate: Callable[[Tensor], Sequence[Score]],
    first: Tensor,
    mean: Tensor,
    method: Method = "cem",
    population: int = 32,
    generations: int = 20,
    seed: int = 0,
    low: float = 0.0,
    high: float = 1.0,
    progress: bool = True,
) -> Found:
    """Searches the box [low, high] for the point of the highest score; of equal ones the first that was seen.

    Args:
        evaluate: (candidates, numbers) -> a score for each. Never asked for the same candidate twice.
        first: (n, numbers), n <= population, that the first population contains, in this order.
        mean: (numbers,), what the search starts around.

    Raises:
        ValueError: for an unknown method, or more points to start with than the population has.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is none of {', '.join(METHODS)}")
    if len(first) > population:
        raise ValueError(f"population={population} is too small to contain the {len(first)} points to start with")
    search = METHODS[method](mean, population, seed, low, high)
    known: dict[bytes, Score] = {}
    found = Found(first[0], (-math.inf,))
    with _bar(generations, progress) as advance:
        for generation in range(generations):
            candidates = search.ask()
            if generation == 0:
                candidates[: len(first)] = first
            keys = [candidate.numpy().tobytes() for candidate in candidates]
            new = [i for i, key in enumerate(keys) if key not in known and key not in keys[:i]]
            if new:
                known |= zip((keys[i] for i in new), map(tuple, evaluate(candidates[new])), strict=True)
            scores = [known[key] for key in keys]
            order = sorted(range(population), key=lambda i: scores[i], reverse=True)  # stable: the first of equals
            search.tell(candidates, order)
            if scores[order[0]] > found.score:
                found.best, found.score = candidates[order[0]].clone(), scores[order[0]]
            found.history.append(found.score)
            found.evaluated += len(new)
            advance(found.score)
    return found


@contextmanager
def _bar(generations: int, wanted: bool) -> Iterator[Callable[[Score], None]]:
    """A progress bar with the best score."""
    if not wanted:
        yield lambda score: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("Searching"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[best]}"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=generations, best="")
        yield lambda score: bar.update(task, advance=1, best=f"best {score[0]:.3g}")
