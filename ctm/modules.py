"""The parts of a Continuous Thought Machine, one small class each (arXiv 2505.05522, section 3).

Shape letters, carried as suffixes on names:
    B batch   T ticks   D neurons   M memory (ticks a neuron looks back)   H hidden width of a neuron-level model
    S tokens   E token width   R synchronization pairs   C outputs = P positions x K classes
"""

import math
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

Pairing = Literal["dense", "semi-dense", "random"]


# ----------------------------------------------------------------------------------------------------------------------
# Synapses: mix what was read with what every neuron said last (section 3.1)


class SynapseLayer(nn.Sequential):
    """Gated layers, (B, n_in) -> (B, D): the synapse model of depth 1.

    Args:
        blocks: how many; the published reinforcement-learning models have two.
    """

    def __init__(self, n_in: int, d_model: int, dropout: float, blocks: int = 1):
        super().__init__(nn.Dropout(dropout))
        for width in [n_in] + [d_model] * (blocks - 1):
            self.extend([nn.Linear(width, 2 * d_model), nn.GLU(), nn.LayerNorm(d_model)])


def unet_widths(d_model: int, depth: int, bottleneck: int = 16) -> list[int]:
    """Widths of the U-Net's levels. NumPy's float64 linspace, truncated: torch.linspace rounds some differently."""
    return [int(width) for width in np.linspace(d_model, bottleneck, depth)]


def linear_norm_silu(n_in: int, n_out: int, dropout: float = 0.0) -> nn.Sequential:
    return nn.Sequential(nn.Dropout(dropout), nn.Linear(n_in, n_out), nn.LayerNorm(n_out), nn.SiLU())


class SynapseUNet(nn.Module):
    """U-Net over neurons, (B, n_in) -> (B, D): `depth` widths from D down to 16 and back, a skip at every level."""

    def __init__(self, n_in: int, d_model: int, depth: int, dropout: float):
        super().__init__()
        widths = unet_widths(d_model, depth)
        levels = list(pairwise(widths))
        self.first = linear_norm_silu(n_in, d_model)
        self.down = nn.ModuleList(linear_norm_silu(wide, narrow, dropout) for wide, narrow in levels)
        self.up = nn.ModuleList(linear_norm_silu(narrow, wide, dropout) for wide, narrow in levels)
        self.skip_norm = nn.ModuleList(nn.LayerNorm(wide) for wide, _ in levels)

    def forward(self, x: Tensor) -> Tensor:
        skips = [self.first(x)]
        for down in self.down:
            skips.append(down(skips[-1]))
        x = skips.pop()
        for up, norm, skip in zip(reversed(self.up), reversed(self.skip_norm), reversed(skips), strict=True):
            x = norm(up(x) + skip)
        return x


# ----------------------------------------------------------------------------------------------------------------------
# Neuron-level models: every neuron has its own small MLP over the history of its inputs (section 3.2)


