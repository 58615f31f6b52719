"""The Continuous Thought Machine (arXiv 2505.05522): the paper's figure 1, top to bottom.

One tick, with z the activations of D neurons and `read` what the world shows:

       z ── synchronize ──> query ──> attend to the tokens ──> o          (or `read` is o itself)
       (o, z) ── synapses ──> pre-activations ──> memory of the last M ── neuron-level models ──> next z
       next z ── synchronize ──> head ──> prediction of this tick

`CTM.tick` is the whole recurrence, `CTM.forward` runs it. Shape letters are those of `ctm.modules`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ctm import ops
from ctm.modules import (
    CrossAttention,
    DecayingSync,
    KeysValues,
    NeuronLevelModels,
    Pairing,
    SynapseLayer,
    SynapseUNet,
    Synchronization,
    SyncState,
    WindowedSync,
    at_least,
    certainty,
    choose_pairs,
)


@dataclass(frozen=True)
class CTMConfig:
    """Everything that fixes a CTM but its inputs and outputs."""

    d_model: int = 512
    """D, the number of neurons."""
    d_input: int = 128
    """E, the width of a token and of what attention returns."""
    ticks: int = 50
    """T, internal ticks of thought."""
    heads: int = 4
    """Attention heads; 0 for a model whose reads are ready vectors."""
    n_synch_out: int = 32
    """Neurons (dense, semi-dense) or pairs (random) whose synchronization gives the prediction."""
    n_synch_action: int = 32
    """The same for the attention query; 0 without attention."""
    pairing: Pairing = "dense"
    """Which neurons are paired: dense (first and last neurons), semi-dense (two random draws), random (pairs)."""
    n_self_pairs: int = 0
    """Of the random pairs, how many pair a neuron with itself."""
    sync: Literal["decay", "window"] = "decay"
    """Synchronization over all ticks with a decay, or over the last M (a model without attention)."""
    synapse_depth: int = 4
    """Depth of the synapse U-Net; 1 for gated layers."""
    synapse_blocks: int = 1
    """How many gated layers, where synapse_depth is 1."""
    memory_length: int = 25
    """M, how many past inputs a neuron-level model sees."""
    nlm_hidden: int = 4
    """H, hidden width of a neuron-level model; 0 for the shallow model."""
    nlm_layernorm: bool = False
    """LayerNorm before both layers of the neuron-level models."""
    dropout: float = 0.0
    """Dropout in attention and synapses."""
    query_std: float = 0.0
    """Above 0, the query's bias starts from a normal distribution of this standard deviation, so that the heads look at
    different places from the first step on; 0 starts it near zero, as published."""
    nlm_dropout: float | None = None
    """Dropout in the neuron-level models; null for the same as `dropout`."""
    recompute: int = 0
    """Ticks whose inner values are kept at a time in training and computed anew in the backward pass, to save memory;
    0 keeps all of them."""

    def __post_init__(self):
        at_least(
            1, self, "d_model", "d_input", "ticks", "n_synch_out", "synapse_depth", "synapse_blocks", "memory_length"
        )
        at_least(0, self, "heads", "n_synch_action", "n_self_pairs", "nlm_hidden", "query_std", "recompute")
        if self.heads and self.d_input % self.heads:
            raise ValueError(f"d_input={self.d_input} must be a multiple of heads={self.heads}")
        if bool(self.heads) != bool(self.n_synch_action):
            raise ValueError("heads and n_synch_action go together: both 0 for a model without attention")
        if self.heads and self.sync == "window":
            raise ValueError("sync=window is for a model without attention: heads=0, n_synch_action=0")
        if self.pairing == "dense" and self.n_synch_out + self.n_synch_action > self.d_model:
            raise ValueError(
                f"dense pairing needs d_model >= n_synch_out + n_synch_action, "
                f"got {self.d_model} < {self.n_synch_out} + {self.n_synch_action}"
            )
        smallest = min(self.n_synch_out, self.n_synch_action or self.n_synch_out)
        if self.n_self_pairs and (self.pairing != "random" or self.n_self_pairs >= smallest):
            raise ValueError(f"n_self_pairs={self.n_self_pairs} needs random pairing with more pairs than that")


class State(NamedTuple):
    """What a CTM carries from tick to tick."""

    z_BD: Tensor
    """Activations."""
    trace_BDM: Tensor
    """The last M pre-activations of every neuron, newest last."""
    action: SyncState | None
    """Synchronization behind the attention query."""
    out: SyncState | Tensor
    """Synchronization behind the prediction; the last M activations (B, D, M) for one with a window."""
    sync_BR: Tensor
    """The last output synchronization."""


class Thought(NamedTuple):
    """What thinking gave. `certainty` and `predictions` cover every tick, the rest is the last tick's."""

    predictions: Tensor
    """Logits (B, T, C), C = positions x classes; the synchronization (B, T, R) of a model without a head."""
    certainty: Tensor | None
    """(B, T), 1 - normalised entropy; None without a head."""
    sync: Tensor | None = None
    """Last output synchronization (B, R)."""
    state: State | None = None
    """To think on from here."""


