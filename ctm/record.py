"""Watch a model think, from outside: hooks on its parts, nothing in the model knows of them.

    with record(model) as seen:
        thought = model(images)
    seen.attention          # (T, B, heads, S)

Tensors stay on their device and keep their graph, where there is one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby

import torch
from torch import Tensor, nn

from ctm.modules import CrossAttention, NeuronLevelModels, SynapseLayer, SynapseUNet, Synchronization


class Recording:
    """What was seen at every tick, the tick first. A part that the model lacks is None."""

    def __init__(self):
        self.parts: dict[str, list[Tensor]] = {}
        self.attention_ticks: list[int] = []
        """The ticks, from 0, at which the model attended: all of them, unless it also reads ready vectors."""

    @property
    def ticks(self) -> int:
        """How many ticks were seen to their end."""
        return sum(map(len, self.parts.get("post_activations", ())))

    def keep(self, name: str, value: Tensor) -> None:
        """Some more ticks (T, B, ...) of a part."""
        self.parts.setdefault(name, []).append(value)

    def take(self, work, sync_BTR: Tensor) -> None:
        """What the fast recurrence (`ctm.ops`) has in its buffers after a thought."""
        s, before = work.spec, self.ticks
        for read, run in groupby(range(s.ticks), key=lambda t: s.reads[t]):
            ticks = list(run)
            if read >= 0:
                self.keep("attention", work.p[read][ticks[0] : ticks[-1] + 1].clone())
                self.attention_ticks += [before + t for t in ticks]
        self.keep("pre_activations", work.pre.clone())
        self.keep("post_activations", work.z[1:].clone())
        self.keep("sync_out", sync_BTR.transpose(0, 1))
        if s.n_pairs:
            self.keep("sync_action", work.s.clone())

    def all_of(self, name: str, last: int | None = None) -> Tensor | None:
        parts = self.parts.get(name)
        if parts is None:
            return None
        if len(parts) > 1:
            parts = self.parts[name] = [torch.cat(parts)]
        return parts[0] if last is None else parts[0][-last:]

    @property
    def attention(self) -> Tensor | None:
        """Attention weights (T, B, heads, S), at the ticks `attention_ticks`."""
        return self.all_of("attention")

    @property
    def pre_activations(self) -> Tensor | None:
        """(T, B, D), what the synapses send to the neurons."""
        return self.all_of("pre_activations")

    @property
    def post_activations(self) -> Tensor | None:
        """(T, B, D), what the neurons answer; the hidden state of an LSTM."""
        return self.all_of("post_activations")

    @property
    def sync_action(self) -> Tensor | None:
        """(T, B, R), behind the attention query."""
        return self.all_of("sync_action")

    @property
    def sync_out(self) -> Tensor | None:
        """(T, B, R), behind the prediction; the value before the first tick is left out."""
        return self.all_of("sync_out", self.ticks)


@contextmanager
def record(model: nn.Module) -> Iterator[Recording]:
    """Records one forward pass of a `CTM`, a baseline or a `Thinker` around one."""
    seen = Recording()
    handles = []

    def watch(module: nn.Module, name: str, pick=lambda output: output) -> None:
        def hook(_, __, output):
            if name == "attention":
                seen.attention_ticks.append(seen.ticks)
            seen.keep(name, pick(output)[None])

        hook.records = True  # `ctm.ops` serves it from its buffers
        handles.append(module.register_forward_hook(hook))

    nets = []
    for path, module in model.named_modules():
        if isinstance(module, CrossAttention):
            watch(module.softmax, "attention", lambda weights: weights.squeeze(-2))
        elif isinstance(module, SynapseLayer | SynapseUNet):
            watch(module, "pre_activations")
        elif isinstance(module, NeuronLevelModels):
            watch(module, "post_activations")
        elif isinstance(module, nn.LSTM):
            watch(module, "post_activations", lambda output: output[0])
        elif isinstance(module, Synchronization):
            watch(module, path.rpartition(".")[2], lambda output: output[0])
        elif hasattr(module, "recordings"):
            nets.append(module)
            module.recordings.append(seen)
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        for net in nets:
            net.recordings.remove(seen)
