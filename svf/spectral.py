"""The arithmetic of singular-value fine-tuning (arXiv 2501.06252): multipliers, and how they act on a matrix.

A weight W = U diag(s) Vᵀ becomes W' = U diag(e s) Vᵀ: a vector e rescales its singular values, nothing else moves. All
code here works on the shift d = e - 1, so that d = 0 gives back W bit for bit. With Q the singular vectors of the
shorter side of W (square, so the other side is not needed: U diag(s) = W V),

    n_out >= n_in   Q = V (n_in, n_in)     W' = W + W Q diag(d) Qᵀ     y = W (x + Q(d * Qᵀx))
    n_out <  n_in   Q = U (n_out, n_out)   W' = W + Q diag(d) Qᵀ W     y = y0 + Q(d * Qᵀ y0),   y0 = W x

Shape letters: K directions kept (all r = min(n_out, n_in), or the top k), N side length of Q, so that Q is (N, K).
"""

from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Parametrization = Literal["residual", "exp", "sigmoid"]
Normalization = Literal["none", "nuclear", "fro"]

FOLD_FROM = 2.0
"""From so many tokens per direction on, one product with Q diag(d) Qᵀ is cheaper than two with Q (training: at 2)."""


def shift(z: Tensor, values: Tensor, how: Parametrization, normalize: Normalization, max_mult: float) -> Tensor:
    """What is learned -> what happens to every singular value: d = e - 1, fp32, exactly 0 where residual or exp z is.

    Args:
        z: (..., K), what is learned.
        values: singular values (..., K), which a normalisation weighs the multipliers with.
        how: residual e = 1 + z; exp e = exp(z); sigmoid e = max_mult * sigmoid(z).
        normalize: rescales e so that the sum (nuclear) or the sum of squares (fro) of the singular values stays.
    """
    z = z.float()
    if how == "residual":
        d = z
    elif how == "exp":
        d = torch.expm1(z)
    else:
        d = torch.sigmoid(z) * max_mult - 1
    if normalize == "none":
        return d
    scaled = values * (1 + d)
    if normalize == "nuclear":
        was, now = values.sum(-1, keepdim=True), scaled.sum(-1, keepdim=True)
    else:
        was, now = values.square().sum(-1, keepdim=True), scaled.square().sum(-1, keepdim=True)
    zero = was == 0  # a weight that is zero has no norm to keep
    c = torch.where(zero, 1, was) / torch.where(zero, 1, now)
    return (c if normalize == "nuclear" else c.sqrt()) * (1 + d) - 1


def compose(weight: Tensor, basis: Tensor, d: Tensor, side: str) -> Tensor:
    """The adapted weight W' (..., n_out, n_in), with gradient to d.

    Args:
        weight: W (..., n_out, n_in).
        basis: Q (..., N, K).
        d: (..., K).
        side: "in" where Q spans the inputs, "out" where it spans the outputs.
    """
    scaled = basis * d[..., None, :].to(basis.dtype)
    if side == "in":
        return weight + (weight @ scaled) @ basis.mT
    return weight + scaled @ (basis.mT @ weight)


