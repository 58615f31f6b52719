"""Actor and critic over a model that thinks between observations: the published reinforcement-learning models."""

from typing import NamedTuple

from torch import Tensor, nn

from ctm.baselines import LSTMState
from ctm.model import State, Thinker


class Decision(NamedTuple):
    """What an agent answers to a batch of observations."""

    logits: Tensor
    """Of the actions, (B, A)."""
    value: Tensor
    """Of the state, (B,)."""
    state: State | LSTMState
    """To go on from; `agent.thinker.net.reset(state, done)` starts anew where an episode ended."""


class Agent(nn.Module):
    """Observations -> `Decision`.

    Args:
        thinker: a model without a head (`out_dims=None`).
        n_actions: A.
    """

    HIDDEN = 64

    def __init__(self, thinker: Thinker, n_actions: int):
        super().__init__()
        self.thinker = thinker
        net = thinker.net
        width = len(net.sync_out.decay) if hasattr(net, "sync_out") else net.config.d_model
        self.actor, self.critic = self._mlp(width, n_actions), self._mlp(width, 1)

    def _mlp(self, n_in: int, n_out: int) -> nn.Sequential:
        layers = [nn.Linear(n_in, self.HIDDEN), nn.ReLU(), nn.Linear(self.HIDDEN, self.HIDDEN), nn.ReLU()]
        mlp = nn.Sequential(*layers, nn.Linear(self.HIDDEN, n_out))
        for layer in mlp[::2]:
            nn.init.orthogonal_(layer.weight)
            nn.init.zeros_(layer.bias)
        return mlp

    def forward(self, observation: Tensor, state: State | LSTMState | None = None) -> Decision:
        thought = self.thinker(observation, state=state)
        return Decision(self.actor(thought.sync), self.critic(thought.sync).squeeze(-1), thought.state)
