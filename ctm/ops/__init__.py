"""The fast recurrence behind one seam: `think` does what `ctm.model.CTM`'s loop does, or says that it cannot.

`learn` takes a training step, forward, loss and backward, which a GPU replays as one CUDA graph.

`CTM_OPS=naive` forces the plain loop. Without it a CPU takes hand-written steps in PyTorch, a GPU Triton kernels in
CUDA graphs; `CTM_OPS=triton` takes the kernels anywhere (for Triton's interpreter).
"""

import logging
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ctm.modules import KeysValues, Synchronization, SyncState
from ctm.ops import replay, torch_tick
from ctm.ops.recurrence import Spec
from ctm.ops.weights import Unsupported, Weights, collect

CHUNK = 25
"""Without gradients, so many ticks at a time: memory does not grow with the length of a thought."""

OF_ATTENTION = ("wq", "bq", "wo", "bo")
"""Names of the weights that only ticks with tokens use."""

OF_STATE = ("z", "trace", "alpha", "beta")

log = logging.getLogger(__name__)
said: set[str] = set()


def mode() -> str:
    return os.environ.get("CTM_OPS", "auto")


def encode(encoder: nn.Module, *inputs: Tensor):
    """`encoder(*inputs)`: tokens, or reads for every tick."""
    return encoder(*inputs) if mode() == "naive" else replay.encode(encoder, *inputs)


def learn(model: nn.Module, loss_of: Callable, batch: tuple, *marks: Hashable) -> tuple[Tensor, tuple]:
    """The loss of a training step, and its thought: `thought = model(*inputs)`, `loss_of(thought, batch)`.

    On a GPU all of it, and the backward pass with it, is one CUDA graph from the second step on; the gradients then
    wait for `loss.backward()`.

    Args:
        model: takes the batch but its last part. It and the loss do nothing but launch kernels, the same for all
            batches of one shape.
        loss_of: thought and batch -> loss.
        marks: everything else that the loss depends on.

    Returns:
        The loss; predictions and certainty, which have no gradients.
    """

    def step(*batch: Tensor):
        # Aliases, whose nodes in autograd belong to the stream that is recorded, as those of no older step do.
        own = {name: p.detach().requires_grad_() for name, p in model.named_parameters() if p.requires_grad}
        thought = torch.func.functional_call(model, own, batch[:-1])
        loss = loss_of(thought, batch)
        with torch.autocast(loss.device.type, enabled=False):
            gradients = torch.autograd.grad(loss, list(own.values()), allow_unused=True)
        return loss.detach(), thought.predictions.detach(), thought.certainty.detach(), gradients, take_captured()

    # In fp16 the loss is scaled, which the gradients of a graph would not be until they had vanished.
    scaled = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") == torch.float16
    graph = None
    if mode() != "naive" and not scaled and not getattr(model.net, "recordings", ()):
        pairs = [Pairs.of(part) for part in model.modules() if isinstance(part, Synchronization)]
        graph = replay.graph_of(model, step, batch, *marks, *pairs, learns=True)
    if graph is None:
        thought = model(*batch[:-1])
        return loss_of(thought, batch), (thought.predictions.detach(), thought.certainty.detach())
    loss, *thought, gradients, _ = graph(*batch)
    weights = [p for p in model.parameters() if p.requires_grad]
    return Learned.apply(graph, loss, gradients, *weights), tuple(value.clone() for value in thought)


def backend(device: torch.device):
    """The module of steps for a device."""
    if mode() == "triton" or device.type == "cuda":
        from ctm.ops import triton_tick

        return triton_tick
    return torch_tick


def parts(reads: list, recompute: int) -> list[list]:
    """The reads of a thought, as they are thought about at a time."""
    size = (recompute or len(reads)) if torch.is_grad_enabled() else CHUNK
    return [reads[i : i + size] for i in range(0, len(reads), size)]


def think(net: nn.Module, reads: list, state) -> Iterator[tuple[Tensor, tuple]]:
    """The synchronization after every tick (B, T, R) and the state after the last, for some ticks at a time.

    Args:
        net: a `CTM`.
        reads: one for each tick.
        state: before the first tick; None for the learned start.
    """
    ready = prepare if mode() == "naive" else partial(replay.prepare, prepare)
    reads, state, weights = ready(net, reads, state)
    for part in parts(reads, net.config.recompute):
        sync_BTR, state = net.loop(part, state) if weights is None else fast(net, weights, part, state)
        yield sync_BTR, state