Read = Tensor | KeysValues
"""Tokens (B, S, E) to attend to, the same already projected, or a ready vector (B, E)."""


def projected(read: Read, attention: nn.Module | None) -> Read:
    """Tokens as keys and values; anything else stays what it is."""
    if isinstance(read, KeysValues) or read.ndim != 3:
        return read
    if attention is None:
        raise ValueError("this model has no attention (heads=0): it reads vectors (B, E), not tokens (B, S, E)")
    return attention.keys_values(read)


def every_tick(reads: Read | Sequence[Read], ticks: int | None, default: int) -> list[Read]:
    """One read for each tick.

    Raises:
        ValueError: where `ticks` is given and differs from the number of reads, or there is no tick at all.
    """
    if isinstance(reads, Tensor | KeysValues):
        reads = [reads] * (default if ticks is None else ticks)
    elif ticks not in (None, len(reads)):
        raise ValueError(f"{len(reads)} reads are {len(reads)} ticks, not {ticks}")
    if not reads:
        raise ValueError("a thought takes at least one tick")
    return list(reads)


def projected_once(reads: Sequence[Read], attention: nn.Module | None) -> list[Read]:
    """Tokens as keys and values, projected once for all ticks that read them.

    Raises:
        ValueError: where a model without attention is given tokens.
    """
    distinct = {id(read): read for read in reads}
    distinct = {key: projected(read, attention) for key, read in distinct.items()}
    return [distinct[id(read)] for read in reads]


def batch_of(read: Read) -> int:
    return len(read.keys if isinstance(read, KeysValues) else read)


