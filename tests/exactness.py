"""For `test_ops.py`: thoughts on both paths, and how far each is from fp64, with one dropout for both.

Triton's interpreter runs in a process that imports this and not what the tests need besides.
"""

import copy

import torch
from conftest import relative
from torch import nn

from ctm import CTM, CTMConfig

SMALL = {"d_model": 24, "d_input": 8, "ticks": 5, "heads": 2, "n_synch_out": 6, "n_synch_action": 4, "memory_length": 3}
KINDS = {
    "dense": {"synapse_depth": 3},
    "semi-dense": {"pairing": "semi-dense", "synapse_depth": 1, "nlm_hidden": 0},
    "random": {"pairing": "random", "n_self_pairs": 2, "synapse_depth": 2},
    "gated": {"synapse_depth": 1, "nlm_hidden": 5},
    "odd": {"synapse_depth": 4, "d_model": 37, "memory_length": 1, "ticks": 1},
}


def make(device: str = "cpu", seed: int = 0, **config) -> CTM:
    """A model whose every part matters: nothing at its initial value."""
    torch.manual_seed(seed)
    net = CTM(CTMConfig(**SMALL | config), (5, 3))
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.uniform_(0.02, 1.5) if name.endswith("decay") else p.add_(0.1 * torch.randn_like(p))
    return net.to(device)


def tokens(n: int = 7, batch: int = 3, device: str = "cpu", width: int = 8, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, n, width, generator=generator).to(device).requires_grad_()


def think(monkeypatch, path: str, net: CTM, reads, ticks=None, state=None):
    """A thought, and the gradients of a loss on all that came out of it."""
    monkeypatch.setenv("CTM_OPS", path)
    thought = net(reads, ticks, state)
    weight = torch.linspace(-1, 1, thought.predictions.numel(), device=thought.predictions.device)
    loss = (thought.predictions * weight.view_as(thought.predictions)).sum()
    end = thought.state
    loss = loss + end.z_BD.sin().sum() + end.trace_BDM.cos().sum() + end.out.alpha_BR.sin().sum()
    if end.action is not None:
        loss = loss + end.action.alpha_BR.sin().sum()
    inputs = {id(read): read for read in (reads if isinstance(reads, list) else [reads])}
    named = dict(net.named_parameters()) | {f"read{i}": read for i, read in enumerate(inputs.values())}
    named |= {f"state{i}": leaf for i, leaf in enumerate(leaves(state or ())) if leaf.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return thought, {name: grad for name, grad in zip(named, grads, strict=True) if grad is not None}


def leaves(state):
    return [
        leaf for part in state for leaf in (leaves(part) if isinstance(part, tuple) else [part]) if leaf is not None
    ]


# ----------------------------------------------------------------------------------------------------------------------
# Dropout by the kernels' numbers


class Draws(nn.Module):
    """Dropout by the numbers that the kernels draw, in the place of a dropout of the plain loop."""

    def __init__(self, p: float, site: int, index, clock: "Clock"):
        super().__init__()
        self.p, self.site, self.index, self.clock = p, site, index, clock

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seed, t = self.clock.now()
        key = hashed(hashed(torch.tensor(t * self.clock.sites + self.site)) + seed)
        bits = hashed(self.index(x.shape).to(x.device) * 0x9E3779B1 + key.to(x.device))
        return x * ((bits >= int(self.p * 2**32)) / (1 - self.p)).to(x.dtype)


def hashed(x: torch.Tensor) -> torch.Tensor:
    """`ctm.ops.kernels._hash` of the last 32 bits."""
    x = x & 0xFFFFFFFF
    x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)


