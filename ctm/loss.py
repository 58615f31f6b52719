"""Losses of thoughts: the two-tick rule, for all tasks, and the curriculum of routes (section 3.5, appendix C).

Everything is vectorised and stays on the device.
"""

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor


def gather_tick(values: Tensor, tick_B: Tensor) -> Tensor:
    """Picks one tick of every sample: (B, T, ...) and (B,) -> (B, ...)."""
    return values[torch.arange(len(values), device=values.device), tick_B]


def two_tick_loss(loss_BT: Tensor, certainty_BT: Tensor, most_certain: bool = True) -> Tensor:
    """Mean over samples of the loss at the best tick and at the most certain tick, half each (equations 11-12).

    Args:
        loss_BT: loss of every sample at every tick.
        certainty_BT: certainty of the same; picks a tick, carries no gradient.
        most_certain: False takes the last tick in place of the most certain one (published for LSTM baselines).
    """
    best = loss_BT.argmin(1)
    second = certainty_BT.argmax(1) if most_certain else torch.full_like(best, loss_BT.shape[1] - 1)
    return (gather_tick(loss_BT, best).mean() + gather_tick(loss_BT, second).mean()) / 2


def cross_entropy(predictions_BTC: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy at every tick and position: logits (B, T, P * K) and targets (B, P) -> (B, T, P)."""
    positions, ticks = targets.shape[1], predictions_BTC.shape[1]
    logits = rearrange(predictions_BTC, "b t (p k) -> b k t p", p=positions)
    return F.cross_entropy(logits, targets[:, None].expand(-1, ticks, -1), reduction="none")


def classification_loss(predictions_BTC: Tensor, certainty_BT: Tensor, targets: Tensor, most_certain=True) -> Tensor:
    """Two-tick cross-entropy for targets (B,) or (B, P), averaged over positions."""
    targets = rearrange(targets, "b -> b 1") if targets.ndim == 1 else targets
    loss_BT = reduce(cross_entropy(predictions_BTC, targets), "b t p -> b t", "mean")
    return two_tick_loss(loss_BT, certainty_BT, most_certain)


def route_loss(
    predictions_BTC: Tensor, certainty_BT: Tensor, routes_BP: Tensor, lookahead: int = 5, most_certain: bool = True
) -> Tensor:
    """Two-tick cross-entropy of routes under the published curriculum.

    Of each route only the first positions count: up to the end of the longest prefix that is right at some tick, and
    `lookahead` beyond (`curriculum_mask`). A model so learns a route from its start outwards.
    """
    mask_BP = curriculum_mask(predictions_BTC, routes_BP, lookahead)
    loss_BTP = cross_entropy(predictions_BTC, routes_BP) * mask_BP[:, None]
    return two_tick_loss(loss_BTP.sum(-1) / mask_BP.sum(-1, keepdim=True), certainty_BT, most_certain)


def paced_loss(predictions_BTC: Tensor, targets_BP: Tensor, asked_BP: Tensor) -> Tensor:
    """Cross-entropy over all ticks, of the asked positions that are due by then: one after the other, at an even pace.

    The two-tick loss leaves open when a position is to be known, and two ticks of T hear from it. Here every position
    has its tick, the last one the last, and is asked for from then on: each is learned from the one before it, known
    a tick or two earlier.

    Args:
        asked_BP: 1 where a position counts, of every sample; (P,) for the same in all.
    """
    mask_BTP = asked_BP[..., None, :] * due(predictions_BTC.shape[1], targets_BP.shape[1], asked_BP.device)
    mask_BTP = mask_BTP.expand(len(targets_BP), -1, -1)
    return (cross_entropy(predictions_BTC, targets_BP) * mask_BTP).sum() / mask_BTP.sum().clamp(min=1)


def due(ticks: int, positions: int, device: torch.device | None = None) -> Tensor:
    """(T, P), true where a position is due at a tick: by tick t of T, the first t / T of them, rounded up."""
    tick_T, position_P = (torch.arange(n, device=device) for n in (ticks, positions))
    return position_P * ticks < (tick_T[:, None] + 1) * positions


@torch.no_grad()
def beginning(predictions_BTC: Tensor, targets_BP: Tensor, lookahead: int) -> Tensor:
    """(P,), 1 for the first positions, each right in more than nine of ten answers given when it is due (samples times
    ticks), and for `lookahead` more.

    A curriculum for the whole batch. A beginning of each sample's own at its best tick, as in `route_loss`, does not
    serve where there are two classes: with T ticks to choose from, chance alone has log2(T) of them right.
    """
    ticks, positions = predictions_BTC.shape[1], targets_BP.shape[1]
    said_BTP = rearrange(predictions_BTC, "b t (p k) -> b t p k", p=positions).argmax(-1)
    due_TP = due(ticks, positions, targets_BP.device)
    right_P = ((said_BTP == targets_BP[:, None]) & due_TP).float().mean(0).sum(0) / due_TP.sum(0)
    upto = (right_P > 0.9).int().cumprod(0).sum() + lookahead
    return (torch.arange(positions, device=targets_BP.device) < upto).float()


def ctc_loss(predictions_BTC: Tensor, targets_BN: Tensor) -> Tensor:
    """Connectionist temporal classification of sequences, the last class being the blank (the published sorting loss).

    Args:
        predictions_BTC: logits; a model says at most one symbol a tick.
        targets_BN: N <= T symbols.
    """
    log_probs_TBC = rearrange(F.log_softmax(predictions_BTC, dim=-1), "b t c -> t b c")
    ticks, batch, classes = log_probs_TBC.shape
    lengths = [torch.full((batch,), n, dtype=torch.long) for n in (ticks, targets_BN.shape[1])]
    return F.ctc_loss(log_probs_TBC, targets_BN, *lengths, blank=classes - 1)


@torch.no_grad()
def curriculum_mask(predictions_BTC: Tensor, routes_BP: Tensor, lookahead: int) -> Tensor:
    """(B, P), 1 where a position counts: the first max(n, 1) - 1 + lookahead; n: longest right prefix of any tick."""
    positions = routes_BP.shape[1]
    moves_BTP = rearrange(predictions_BTC, "b t (p k) -> b t p k", p=positions).argmax(-1)
    prefix_B = (moves_BTP == routes_BP[:, None]).int().cumprod(-1).sum(-1).amax(1)
    upto_B = prefix_B.clamp(min=1) - 1 + lookahead
    return (torch.arange(positions, device=routes_BP.device) < upto_B[:, None]).float()
