"""The recurrence forward and backward through time, written out by hand.

What autograd does tick by tick is done once here: every weight gradient is one product over all ticks after the
backward sweep, weights are cast once, and nothing is allocated between ticks. The two loops, `Recurrence.forward` and
`Recurrence.backward`, are those of `ctm.model.CTM.tick`; the steps between matrix products are a subclass's, in
PyTorch (`ctm.ops.torch_tick`) or in Triton (`ctm.ops.triton_tick`).

Letters are those of `ctm.modules`. Every buffer has the tick first. `x` is the input of a matrix product, `y` its
output, `dx` and `dy` their gradients.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spec:
    """Everything that fixes the buffers and the launches of a thought but its numbers."""

    batch: int
    ticks: int
    d_model: int
    d_input: int
    heads: int
    n_pairs: int
    memory: int
    hidden: int
    widths: tuple[int, ...]
    """Of the synapse U-Net; empty for the gated layer."""
    reads: tuple[int, ...]
    """For each tick the number of its tokens, or -1 - the number of its ready vector."""
    tokens: tuple[int, ...]
    """How many tokens (S) each has."""
    dropout: float
    nlm_dropout: float
    eps: float
    dtype: torch.dtype
    """Of matrix products."""
    device: torch.device
    keep: bool
    """Whether there will be a backward pass."""
    folded: bool
    """Whether attention's output projection is part of the first synapse layer."""
    names: tuple[str, ...]
    """Of all tensors that go in: the state before the first tick, tokens and vectors, weights."""
    wanted: tuple[str, ...]
    """Of those that want a gradient."""

    @property
    def layers(self) -> list[str]:
        """Names of the synapses' matrix products."""
        k = len(self.widths)
        return [f"down{i}" for i in range(k)] + [f"up{i}" for i in range(k - 1)] if k else ["gated"]