class CTM(nn.Module):
    """A Continuous Thought Machine: reads -> `Thought`.

    Args:
        config: sizes and kinds of the parts.
        out_dims: (positions, classes) of the prediction; (1, K) for plain classification into K classes; None for a
            model without a head, whose answer is its synchronization.
    """

    def __init__(self, config: CTMConfig, out_dims: tuple[int, int] | None):
        super().__init__()
        c = self.config = config
        self.out_dims = out_dims and tuple(out_dims)
        self.recordings = []  # filled by `ctm.record`
        nlm_dropout = c.dropout if c.nlm_dropout is None else c.nlm_dropout
        n_in = c.d_input + c.d_model

        def pairs(n: int, first: bool) -> tuple[Tensor, Tensor]:
            return choose_pairs(c.d_model, n, c.pairing, c.n_self_pairs, first)

        self.trace_start = nn.Parameter(
            torch.empty(c.d_model, c.memory_length).uniform_(-1, 1) / (c.d_model + c.memory_length) ** 0.5
        )
        if c.heads:
            self.sync_action = DecayingSync(*pairs(c.n_synch_action, first=False))
            self.query = nn.Linear(len(self.sync_action.decay), c.d_input)
            if c.query_std:
                nn.init.normal_(self.query.bias, std=c.query_std)
            self.attention = CrossAttention(c.d_input, c.heads, c.dropout)
        else:
            self.attention = None
        if c.synapse_depth == 1:
            self.synapses = SynapseLayer(n_in, c.d_model, c.dropout, c.synapse_blocks)
        else:
            self.synapses = SynapseUNet(n_in, c.d_model, c.synapse_depth, c.dropout)
        self.neurons = NeuronLevelModels(c.d_model, c.memory_length, c.nlm_hidden, nlm_dropout, c.nlm_layernorm)
        if c.sync == "window":  # the learned history of activations holds the first one, too
            self.sync_out = WindowedSync(*pairs(c.n_synch_out, first=False), c.d_model, c.memory_length)
        else:
            self.z_start = nn.Parameter(torch.empty(c.d_model).uniform_(-1, 1) / c.d_model**0.5)
            self.sync_out = DecayingSync(*pairs(c.n_synch_out, first=True))
        n_sync = len(self.sync_out.decay)
        self.head = nn.Linear(n_sync, self.out_dims[0] * self.out_dims[1]) if self.out_dims else nn.Identity()

    def start(self, batch: int) -> State:
        """The learned state before the first tick. The output synchronization has seen it, the action one has not."""
        trace_BDM = self.trace_start.expand(batch, -1, -1)
        out = self.sync_out.start(batch)
        if self.config.sync == "window":
            return State(out[..., -1], trace_BDM, None, out, self.sync_out.value(out))
        z_BD = self.z_start.expand(batch, -1)
        action = self.sync_action.start(batch) if self.config.heads else None
        sync_BR, out = self.sync_out(out, z_BD)
        return State(z_BD, trace_BDM, action, out, sync_BR)

    def tick(self, read: Read, state: State) -> State:
        """One internal tick: the whole recurrence.

        Args:
            read: tokens (B, S, E), `KeysValues` of them, or a ready vector (B, E).
            state: of the tick before, or `start(B)`.
        """
        z_BD, trace_BDM, action, out, _ = state
        if action is not None:  # the action synchronization moves on even while nothing is attended to
            sync_action_BR, action = self.sync_action(action, z_BD)
        read = projected(read, self.attention)
        o_BE = self.attention(self.query(sync_action_BR), read) if isinstance(read, KeysValues) else read

        pre_BD = self.synapses(torch.cat([o_BE, z_BD], dim=-1))
        trace_BDM = torch.cat([trace_BDM[..., 1:], pre_BD[..., None]], dim=-1)
        z_BD = self.neurons(trace_BDM)

        sync_BR, out = self.sync_out(out, z_BD)
        return State(z_BD, trace_BDM, action, out, sync_BR)

    def forward(self, reads: Read | Sequence[Read], ticks: int | None = None, state: State | None = None) -> Thought:
        """Thinks for some ticks.

        Args:
            reads: one read for all ticks, or a list with one for each tick.
            ticks: how many, for one read; `config.ticks` where not given.
            state: to continue from; the learned start where not given.

        Raises:
            ValueError: where `ticks` is given and differs from the number of reads, there is no tick at all, or a
                model without attention is given tokens.
        """
        reads = every_tick(reads, ticks, self.config.ticks)
        predictions = []
        for syncs_BTR, after in ops.think(self, reads, state):
            predictions.append(self.head(syncs_BTR))
            state = after
        predictions_BTC = torch.cat(predictions, dim=1).float()
        sure_BT = certainty(predictions_BTC, self.out_dims[1]) if self.out_dims else None
        return Thought(predictions_BTC, sure_BT, state.sync_BR, state)

    def begin(self, reads: Sequence[Read], state: State | None) -> tuple[list[Read], State]:
        """What the first tick needs: tokens as keys and values, and the learned start where there is no state."""
        return projected_once(reads, self.attention), self.start(batch_of(reads[0])) if state is None else state

    def loop(self, reads: Sequence[Read], state: State) -> tuple[Tensor, State]:
        """Tick after tick, plainly: synchronization after each (B, T, R), and the last state. `ctm.ops` is faster."""
        syncs = []
        for read in reads:
            state = self.tick(read, state)
            syncs.append(state.sync_BR)
        return torch.stack(syncs, dim=1), state

    def reset(self, state: State, done_B: Tensor) -> State:
        """The state with the learned start in the rows (episodes) that are done; the others go on."""
        return reset_rows(state, self.start(len(done_B)), done_B)

    def project_parameters(self) -> None:
        """Puts bounded parameters (decays) back into their bounds; to be called after every optimiser step."""
        for part in self.modules():
            if isinstance(part, Synchronization) and part.decay.requires_grad:
                part.project()


def reset_rows(state: State | Tensor | None, start: State | Tensor | None, done_B: Tensor):
    """`start` where done and `state` elsewhere, through the nested tuples of a state."""
    if state is None:
        return None
    if isinstance(state, tuple):
        return type(state)(*(reset_rows(old, new, done_B) for old, new in zip(state, start, strict=True)))
    if state.ndim == 1:  # beta, the same for all rows until one starts anew
        state, start = state.expand(len(done_B), -1), start.expand(len(done_B), -1)
    return torch.where(done_B.view(-1, *[1] * (state.ndim - 1)), start, state)


class Thinker(nn.Module):
    """An encoder and what thinks about its tokens (a `CTM` or a baseline): inputs -> `Thought`."""

    def __init__(self, encoder: nn.Module, net: nn.Module):
        super().__init__()
        self.encoder, self.net = encoder, net

    def forward(self, *inputs: Tensor, ticks: int | None = None, state: State | None = None) -> Thought:
        return self.net(ops.encode(self.encoder, *inputs), ticks, state)