class Clock:
    """Ticks so far, and the seeds of the parts that a thought is thought in: as many draws of torch's generator."""

    def __init__(self, part: int, parts: int, sites: int, device: str, seed: int):
        torch.manual_seed(seed)
        draws = [torch.zeros(1, dtype=torch.int32, device=device).random_(2**31 - 1) for _ in range(parts)]
        self.seeds, self.part, self.sites, self.t = [int(draw) for draw in draws], part, sites, 0

    def now(self) -> tuple[int, int]:
        return self.seeds[self.t // self.part], self.t % self.part


def plain_twin(net: CTM, ticks: int, device: str, seed: int) -> CTM:
    """A copy of a model for the plain loop, whose dropout is the one that the kernels draw after this seed."""
    twin, c = copy.deepcopy(net), net.config
    if not c.dropout:
        return twin
    depth = c.synapse_depth if c.synapse_depth > 1 else 0
    part = c.recompute or ticks
    clock = Clock(part, -(-ticks // part), 6 + 2 * depth, device, seed)

    def padded(shape) -> torch.Tensor:
        return torch.arange(shape[0])[:, None] * (-(-shape[1] // 64) * 64) + torch.arange(shape[1])

    def counted(shape) -> torch.Tensor:
        return torch.arange(shape.numel()).view(shape)

    def by_neuron(shape) -> torch.Tensor:
        return torch.arange(shape.numel()).view(shape[1], shape[0], shape[2]).transpose(0, 1)

    def draws(site: int, index) -> Draws:
        return Draws(c.dropout, site, index, clock)

    twin.attention.dropout = draws(0, counted)
    if depth:
        for i in range(depth - 1):  # a layer's input is dropped where it came out of another: sites are by the latter
            twin.synapses.down[i][0] = draws(2 + i, padded)
            twin.synapses.up[i][0] = draws(2 + depth + i + 1 if i < depth - 2 else 2 + depth - 1, padded)
    else:
        twin.synapses[0] = draws(1, counted)
    twin.neurons[0].dropout = draws(4 + 2 * depth, by_neuron)
    if c.nlm_hidden:
        twin.neurons[2].dropout = draws(5 + 2 * depth, by_neuron)
    twin.neurons.register_forward_hook(lambda *_: setattr(clock, "t", clock.t + 1))
    return twin


# ----------------------------------------------------------------------------------------------------------------------
# Errors


def errors_against_fp64(path, device, dtype, seeds, monkeypatch, batch, d, memory, ticks, kind, how):
    """Relative errors of the fast path and of the plain loop, (seeds, names) each, and what they are of: predictions,
    the state after the last tick, all gradients as one, and each gradient by itself.

    Both drop the same. What the fast path's buffers hold beforehand is NaN, from thoughts about nothing.

    Args:
        path: `CTM_OPS` of the fast one.
        how: "tokens"; "by tick", tokens and vectors by turns, after a state; "dropout"; "recompute"; or several.
    """
    config = KINDS[kind] | {"d_model": d, "d_input": 32, "heads": 4, "n_synch_out": 12, "n_synch_action": 9}
    config |= {"memory_length": memory, "ticks": ticks, "dropout": 0.2 if "dropout" in how else 0.0}
    config |= {"recompute": -(-ticks // 2) if "recompute" in how else 0}
    found = []
    for seed in range(seeds):
        net, state = make(device, seed, **config).train(), None
        reads = [tokens(10, batch, device, 32, seed)]
        if "by tick" in how:
            vector = tokens(1, batch, device, 32, seed + 60).detach()[:, 0]
            reads += [vector, tokens(4, batch, device, 32, seed + 50)]
            with torch.no_grad():
                monkeypatch.setenv("CTM_OPS", "naive")
                state = copy.deepcopy(net).eval()(reads[0], 2).state

        def thought(path: str, model: CTM, factor: float = 1.0, net=net, reads=reads, state=state):
            exact = model.head.weight.dtype
            if state is not None:
                state = copied(state, exact)
            given = [(factor * read.detach().to(exact)).requires_grad_() for read in reads]
            with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16 and exact != torch.float64):
                return think(monkeypatch, path, model, [given[t % len(given)] for t in range(ticks)], state=state)

        for _ in range(2 if device == "cuda" else 1):  # on a GPU by launches, while it is recorded, then replayed
            thought(path, net, float("nan"))
        torch.manual_seed(seed)
        fast = thought(path, net)
        plain = thought("naive", plain_twin(net, ticks, device, seed))
        exact = thought("naive", plain_twin(net, ticks, device, seed).double())
        found.append([errors_of(one, exact) for one in (fast, plain)])
    fast, plain = (torch.tensor([list(errors.values()) for errors in each]) for each in zip(*found, strict=True))
    return fast, plain, list(found[0][0])


def copied(state, dtype: torch.dtype):
    if isinstance(state, tuple):
        return type(state)(*(copied(part, dtype) for part in state))
    return state.detach().to(dtype).requires_grad_()


def errors_of(found, exact) -> dict[str, float]:
    (ours, grads), (theirs, expected) = found, exact
    assert grads.keys() == expected.keys()
    one, other = (torch.cat([each[name].double().flatten() for name in expected]) for each in (grads, expected))
    ends = (torch.cat([leaf.detach().double().flatten() for leaf in leaves(each.state)]) for each in (ours, theirs))
    whole = {
        "predictions": relative(ours.predictions, theirs.predictions),
        "state": relative(*ends),
        "gradients": relative(one, other),
    }
    floor = 1e-3 * float(other.norm())
    return whole | {name: relative(grads[name], expected[name], floor) for name in expected}
