"""The steps of `ctm.ops.recurrence` in PyTorch: the fast path of a CPU, and what the kernels are compared with."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ctm.ops.recurrence import Recurrence, Spec


class TorchRecurrence(Recurrence):
    """What a step computes for the backward loop is kept in `saved`, by step and tick."""

    def __init__(self, spec: Spec):
        super().__init__(spec)
        self.saved: dict[tuple, tuple] = {}
        self.norms: dict[str, Tensor] = {}
        self.generator = torch.Generator(spec.device)

    def load(self, given: dict[str, Tensor], seed: Tensor | None = None) -> None:
        super().load(given, seed)
        self.generator.manual_seed(int(self.seed))

    def make_trace(self, length: int, dtype: torch.dtype | None = None) -> Tensor:
        """Neuron-major in memory, so that a window is a batch of matrices as it is."""
        return self.zeros(self.spec.d_model, self.spec.batch, length).permute(2, 1, 0)

    def keep(self, key: tuple, *values: Tensor) -> None:
        if self.spec.keep:
            self.saved[key] = values

    def dropped(self, key: tuple, x: Tensor, p: float) -> Tensor:
        """Dropout, its mask kept; p = 0 costs nothing."""
        if not p:
            return x
        # Four 16-bit numbers from every draw of the generator, which is what takes the time.
        draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
        bits = draws.random_(-(2**63), None, generator=self.generator).view(torch.int16)[: x.numel()]
        mask = (bits >= round(p * 2**16) - 2**15).view(x.shape) * (1 / (1 - p))
        self.keep((*key, "mask"), mask)
        return x * mask

    def undropped(self, key: tuple, dx: Tensor, p: float) -> Tensor:
        return dx * self.saved[(*key, "mask")][0] if p else dx

    # ------------------------------------------------------------------------------------------------ synchronization
    def sync_start(self) -> None:
        self.r = torch.exp(-self.packed["decay"])
        self.betas = [self.packed["beta"]]
        for _ in range(self.spec.ticks):
            self.betas.append(self.r * self.betas[-1] + 1)

    def sync(self, t: int) -> None:
        z, left, right = self.z[t], *self.pairs
        torch.addcmul(z.index_select(1, left) * z.index_select(1, right), self.r, self.alpha, out=self.alpha)
        torch.div(self.alpha, self.betas[t + 1].sqrt(), out=self.s[t])
        self.sx[self.row(t), :, : self.spec.n_pairs] = self.s[t]

    def sync_backward(self, t: int, reads: bool) -> None:
        s = self.spec
        torch.add(self.dx[t, :, s.d_input : s.d_input + s.d_model], self.dz_out[t - 1] if t else 0, out=self.dz[t])
        if not s.n_pairs:
            return
        if t + 1 < s.ticks:
            self.dalpha.mul_(self.r)
            self.dbeta.mul_(self.r)
        if reads:
            ds, beta = self.dsx[:, : s.n_pairs].float(), self.betas[t + 1]
            self.dalpha.addcdiv_(ds, beta.sqrt())
            self.dbeta.sub_(ds * self.s[t] / (2 * beta))
        before = self.s[t - 1] * self.betas[t].sqrt() if t else self.alpha0
        self.dr.addcmul_(self.dalpha, before).addcmul_(self.dbeta, self.betas[t])
        add_pairs_share(self.dz[t], self.dalpha, self.z[t], self.neighbours)

    # ------------------------------------------------------------------------------------------------------ attention
    def attend(self, t: int, i: int, out: Tensor) -> None:
        s, row = self.spec, self.row(t)
        q = (self.q[row] + self.packed["bq"].to(s.dtype)).unflatten(-1, (s.heads, 1, -1))
        scores = (q @ self.packed[f"keys{i}"].mT).squeeze(-2).float() / math.sqrt(q.shape[-1])
        torch.softmax(scores, -1, out=self.p[i][t])
        weight = self.dropped(("attend", t), self.p[i][t], s.dropout).to(s.dtype)
        if s.keep:
            self.weight[i][t] = weight
        out[:, : s.d_input] = (weight.unsqueeze(-2) @ self.packed[f"values{i}"]).flatten(1)

    def attend_backward(self, t: int, i: int, do: Tensor) -> None:
        s = self.spec
        do = do[:, : s.d_input].unflatten(-1, (s.heads, 1, -1))
        dp = self.undropped(("attend", t), (do @ self.packed[f"values{i}"].mT).squeeze(-2).float(), s.dropout)
        dscore = torch.ops.aten._softmax_backward_data(dp, self.p[i][t], -1, torch.float32)
        self.dscore[i][t] = dscore / math.sqrt(do.shape[-1])
        self.dq[t] = (self.dscore[i][t].unsqueeze(-2) @ self.packed[f"keys{i}"]).flatten(1)

    # ------------------------------------------------------------------------------------------------------- synapses
    def product(self, layer: str, row: int) -> None:
        bias = self.packed[f"b.{layer}"].to(self.spec.dtype)
        torch.addmm(bias, self.input_of(layer)[row], self.packed[f"w.{layer}"].T, out=self.y[layer][row])

    def norm(self, key: tuple, x: Tensor, layer: str, second: str = "") -> Tensor:
        """LayerNorm, with what its backward needs kept."""
        gamma, beta = self.packed[f"gamma{second}.{layer}"], self.packed[f"beta{second}.{layer}"]
        out, mean, rstd = torch.native_layer_norm(x.float(), gamma.shape, gamma, beta, self.spec.eps)
        self.keep(key, x, mean, rstd, out)
        return out

    def norm_backward(self, key: tuple, dout: Tensor, layer: str, second: str = "") -> Tensor:
        x, mean, rstd, _ = self.saved[key]
        gamma, beta = self.packed[f"gamma{second}.{layer}"], self.packed[f"beta{second}.{layer}"]
        dx, dgamma, dbeta = torch.ops.aten.native_layer_norm_backward(
            dout.contiguous(), x.float(), gamma.shape, mean, rstd, gamma, beta, (True, True, True)
        )
        self.norms[f"gamma{second}.{layer}"] += dgamma
        self.norms[f"beta{second}.{layer}"] += dbeta
        return dx

    def start_backward(self) -> None:
        names = [name for name in self.packed if name.startswith(("gamma", "beta"))]
        self.norms = {name: torch.zeros_like(self.packed[name]) for name in names}
        fresh = {name: value for name, value in self.packed.items() if name.startswith("n.")}
        self.weights = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in fresh.items()}
        self.waiting: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def norm_gradients(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.norms.items() if name != "beta"}

    def norm_silu(self, layer: str, t: int) -> None:
        h = F.silu(self.norm((layer, t), self.y[layer][self.row(t)], layer))
        self.skip = {**getattr(self, "skip", {}), layer: h}
        self.after[layer][self.row(t)] = self.dropped((layer, t), h, self.spec.dropout)

    def norm_silu_backward(self, layer: str, t: int) -> None:
        dh = self.undropped((layer, t), self.dafter[layer].float(), self.spec.dropout)
        if layer in self.dskip:
            dh = dh + self.dskip[layer]
        da = torch.ops.aten.silu_backward(dh, self.saved[layer, t][3])
        self.dy[layer][t] = self.norm_backward((layer, t), da, layer)

    def up(self, i: int, t: int) -> None:
        layer = f"up{i}"
        h = F.silu(self.norm((layer, t), self.y[layer][self.row(t)], layer))
        u = self.norm((layer, t, 2), h + self.skip[f"down{i}"], layer, "2")
        if i:
            self.after[layer][self.row(t)] = self.dropped((layer, t), u, self.spec.dropout)
        else:
            self.trace[self.spec.memory + t] = u

    def up_backward(self, i: int, t: int) -> None:
        layer = f"up{i}"
        if i:
            du = self.undropped((layer, t), self.dafter[layer].float(), self.spec.dropout)
        else:
            du = self.dtrace[self.spec.memory + t]
        dh = self.norm_backward((layer, t, 2), du, layer, "2")
        self.dskip[f"down{i}"].copy_(dh)
        da = torch.ops.aten.silu_backward(dh, self.saved[layer, t][3])
        self.dy[layer][t] = self.norm_backward((layer, t), da, layer)

    def gated_norm(self, t: int) -> None:
        out = self.norm(("gated", t), F.glu(self.y["gated"][self.row(t)].float()), "gated")
        self.trace[self.spec.memory + t] = out

    def gated_norm_backward(self, t: int) -> None:
        dh = self.norm_backward(("gated", t), self.dtrace[self.spec.memory + t], "gated")
        self.dy["gated"][t] = torch.ops.aten.glu_backward(dh, self.y["gated"][t].float(), -1)

    def drop(self, t: int, read: int) -> None:
        row, s = self.row(t), self.spec
        if read >= 0:
            self.x[row, :, : s.d_input] += self.packed["bo"]
        self.x[row] = self.dropped(("concat", t), self.x[row], s.dropout)

    def drop_backward(self, t: int) -> None:
        self.dx[t] = self.undropped(("concat", t), self.dx[t], self.spec.dropout)

    # -------------------------------------------------------------------------------------------- neuron-level models
    def layer(self, n: int, x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """One layer of all neuron-level models, (D, B, I) -> its input after dropout and its output (D, B, O)."""
        x = self.dropped(("n", n, t), x, self.spec.nlm_dropout).to(self.spec.dtype)
        w, b, temperature = (self.packed[f"n.{what}{n}"] for what in ("w", "b", "t"))
        return x, (torch.bmm(x, w).float() + b[:, None]) / temperature

    def history(self, t: int) -> Tensor:
        return self.trace[t + 1 : t + 1 + self.spec.memory].permute(2, 1, 0)

    def neurons(self, t: int) -> None:
        s, x = self.spec, self.history(t)
        if s.hidden:
            x, y = self.layer(1, x, t)
            self.keep(("n1", t), x, y)
            x = F.glu(y)
        x, y = self.layer(2, x, t)
        self.keep(("n2", t), x, y)
        self.z[t + 1] = F.glu(y).squeeze(-1).T
        if t + 1 < s.ticks:
            self.x[self.row(t + 1), :, s.d_input : s.d_input + s.d_model] = self.z[t + 1]

    def layer_backward(self, n: int, dout: Tensor, t: int) -> Tensor:
        x, y = self.saved[f"n{n}", t]
        w, temperature = self.packed[f"n.w{n}"], self.packed[f"n.t{n}"]
        dy = torch.ops.aten.glu_backward(dout, y, -1)
        self.weights[f"n.t{n}"] -= (dy * y).sum() / temperature
        du = dy / temperature
        self.weights[f"n.b{n}"] += du.sum(1)
        du = du.to(self.spec.dtype)
        waiting = self.waiting.setdefault(n, [])
        waiting.append((x, du))
        if len(waiting) == self.TOGETHER:
            self.add_weight_gradient(n)
        return self.undropped(("n", n, t), torch.bmm(du, w.mT).float(), self.spec.nlm_dropout)

    TOGETHER = 8
    """Ticks whose part of the neurons' weight gradients is one product: larger ones are faster."""

    def add_weight_gradient(self, n: int) -> None:
        x, du = (torch.cat(ticks, dim=1) for ticks in zip(*self.waiting.pop(n), strict=True))
        self.weights[f"n.w{n}"].baddbmm_(x.mT.float(), du.float())

    def neurons_backward(self, t: int) -> None:
        dx = self.layer_backward(2, self.dz[t + 1].T[..., None], t)
        if self.spec.hidden:
            dx = self.layer_backward(1, dx, t)
        self.dtrace[t + 1 : t + 1 + self.spec.memory].permute(2, 1, 0).add_(dx)

    def neuron_gradients(self) -> dict[str, Tensor]:
        for n in list(self.waiting):
            self.add_weight_gradient(n)
        return self.weights