def prepare(net: nn.Module, reads: list, state) -> tuple[list[Tensor | KeysValues], tuple, Weights | None]:
    """What comes before the first tick: projected reads, a state, and what the fast path thinks with, if it can."""
    reads, state = net.begin(reads, state)
    try:
        return reads, state, take_weights(net, reads, state)
    except Unsupported as why:
        if str(why) not in said:
            said.add(str(why))
            log.warning("the plain loop is used, which is slower: the fast one does not know %s", why)
        return reads, state, None


def take_weights(net: nn.Module, reads: list[Tensor | KeysValues], state) -> Weights | None:
    """What the fast path thinks with, or None where the plain loop is asked for.

    Raises:
        Unsupported: where the fast path cannot.
    """
    device, c = state.z_BD.device, net.config
    if mode() == "naive" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    if device.type not in ("cpu", "cuda"):
        raise Unsupported(f"devices of type {device.type}")
    if net.recordings and torch.is_grad_enabled():  # what is recorded keeps its graph, and the buffers have none
        raise Unsupported("recordings of a thought with gradients")
    if type(net).__qualname__ != "CTM" or type(net).__module__ != "ctm.model":
        raise Unsupported(f"the subclass {type(net).__name__}")
    if state.z_BD.dtype != torch.float32:
        raise Unsupported(f"states of {state.z_BD.dtype}")
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise Unsupported(f"products in {dtype}")
    if c.sync == "window" or c.synapse_blocks > 1:
        raise Unsupported("the published reinforcement-learning parts")
    if any(sync is not None and sync.beta_R.ndim > 1 for sync in (state.action, state.out)):
        raise Unsupported("rows that started at different ticks")
    tokens = [read for read in reads if isinstance(read, KeysValues)]
    if device.type == "cuda" and any(kv.keys.shape[2] > 1024 for kv in tokens):
        raise Unsupported("more than 1024 tokens")
    with torch.autocast(device.type, enabled=False):
        return collect(net, dtype, only_tokens=len(tokens) == len(reads), tokens=bool(tokens))


def fast(net: nn.Module, weights: Weights, reads: list[Tensor | KeysValues], state):
    """Some ticks on the fast path: what the plain loop, `CTM.loop`, returns."""
    c, device = net.config, state.z_BD.device
    tokens = list({id(read): read for read in reads if isinstance(read, KeysValues)}.values())
    vectors = list({id(read): read for read in reads if not isinstance(read, KeysValues)}.values())
    number = {id(read): i for i, read in enumerate(tokens)} | {id(read): -1 - i for i, read in enumerate(vectors)}
    given = {"z": state.z_BD, "trace": state.trace_BDM}
    if c.heads:
        given |= {"alpha": state.action.alpha_BR, "beta": state.action.beta_R}
    for i, kv in enumerate(tokens):
        given |= {f"keys{i}": kv.keys, f"values{i}": kv.values}
    given |= {f"vector{i}": vector for i, vector in enumerate(vectors)}
    unused = () if tokens else OF_ATTENTION  # these ticks read vectors, others of the thought tokens
    given |= {name: value for name, value in weights.tensors.items() if name not in unused}
    learns = torch.is_grad_enabled() and any(value.requires_grad for value in given.values())
    again = learns and bool(c.recompute)
    # With recomputation all parts of a thought take turns with one runner: the first, too, has gradients of its state.
    needed = [name for name, value in given.items() if value.requires_grad or (again and name in OF_STATE)]
    spec = Spec(
        batch=len(state.z_BD), ticks=len(reads), d_model=c.d_model, d_input=c.d_input, heads=c.heads,
        n_pairs=len(net.sync_action.decay) if c.heads else 0, memory=c.memory_length, hidden=c.nlm_hidden,
        widths=weights.widths, reads=tuple(number[id(read)] for read in reads),
        tokens=tuple(kv.keys.shape[2] for kv in tokens), folded=weights.folded, dropout=weights.dropout,
        nlm_dropout=weights.nlm_dropout, eps=weights.eps, dtype=weights.dtype, device=device, keep=learns,
        wanted=tuple(needed) if learns else (), names=tuple(given),
    )  # fmt: skip
    runner = runner_for(spec, Pairs.of(net.sync_action) if c.heads else None, again)
    if runner.weights is not weights:
        runner.weights = weights
        runner.work.taken.clear()
    # Kernels are launched, and graphs recorded, on the current device; for the backward pass autograd sees to that.
    with torch.cuda.device_of(state.z_BD), torch.autocast(device.type, enabled=False):
        z_TBD, trace_BDM, alpha_BR = (ThinkAgain if again else Think).apply(runner, *given.values())
        sync_BTR, alpha_out_BR, beta_out_R = Scan.apply(
            z_TBD, net.sync_out.bounded_decay(), state.out.alpha_BR, state.out.beta_R, Pairs.of(net.sync_out)
        )
        action = None
        if c.heads:
            action = SyncState(alpha_BR, after(state.action.beta_R, weights.tensors["decay"], len(reads)))
    for seen in net.recordings:
        seen.take(runner.work, sync_BTR)
    out = SyncState(alpha_out_BR, beta_out_R)
    return sync_BTR, type(state)(z_TBD[-1].clone(), trace_BDM, action, out, sync_BTR[:, -1])


