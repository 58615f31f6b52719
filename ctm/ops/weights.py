"""What the fast path takes from a model: every weight through one function that refuses any part it does not know.

A part is known by its exact type. Whatever else stands in its place (an adapter, a subclass, a hook) is either applied
here or sends the whole model to the plain loop; it is never passed over.
"""

import sys
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
    dropout: float
    nlm_dropout: float
    eps: float


EFFECTIVE: dict[type, Callable[[nn.Module], tuple[Tensor, Tensor | None]]] = {
    nn.Linear: lambda linear: (linear.weight, linear.bias)
}
"""Type of a linear part -> its effective weight and bias. Adapters add theirs."""


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


def linear(part: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Effective weight and bias of a linear part.

    Raises:
        Unsupported: for a part of a type that is not known here.
    """
    lora_module = sys.modules.get("peft.tuners.lora.layer")
    if lora_module and type(part) is lora_module.Linear:
        return lora(part)
    if type(part) not in EFFECTIVE:
        raise Unsupported(f"a {type(part).__name__} in the place of a linear layer")
    return EFFECTIVE[type(part)](part)


def known(part: nn.Module, *kinds: type) -> nn.Module:
    if type(part) not in kinds:
        raise Unsupported(f"a {type(part).__name__} in the place of a {kinds[0].__name__}")
    return part


def collect(net: nn.Module, folded: Callable[[float], bool]) -> Weights:
    """All weights of the recurrence of a `CTM`.

    Args:
        folded: whether attention's output projection becomes part of the first synapse layer, given the dropout.

    Raises:
        Unsupported: where a part is not known.
    """
    c = net.config
    if c.sync == "window" or c.synapse_blocks > 1:
        raise Unsupported("the published reinforcement-learning parts")
    if c.nlm_layernorm:
        raise Unsupported("LayerNorm in the neuron-level models")
    refuse_hooks(net)
    dropout, nlm_dropout = dropout_of([net.synapses, net.attention]), dropout_of([net.neurons])
    found: dict[str, Tensor] = {}
    tokens_read = net.attention is not None
    if tokens_read:
        known(net.attention, modules.CrossAttention)
        found["decay"] = known(net.sync_action, modules.DecayingSync).bounded_decay()
        (wq, bq), (wo, bo) = linear(net.attention.q_proj), linear(net.attention.out_proj)
        w, b = linear(net.query)  # two linear maps in a row are one
        found["wq"], found["bq"] = wq @ w, bq + wq @ b
        found["wo"], found["bo"] = wo, bo
    eps = norms_into(found, net.synapses)
    if tokens_read and folded(dropout):
        first = "w.gated" if "w.gated" in found else "w.down0"
        w = found[first]
        wo, bo = found.pop("wo"), found.pop("bo")
        read = w[:, : c.d_input]
        found[first] = torch.cat([read @ wo, w[:, c.d_input :]], dim=1)
        bias = first.replace("w.", "b.")
        found[bias] = found[bias] + read @ bo
    layers = [known(net.neurons[i], modules.SuperLinear) for i in ((0, 2) if c.nlm_hidden else (0,))]
    known(net.neurons, modules.NeuronLevelModels)
    for number, layer in zip((1, 2) if c.nlm_hidden else (2,), layers, strict=True):
        for name, value in (("w", layer.weight), ("b", layer.bias), ("t", layer.temperature)):
            found[f"n.{name}{number}"] = value
    if any(value.dtype != torch.float32 for value in found.values()):
        raise Unsupported("weights that are not fp32")
    return Weights(found, dropout, nlm_dropout, eps)


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
    return found.pop() if found else 0.0


def refuse_hooks(net: nn.Module) -> None:
    """Hooks would not be called. Those of `ctm.record` are served otherwise."""
    if nn_module._has_any_global_hook():
        raise Unsupported("a global hook")
    for name, part in net.named_modules():
        hooks = [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
        hooks += [*part._backward_hooks.values(), *part._backward_pre_hooks.values()]
        if name and any(not getattr(hook, "records", False) for hook in hooks) and not name.startswith("head"):
            raise Unsupported(f"a hook on {name}")