class Recurrence:
    """Buffers of one thought at a time, and the two loops over its ticks.

    After `forward`: `z` (T + 1, B, D) with the start first, `trace` (M + T, B, D) with the memory first, `s` (T, B, R)
    action synchronization, `p` attention weights, `alpha` (B, R), `pre` (T, B, D) pre-activations in fp32.
    """

    ALIGN = 1
    """Widths of products are padded with zeros to a multiple of this."""

    def __init__(self, spec: Spec):
        self.spec = spec
        s = spec
        rows = s.ticks if s.keep else 1
        self.z = self.zeros(s.ticks + 1, s.batch, s.d_model)
        self.trace = self.make_trace(s.memory + s.ticks)
        self.pre = self.trace[s.memory :]
        self.seed = torch.zeros(1, dtype=torch.int32, device=s.device)
        if s.n_pairs:
            self.alpha, self.alpha0 = self.zeros(s.batch, s.n_pairs), self.zeros(s.batch, s.n_pairs)
            self.s = self.zeros(s.ticks, s.batch, s.n_pairs)
            self.sx = self.zeros(rows, s.batch, self.pad(s.n_pairs), dtype=s.dtype)
        if s.tokens:
            self.q = self.zeros(rows, s.batch, s.d_input, dtype=s.dtype)
            self.p = [self.zeros(s.ticks, s.batch, s.heads, n) for n in s.tokens]
            if not s.folded:
                self.o = self.zeros(rows, s.batch, s.d_input, dtype=s.dtype)
        n_in = s.d_input + s.d_model
        self.x = self.zeros(rows, s.batch, self.pad(n_in), dtype=s.dtype)  # what was read, and z
        self.sizes = dict.fromkeys(s.layers, (2 * s.d_model, n_in))
        widths = s.widths
        for i in range(len(widths)):
            self.sizes[f"down{i}"] = (widths[i], widths[i - 1] if i else n_in)
        for i in range(len(widths) - 1):
            self.sizes[f"up{i}"] = (widths[i], widths[i + 1])
        self.y = {
            name: self.zeros(rows, s.batch, self.pad(out), dtype=s.dtype) for name, (out, _) in self.sizes.items()
        }
        self.after = {name: torch.zeros_like(y) for name, y in self.y.items() if name not in ("gated", "up0")}
        self.sites = 6 + 2 * len(widths)
        self.site = {name: 2 + i for i, name in enumerate(s.layers)}
        self.packed: dict[str, Tensor] = {}
        self.taken: dict[str, tuple[Tensor, int]] = {}
        self.ticks_of = {read: self.chosen([r == read for r in s.reads]) for read in set(s.reads)}
        self.ticks_of_tokens = self.chosen([r >= 0 for r in s.reads])
        if s.keep:
            self.allocate_backward()

    def allocate_backward(self) -> None:
        s = self.spec
        self.dz = self.zeros(s.ticks + 1, s.batch, s.d_model)
        self.dz_out = self.zeros(s.ticks, s.batch, s.d_model)
        self.dtrace = self.make_trace(s.memory + s.ticks, torch.float32)
        self.dx = torch.zeros_like(self.x)
        self.dy = {name: torch.zeros_like(y) for name, y in self.y.items()}
        self.dafter = {name: torch.zeros_like(x[0]) for name, x in self.after.items()}
        k = len(s.widths)
        self.dskip = {f"down{i}": self.zeros(*self.y[f"down{i}"].shape[1:]) for i in range(k - 1)}
        if s.n_pairs:
            self.dalpha, self.dbeta, self.dr = (self.zeros(s.batch, s.n_pairs) for _ in range(3))
            self.dsx = torch.zeros_like(self.sx[0])
        if s.tokens:
            self.dq = torch.zeros_like(self.q)
            self.dscore = [torch.zeros_like(p, dtype=s.dtype) for p in self.p]
            self.weight = [torch.zeros_like(p, dtype=s.dtype) for p in self.p]
            if not s.folded:
                self.do = torch.zeros_like(self.o)

    def zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        with torch.inference_mode(False):  # the next thought may not be in that mode
            return torch.zeros(shape, dtype=dtype or torch.float32, device=self.spec.device)

    def make_trace(self, length: int, dtype: torch.dtype | None = None) -> Tensor:
        """A buffer (length, B, D) for pre-activations; how it lies in memory is the subclass's matter."""
        return self.zeros(length, self.spec.batch, self.spec.d_model, dtype=dtype or self.spec.dtype)

    def chosen(self, ticks: list[bool]) -> slice | Tensor:
        """The index of some ticks: neighbours as a slice, others as numbers on the device, made before a graph,
        which cannot bring them there, is recorded."""
        at = [t for t, true in enumerate(ticks) if true]
        if len(at) == (at[-1] - at[0] + 1 if at else 0):
            return slice(at[0], at[-1] + 1) if at else slice(0)
        with torch.inference_mode(False):
            return torch.tensor(at, device=self.spec.device)

    def pad(self, width: int) -> int:
        return -(-width // self.ALIGN) * self.ALIGN

    def row(self, t: int) -> int:
        """Where a tick's values are kept: all ticks' for a backward pass, else the last one's."""
        return t if self.spec.keep else 0

    def input_of(self, layer: str) -> Tensor:
        """What a synapse layer's product reads, all ticks."""
        k = len(self.spec.widths)
        i = int("".join(c for c in layer if c.isdigit()) or 0)
        if layer == "gated" or layer == "down0":
            return self.x
        if layer.startswith("down"):
            return self.after[f"down{i - 1}"]
        return self.after[f"up{i + 1}"] if i < k - 2 else self.after[f"down{k - 1}"]

    # ------------------------------------------------------------------------------------------------------- forward
    def pack(self, given: dict[str, Tensor]) -> None:
        """Takes weights, keys and values in, in the products' type, padded; without gradients, once a thought."""
        into, values = [], []
        for name, value in given.items():
            if not self.spec.keep and not value.is_inference():
                known = self.taken.get(name)
                if known and known[0] is value and known[1] == value._version:
                    continue
                self.taken[name] = value, value._version
            kind = name.split(".")[0]
            product = kind in ("w", "wq", "wo", "keys", "values") or name in ("n.w1", "n.w2")
            product = product or kind.startswith(("keys", "values"))
            if name not in self.packed:
                shape = list(value.shape)
                if kind == "w":
                    shape = [self.pad(n) for n in shape]
                elif kind == "wq":
                    shape[1] = self.pad(shape[1])
                self.packed[name] = self.zeros(*shape, dtype=self.spec.dtype if product else torch.float32)
            place = self.packed[name]
            into.append(place if place.shape == value.shape else place[: value.shape[0], : value.shape[1]])
            values.append(value)
        if into:
            torch._foreach_copy_(into, values)

    def load(self, given: dict[str, Tensor], seed: Tensor | None = None) -> None:
        """Takes the tensors of `Spec.names` in; `seed` repeats the dropout of the thought that had it."""
        s = self.spec
        self.pack({name: value for name, value in given.items() if name not in ("z", "trace", "alpha")})
        self.z[0].copy_(given["z"])
        self.trace[: s.memory].copy_(given["trace"].permute(2, 0, 1))
        self.x[0, :, s.d_input : s.d_input + s.d_model].copy_(given["z"])
        if s.n_pairs:
            self.alpha.copy_(given["alpha"])
            self.alpha0.copy_(given["alpha"])
        if seed is not None:
            self.seed.copy_(seed)
        elif s.dropout or s.nlm_dropout:
            self.seed.random_(2**31 - 1)

    def forward(self) -> None:
        """All ticks, of what was loaded."""
        s = self.spec
        if s.n_pairs:
            self.sync_start()
        for t in range(s.ticks):
            row, read = self.row(t), s.reads[t]
            if s.n_pairs:
                self.sync(t)
            if read < 0:
                self.x[row, :, : s.d_input].copy_(self.packed[f"vector{-1 - read}"])
            else:
                torch.mm(self.sx[row], self.packed["wq"].T, out=self.q[row])
                if s.folded:
                    self.attend(t, read, self.x[row])
                else:
                    self.attend(t, read, self.o[row])
                    torch.mm(self.o[row], self.packed["wo"].T, out=self.x[row, :, : s.d_input])
            if not s.widths and (s.dropout or (read >= 0 and not s.folded)):
                self.drop(t, read)
            elif not s.folded and read >= 0:
                self.x[row, :, : s.d_input] += self.packed["bo"]
            self.synapses(t)
            self.neurons(t)

    def synapses(self, t: int) -> None:
        row, k = self.row(t), len(self.spec.widths)
        if not k:
            self.product("gated", row)
            self.gated_norm(t)
            return
        for i in range(k - 1):
            self.product(f"down{i}", row)
            self.norm_silu(f"down{i}", t)
        self.valley(t)
        for i in range(k - 3, -1, -1):
            self.product(f"up{i}", row)
            self.up(i, t)

    def valley(self, t: int) -> None:
        """The innermost two layers: to the narrowest width and back."""
        row, k = self.row(t), len(self.spec.widths)
        self.product(f"down{k - 1}", row)
        self.norm_silu(f"down{k - 1}", t)
        self.product(f"up{k - 2}", row)
        self.up(k - 2, t)

    def product(self, layer: str, row: int) -> None:
        torch.mm(self.input_of(layer)[row], self.packed[f"w.{layer}"].T, out=self.y[layer][row])

    # ------------------------------------------------------------------------------------------------------ backward
    def load_gradients(self, dz: Tensor, dtrace: Tensor | None, dalpha: Tensor | None) -> None:
        """Takes in the gradients of what came out.

        Args:
            dz: (T, B, D), of the activations after every tick.
            dtrace: (B, D, M), of the trace after the last tick.
            dalpha: (B, R), of the last action synchronization's sums.
        """
        s = self.spec
        self.dz_out.copy_(dz)
        self.dz[s.ticks].copy_(dz[-1])
        self.dtrace.zero_()
        if dtrace is not None:
            self.dtrace[s.ticks :].copy_(dtrace.permute(2, 0, 1))
        if s.n_pairs:
            self.dalpha.zero_() if dalpha is None else self.dalpha.copy_(dalpha)

    def backward(self) -> dict[str, Tensor]:
        """All ticks backward: the gradients of the tensors in `spec.wanted`."""
        s = self.spec
        self.start_backward()
        if s.n_pairs:
            self.dbeta.zero_()
            self.dr.zero_()
        for t in range(s.ticks - 1, -1, -1):
            read = s.reads[t]
            self.neurons_backward(t)
            self.synapses_backward(t)
            if not s.widths and s.dropout:
                self.drop_backward(t)
            if read >= 0:
                do = self.dx[t]
                if not s.folded:
                    torch.mm(self.dx[t, :, : s.d_input], self.packed["wo"], out=self.do[t])
                    do = self.do[t]
                self.attend_backward(t, read, do)
                torch.mm(self.dq[t], self.packed["wq"], out=self.dsx)
            self.sync_backward(t, read >= 0)
        return self.gradients()

    def synapses_backward(self, t: int) -> None:
        k = len(self.spec.widths)
        if not k:
            self.gated_norm_backward(t)
            torch.mm(self.dy["gated"][t], self.packed["w.gated"], out=self.dx[t])
            return
        for i in range(k - 1):
            self.up_backward(i, t)
            into = f"up{i + 1}" if i < k - 2 else f"down{k - 1}"
            torch.mm(self.dy[f"up{i}"][t], self.packed[f"w.up{i}"], out=self.dafter[into])
        for i in range(k - 1, -1, -1):
            self.norm_silu_backward(f"down{i}", t)
            out = self.dafter[f"down{i - 1}"] if i else self.dx[t]
            torch.mm(self.dy[f"down{i}"][t], self.packed[f"w.down{i}"], out=out)

    def gradients(self) -> dict[str, Tensor]:
        """The gradients of everything wanted, after the loop: one product each, over all ticks and samples."""
        s, found = self.spec, {}
        wanted = set(s.wanted)
        found["z"] = self.dz[0]
        found["trace"] = self.dtrace[: s.memory].permute(1, 2, 0)
        for layer, (n_out, n_in) in self.sizes.items():
            if f"w.{layer}" in wanted:
                found[f"w.{layer}"] = self.weight_gradient(self.dy[layer], self.input_of(layer))[:n_out, :n_in]
            if f"b.{layer}" in wanted:
                found[f"b.{layer}"] = self.dy[layer].sum((0, 1), dtype=torch.float32)[:n_out]
        found |= self.norm_gradients()
        if s.n_pairs:
            r = torch.exp(-self.packed["decay"])
            found["decay"] = -r * self.dr.sum(0)
            found["alpha"], found["beta"] = r * self.dalpha, r * self.dbeta.sum(0)
        if s.tokens:
            found["wq"] = self.weight_gradient(self.dq, self.sx)[:, : s.n_pairs]
            found["bq"] = self.dq.sum((0, 1), dtype=torch.float32)
            do = self.dx[..., : s.d_input] if s.folded else self.do
            if not s.folded:
                # The other ticks have no part in attention's output projection.
                of_tokens = self.dx[self.ticks_of_tokens, :, : s.d_input]
                found["wo"] = self.weight_gradient(of_tokens, self.o[self.ticks_of_tokens])
                found["bo"] = of_tokens.sum((0, 1), dtype=torch.float32)
            for i in range(len(s.tokens)):
                if f"keys{i}" in wanted or f"values{i}" in wanted:
                    at = self.ticks_of[i]
                    q = self.q[at] + self.packed["bq"].to(s.dtype)
                    q, o = (x.unflatten(-1, (s.heads, -1)).permute(1, 2, 0, 3) for x in (q, do[at]))
                    dscore, weight = (x[at].permute(1, 2, 3, 0) for x in (self.dscore[i], self.weight[i]))
                    found[f"keys{i}"], found[f"values{i}"] = dscore @ q, weight @ o
        for j in range(-min(0, *s.reads)):
            found[f"vector{j}"] = self.dx[self.ticks_of[-1 - j], :, : s.d_input].sum(0, dtype=torch.float32)
        if any(name.startswith("n.") for name in wanted):
            found |= self.neuron_gradients()
        return {name: found[name] for name in s.wanted}

    @staticmethod
    def weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
        return dy.flatten(0, 1).T @ x.flatten(0, 1)

    # -------------------------------------------------------------------------------------------- what a subclass does
    def sync_start(self) -> None:
        """r and beta for all ticks, from the decays and from beta before the first one."""

    def sync(self, t: int) -> None:
        """alpha, `s[t]` and `sx` of a tick from `z[t]`."""

    def attend(self, t: int, i: int, out: Tensor) -> None:
        """Tokens i seen by `q` and its bias into the first columns of `out`."""

    def drop(self, t: int, read: int) -> None:
        """Bias of the output projection on what was read, and dropout on all that goes into the gated layer."""

    def norm_silu(self, layer: str, t: int) -> None:
        """dropout(SiLU(LayerNorm(y))) into `after`."""

    def up(self, i: int, t: int) -> None:
        """LayerNorm(SiLU(LayerNorm(y)) + skip) into `after`, or for i = 0 into the trace."""

    def gated_norm(self, t: int) -> None:
        """LayerNorm(GLU(y)) into the trace."""

    def neurons(self, t: int) -> None:
        """`z[t + 1]` from the last M columns of the trace, and into the next tick's `x`."""

    def start_backward(self) -> None:
        """Zeroes what the backward loop adds to."""

    def neurons_backward(self, t: int) -> None:
        """Adds to `dtrace` what `dz[t + 1]` asks."""

    def up_backward(self, i: int, t: int) -> None:
        """`dy` and `dskip` from `dafter`, or for i = 0 from `dtrace`."""

    def norm_silu_backward(self, layer: str, t: int) -> None:
        """`dy` from `dafter` and `dskip`."""

    def gated_norm_backward(self, t: int) -> None:
        """`dy` from `dtrace`."""

    def drop_backward(self, t: int) -> None:
        """Dropout of `dx[t]`, in place."""

    def attend_backward(self, t: int, i: int, do: Tensor) -> None:
        """`dq[t]`, `dscore[i][t]` and `weight[i][t]`."""

    def sync_backward(self, t: int, reads: bool) -> None:
        """`dz[t]` from `dx[t]`, `dz_out[t - 1]` and, where there is attention, `dsx`."""

    def norm_gradients(self) -> dict[str, Tensor]:
        """Of all LayerNorms."""
        return {}

    def neuron_gradients(self) -> dict[str, Tensor]:
        """Of the neuron-level models' weights."""
        return {}