def after(beta_R: Tensor, decay_R: Tensor, ticks: int) -> Tensor:
    """beta, `ticks` ticks later: r^n beta + the sum of r^k for k < n, whose closed form is 0 / 0 at r = 1."""
    powers_RT = torch.exp(-decay_R[:, None] * torch.arange(ticks + 1, device=decay_R.device))
    return powers_RT[:, ticks] * beta_R + powers_RT[:, :ticks].sum(1)


# ----------------------------------------------------------------------------------------------------------------------
# Pairs of neurons


class Pairs(torch_tick.Neighbours):
    """The pairs of a synchronization as the steps want them, made once for a module."""

    cache: "weakref.WeakKeyDictionary[nn.Module, tuple[tuple, Pairs]]" = weakref.WeakKeyDictionary()

    def __init__(self, sync: Synchronization):
        super().__init__(sync.left, sync.right)
        if sync.left.is_cuda:
            for name in ("left", "right", "active", "pair", "other"):
                setattr(self, name, getattr(self, name).int())

    @classmethod
    def of(cls, sync: Synchronization) -> "Pairs":
        mark = (sync.left.data_ptr(), sync.left._version, sync.right.data_ptr(), sync.right._version)
        of_then, pairs = cls.cache.get(sync, (None, None))
        if of_then != mark:
            with torch.inference_mode(False):
                if pairs is None or not pairs.still(sync):
                    pairs = cls(sync)
            cls.cache[sync] = mark, pairs
        return pairs

    def still(self, sync: Synchronization) -> bool:
        """Whether they are the same as ever: DDP writes every buffer anew at every step."""
        if self.left.device != sync.left.device or self.left.shape != sync.left.shape:
            return False
        return bool((self.left == sync.left).all() & (self.right == sync.right).all())


# ----------------------------------------------------------------------------------------------------------------------
# Buffers and graphs, kept from thought to thought


class Turn:
    """One thought's use of a runner's buffers: until its backward pass, or until nobody can ask for that any more."""

    done = False


