"""What a CTM is compared with: an LSTM that also thinks in ticks, and a feed-forward head. Same contract as `CTM`:
tokens (B, S, E) -> `Thought` with predictions (B, T, C)."""

from dataclasses import dataclass

import torch
from einops import reduce
from torch import Tensor, nn

from ctm.model import Thought
from ctm.modules import CrossAttention, certainty


@dataclass(frozen=True)
class LSTMConfig:
    """Everything that fixes an LSTM baseline but its inputs and outputs."""

    d_model: int = 512
    """Width of the hidden state."""
    d_input: int = 128
    """E, the width of a token and of what attention returns."""
    layers: int = 1
    """Stacked LSTM layers."""
    ticks: int = 50
    """T, internal ticks of thought."""
    heads: int = 4
    """Attention heads."""
    dropout: float = 0.0
    """Dropout in attention and between layers."""


class LSTM(nn.Module):
    """An LSTM in the place of the CTM's recurrence: its hidden state asks the attention and gives the prediction."""

    def __init__(self, config: LSTMConfig, out_dims: tuple[int, int]):
        super().__init__()
        c = self.config = config
        self.out_dims = tuple(out_dims)
        bound = c.d_model**-0.5
        self.hidden_start = nn.Parameter(torch.empty(c.layers, c.d_model).uniform_(-bound, bound))
        self.cell_start = nn.Parameter(torch.empty(c.layers, c.d_model).uniform_(-bound, bound))
        self.query = nn.Linear(c.d_model, c.d_input)
        self.attention = CrossAttention(c.d_input, c.heads, c.dropout)
        between = c.dropout if c.layers > 1 else 0.0
        self.lstm = nn.LSTM(c.d_input, c.d_model, c.layers, batch_first=True, dropout=between)
        self.head = nn.Linear(c.d_model, self.out_dims[0] * self.out_dims[1])

    def forward(self, tokens_BSE: Tensor, ticks: int | None = None) -> Thought:
        batch = len(tokens_BSE)
        kv = self.attention.keys_values(tokens_BSE)
        hidden = self.hidden_start[:, None].expand(-1, batch, -1).contiguous()
        cell = self.cell_start[:, None].expand(-1, batch, -1).contiguous()
        tops = []
        for _ in range(ticks or self.config.ticks):
            o_BE = self.attention(self.query(hidden[-1]), kv)
            _, (hidden, cell) = self.lstm(o_BE[:, None], (hidden, cell))
            tops.append(hidden[-1])
        predictions_BTC = self.head(torch.stack(tops, dim=1)).float()
        return Thought(predictions_BTC, certainty(predictions_BTC, self.out_dims[1]))


@dataclass(frozen=True)
class FFConfig:
    """Everything that fixes a feed-forward baseline but its inputs and outputs."""

    d_model: int = 512
    """Width of the hidden layer."""
    pool: bool = False
    """True averages the tokens (as the published code), False sees all of them (as the paper's maze baseline)."""
    dropout: float = 0.0
    """Dropout after the hidden layer."""


class FeedForward(nn.Module):
    """One look and one hidden layer: predictions of a single tick.

    Args:
        n_tokens, width: S and channels of the encoder's tokens, which it takes without a projection.
    """

    def __init__(self, config: FFConfig, out_dims: tuple[int, int], n_tokens: int, width: int):
        super().__init__()
        c = self.config = config
        self.out_dims, self.n_tokens, self.width = tuple(out_dims), n_tokens, width
        hidden = [nn.Linear(width, c.d_model), nn.ReLU()]
        if not c.pool:
            hidden = [nn.Linear(n_tokens * width, 2 * c.d_model), nn.GLU()]
        n_out = self.out_dims[0] * self.out_dims[1]
        self.layers = nn.Sequential(*hidden, nn.Dropout(c.dropout), nn.Linear(c.d_model, n_out))

    def forward(self, tokens_BSE: Tensor, ticks: int | None = None) -> Thought:
        """`ticks` is there for the contract alone: there is always one."""
        features = reduce(tokens_BSE, "b s e -> b e", "mean") if self.config.pool else tokens_BSE.flatten(1)
        predictions_BTC = self.layers(features)[:, None].float()
        return Thought(predictions_BTC, certainty(predictions_BTC, self.out_dims[1]))
