"""What there is to look at: some samples watched while a model thinks about them, and how it did on many.

`watch` makes one recording of a sample, which all its pictures are drawn from; `survey` thinks about many. Both give
NumPy arrays, letters as in `ctm.modules`, the tick first.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from ctm.loss import gather_tick
from ctm.model import CTM
from ctm.record import record
from tasks.metrics import answer_tick, averaged, probabilities

Array = np.ndarray


@dataclass
class Sample:
    """One sample, and all that was seen while it was thought about. What the model lacks is None."""

    batch: tuple[Array, ...]
    """Inputs and target, without the axis of the batch."""
    values: dict[str, float]
    """The task's metrics."""
    probabilities: Array
    """(T, P, K), at the ticks at which an answer may be given."""
    certainty: Array
    """(T,)."""
    answer: int
    """The tick of the answer, an index of the two above."""
    first: int
    """Ticks of thought before the first at which an answer may be given."""
    attention: Array | None = None
    """(T, heads, S), at `attention_ticks`."""
    attention_ticks: list[int] = field(default_factory=list)
    pre: Array | None = None
    """(T, D)."""
    post: Array | None = None
    """(T, D)."""
    syncs: dict[str, Array] = field(default_factory=dict)
    """(T, R), by what they are for: answer, attention."""


@dataclass
class Survey:
    """How a model did on many samples (N)."""

    values: dict[str, Array]
    """The task's metrics, (N,) each, and what a test adds to them."""
    curves: dict[str, Array]
    """Metrics at every tick, (N, T) each."""
    difficulty: Array | None
    """(N,)."""
    confidence: dict[str, tuple[Array, Array]]
    """Of every position's predicted class: its probability and whether it was right, at the answer and by the mean over
    ticks. Empty for a task that does not name classes."""
    right_by_tick: Array | None
    """Share of samples right, (T, P)."""
    more: dict[str, tuple[Array, ...]]
    """What the task finds out besides, by `Task.explore`."""

    @property
    def n(self) -> int:
        return len(next(iter(self.values.values())))


@dataclass
class Seen:
    """Everything that pictures are drawn from."""

    samples: list[Sample]
    decays: dict[str, tuple[Array, str]]
    """Learned decay rates (R,) and the pairing of the model's synchronizations, by what they are for."""
    survey: Survey | None = None


def array(value: Tensor | None) -> Array | None:
    return None if value is None else value.detach().float().cpu().numpy()


def of_split(task, split: str, positions: Iterable[int]) -> list:
    """Samples of a task's data by their numbers; those that cannot be read are left out."""
    dataset = task.dataset(split)
    return [sample for i in positions if (sample := dataset[int(i)]) is not None]


def spread(task, split: str, n: int) -> list[int]:
    """n positions in equal steps over the whole of a set, all of it where it is smaller."""
    length = len(task.dataset(split))
    return np.unique(np.linspace(0, length - 1, min(n, length)).round().astype(int)).tolist()


def batches(samples: list, size: int) -> Iterator[list[int]]:
    """Numbers of neighbouring samples of equal shapes, at most `size` together."""
    shapes = [tuple(np.shape(part) for part in sample) for sample in samples]
    start = 0
    for i in range(1, len(samples) + 1):
        if i == len(samples) or shapes[i] != shapes[start] or i - start == size:
            yield list(range(start, i))
            start = i


@contextmanager
def evaluating(module) -> Iterator[None]:
    """A module in evaluation mode and without gradients, and back as it was."""
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(was_training)


def on_device(module, samples: list) -> tuple[Tensor, ...]:
    device = next(module.parameters()).device
    return tuple(part.to(device) for part in default_collate(samples))


