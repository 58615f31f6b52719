"""What the fast path takes from a model: every weight through one function that refuses any part it does not know.

A part is known by its exact type. Whatever else stands in its place (an adapter, a subclass, a hook) is either applied
here or sends the whole model to the plain loop; it is never passed over.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from ctm import modules


class Unsupported(Exception):
    """Why a model must think in the plain loop."""


@dataclass
class Weights:
    """A model's weights, and the numbers that fix its dropout and norms."""

    tensors: dict[str, Tensor]
    folded: bool
    """Whether attention's output projection is part of the first synapse layer: two linear maps in a row are one."""
    widths: tuple[int, ...]
    """Of the synapse U-Net; empty for the gated layer."""
    dropout: float
    nlm_dropout: float
    eps: float
    dtype: torch.dtype
    """Of matrix products."""


def lora(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The effective weight of a PEFT LoRA layer."""
    weight, bias = linear(layer.base_layer)
    if layer.disable_adapters or layer.merged:
        return weight, bias
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        dropout = layer.lora_dropout[name]
        if not isinstance(dropout, nn.Identity) and dropout.p and dropout.training:
            raise Unsupported("a LoRA adapter with dropout")
        if getattr(layer, "lora_variant", {}).get(name) is not None or layer.lora_B[name].bias is not None:
            raise Unsupported("a variant of LoRA")
        weight = weight + layer.scaling[name] * (layer.lora_B[name].weight @ layer.lora_A[name].weight).to(weight.dtype)
    return weight, bias


def svf(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The effective weight of a singular-value adapter."""
    weight, bias = linear(layer.base_layer)
    if layer.disable_adapters or layer.merged:
        return weight, bias
    if layer.mixing.active is not None and layer.mixing.active.per_row:
        raise Unsupported("a mixture of adapters of its own for every row")
    change = layer.change()
    return (weight if change is None else weight + change), bias


EFFECTIVE: dict[str, Callable[[nn.Module], tuple[Tensor, Tensor | None]]] = {
    "torch.nn.modules.linear.Linear": lambda layer: (layer.weight, layer.bias),
    "peft.tuners.lora.layer.Linear": lora,
    "svf.layers.SVFLinear": svf,
}
"""Type of a linear part, by its name so that none is imported for it -> its effective weight and bias."""


def linear(part: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Effective weight and bias of a linear part.

    Raises:
        Unsupported: for a part of a type that is not known here.
    """
    effective = EFFECTIVE.get(f"{type(part).__module__}.{type(part).__qualname__}")
    if effective is None:
        raise Unsupported(f"a {type(part).__name__} in the place of a linear layer")
    return effective(part)


def known(part: nn.Module, *kinds: type) -> nn.Module:
    if type(part) not in kinds:
        raise Unsupported(f"a {type(part).__name__} in the place of a {kinds[0].__name__}")
    return part


def collect(net: nn.Module, dtype: torch.dtype, only_tokens: bool, tokens: bool) -> Weights:
    """All weights of the recurrence of a `CTM`.

    Args:
        dtype: of matrix products.
        only_tokens: whether every tick reads tokens. tokens: whether any does.

    Raises:
        Unsupported: where a part is not known.
    """
    c = net.config
    if c.nlm_layernorm:
        raise Unsupported("LayerNorm in the neuron-level models")
    refuse_hooks(net)
    inside = [net.synapses]
    if type(net.synapses) is modules.SynapseUNet:
        inside = [net.synapses.down, net.synapses.up]
        if dropout_of([net.synapses.first]):
            raise Unsupported("dropout before the first synapse layer")
    dropout, nlm_dropout = dropout_of([*inside, net.attention]), dropout_of([net.neurons])
    found: dict[str, Tensor] = {}
    if c.heads:
        known(net.attention, modules.CrossAttention)
        found["decay"] = known(net.sync_action, modules.DecayingSync).bounded_decay()
    if tokens:
        (wq, bq), (wo, bo) = linear(net.attention.q_proj), linear(net.attention.out_proj)
        w, b = linear(net.query)  # two linear maps in a row are one
        found["wq"], found["bq"] = wq @ w, bq + wq @ b
    eps = norms_into(found, net.synapses)
    folded = only_tokens and (c.synapse_depth > 1 or dropout == 0)
    if folded:
        first = "gated" if "w.gated" in found else "down0"
        w = found[f"w.{first}"]
        read = w[:, : c.d_input]
        found[f"w.{first}"] = torch.cat([read @ wo, w[:, c.d_input :]], dim=1)
        found[f"b.{first}"] = found[f"b.{first}"] + read @ bo
    elif tokens:
        found["wo"], found["bo"] = wo, bo
    layers = [known(net.neurons[i], modules.SuperLinear) for i in ((0, 2) if c.nlm_hidden else (0,))]
    known(net.neurons, modules.NeuronLevelModels)
    for number, layer in zip((1, 2) if c.nlm_hidden else (2,), layers, strict=True):
        for name, value in (("w", layer.weight), ("b", layer.bias), ("t", layer.temperature)):
            found[f"n.{name}{number}"] = value
    if any(value.dtype != torch.float32 for value in found.values()):
        raise Unsupported("weights that are not fp32")
    depth = c.synapse_depth if c.synapse_depth > 1 else 0
    widths = tuple(len(found[f"b.down{i}"]) for i in range(depth))
    return Weights(found, folded, widths, dropout, nlm_dropout, eps, dtype)


def norms_into(found: dict[str, Tensor], synapses: nn.Module) -> float:
    """The synapses' linear layers and norms; returns the norms' eps."""
    eps = set()

    def take(layer: str, part: nn.Module, norm: nn.Module, second: nn.Module | None = None) -> None:
        found[f"w.{layer}"], found[f"b.{layer}"] = linear(part)
        for suffix, one in (("", norm), ("2", second)):
            if one is not None:
                known(one, nn.LayerNorm)
                found[f"gamma{suffix}.{layer}"], found[f"beta{suffix}.{layer}"] = one.weight, one.bias
                eps.add(one.eps)

    if type(synapses) is modules.SynapseLayer:
        take("gated", synapses[1], synapses[3])
    else:
        known(synapses, modules.SynapseUNet)
        for i, block in enumerate([synapses.first, *synapses.down]):
            take(f"down{i}", block[1], block[2])
        for i, (block, skip) in enumerate(zip(synapses.up, synapses.skip_norm, strict=True)):
            take(f"up{i}", block[1], block[2], skip)
    if len(eps) > 1:
        raise Unsupported("LayerNorms of different eps")
    return eps.pop()


def dropout_of(parts: list[nn.Module | None]) -> float:
    """The one probability that all dropouts of these parts have now."""
    found = {
        part.p if part.training else 0.0
        for parent in parts
        if parent is not None
        for part in parent.modules()
        if isinstance(part, nn.Dropout)
    }
    if len(found) > 1:
        raise Unsupported("dropouts of different probability")
    if 1.0 in found:
        raise Unsupported("a dropout that leaves nothing")
    return found.pop() if found else 0.0


def refuse_hooks(net: nn.Module) -> None:
    """Hooks would not be called. Those of `ctm.record` are served otherwise."""
    if nn_module._has_any_global_hook():
        raise Unsupported("a global hook")
    for name, part in net.named_modules():
        kinds = part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks
        if not any(kinds) or not name or name.startswith("head"):
            continue
        if any(not getattr(hook, "records", False) for hooks in kinds for hook in hooks.values()):
            raise Unsupported(f"a hook on {name}")
