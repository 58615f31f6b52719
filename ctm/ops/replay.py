"""An encoder without gradients as a CUDA graph: its hundreds of small launches, which take longer than the work, become
one."""

import weakref
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

MOST = 4
"""Graphs kept of an encoder, for different batches; the one not used for longest goes first."""
OUR_OWN = ("torch.nn.modules.", "torchvision.models.", "ctm.encoders")
"""Modules of these do nothing but launch kernels. Anything else (an adapter, say) may think of something new."""

kept: "weakref.WeakKeyDictionary[nn.Module, OrderedDict[tuple, Replay | None]]" = weakref.WeakKeyDictionary()


class Replay:
    """A module's launches for inputs of one shape, recorded."""

    def __init__(self, module: nn.Module, x: Tensor):
        autocast = torch.autocast(
            "cuda", torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda"), cache_enabled=False
        )  # the weights as they will be, not the copies that were cast until now
        with torch.inference_mode(False), torch.no_grad(), autocast:  # its buffers outlive this mode
            self.x = x.clone()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.y = module(self.x)

    def __call__(self, x: Tensor) -> Tensor:
        self.x.copy_(x)
        self.graph.replay()
        return self.y.clone()


def encode(encoder: nn.Module, *inputs: Tensor):
    """What `encoder(*inputs)` gives, from its second call with such inputs on by a graph, where it may be one."""
    addresses = addresses_of(encoder, *inputs)
    if addresses is None:
        return encoder(*inputs)
    (x,), graphs = inputs, kept.setdefault(encoder, OrderedDict())
    key = (
        x.shape, x.dtype, x.stride(), torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"),
        torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, *addresses,
    )  # fmt: skip
    if key not in graphs:
        graphs[key] = None  # the first call compiles, and chooses algorithms
        while len(graphs) > MOST:
            graphs.popitem(last=False)
        return encoder(x)
    graphs.move_to_end(key)
    if graphs[key] is None:
        graphs[key] = Replay(encoder, x)
    return graphs[key](x)


def addresses_of(encoder: nn.Module, *inputs: Tensor) -> list[int] | None:
    """Where all weights lie, if it is known that nothing else but the numbers of one input changes from call to call;
    None if not."""
    if not getattr(encoder, "replayable", False) or len(inputs) != 1 or not inputs[0].is_cuda:
        return None
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    if nn_module._has_any_global_hook() or torch.cuda.is_current_stream_capturing():
        return None
    addresses = []
    for part in encoder.modules():
        hooked = part._forward_hooks or part._forward_pre_hooks
        if part.training or hooked or not type(part).__module__.startswith(OUR_OWN):
            return None
        for values in (part._parameters, part._buffers):
            addresses += [value.data_ptr() for value in values.values() if value is not None]
    return addresses
