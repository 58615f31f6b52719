"""How well thoughts answer, the same for every task that is a classification: at each tick, at the most certain one,
by predictions averaged over ticks; calibration; and what depends on how hard a sample is."""

from statistics import mean

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor
from torchmetrics.classification import MulticlassCalibrationError

from ctm.loss import gather_tick
from ctm.model import Thought

CUMULATIVE = ("_most_certain_by_tick", "_averaged_by_tick", "_weighted_by_tick")
"""Ends of the names of `classification`'s curves of all ticks so far; only a test writes them."""


def answer_tick(certainty_BT: Tensor, most_certain: bool) -> Tensor:
    """The tick (B,), from 0, whose prediction is the answer: the most certain one, or the last."""
    batch, ticks = certainty_BT.shape
    return certainty_BT.argmax(1) if most_certain else torch.full((batch,), ticks - 1, device=certainty_BT.device)


def probabilities(thought: Thought, n_classes: int) -> Tensor:
    """(B, T, P, K)."""
    return rearrange(thought.predictions, "b t (p k) -> b t p k", k=n_classes).softmax(-1)


def averaged(probabilities_BTPK: Tensor, weight_BT: Tensor | None = None) -> Tensor:
    """Mean probabilities of all ticks up to each tick, weighted where weights are given: (B, T, P, K)."""
    if weight_BT is None:
        weight_BT = torch.ones_like(probabilities_BTPK[..., 0, 0])
    sums = (probabilities_BTPK * weight_BT[..., None, None]).cumsum(1)
    return sums / weight_BT.cumsum(1).clamp(min=1e-12)[..., None, None]


@torch.no_grad()
def classification(
    thought: Thought, targets_BP: Tensor, n_classes: int, most_certain: bool = True
) -> dict[str, Tensor]:
    """Values of every sample, (B,) each, and curves over ticks (B, T), for targets of P positions.

    `accuracy` (share of right positions) is that of the answer, at the most certain tick. `_by_tick` is the accuracy
    of each tick's own prediction; `_most_certain_by_tick`, `_averaged_by_tick` and `_weighted_by_tick` are what the
    answer would be had thinking ended there: of the most certain tick so far, of the mean probabilities so far, and of
    the same weighted by certainty. `solved`, where there are several positions: all of them are right.
    """
    certainty_BT = thought.certainty
    tick_B = answer_tick(certainty_BT, most_certain)
    all_BTPK = probabilities(thought, n_classes)
    right = {"": all_BTPK.argmax(-1) == targets_BP[:, None]}
    best_so_far_BT = torch.cummax(certainty_BT, dim=1).indices
    right["_most_certain"] = right[""].gather(1, best_so_far_BT[..., None].expand_as(right[""]))
    right["_averaged"] = averaged(all_BTPK).argmax(-1) == targets_BP[:, None]
    right["_weighted"] = averaged(all_BTPK, certainty_BT.clamp(min=0)).argmax(-1) == targets_BP[:, None]
    values = {}
    names = {"accuracy": lambda right_P: right_P.float().mean(-1)}
    if targets_BP.shape[1] > 1:
        names = {"solved": lambda right_P: right_P.all(-1).float()} | names
    for name, score in names.items():
        values[name] = score(gather_tick(right[""], tick_B))
        for way in ("_averaged", "_weighted"):
            values[name + way] = score(right[way][:, -1])
        for way, right_BTP in right.items():
            values[f"{name}{way}_by_tick"] = score(right_BTP)
    return values | {
        "ticks": tick_B.float() + 1,
        "certainty": gather_tick(certainty_BT, tick_B),
        "certainty_by_tick": certainty_BT,
    }


class Calibration:
    """Expected calibration error (15 bins) of every tick: of its own prediction, and of the mean of the predictions
    so far, by which the paper measures it. Every position counts as a prediction."""

    def __init__(self, n_classes: int):
        self.n_classes = n_classes
        self.errors: dict[str, list[MulticlassCalibrationError]] = {}

    def update(self, thought: Thought, targets_BP: Tensor) -> None:
        own_BTPK = probabilities(thought, self.n_classes)
        for name, all_BTPK in (("calibration_error", own_BTPK), ("calibration_error_averaged", averaged(own_BTPK))):
            if name not in self.errors:
                errors = (
                    MulticlassCalibrationError(self.n_classes, n_bins=15, validate_args=False)
                    for _ in range(all_BTPK.shape[1])
                )
                self.errors[name] = [error.to(targets_BP.device) for error in errors]
            for error, all_BPK in zip(self.errors[name], all_BTPK.unbind(1), strict=True):
                error.update(all_BPK.flatten(0, 1), targets_BP.flatten())

    def compute(self) -> dict[str, Tensor]:
        """Curves over ticks (T,), named as those of `classification`, and the value of the last tick."""
        values = {}
        for name, errors in self.errors.items():
            curve_T = torch.stack([error.compute() for error in errors])
            values |= {name: curve_T[-1], f"{name}_by_tick": curve_T}
        return values


class ByDifficulty:
    """Means of metrics over the samples of equal difficulty: thinking time and accuracy against it."""

    def __init__(self):
        self.seen: list[tuple[int, dict[str, float]]] = []

    def update(self, difficulty_B: Tensor, values: dict[str, Tensor]) -> None:
        """`values` as of `Task.metrics`; curves over ticks are left out."""
        columns = {name: value.tolist() for name, value in values.items() if value.ndim == 1}
        for i, difficulty in enumerate(difficulty_B.tolist()):
            self.seen.append((difficulty, {name: column[i] for name, column in columns.items()}))

    def rows(self) -> list[dict[str, float]]:
        """`difficulty`, `n` and the mean of every metric, the easiest first; of all processes together."""
        seen = self.seen
        if dist.is_initialized():
            parts = [None] * dist.get_world_size()
            dist.all_gather_object(parts, seen)
            seen = [sample for part in parts for sample in part]
        groups = {}
        for difficulty, values in sorted(seen, key=lambda sample: sample[0]):
            groups.setdefault(difficulty, []).append(values)
        return [
            {"difficulty": difficulty, "n": len(group)} | {name: mean(v[name] for v in group) for name in group[0]}
            for difficulty, group in groups.items()
        ]
