"""Hundreds of small launches, which take longer than their work, as one CUDA graph: an encoder, and what makes a model
ready to think, where there are no gradients; a whole training step, forward and backward, where there are."""

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

MOST = 4
"""Graphs kept of a module, for different batches; the one not used for longest goes first."""
OUR_OWN = ("torch.nn.modules.", "torchvision.models.", "ctm.encoders", "ctm.modules", "ctm.model", "ctm.baselines")
"""Modules of these do nothing but launch kernels. Anything else (an adapter, say) may think of something new."""

DEVICES = ("cuda",)
"""Which can record."""
PLAIN = frozenset((bool, int, float, str, tuple, type(None)))
"""Attributes of these types say what a module does: sizes, an eps, a mode."""

kept: "weakref.WeakKeyDictionary[nn.Module, OrderedDict[tuple, Replay | None]]" = weakref.WeakKeyDictionary()


class Replay:
    """A function's launches for inputs of one shape, recorded. What it returns lies where the next call's will lie."""

    def __init__(self, function: Callable[..., Any], inputs: tuple[Tensor, ...], learns: bool):
        self.uses = 0
        autocast = torch.autocast(
            "cuda", torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda"), cache_enabled=False
        )  # the weights as they will be, not the copies that were cast until now
        # Its buffers outlive this mode; a graph is recorded on the current device.
        grad, device = torch.set_grad_enabled(learns), torch.cuda.device(inputs[0].device)
        with torch.inference_mode(False), grad, autocast, device:
            self.inputs = [x.clone() for x in inputs]
            self.graph = torch.cuda.CUDAGraph()
            with capture(self.graph, inputs[0].device):
                self.outputs = function(*self.inputs)

    def __call__(self, *inputs: Tensor) -> Any:
        self.uses += 1
        torch._foreach_copy_(self.inputs, inputs)
        self.graph.replay()
        return self.outputs


def encode(encoder: nn.Module, *inputs: Tensor):
    """What `encoder(*inputs)` gives."""
    if not getattr(encoder, "replayable", False) or len(inputs) != 1:
        return encoder(*inputs)
    graph = graph_of(encoder, encoder, inputs)
    return encoder(*inputs) if graph is None else graph(*inputs).clone()


def prepare(function: Callable, net: nn.Module, reads: list, state) -> tuple:
    """What `function(net, reads, state)`, which makes a `CTM` ready to think, gives."""
    if state is None and isinstance(reads[0], Tensor) and all(read is reads[0] for read in reads):
        graph = graph_of(net, lambda x: function(net, [x] * len(reads), None), reads[:1], len(reads))
        if graph is not None:
            reads, state, weights = graph(reads[0])
            return reads, state, weights and replace(weights)  # another thought's: their numbers are new
    return function(net, reads, state)


def graph_of(
    module: nn.Module, function: Callable, inputs: tuple, *more: Hashable, learns: bool = False
) -> Replay | None:
    """`function` of such inputs as a graph, from the second call on of those that are alike, `more` included. None
    where it may not be one, or not yet: the first call compiles, and chooses algorithms."""
    if not may_replay(inputs, learns) or (what := identity(module, learns)) is None:
        return None
    graphs = kept.setdefault(module, OrderedDict())
    key = (
        threading.get_ident(), *((x.device, x.shape, x.dtype, x.stride()) for x in inputs), learns,
        torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"), torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32, os.environ.get("CTM_OPS"), *more, *what,
    )  # fmt: skip
    try:
        graph = graphs.pop(key, missing)  # once, for the key is long
    except TypeError:  # an attribute that can be changed without a trace
        return None
    if graph is None:
        graph = Replay(function, inputs, learns)
    graphs[key] = None if graph is missing else graph
    while len(graphs) > MOST:
        graphs.popitem(last=False)
    return None if graph is missing else graph


missing = object()


def may_replay(inputs: tuple, learns: bool) -> bool:
    """Whether a graph may stand for launches now."""
    if not all(isinstance(x, Tensor) and x.device.type in DEVICES for x in inputs):
        return False
    if torch.is_grad_enabled() != learns or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return not (nn_module._has_any_global_hook() or capturing(inputs[0].device))


def capture(graph: torch.cuda.CUDAGraph, device: torch.device, pool: tuple | None = None) -> torch.cuda.graph:
    """Makes a graph of what is launched meanwhile, on a stream of this device: PyTorch's own is of whichever device was
    the first to be captured."""
    return torch.cuda.graph(graph, pool, stream_of(device), capture_error_mode="thread_local")


@cache
def stream_of(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def capturing(device: torch.device) -> bool:
    """Whether what is launched now becomes a part of a graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@cache
def our_own(kind: type) -> bool:
    return kind.__module__.startswith(OUR_OWN)


def identity(module: nn.Module, learns: bool) -> list | None:
    """What every part of a module is and where its weights lie: while this stays the same, nothing but numbers changes
    from call to call. None if that is not known.

    It is taken before every thought while the GPU waits: hence no names, no `modules()`.
    """
    found, parts = [], [module]
    for part in parts:  # which grows
        found.append(type(part))
        if part is None:
            continue
        if (part.training and not learns) or part._forward_hooks or part._forward_pre_hooks:
            return None
        if not our_own(type(part)):
            return None
        found += settings(part)
        for values in (part._parameters, part._buffers):
            for value in values.values():
                if value is not None:
                    found += value.data_ptr(), value.shape, value.stride(), value.dtype, value.requires_grad
        parts += part._modules.values()
    return found


def settings(thing: object) -> list:
    """What plain attributes say of it."""
    return [value for value in vars(thing).values() if type(value) in PLAIN]