def watch(module, samples: list) -> list[Sample]:
    """Thinks about samples, one after the other, and records everything.

    Args:
        module: a `ctm.lit.LitCTM`.
        samples: of the task's data set.
    """
    task, seen = module.task, []
    with evaluating(module):
        for sample in samples:
            *inputs, _ = batch = on_device(module, [sample])
            with record(module.model) as watched:
                thought = module(*inputs)
            values = task.metrics(thought, batch, module.most_certain)
            syncs = {"answer": watched.sync_out, "attention": watched.sync_action}
            post = watched.post_activations
            seen.append(
                Sample(
                    batch=tuple(array(part)[0] for part in batch),
                    values={name: float(value[0]) for name, value in values.items() if value.ndim == 1},
                    probabilities=array(probabilities(thought, task.out_dims[1]))[0],
                    certainty=array(thought.certainty)[0],
                    answer=int(answer_tick(thought.certainty, module.most_certain)),
                    first=0 if post is None else len(post) - thought.certainty.shape[1],
                    attention=None if watched.attention is None else array(watched.attention[:, 0]),
                    attention_ticks=watched.attention_ticks,
                    pre=None if watched.pre_activations is None else array(watched.pre_activations[:, 0]),
                    post=None if post is None else array(post[:, 0]),
                    syncs={name: array(value[:, 0]) for name, value in syncs.items() if value is not None},
                )
            )
    return seen


def learned_decays(model) -> dict[str, tuple[Array, str]]:
    """Decay rates and pairing of a CTM's synchronizations; nothing for another net."""
    if not isinstance(model.net, CTM):
        return {}
    found = {}
    for name, part in (("answer", "sync_out"), ("attention", "sync_action")):
        if sync := getattr(model.net, part, None):
            found[name] = array(sync.decay.clamp(0, sync.MAX_DECAY)), model.net.config.pairing
    return found


def survey(module, samples: list, progress=lambda steps: steps) -> Survey:
    """Thinks about many samples in batches.

    Args:
        progress: wraps the list of batches, to show how far it is.
    """
    task = module.task
    values: dict[str, list[Array]] = {}
    confidence: dict[str, list[tuple[Array, Array]]] = {}
    difficulty, right_by_tick = [], []
    with evaluating(module):
        for numbers in progress(list(batches(samples, task.eval_batch_size))):
            *inputs, _ = batch = on_device(module, [samples[i] for i in numbers])
            thought = module(*inputs)
            found = task.metrics(thought, batch, module.most_certain)
            for name, value in found.items():
                values.setdefault(name, []).append(array(value))
            if (hard := task.difficulty(batch)) is not None:
                difficulty.append(array(hard))
            if (targets := task.targets(batch)) is None:
                continue
            all_BTPK = probabilities(thought, task.out_dims[1])
            tick_B = answer_tick(thought.certainty, module.most_certain)
            ways = {"the answer": gather_tick(all_BTPK, tick_B), "mean over ticks": averaged(all_BTPK)[:, -1]}
            for name, mean_BPK in ways.items():
                sure, said = mean_BPK.max(-1)
                pair = array(sure.flatten()), array((said == targets).flatten())
                confidence.setdefault(name, []).append(pair)
            right_by_tick.append(array((all_BTPK.argmax(-1) == targets[:, None]).float().sum(0)))
        more = task.explore(module.model, module.most_certain)
    joined = {name: np.concatenate(parts) for name, parts in values.items()}
    return Survey(
        values={name: value for name, value in joined.items() if value.ndim == 1},
        curves={name: value for name, value in joined.items() if value.ndim == 2},
        difficulty=np.concatenate(difficulty) if difficulty else None,
        confidence={
            name: tuple(np.concatenate(part) for part in zip(*pairs, strict=True)) for name, pairs in confidence.items()
        },
        right_by_tick=sum(right_by_tick) / len(samples) if right_by_tick else None,
        more=more,
    )


def telling(survey: Survey, headline: str, n: int) -> list[int]:
    """Which samples to show: by turns one that was solved, the hardest first, and one that was not, the easiest."""
    hard = survey.values["ticks"] if survey.difficulty is None else survey.difficulty
    order = np.lexsort((survey.values["ticks"], hard))
    right = survey.values[headline][order] > 0.5
    solved, failed = order[right][::-1].tolist(), order[~right].tolist()
    if len(solved) > 2:  # not only the hardest: the third is of middling difficulty
        solved.insert(1, solved.pop(len(solved) // 2))
    chosen = []
    while len(chosen) < n and (solved or failed):
        chosen += [group.pop(0) for group in (solved, failed) if group]
    return chosen[:n]
