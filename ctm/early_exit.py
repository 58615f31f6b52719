"""Thinking that ends when it is certain: samples leave the batch one by one, so that their time is really saved."""

from typing import NamedTuple

import torch
from torch import Tensor

from ctm import ops
from ctm.baselines import LSTMState
from ctm.model import Read, State, Thinker, Thought, every_tick, projected_once


class Exit(NamedTuple):
    """What thinking gave that was allowed to end early."""

    predictions: Tensor
    """Logits (B, C) of the answer."""
    certainty: Tensor
    """Of the answer, (B,)."""
    ticks: Tensor
    """How many ticks were thought, (B,); only those at which an answer is due count."""


@torch.no_grad()
def think_until(model: Thinker, *inputs: Tensor, threshold: float, most_certain: bool = True) -> Exit:
    """Thinks about every sample until the first tick whose certainty reaches the threshold, or to the end.

    The answer is that of the most certain tick so far (which is the one that reached the threshold, where one did), or
    with `most_certain=False` that of the last tick thought.

    Args:
        model: a CTM or an LSTM with its encoder, in evaluation mode.
    """
    net = model.net
    reads = projected_once(every_tick(ops.encode(model.encoder, *inputs), None, net.config.ticks), net.attention)
    first = len(reads) - (model.encoder.answer_ticks or len(reads))
    batch, device = len(inputs[0]), inputs[0].device
    predictions = torch.zeros(batch, net.out_dims[0] * net.out_dims[1], device=device)
    certainty = torch.full((batch,), -torch.inf, device=device)
    ticks = torch.zeros(batch, dtype=torch.long, device=device)
    left = torch.arange(batch, device=device)  # the samples still thought about
    state, shown, read = None, None, None
    for tick, whole in enumerate(reads):
        if whole is not shown:
            shown, read = whole, rows_of(whole, left)
        thought: Thought = net(read, 1, state)
        state = thought.state
        if tick < first:
            continue
        sure = thought.certainty[:, 0]
        better = sure > certainty[left] if most_certain else torch.ones_like(left, dtype=torch.bool)
        predictions[left[better]], certainty[left[better]] = thought.predictions[better, 0], sure[better]
        ticks[left] += 1
        stay = (sure < threshold).nonzero().squeeze(1)
        if len(stay) == 0:
            break
        if len(stay) < len(left):
            left, state, read = left[stay], rows_of(state, stay), rows_of(read, stay)
    return Exit(predictions, certainty, ticks)


def rows_of(value: Read | State | LSTMState | None, rows: Tensor):
    """The samples `rows` of a read or of a state, through its nested tuples."""
    if value is None:
        return value
    if isinstance(value, LSTMState):
        return LSTMState(*(part[:, rows] for part in value))
    if isinstance(value, tuple):
        return type(value)(*(rows_of(part, rows) for part in value))
    return value if value.ndim == 1 else value[rows]  # one dimension: beta, which all samples share