def _rescaled(x: Tensor, basis: Tensor, d: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """x + Q(d * Qᵀ(x - bias)), and what its gradient needs: Qᵀ(x - bias), or x and Q diag(d) Qᵀ where that was made."""
    flat = x.reshape(-1, x.shape[-1])
    tokens, kept, shared = len(flat), basis.shape[-1], d.ndim == 1
    if shared and tokens >= FOLD_FROM * kept:
        folded = (basis * d) @ basis.T
        out = torch.addmm(flat, flat, folded)
        if bias is not None:
            out -= bias @ folded
        return out.view(x.shape), flat, folded
    h = flat @ basis if bias is None else torch.addmm(-(bias @ basis), flat, basis)
    if shared and tokens >= kept:  # cheaper on Q than on the tokens
        out = torch.addmm(flat, h, (basis * d).T)
    else:
        out = torch.addmm(flat, _scale(h, d, x.shape), basis.T)
    return out.view(x.shape), h, None


class _Rescale(torch.autograd.Function):
    """`_rescaled` and its gradient, with as little kept and moved as possible.

    `d` is (K,), one for all tokens, or broadcasts to (tokens..., K). Three ways, chosen by size:
    one d and many tokens: one product with Q diag(d) Qᵀ, made once; the gradient of d is the diagonal of
    Qᵀ (xᵀ g) Q. One d, fewer tokens: two products with Q. A d per row or token: the same, with d applied between them.
    """

    @staticmethod
    def forward(ctx, x: Tensor, basis: Tensor, d: Tensor, bias: Tensor | None) -> Tensor:
        d_cast = d.to(x.dtype)
        out, seen, folded = _rescaled(x, basis, d_cast, bias)
        ctx.save_for_backward(basis, d_cast, bias, folded, seen if ctx.needs_input_grad[2] else None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        basis, d, bias, folded, seen = ctx.saved_tensors
        need_x, _, need_d, need_bias = ctx.needs_input_grad
        grad_x = grad_d = grad_bias = None
        flat = grad.reshape(-1, grad.shape[-1])
        total = flat.sum(0) if bias is not None else None
        if folded is not None:
            if need_x:
                grad_x = torch.addmm(flat, flat, folded.T)
            if need_d:
                grad_d = ((seen.T @ flat) @ basis * basis).sum(0, dtype=torch.float32)
                if bias is not None:
                    grad_d -= (bias @ basis) * (total @ basis)
            if need_bias:
                grad_bias = -(total @ folded.T)
        else:
            h_grad = flat @ basis
            if need_d:
                grad_d = _reduce(h_grad * seen, d.shape, grad.shape)
            scaled = _scale(h_grad, d, grad.shape)
            if need_x:
                grad_x = torch.addmm(flat, scaled, basis.T)
            if need_bias:
                grad_bias = -(scaled.sum(0) @ basis.T)
        return None if grad_x is None else grad_x.view(grad.shape), None, grad_d, grad_bias


def _scale(h: Tensor, d: Tensor, shape: torch.Size) -> Tensor:
    """h (tokens, K) times d, which is (K,) or broadcasts to (*shape[:-1], K)."""
    return h * d if d.ndim == 1 else (h.view(*shape[:-1], -1) * d).view(h.shape)


def _reduce(product: Tensor, to: torch.Size, shape: torch.Size) -> Tensor:
    """Sum of (tokens, K) over everything that d was broadcast over, accumulated in fp32."""
    if len(to) == 1:
        return product.sum(0, dtype=torch.float32)
    product = product.view(*shape[:-1], -1)
    over = [i for i, (n, m) in enumerate(zip(to, product.shape, strict=True)) if n == 1 and m != 1]
    return product.sum(over, keepdim=True, dtype=torch.float32) if over else product.float()


def rescale(x: Tensor, basis: Tensor, d: Tensor, bias: Tensor | None = None) -> Tensor:
    """x + Q(d * Qᵀ(x - bias)) along the last axis: rescales by 1 + d what x has along the columns of Q.

    Args:
        x: (..., N).
        basis: Q (N, K), orthonormal columns.
        d: fp32, (K,) or broadcasting to (..., K) with as many axes as x.
        bias: (N,), what to leave out.

    Returns:
        (..., N) in the dtype of x, or of autocast where that is on. Equal to x, bit for bit, where d is 0.
    """
    if not torch.is_autocast_enabled(x.device.type):
        return _rescale_as(x.dtype, x, basis, d, bias)
    with torch.autocast(x.device.type, enabled=False):
        return _rescale_as(torch.get_autocast_dtype(x.device.type), x, basis, d, bias)


def _rescale_as(dtype: torch.dtype, x: Tensor, basis: Tensor, d: Tensor, bias: Tensor | None) -> Tensor:
    x, basis, bias = x.to(dtype), basis.to(dtype), None if bias is None else bias.to(dtype)
    if torch.is_grad_enabled() and (x.requires_grad or d.requires_grad):
        return _Rescale.apply(x, basis, d, bias)
    return _rescaled(x, basis, d.to(dtype), bias)[0]


class _Multiply(torch.autograd.Function):
    """h * m with the gradient of m accumulated in fp32; m is (K,) or broadcasts to the shape of h."""

    @staticmethod
    def forward(ctx, h: Tensor, m: Tensor) -> Tensor:
        m_cast = m.to(h.dtype)
        ctx.save_for_backward(h if ctx.needs_input_grad[1] else None, m_cast)
        return h * m_cast

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        h, m = ctx.saved_tensors
        grad_h = grad * m if ctx.needs_input_grad[0] else None
        grad_m = None
        if ctx.needs_input_grad[1]:
            product = (grad * h).reshape(-1, grad.shape[-1])
            grad_m = _reduce(product, m.shape, grad.shape)
        return grad_h, grad_m


def factored(x: Tensor, down: Tensor, up: Tensor, multiplier: Tensor, bias: Tensor | None) -> Tensor:
    """up(multiplier * down(x)) + bias, for W' kept as two factors down (K, n_in) and up (n_out, K)."""
    h = F.linear(x, down.to(x.dtype))
    return F.linear(_Multiply.apply(h, multiplier), up.to(h.dtype), bias)


def factors(weight: Tensor, basis: Tensor, side: str) -> tuple[Tensor, Tensor]:
    """(down, up) with W = up @ down where the basis is complete: Qᵀ and W Q, or Qᵀ W and Q."""
    if side == "in":
        return basis.mT, weight @ basis
    return basis.mT @ weight, basis
