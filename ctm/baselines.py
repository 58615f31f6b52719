"""What a CTM is compared with: an LSTM that also thinks in ticks, and a feed-forward head. Same contract as `CTM`:
reads -> `Thought` with predictions (B, T, C)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import reduce
from torch import Tensor, nn

from ctm.model import Read, Thought, batch_of, every_tick, projected_once, reset_rows
from ctm.modules import CrossAttention, KeysValues, at_least, certainty


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
    """Attention heads; 0 for a model whose reads are ready vectors."""
    see_hidden: bool = False
    """Whether its input is what it read and its own last output, too."""
    learned_start: bool = True
    """Whether its first state is learned; false for zeros."""
    dropout: float = 0.0
    """Dropout in attention and between layers."""

    def __post_init__(self):
        at_least(1, self, "d_model", "d_input", "layers", "ticks")
        at_least(0, self, "heads")
        if self.heads and self.d_input % self.heads:
            raise ValueError(f"d_input={self.d_input} must be a multiple of heads={self.heads}")


class LSTMState(NamedTuple):
    """What an LSTM carries from tick to tick, (layers, B, D) each."""

    hidden: Tensor
    cell: Tensor


class OneStep(nn.LSTM):
    """A stacked LSTM that takes one step of time: (B, E), state -> (B, D), state.

    cuDNN's would move the weights into a buffer of its own, which a CUDA graph (`ctm.ops.learn`) could not follow, and
    would round the cell to bf16 at every tick under autocast.
    """

    def forward(self, x_BE: Tensor, state: LSTMState) -> tuple[Tensor, LSTMState]:
        after = []
        for hidden, cell, (w_x, w_h, b_x, b_h) in zip(*state, self.all_weights, strict=True):
            x_BE = F.dropout(x_BE, self.dropout, self.training) if after else x_BE
            gates = F.linear(x_BE, w_x, b_x) + F.linear(hidden, w_h, b_h)
            i, f, g, o = gates.to(cell.dtype).chunk(4, dim=-1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            x_BE = o.sigmoid() * cell.tanh()
            after.append((x_BE, cell))
        return x_BE, LSTMState(*(torch.stack(part) for part in zip(*after, strict=True)))


class LSTM(nn.Module):
    """An LSTM in the place of the CTM's recurrence: its hidden state asks the attention and gives the prediction.

    Args:
        config: sizes.
        out_dims: (positions, classes), or None for no head: the answer is then the hidden state.
    """

    def __init__(self, config: LSTMConfig, out_dims: tuple[int, int] | None):
        super().__init__()
        c = self.config = config
        self.out_dims = out_dims and tuple(out_dims)
        bound = c.d_model**-0.5
        for name in ("hidden_start", "cell_start"):
            if c.learned_start:
                setattr(self, name, nn.Parameter(torch.empty(c.layers, c.d_model).uniform_(-bound, bound)))
            else:
                self.register_buffer(name, torch.zeros(c.layers, c.d_model), persistent=False)
        self.query = nn.Linear(c.d_model, c.d_input) if c.heads else None
        self.attention = CrossAttention(c.d_input, c.heads, c.dropout) if c.heads else None
        n_in = c.d_input + (c.d_model if c.see_hidden else 0)
        between = c.dropout if c.layers > 1 else 0.0
        self.lstm = OneStep(n_in, c.d_model, c.layers, dropout=between)
        self.head = nn.Linear(c.d_model, self.out_dims[0] * self.out_dims[1]) if self.out_dims else nn.Identity()

    def start(self, batch: int) -> LSTMState:
        """The state before the first tick."""
        expanded = (start[:, None].expand(-1, batch, -1) for start in (self.hidden_start, self.cell_start))
        return LSTMState(*expanded)

    def reset(self, state: LSTMState, done_B: Tensor) -> LSTMState:
        """The state with the start in the rows (episodes) that are done; the others go on."""
        rows_first = (LSTMState(*(part.transpose(0, 1) for part in s)) for s in (state, self.start(len(done_B))))
        return LSTMState(*(part.transpose(0, 1) for part in reset_rows(*rows_first, done_B)))

    def forward(
        self, reads: Read | Sequence[Read], ticks: int | None = None, state: LSTMState | None = None
    ) -> Thought:
        """Arguments and errors as `CTM.forward`."""
        reads = projected_once(every_tick(reads, ticks, self.config.ticks), self.attention)
        state = state or self.start(batch_of(reads[0]))
        tops = []
        for read in reads:
            last = state.hidden[-1]
            o_BE = self.attention(self.query(last), read) if isinstance(read, KeysValues) else read
            if self.config.see_hidden:
                o_BE = torch.cat([o_BE, last], dim=-1)
            top, state = self.lstm(o_BE, state)
            tops.append(top)
        predictions_BTC = self.head(torch.stack(tops, dim=1)).float()
        sure_BT = certainty(predictions_BTC, self.out_dims[1]) if self.out_dims else None
        return Thought(predictions_BTC, sure_BT, tops[-1], state)


@dataclass(frozen=True)
class FFConfig:
    """Everything that fixes a feed-forward baseline but its inputs and outputs."""

    d_model: int = 512
    """Width of the hidden layer."""
    d_input: int | None = None
    """Width of a token; null for the features of the encoder as they are."""
    pool: bool = False
    """True averages the tokens (as the published code), False sees all of them (as the paper's maze baseline)."""
    dropout: float = 0.0
    """Dropout after the hidden layer."""

    def __post_init__(self):
        at_least(1, self, "d_model", "d_input")


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

    def forward(self, tokens_BSE: Tensor, ticks: int | None = None, state: None = None) -> Thought:
        """`ticks` and `state` are there for the contract alone: there is one tick, and nothing to carry."""
        features = reduce(tokens_BSE, "b s e -> b e", "mean") if self.config.pool else tokens_BSE.flatten(1)
        predictions_BTC = self.layers(features)[:, None].float()
        return Thought(predictions_BTC, certainty(predictions_BTC, self.out_dims[1]))