class SuperLinear(nn.Module):
    """A linear layer of its own for every neuron: (B, D, I) -> (B, D, O), divided by one learned temperature.

    Weights are stored neuron-major, (D, I, O), so that the product is one batched GEMM without a copy.
    """

    def __init__(self, d_model: int, n_in: int, n_out: int, dropout: float, layernorm: bool):
        super().__init__()
        bound = 1 / math.sqrt(n_in + n_out)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(n_in) if layernorm else nn.Identity()
        self.weight = nn.Parameter(torch.empty(d_model, n_in, n_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(d_model, n_out))
        self.temperature = nn.Parameter(torch.ones(1))

    def forward(self, x_BDI: Tensor) -> Tensor:
        x_BDI = self.norm(self.dropout(x_BDI))
        return (einsum(x_BDI, self.weight, "b d i, d i o -> b d o") + self.bias) / self.temperature


class NeuronLevelModels(nn.Sequential):
    """History of every neuron's inputs (B, D, M) -> its next activation (B, D). Private weights, gated, unbounded.

    Args:
        hidden: width of the hidden layer; 0 for the shallow model without one.
    """

    def __init__(self, d_model: int, memory_length: int, hidden: int, dropout: float, layernorm: bool):
        layers: list[nn.Module] = []
        width = memory_length
        for n_out in [hidden, 1] if hidden else [1]:
            layers += [SuperLinear(d_model, width, 2 * n_out, dropout, layernorm), nn.GLU(dim=-1)]
            width = n_out
        super().__init__(*layers, nn.Flatten(-2))


# ----------------------------------------------------------------------------------------------------------------------
# Synchronization: how pairs of neurons move together over time is the representation (section 3.3)


def dense_pairs(neurons_left: Tensor, neurons_right: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs (left[i], right[j]) with i <= j, row-major: n neurons give n (n + 1) / 2 pairs."""
    i, j = torch.triu_indices(len(neurons_left), len(neurons_right))
    return neurons_left[i], neurons_right[j]


def choose_pairs(d_model: int, n: int, pairing: Pairing, n_self: int, first: bool) -> tuple[Tensor, Tensor]:
    """Which neurons are multiplied with which: two index tensors (R,).

    dense        all pairs among the first (or last) n neurons                    (published: "first-last")
    semi-dense   pairs i <= j of two independent random draws of n neurons        (published: "random")
    random       n pairs of random neurons, the first n_self with themselves      (published: "random-pairing")
    """
    if pairing == "dense":
        neurons = torch.arange(n) if first else torch.arange(d_model - n, d_model)
        return dense_pairs(neurons, neurons)
    left = torch.randint(d_model, (n,))
    if pairing == "semi-dense":
        return dense_pairs(left, torch.randint(d_model, (n,)))
    return left, torch.cat([left[:n_self], torch.randint(d_model, (n - n_self,))])


class Synchronization(nn.Module):
    """Base of both kinds: R pairs of neurons, each with a learned decay.

    `forward(state, z)` takes the activations of a tick in and returns the synchronization (B, R) and the new state.
    """

    MAX_DECAY: float

    def __init__(self, left_R: Tensor, right_R: Tensor):
        super().__init__()
        self.register_buffer("left", left_R.clone())
        self.register_buffer("right", right_R.clone())
        self.decay = nn.Parameter(torch.zeros(len(left_R)))

    def bounded_decay(self) -> Tensor:
        """The decays in [0, MAX_DECAY]. Straight-through: one at its bound still gets a gradient to bring it back."""
        return self.decay + (self.decay.clamp(0, self.MAX_DECAY) - self.decay).detach()

    @torch.no_grad()
    def project(self) -> None:
        """Puts the decays back into their bounds; to be called after every optimiser step."""
        self.decay.clamp_(0, self.MAX_DECAY)


class SyncState(NamedTuple):
    """Running sums of a decaying synchronization: `alpha_BR` of pair products, `beta_R` of their weights."""

    alpha_BR: Tensor
    beta_R: Tensor


class DecayingSync(Synchronization):
    """Synchronization over all ticks so far (section 3.3, equations 7-10).

    sync_t = sum_k r^(t-k) z_k[left] z_k[right] / sqrt(sum_k r^(t-k)),   r = exp(-decay), decay in [0, 15], 0 at first.
    """

    MAX_DECAY = 15.0

    def start(self, batch: int) -> SyncState:
        """Nothing seen yet."""
        return SyncState(self.decay.new_zeros(batch, len(self.decay)), self.decay.new_zeros(len(self.decay)))

    def forward(self, state: SyncState, z_BD: Tensor) -> tuple[Tensor, SyncState]:
        r = torch.exp(-self.bounded_decay())
        products_BR = z_BD.index_select(1, self.left) * z_BD.index_select(1, self.right)
        alpha = torch.addcmul(products_BR, r, state.alpha_BR)
        beta = r * state.beta_R + 1
        return alpha / beta.sqrt(), SyncState(alpha, beta)


class WindowedSync(Synchronization):
    """Synchronization over the last M ticks (the published reinforcement-learning models). Its state is the history of
    activations (B, D, M), newest last, which starts from a learned one.

    sync = sum_m w_m z_m[left] z_m[right] / sqrt(sum_m w_m),   w_m = exp(-decay (M - 1 - m)), decay in [0, 4].
    """

    MAX_DECAY = 4.0

    def __init__(self, left_R: Tensor, right_R: Tensor, d_model: int, memory_length: int):
        super().__init__(left_R, right_R)
        bound = (d_model + memory_length) ** -0.5
        self.history_start = nn.Parameter(torch.empty(d_model, memory_length).uniform_(-bound, bound))

    def start(self, batch: int) -> Tensor:
        """The learned history."""
        return self.history_start.expand(batch, -1, -1)

    def value(self, history_BDM: Tensor) -> Tensor:
        """Synchronization (B, R) of a history."""
        age_M = torch.arange(history_BDM.shape[-1] - 1, -1, -1, device=history_BDM.device)
        weight_RM = torch.exp(-self.bounded_decay()[:, None] * age_M)
        products_BRM = history_BDM.index_select(1, self.left) * history_BDM.index_select(1, self.right)
        return einsum(products_BRM, weight_RM, "b r m, r m -> b r") / weight_RM.sum(-1).sqrt()

    def forward(self, state: Tensor, z_BD: Tensor) -> tuple[Tensor, Tensor]:
        history_BDM = torch.cat([state[..., 1:], z_BD[..., None]], dim=-1)
        return self.value(history_BDM), history_BDM


# ----------------------------------------------------------------------------------------------------------------------
# Attention: one query a tick reads the tokens (section 3.4)


class KeysValues(NamedTuple):
    """Tokens as attention sees them, each (B, heads, S, E / heads). They do not change while the model thinks."""

    keys: Tensor
    values: Tensor


class CrossAttention(nn.Module):
    """Multi-head attention of one query per sample over S tokens, numerically `nn.MultiheadAttention`.

    Its four projections are `nn.Linear`s, so that adapters can wrap them, and its weights pass through the module
    `softmax`, so that they can be watched by a hook.
    """

    def __init__(self, d_input: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(d_input, d_input) for _ in range(4))
        self.softmax = nn.Softmax(dim=-1)
        self.dropout = nn.Dropout(dropout)
        bound = math.sqrt(6 / (3 * d_input + d_input))  # Xavier over the three stacked projections, as PyTorch's own
        for proj in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.uniform_(proj.weight, -bound, bound)
        for proj in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.zeros_(proj.bias)

    def keys_values(self, tokens_BSE: Tensor) -> KeysValues:
        split = "b s (h e) -> b h s e"
        keys, values = self.k_proj(tokens_BSE), self.v_proj(tokens_BSE)
        return KeysValues(rearrange(keys, split, h=self.heads), rearrange(values, split, h=self.heads))

    def forward(self, query_BE: Tensor, kv: KeysValues) -> Tensor:
        query = rearrange(self.q_proj(query_BE), "b (h e) -> b h 1 e", h=self.heads)
        scores = query @ kv.keys.mT / math.sqrt(query.shape[-1])
        mixed = self.dropout(self.softmax(scores)) @ kv.values
        return self.out_proj(rearrange(mixed, "b h 1 e -> b (h e)"))


# ----------------------------------------------------------------------------------------------------------------------


def certainty(predictions: Tensor, n_classes: int) -> Tensor:
    """1 - normalised entropy of the predictions, averaged over positions (section 3.5).

    Args:
        predictions: logits (..., P * K).
        n_classes: K.

    Returns:
        (...), 0 for a uniform guess and 1 for full certainty.
    """
    logits = rearrange(predictions, "... (p k) -> ... p k", k=n_classes)
    entropy = -(F.softmax(logits, -1) * F.log_softmax(logits, -1)).sum(-1) / math.log(n_classes)
    return 1 - entropy.mean(-1)


def at_least(least: float, config: object, *names: str) -> None:
    """Refuses a configuration in which one of these numbers is smaller."""
    for name in names:
        if (value := getattr(config, name)) is not None and value < least:
            raise ValueError(f"{name}={value} must be at least {least}")
