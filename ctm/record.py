"""Watch a model think, from outside: hooks on its parts, nothing in the model knows of them.

    with record(model) as seen:
        thought = model(images)
    seen.attention          # (T, B, heads, S)

Tensors stay on their device and keep their graph, where there is one.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ctm.modules import CrossAttention, NeuronLevelModels, SynapseLayer, SynapseUNet, Synchronization


class Recording:
    """What was seen at every tick, the tick first. A part that the model lacks is None."""

    def __init__(self):
        self.ticks: dict[str, list[Tensor]] = {}

    def keep(self, name: str, value: Tensor) -> None:
        self.ticks.setdefault(name, []).append(value)

    def take(self, work, sync_BTR: Tensor) -> None:
        """What the fast recurrence (`ctm.ops`) has in its buffers after a thought."""
        s = work.spec
        self.ticks.setdefault("pre_activations", []).extend(work.pre.clone())
        self.ticks.setdefault("post_activations", []).extend(work.z[1:].clone())
        self.ticks.setdefault("sync_out", []).extend(sync_BTR.transpose(0, 1))
        if s.n_pairs:
            self.ticks.setdefault("sync_action", []).extend(work.s.clone())
        for t, read in enumerate(s.reads):
            if read >= 0:
                self.keep("attention", work.p[read][t].unsqueeze(-2).clone())

    def stack(self, name: str, last: int | None = None) -> Tensor | None:
        values = self.ticks.get(name)
        return None if values is None else torch.stack(values[-last:] if last else values)

    @property
    def attention(self) -> Tensor | None:
        """Attention weights (T, B, heads, S)."""
        weights = self.stack("attention")
        return None if weights is None else weights.squeeze(-2)

    @property
    def pre_activations(self) -> Tensor | None:
        """(T, B, D), what the synapses send to the neurons."""
        return self.stack("pre_activations")

    @property
    def post_activations(self) -> Tensor | None:
        """(T, B, D), what the neurons answer."""
        return self.stack("post_activations")

    @property
    def sync_action(self) -> Tensor | None:
        """(T, B, R), behind the attention query."""
        return self.stack("sync_action")

    @property
    def sync_out(self) -> Tensor | None:
        """(T, B, R), behind the prediction; the value before the first tick is left out."""
        return self.stack("sync_out", len(self.ticks.get("post_activations", [])))


@contextmanager
def record(model: nn.Module) -> Iterator[Recording]:
    """Records one forward pass of a `CTM`, a baseline or a `Thinker` around one."""
    seen = Recording()
    handles = []

    def watch(module: nn.Module, name: str, pick=lambda output: output) -> None:
        def hook(_, __, output):
            seen.keep(name, pick(output))

        hook.records = True  # `ctm.ops` serves it from its buffers
        handles.append(module.register_forward_hook(hook))

    nets = []
    for path, module in model.named_modules():
        if isinstance(module, CrossAttention):
            watch(module.softmax, "attention")
        elif isinstance(module, SynapseLayer | SynapseUNet):
            watch(module, "pre_activations")
        elif isinstance(module, NeuronLevelModels):
            watch(module, "post_activations")
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