class Runner:
    """A `Recurrence` and, on a GPU, the CUDA graphs of its two loops."""

    def __init__(self, spec: Spec, pairs: Pairs | None):
        steps = backend(spec.device)
        kind = steps.TorchRecurrence if steps is torch_tick else steps.TritonRecurrence
        self.work = kind(spec)
        if pairs is not None:
            self.work.pairs, self.work.neighbours = (pairs.left, pairs.right), pairs
        self.spec, self.pairs, self.uses = spec, pairs, 0  # the key of runners has the address of pairs
        self.turn: weakref.ref[Turn] | None = None
        self.graphs: tuple | None = None
        self.grads: dict[str, Tensor] = {}
        self.lock = threading.Lock()
        self.weights: Weights | None = None
        """Of the last thought: they are taken in once a thought, for its parts may share them."""

    @property
    def busy(self) -> bool:
        turn = self.turn and self.turn()
        return turn is not None and not turn.done

    def forward(self, given: dict[str, Tensor], seed: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        work = self.work
        work.load(given, seed)
        part = replay.capturing(self.spec.device)
        if self.spec.device.type == "cuda" and self.uses > 0 and not self.graphs and not part:
            self.capture()
        if self.graphs and not part:
            self.graphs[0].replay()
        else:
            work.forward()
        self.uses += 1
        memory, ticks = self.spec.memory, self.spec.ticks
        # As it lies in the buffers, the tick first: what comes after reads it row by row.
        older = given["trace"].permute(2, 0, 1)[ticks:]
        trace = torch.cat([older, work.pre[max(0, ticks - memory) :]]).permute(1, 2, 0)
        alpha = work.alpha.clone() if self.spec.n_pairs else work.z[0, :, :0].clone()
        return work.z[1:].detach(), trace, alpha

    def backward(self, dz: Tensor, dtrace: Tensor | None, dalpha: Tensor | None) -> dict[str, Tensor]:
        self.work.load_gradients(dz, dtrace, dalpha)
        if self.graphs and self.graphs[1] and not replay.capturing(self.spec.device):
            self.graphs[1].replay()
            grads = self.grads
        else:
            grads = self.work.backward()
        return {name: value.clone() for name, value in grads.items()}  # the buffers are the next thought's

    def capture(self) -> None:
        """Records both loops. They were run before, so that everything is compiled."""
        forward, backward = torch.cuda.CUDAGraph(), None
        with replay.capture(forward, self.spec.device):
            self.work.forward()
        if self.spec.keep:
            backward = torch.cuda.CUDAGraph()
            with replay.capture(backward, self.spec.device, forward.pool()):
                self.grads = self.work.backward()
        self.graphs = forward, backward


MOST = 12
"""Runners that are kept; the one not used for longest goes first."""
runners: "OrderedDict[tuple, list[Runner]]" = OrderedDict()
choosing = threading.Lock()


def runner_for(spec: Spec, pairs: Pairs | None, again: bool = False) -> Runner:
    """A runner of this kind whose buffers are free.

    Without gradients nothing marks them as used while a thought goes on: they are of this thread's own. Those of a
    thought that is thought again are of the stream's, for the backward pass is on another thread, but in no other
    stream. Those of a graph are its own for good.
    """
    owner = threading.get_ident()
    if again:
        owner = torch.cuda.current_stream(spec.device) if spec.device.type == "cuda" else None
    part = replay.capturing(spec.device)
    kind = spec, id(pairs), torch.get_float32_matmul_precision()
    key = *kind, CAPTURED if part else owner
    with choosing:
        runners.setdefault(key, [])
        runners.move_to_end(key)
        free = next((runner for runner in runners[key] if not runner.busy), None)
        if free is None and part:  # that of the steps before, which will not be needed again
            last = [group for other, group in runners.items() if other[:-1] == kind]
            free = next((group.pop(i) for group in last for i, r in enumerate(group) if not r.busy), None)
            runners[key] += [free] if free else []
        if free is None:
            with torch.inference_mode(False):  # its buffers outlive this mode
                free = Runner(spec, pairs)
            runners[key].append(free)
        while sum(map(len, runners.values())) > MOST and len(runners) > 1 and not part:
            runners.popitem(last=False)
    return free


CAPTURED = "captured"


def take_captured() -> list[Runner]:
    """The runners of what was captured just now, which nothing else may use any more."""
    with choosing:
        keys = [key for key in runners if key[-1] == CAPTURED]
        return [runner for key in keys for runner in runners.pop(key)]


def clear() -> None:
    """Gives the memory of all buffers and graphs back."""
    runners.clear()
    replay.kept.clear()


# ----------------------------------------------------------------------------------------------------------------------
# Autograd


class Think(torch.autograd.Function):
    """A thought as one step of autograd: tensors of `Spec.names` -> activations of all ticks, trace and action sums."""

    @staticmethod
    def forward(ctx, runner: Runner, *tensors: Tensor):
        ctx.set_materialize_grads(False)
        ctx.runner, ctx.turn = runner, Turn()
        runner.turn = weakref.ref(ctx.turn)
        return runner.forward(dict(zip(runner.spec.names, tensors, strict=True)))

    @staticmethod
    @once_differentiable
    def backward(ctx, dz: Tensor | None, dtrace: Tensor | None, dalpha: Tensor | None):
        runner = ctx.runner
        if runner.turn() is not ctx.turn:
            raise RuntimeError("this thought's buffers were used again since its backward pass; think again first")
        if dz is None:
            dz = torch.zeros_like(runner.work.z[1:])
        with torch.autocast(dz.device.type, enabled=False):
            grads = runner.backward(dz, dtrace, dalpha)
        ctx.turn.done = True
        return None, *(grads.get(name) for name in runner.spec.names)


class ThinkAgain(torch.autograd.Function):
    """`Think` that leaves its buffers to the next thought, and thinks again in the backward pass, by the same dice."""

    @staticmethod
    def forward(ctx, runner: Runner, *tensors: Tensor):
        ctx.set_materialize_grads(False)
        with runner.lock:
            z, trace, alpha = runner.forward(dict(zip(runner.spec.names, tensors, strict=True)))
            ctx.save_for_backward(runner.work.seed.clone(), *tensors)
            ctx.spec, ctx.pairs = runner.spec, runner.pairs
            return z.clone(), trace, alpha

    @staticmethod
    @once_differentiable
    def backward(ctx, dz: Tensor | None, dtrace: Tensor | None, dalpha: Tensor | None):
        seed, *tensors = ctx.saved_tensors
        runner = runner_for(ctx.spec, ctx.pairs, again=True)
        with runner.lock, torch.autocast(seed.device.type, enabled=False):
            runner.forward(dict(zip(ctx.spec.names, tensors, strict=True)), seed)
            dz = torch.zeros_like(runner.work.z[1:]) if dz is None else dz
            grads = runner.backward(dz, dtrace, dalpha)
        return None, *(grads.get(name) for name in ctx.spec.names)


class Scan(torch.autograd.Function):
    """Synchronization of all ticks from the activations of all ticks."""

    @staticmethod
    def forward(ctx, z_TBD: Tensor, decay: Tensor, alpha_BR: Tensor, beta_R: Tensor, pairs: Pairs):
        ctx.set_materialize_grads(False)
        steps, ticks = backend(z_TBD.device), len(z_TBD)
        if steps is torch_tick:
            r, beta, betas = torch.exp(-decay), beta_R, []
            for _ in range(ticks):
                beta = r * beta + 1
                betas.append(beta)
            betas = torch.stack(betas)
        else:
            r, betas = steps.tables(decay, beta_R.contiguous(), ticks)
        alpha_BR = alpha_BR.contiguous()
        sync, last = steps.scan(z_TBD, (pairs.left, pairs.right), r, betas, alpha_BR)
        ctx.save_for_backward(z_TBD, sync, r, betas, alpha_BR, beta_R)
        ctx.pairs = pairs
        return sync, last, betas[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, dsync: Tensor | None, dalpha: Tensor | None, dbeta: Tensor | None):
        z, sync, r, betas, alpha0, beta0 = ctx.saved_tensors
        dsync = torch.zeros_like(sync) if dsync is None else dsync
        dalpha = torch.zeros_like(alpha0) if dalpha is None else dalpha.contiguous()
        per_row = torch.zeros_like(alpha0)
        if dbeta is not None:
            per_row[0] = dbeta  # the same for all rows: one of them carries it
        steps = backend(z.device)
        with torch.autocast(z.device.type, enabled=False):
            dz, dr, dalpha, dbeta = steps.scan_backward(
                dsync, sync, z, r, betas, alpha0, beta0, dalpha, per_row, ctx.pairs
            )
        return dz, -r * dr, dalpha, dbeta, None


class Learned(torch.autograd.Function):
    """A recorded training step as one step of autograd: weights -> loss, whose gradients are there already."""

    @staticmethod
    def forward(ctx, graph: replay.Replay, loss: Tensor, gradients: tuple[Tensor | None, ...], *weights: Tensor):
        ctx.graph, ctx.uses, ctx.gradients = graph, graph.uses, gradients
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss: Tensor):
        if ctx.graph.uses != ctx.uses:
            raise RuntimeError("another step was taken before this loss's backward pass; call backward() after each")
        scaled = iter(torch._foreach_mul([g for g in ctx.gradients if g is not None], dloss))
        return None, None, None, *(None if g is None else next(scaled) for g in ctx.gradients)
