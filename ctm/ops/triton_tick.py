"""The steps of `ctm.ops.recurrence` as launches of `ctm.ops.kernels`: the fast path of a GPU."""

import math

import torch
import triton
from torch import Tensor

from ctm.ops import kernels
from ctm.ops.recurrence import Recurrence, Spec


def block(width: int, least: int = 16) -> int:
    return max(least, triton.next_power_of_2(width))


def warps(width: int) -> int:
    """Measured on an H200: a step has few rows, so that many threads share each; but never two the same value, for
    one of them could read what the other has already added to."""
    return min(16, max(1, block(width) // 64))


class TritonRecurrence(Recurrence):
    ALIGN = 64  # tensor cores want rows that start at multiples of 16 bytes

    def __init__(self, spec: Spec):
        super().__init__(spec)
        s = spec
        if s.n_pairs:
            self.r, self.beta = self.zeros(s.n_pairs), self.zeros(s.ticks, s.n_pairs)
        self.no_bias = self.zeros(1)
        full = torch.get_float32_matmul_precision() == "highest"
        self.precision = "ieee" if s.dtype == torch.float32 and full else "tf32"
        self.neuron_options = {
            "BLOCK_N": 8, "BLOCK_B": 16, "BLOCK_M": block(s.memory), "BLOCK_H": block(s.hidden), "DEEP": s.hidden > 0,
            "DROP": s.nlm_dropout > 0, "PRECISION": self.precision, "num_warps": 4,
        }  # fmt: skip
        self.pre = self.zeros(s.ticks, s.batch, s.d_model)  # the trace is in the products' type, states are fp32
        rows = len(self.x)
        self.stat = {name: self.zeros(rows, s.batch, 2) for name in s.layers}
        self.stat2 = {name: self.zeros(rows, s.batch, 2) for name in s.layers if name.startswith("up")}
        # What the fresh memory held must not matter: padded columns stay zero, everything else is written first.
        if s.keep:
            for layer, y in self.y.items():
                for name in ("gamma", "beta") + (("gamma2", "beta2") if layer.startswith("up") else ()):
                    setattr(self, f"d{name}.{layer}", self.zeros(*y.shape[1:]))

    def site_of(self, t: int, name: str | int) -> int:
        return t * self.sites + (name if isinstance(name, int) else self.site[name])

    # ------------------------------------------------------------------------------------------------ synchronization
    def sync_start(self) -> None:
        s = self.spec
        grid = (triton.cdiv(s.n_pairs, 128),)
        kernels.sync_tables[grid](
            self.packed["decay"], self.packed["beta"], self.r, self.beta, s.ticks, s.n_pairs, BLOCK=128
        )  # fmt: skip

    def sync(self, t: int) -> None:
        s, sx = self.spec, self.sx[self.row(t)]
        kernels.sync_step[(s.batch, triton.cdiv(s.n_pairs, 256))](
            self.z[t], *self.pairs, self.r, self.beta[t], self.alpha, self.s[t], sx, s.d_model, s.n_pairs, sx.stride(0),
            BLOCK=256,
        )  # fmt: skip

    def sync_backward(self, t: int, reads: bool) -> None:
        s = self.spec
        if not s.n_pairs:
            torch.add(self.dx[t, :, s.d_input : s.d_input + s.d_model], self.dz_out[t - 1] if t else 0, out=self.dz[t])
            return
        n = self.neighbours
        kernels.sync_step_backward[(s.batch,)](
            self.dsx, self.dx[t, :, s.d_input :], self.dz_out[t - 1] if t else self.nothing, self.z[t], self.s[t],
            self.s[t - 1] if t else self.alpha0, self.r, self.beta[t], self.beta[t - 1] if t else self.packed["beta"],
            self.dalpha, self.dbeta, self.dr, self.dz[t], n.active, n.pair, n.other, len(n.active), s.d_model,
            s.n_pairs, self.dsx.stride(0), self.dx.stride(1), FIRST=t == 0, END=t == s.ticks - 1, READS=reads,
            DEGREE=n.pair.shape[1], BLOCK=1024, BLOCK_N=64, num_warps=8,
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------------------ attention
    def attend(self, t: int, i: int, out: Tensor) -> None:
        s, q = self.spec, self.q[self.row(t)]
        width, n = s.d_input // s.heads, s.tokens[i]
        kernels.attend[(s.batch * s.heads,)](
            q, self.packed["bq"], self.packed[f"keys{i}"], self.packed[f"values{i}"], self.p[i][t], out, self.seed,
            self.site_of(t, 0), 1 / math.sqrt(width), s.dropout, s.heads, n, width, q.stride(0), out.stride(0),
            DROP=s.dropout > 0, BLOCK_S=block(n), BLOCK_D=block(width),
            num_warps=min(8, max(1, block(n) * block(width) // 8192)),
        )  # fmt: skip

    def attend_backward(self, t: int, i: int, do: Tensor) -> None:
        s, dq = self.spec, self.dq[t]
        width, n = s.d_input // s.heads, s.tokens[i]
        kernels.attend_backward[(s.batch * s.heads,)](
            do, self.packed[f"keys{i}"], self.packed[f"values{i}"], self.p[i][t], self.weight[i][t], self.dscore[i][t],
            dq, self.seed, self.site_of(t, 0), 1 / math.sqrt(width), s.dropout, s.heads, n, width, do.stride(0),
            dq.stride(0), DROP=s.dropout > 0, BLOCK_S=block(n), BLOCK_D=block(width), num_warps=4,
        )  # fmt: skip

    def drop(self, t: int, read: int) -> None:
        s, x = self.spec, self.x[self.row(t)]
        bias, n_bias = (self.packed["bo"], s.d_input) if read >= 0 else (self.no_bias, 0)
        self._drop(t, x, bias, n_bias)

    def drop_backward(self, t: int) -> None:
        self._drop(t, self.dx[t], self.no_bias, 0)

    def _drop(self, t: int, x: Tensor, bias: Tensor, n_bias: int) -> None:
        s = self.spec
        width = s.d_input + s.d_model
        kernels.drop[(s.batch, triton.cdiv(width, 1024))](
            x, bias, x, self.seed, self.site_of(t, 1), s.dropout, width, n_bias, x.stride(0), x.stride(0), BLOCK=1024
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------------------- synapses
    def layer(self, name: str, row: int) -> list[Tensor]:
        """y of a synapse layer, its bias, its LayerNorm and that one's statistics."""
        packed = (self.packed[f"{part}.{name}"] for part in ("b", "gamma", "beta"))
        return [self.y[name][row], *packed, self.stat[name][row]]

    def row_options(self, name: str) -> dict[str, int]:
        width = self.spec.d_model if name == "gated" else self.sizes[name][0]
        return {"BLOCK": block(width), "num_warps": warps(width)}

    def norm_silu(self, layer: str, t: int) -> None:
        s, row, width = self.spec, self.row(t), self.sizes[layer][0]
        kernels.norm_silu[(s.batch,)](
            *self.layer(layer, row), self.after[layer][row], self.seed, self.site_of(t, layer), s.dropout, s.eps, width,
            self.pad(width), DROP=s.dropout > 0, **self.row_options(layer),
        )  # fmt: skip

    def norm_silu_backward(self, layer: str, t: int) -> None:
        s, width = self.spec, self.sizes[layer][0]
        kernels.norm_silu_backward[(s.batch,)](
            self.dafter[layer], self.dskip.get(layer, self.no_bias), *self.layer(layer, t), self.dy[layer][t],
            *self.shares(layer, "gamma", "beta"), self.seed, self.site_of(t, layer), s.dropout, width, self.pad(width),
            DROP=s.dropout > 0, SKIP=layer in self.dskip, **self.row_options(layer),
        )  # fmt: skip

    def valley(self, t: int) -> None:
        """In one launch, where both layers are narrow: their products are too small to fill anything."""
        s, row, k = self.spec, self.row(t), len(self.spec.widths)
        down, up, skip = f"down{k - 1}", f"up{k - 2}", f"down{k - 2}"
        inner, outer = s.widths[-1], s.widths[-2]
        if k == 2 or block(inner) > 32 or block(outer) > 512:
            return super().valley(t)
        kernels.valley[(s.batch,)](
            self.packed[f"w.{down}"], *self.layer(down, row), self.after[down][row], self.packed[f"w.{up}"],
            *self.layer(up, row), *self.layer(skip, row), self.after[skip][row], self.packed[f"gamma2.{up}"],
            self.packed[f"beta2.{up}"], self.stat2[up][row], self.after[up][row], self.seed, self.site_of(t, down),
            self.site_of(t, up), s.dropout, s.eps, inner, outer, self.pad(inner), self.pad(outer),
            DROP=s.dropout > 0, BLOCK_I=block(inner), BLOCK_O=block(outer), num_warps=8,
        )  # fmt: skip

    def up(self, i: int, t: int) -> None:
        s, layer, row = self.spec, f"up{i}", self.row(t)
        width = self.sizes[layer][0]
        out = self.after[layer][row] if i else self.trace[s.memory + t]
        kernels.up[(s.batch,)](
            *self.layer(layer, row), *self.layer(f"down{i}", row), self.packed[f"gamma2.{layer}"],
            self.packed[f"beta2.{layer}"], self.stat2[layer][row], out, self.pre[t], self.seed, self.site_of(t, layer),
            s.dropout, s.eps, width, self.pad(width), out.stride(0), DROP=s.dropout > 0 and i > 0, LAST=i == 0,
            **self.row_options(layer),
        )  # fmt: skip

    def up_backward(self, i: int, t: int) -> None:
        s, layer, skip = self.spec, f"up{i}", f"down{i}"
        width = self.sizes[layer][0]
        dx = self.dafter[layer] if i else self.dtrace[s.memory + t]
        kernels.up_backward[(s.batch,)](
            dx, *self.layer(layer, t), *self.layer(skip, t), self.packed[f"gamma2.{layer}"], self.stat2[layer][t],
            self.dy[layer][t], self.dskip[skip], *self.shares(layer, "gamma", "beta", "gamma2", "beta2"), self.seed,
            self.site_of(t, layer), s.dropout, width, self.pad(width), dx.stride(0), DROP=s.dropout > 0 and i > 0,
            **self.row_options(layer),
        )  # fmt: skip

    def shares(self, layer: str, *names: str) -> list[Tensor]:
        return [getattr(self, f"d{name}.{layer}") for name in names]

    def gated_norm(self, t: int) -> None:
        s, row = self.spec, self.row(t)
        kernels.gated_norm[(s.batch,)](
            *self.layer("gated", row), self.trace[s.memory + t], self.pre[t], s.eps, s.d_model,
            self.y["gated"].stride(1), s.d_model,
            **self.row_options("gated"),
        )  # fmt: skip

    def gated_norm_backward(self, t: int) -> None:
        s = self.spec
        y, bias, gamma, _, stat = self.layer("gated", t)
        kernels.gated_norm_backward[(s.batch,)](
            self.dtrace[s.memory + t], y, bias, gamma, stat, self.dy["gated"][t],
            *self.shares("gated", "gamma", "beta"), s.d_model, y.stride(0), s.d_model, **self.row_options("gated"),
        )  # fmt: skip

    # -------------------------------------------------------------------------------------------- neuron-level models
    @property
    def neuron_weights(self) -> list[Tensor]:
        second = [self.packed[f"n.{name}2"] for name in ("w", "b", "t")]
        first = [self.packed[f"n.{name}1"] for name in ("w", "b", "t")] if self.spec.hidden else second
        return [*first, *second]

    def neuron_grid(self, block_b: int = 16) -> tuple[int, int]:
        return triton.cdiv(self.spec.d_model, self.neuron_options["BLOCK_N"]), triton.cdiv(self.spec.batch, block_b)

    def neurons(self, t: int) -> None:
        s = self.spec
        following = t + 1 < s.ticks
        x = self.x[self.row(t + 1) if following else 0, :, s.d_input :]
        block_b = 32 if s.batch > 16 else 16
        options = self.neuron_options | {"BLOCK_B": block_b, "num_warps": block_b // 4}
        kernels.neurons[self.neuron_grid(block_b)](
            self.trace[t + 1], *self.neuron_weights, self.z[t + 1], x, self.seed, self.site_of(t, self.sites - 2),
            s.nlm_dropout, s.batch, s.d_model, s.memory, s.hidden, x.stride(0), NEXT=following, **options,
        )  # fmt: skip

    def start_backward(self) -> None:
        if not hasattr(self, "nothing"):
            self.nothing = torch.zeros_like(self.dz[0])
        for name in self.norm_names():
            getattr(self, f"d{name}").zero_()

    def norm_names(self) -> list[str]:
        return [name for name in self.packed if name.startswith(("gamma", "beta")) and name != "beta"]

    def norm_gradients(self) -> dict[str, Tensor]:
        found = {name: getattr(self, f"d{name}") for name in self.norm_names()}
        return {name: share.sum(0)[: len(self.packed[name])] for name, share in found.items()}

    def neurons_backward(self, t: int) -> None:
        s = self.spec
        kernels.neurons_backward[self.neuron_grid()](
            self.dz[t + 1], self.trace[t + 1], *self.neuron_weights, self.dtrace[t + 1], self.seed,
            self.site_of(t, self.sites - 2), s.nlm_dropout, s.batch, s.d_model, s.memory, s.hidden,
            **self.neuron_options,
        )  # fmt: skip

    SHARES = 4
    """Of the ticks, among which the weight gradients of a neuron are divided, so that all of a GPU has work."""

    def neuron_gradients(self) -> dict[str, Tensor]:
        s, weights = self.spec, self.neuron_weights
        ticks = -(-s.ticks // self.SHARES)
        options = self.neuron_options | {"num_warps": 8}
        found = {name: self.zeros(self.SHARES, *self.packed[name].shape) for name in self.packed if name[:2] == "n."}
        for name in found:
            if name.startswith("n.t"):
                found[name] = self.zeros(self.SHARES, s.d_model)
        second = [found[f"n.{name}2"] for name in ("w", "b", "t")]
        first = [found[f"n.{name}1"] for name in ("w", "b", "t")] if s.hidden else second
        kernels.neurons_weights[(triton.cdiv(s.d_model, 8), self.SHARES)](
            self.dz[1:], self.trace, *weights, *first, *second, self.seed, self.site_of(0, self.sites - 2), self.sites,
            s.nlm_dropout, s.ticks, ticks, s.batch, s.d_model, s.memory, s.hidden, **options,
        )  # fmt: skip
        return {name: value.sum().view(1) if name.startswith("n.t") else value.sum(0) for name, value in found.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Synchronization over all ticks: as in `ctm.ops.torch_tick`


def scan(z_TBD: Tensor, pairs, r: Tensor, betas_TR: Tensor, alpha_BR: Tensor) -> tuple[Tensor, Tensor]:
    ticks, batch, d = z_TBD.shape
    alpha, n = alpha_BR.clone(), len(r)
    s = z_TBD.new_empty(batch, ticks, n)
    kernels.sync_scan[(batch, triton.cdiv(n, 256))](
        z_TBD, *pairs, r, betas_TR, alpha, s, ticks, batch, d, n, BLOCK=256
    )  # fmt: skip
    return s, alpha


def scan_backward(ds_BTR, s_BTR, z_TBD, r, betas_TR, alpha0_BR, beta0_R, dalpha_BR, dbeta_BR, neighbours):
    ticks, batch, d = z_TBD.shape
    n, dz = len(r), torch.zeros_like(z_TBD)
    adjoint, dr = torch.empty_like(s_BTR), torch.empty_like(alpha0_BR)
    dalpha, dbeta = dalpha_BR.clone(), dbeta_BR.clone()
    kernels.sync_scan_backward[(batch, triton.cdiv(n, 256))](
        ds_BTR.contiguous(), s_BTR, r, betas_TR, alpha0_BR, beta0_R, dalpha, dbeta, adjoint, dr, ticks, n, BLOCK=256
    )  # fmt: skip
    active = len(neighbours.active)
    kernels.sync_scan_neurons[(ticks * batch, triton.cdiv(active, 64))](
        adjoint, z_TBD, neighbours.active, neighbours.pair, neighbours.other, dz, active, ticks, batch, d, n,
        DEGREE=neighbours.pair.shape[1], BLOCK_N=64,
    )  # fmt: skip
    return dz, dr.sum(0), dalpha, dbeta.sum(0)


def tables(decay: Tensor, beta0: Tensor, ticks: int) -> tuple[Tensor, Tensor]:
    """r (R,) and beta (T, R)."""
    r, betas = torch.empty_like(decay), decay.new_empty(ticks, len(decay))
    grid = (triton.cdiv(len(decay), 128),)
    kernels.sync_tables[grid](decay, beta0, r, betas, ticks, len(decay), BLOCK=128)
    return r, betas