# ----------------------------------------------------------------------------------------------------------------------
# Synchronization over all ticks


def add_pairs_share(dz_BD: Tensor, dalpha_BR: Tensor, z_BD: Tensor, neighbours: "Neighbours") -> None:
    """Adds to dz what the pairs ask: for each neuron the sum over its pairs of dalpha times the other's z."""
    left, right = neighbours.left, neighbours.right
    shares = [dalpha_BR * z_BD.index_select(1, other) for other in (right, left)]
    summed = dz_BD.new_zeros(dz_BD.shape[::-1]).index_add_(0, torch.cat([left, right]), torch.cat(shares, 1).T)
    dz_BD += summed.T


class Neighbours:
    """For each neuron that is in a pair: its pairs and the other neuron in each.

    Attributes:
        left, right: (R,) the pairs themselves.
        active: (N,) neurons. pair, other: (N, degree), padded with pair -1 and other 0.
    """

    def __init__(self, left: Tensor, right: Tensor):
        self.left, self.right = left.clone(), right.clone()
        number = torch.arange(len(left), device=left.device)
        neuron, other, pair = torch.cat([left, right]), torch.cat([right, left]), torch.cat([number, number])
        order = torch.argsort(neuron, stable=True)
        self.active, where, count = torch.unique(neuron[order], return_inverse=True, return_counts=True)
        degree = -(-int(count.max()) // 16) * 16
        place = torch.arange(len(neuron), device=left.device) - (count.cumsum(0) - count)[where]
        self.pair = torch.full((len(self.active), degree), -1, device=left.device)
        self.other = torch.zeros_like(self.pair)
        self.pair[where, place], self.other[where, place] = pair[order], other[order]


def scan(z_TBD: Tensor, pairs, r: Tensor, betas_TR: Tensor, alpha_BR: Tensor) -> tuple[Tensor, Tensor]:
    """Synchronization after every tick (B, T, R), and the last sums."""
    left, right = pairs
    products = z_TBD.index_select(2, left) * z_TBD.index_select(2, right)
    for t in range(len(products)):
        alpha_BR = products[t].addcmul_(r, alpha_BR)
    return (products / betas_TR.sqrt()[:, None]).transpose(0, 1), alpha_BR.clone()


def scan_backward(ds_BTR, s_BTR, z_TBD, r, betas_TR, alpha0_BR, beta0_R, dalpha_BR, dbeta_BR, neighbours):
    """Gradients of z, r, the sums before the first tick and their weights."""
    dz = torch.zeros_like(z_TBD)
    dr = torch.zeros_like(dalpha_BR)
    for t in range(len(z_TBD) - 1, -1, -1):
        ds, beta = ds_BTR[:, t].float(), betas_TR[t]
        dalpha_BR = dalpha_BR + ds / beta.sqrt()
        dbeta_BR = dbeta_BR - ds * s_BTR[:, t] / (2 * beta)
        beta_before = betas_TR[t - 1] if t else beta0_R
        before = s_BTR[:, t - 1] * beta_before.sqrt() if t else alpha0_BR
        dr.addcmul_(dalpha_BR, before).addcmul_(dbeta_BR, beta_before)
        add_pairs_share(dz[t], dalpha_BR, z_TBD[t], neighbours)
        dalpha_BR, dbeta_BR = dalpha_BR * r, dbeta_BR * r
    return dz, dr.sum(0), dalpha_BR, dbeta_BR.sum(0)
