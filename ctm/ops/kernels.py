"""Triton kernels of one tick, forward and backward, and of the synchronization over all ticks.

Each does what several modules of `ctm.modules` do between two matrix products. They are launched by
`ctm.ops.triton_tick`; `ctm.ops.torch_tick` does the same in plain PyTorch. All arithmetic is fp32, whatever is stored.
"""

import triton
import triton.language as tl


@triton.jit
def _hash(x):
    """A 32-bit integer hash with full avalanche."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


@triton.jit
def dropout_scale(seed_ptr, site, index, p):
    """0 with probability p, else 1 / (1 - p): the same for the same (seed, site, index), forward and backward."""
    key = _hash(tl.load(seed_ptr).to(tl.uint32) + _hash(site.to(tl.uint32)))
    bits = _hash(index.to(tl.uint32) * 0x9E3779B1 + key)
    return tl.where(bits >= tl.cast(p * 4294967296.0, tl.uint32), 1.0 / (1.0 - p), 0.0)


# ----------------------------------------------------------------------------------------------------------------------
# Synchronization


@triton.jit(do_not_specialize=["T"])
def sync_tables(decay_ptr, beta0_ptr, r_ptr, beta_ptr, T, R, BLOCK: tl.constexpr):
    """r = exp(-decay) and beta_t = r beta_(t-1) + 1 for all ticks."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < R
    r = tl.exp(-tl.load(decay_ptr + i, mask, 0.0))
    beta = tl.load(beta0_ptr + i, mask, 1.0)
    tl.store(r_ptr + i, r, mask)
    for t in range(T):
        beta = r * beta + 1
        tl.store(beta_ptr + t * R + i, beta, mask)


@triton.jit
def sync_step(
    z_ptr, left_ptr, right_ptr, r_ptr, beta_ptr, alpha_ptr, s_ptr, x_ptr, D, R, stride_x, BLOCK: tl.constexpr
):  # fmt: skip
    """One tick: alpha = r alpha + z[left] z[right] in place; s = alpha / sqrt(beta), in fp32 and as a GEMM's input."""
    b = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i < R
    left, right = tl.load(left_ptr + i, mask, 0), tl.load(right_ptr + i, mask, 0)
    product = tl.load(z_ptr + b * D + left, mask, 0.0) * tl.load(z_ptr + b * D + right, mask, 0.0)
    alpha = tl.load(r_ptr + i, mask, 0.0) * tl.load(alpha_ptr + b * R + i, mask, 0.0) + product
    s = alpha / tl.sqrt(tl.load(beta_ptr + i, mask, 1.0))
    tl.store(alpha_ptr + b * R + i, alpha, mask)
    tl.store(s_ptr + b * R + i, s, mask)
    tl.store(x_ptr + b * stride_x + i, s.to(x_ptr.dtype.element_ty), mask)


@triton.jit
def sync_step_backward(
    ds_ptr, dx_ptr, dz_out_ptr, z_ptr, s_ptr, before_ptr, r_ptr, beta_ptr, beta_before_ptr, a_ptr, b_ptr, dr_ptr,
    dz_ptr, active_ptr, pair_ptr, other_ptr, n_active, D, R, stride_ds, stride_dx, FIRST: tl.constexpr,
    END: tl.constexpr, READS: tl.constexpr, DEGREE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tick backward, one program a sample: adjoints of alpha (a) and beta (b), and dz of the activations read.

    dz = what the tick's own use of z gives (dx), what later ticks' outputs ask for (dz_out), and the pairs' share.
    `before` is s of the tick before, or alpha where this is the first one. At the last tick (END) the adjoints are
    those of what came out; before it they pass through r.
    """
    row = tl.program_id(0).to(tl.int64)
    for first in range(0, R, BLOCK):
        i = first + tl.arange(0, BLOCK)
        mask = i < R
        r, beta = tl.load(r_ptr + i, mask, 0.0), tl.load(beta_ptr + i, mask, 1.0)
        beta_before = tl.load(beta_before_ptr + i, mask, 1.0)
        s, before = tl.load(s_ptr + row * R + i, mask, 0.0), tl.load(before_ptr + row * R + i, mask, 0.0)
        if not FIRST:
            before = before * tl.sqrt(beta_before)
        a = tl.load(a_ptr + row * R + i, mask, 0.0)
        b = tl.load(b_ptr + row * R + i, mask, 0.0)
        if not END:
            a *= r
            b *= r
        if READS:
            ds = tl.load(ds_ptr + row * stride_ds + i, mask, 0.0).to(tl.float32)
            a += ds / tl.sqrt(beta)
            b -= 0.5 * ds * s / beta
        tl.store(a_ptr + row * R + i, a, mask)
        tl.store(b_ptr + row * R + i, b, mask)
        dr = tl.load(dr_ptr + row * R + i, mask, 0.0)
        tl.store(dr_ptr + row * R + i, dr + a * before + b * beta_before, mask)
    for first in range(0, D, BLOCK):
        i = first + tl.arange(0, BLOCK)
        mask = i < D
        dz = tl.load(dx_ptr + row * stride_dx + i, mask, 0.0).to(tl.float32)
        dz += tl.load(dz_out_ptr + row * D + i, mask, 0.0)
        tl.store(dz_ptr + row * D + i, dz, mask)
    tl.debug_barrier()
    for first in range(0, n_active, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        mask = n < n_active
        neuron = tl.load(active_ptr + n, mask, 0)
        dz = tl.load(dz_ptr + row * D + neuron, mask, 0.0)
        dz += _pairs_share(a_ptr + row * R, z_ptr + row * D, pair_ptr, other_ptr, n, mask, DEGREE, BLOCK_N)
        tl.debug_barrier()  # several warps hold the same neurons: none may read what another has added to
        tl.store(dz_ptr + row * D + neuron, dz, mask)


@triton.jit
def _pairs_share(a_ptr, z_ptr, pair_ptr, other_ptr, n, mask, DEGREE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Sum over the pairs that a neuron is in: adjoint of the pair times the other neuron's activation."""
    share = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, DEGREE, 16):
        place = n[:, None] * DEGREE + first + tl.arange(0, 16)[None, :]
        pair = tl.load(pair_ptr + place, mask[:, None], -1)
        there = pair >= 0
        other = tl.load(other_ptr + place, there, 0)
        share += tl.sum(tl.load(a_ptr + pair, there, 0.0) * tl.load(z_ptr + other, there, 0.0), axis=1)
    return share


@triton.jit(do_not_specialize=["T", "B"])
def sync_scan(
    z_ptr, left_ptr, right_ptr, r_ptr, beta_ptr, alpha_ptr, s_ptr, T, B, D, R, BLOCK: tl.constexpr
):  # fmt: skip
    """All ticks at once: z (T, B, D) -> s (B, T, R); alpha goes from before the first tick to after the last."""
    b = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i < R
    left, right = tl.load(left_ptr + i, mask, 0), tl.load(right_ptr + i, mask, 0)
    r = tl.load(r_ptr + i, mask, 0.0)
    alpha = tl.load(alpha_ptr + b * R + i, mask, 0.0)
    for t in range(T):
        z = z_ptr + (t * B + b) * D
        alpha = r * alpha + tl.load(z + left, mask, 0.0) * tl.load(z + right, mask, 0.0)
        s = alpha / tl.sqrt(tl.load(beta_ptr + t * R + i, mask, 1.0))
        tl.store(s_ptr + (b * T + t) * R + i, s, mask)
    tl.store(alpha_ptr + b * R + i, alpha, mask)


@triton.jit(do_not_specialize=["T"])
def sync_scan_backward(
    ds_ptr, s_ptr, r_ptr, beta_ptr, alpha0_ptr, beta0_ptr, dalpha_ptr, dbeta_ptr, a_ptr, dr_ptr, T, R,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Adjoints of all ticks (B, T, R), and each sample's share of dr; dalpha and dbeta go from the end to the start."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i < R
    r = tl.load(r_ptr + i, mask, 0.0)
    a, b = tl.load(dalpha_ptr + row * R + i, mask, 0.0), tl.load(dbeta_ptr + row * R + i, mask, 0.0)
    dr = tl.zeros((BLOCK,), tl.float32)
    for k in range(T):
        t = T - 1 - k
        place = (row * T + t) * R + i
        beta = tl.load(beta_ptr + t * R + i, mask, 1.0)
        ds, s = tl.load(ds_ptr + place, mask, 0.0).to(tl.float32), tl.load(s_ptr + place, mask, 0.0)
        a += ds / tl.sqrt(beta)
        b -= 0.5 * ds * s / beta
        tl.store(a_ptr + place, a, mask)
        later = mask & (i * 0 + t > 0)
        beta_before = tl.where(
            later, tl.load(beta_ptr + (t - 1) * R + i, later, 1.0), tl.load(beta0_ptr + i, mask, 1.0)
        )
        s_before = tl.load(s_ptr + place - R, later, 0.0) * tl.sqrt(beta_before)
        before = tl.where(later, s_before, tl.load(alpha0_ptr + row * R + i, mask, 0.0))
        dr += a * before + b * beta_before
        a *= r
        b *= r
    tl.store(dalpha_ptr + row * R + i, a, mask)
    tl.store(dbeta_ptr + row * R + i, b, mask)
    tl.store(dr_ptr + row * R + i, dr, mask)


@triton.jit(do_not_specialize=["T", "B"])
def sync_scan_neurons(
    a_ptr, z_ptr, active_ptr, pair_ptr, other_ptr, dz_ptr, n_active, T, B, D, R, DEGREE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dz (T, B, D) of the neurons that are in a pair, from the adjoints (B, T, R)."""
    t, b = (tl.program_id(0) // B).to(tl.int64), tl.program_id(0) % B
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = n < n_active
    neuron = tl.load(active_ptr + n, mask, 0)
    row = (t * B + b) * D
    share = _pairs_share(a_ptr + (b * T + t) * R, z_ptr + row, pair_ptr, other_ptr, n, mask, DEGREE, BLOCK_N)
    tl.store(dz_ptr + row + neuron, share, mask)


# ----------------------------------------------------------------------------------------------------------------------
# Attention of one query


@triton.jit(do_not_specialize=["site"])
def attend(
    q_ptr, bias_ptr, k_ptr, v_ptr, p_ptr, o_ptr, seed_ptr, site, scale, p_drop, heads, S, dh, stride_q, stride_o,
    DROP: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """softmax((q + bias) k' scale) v for a sample and head; p keeps the weights before dropout."""
    row = tl.program_id(0).to(tl.int64)
    b, h = row // heads, row % heads
    s, d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    mask_s, mask_d = s < S, d < dh
    mask = mask_s[:, None] & mask_d[None, :]
    q = tl.load(q_ptr + b * stride_q + h * dh + d, mask_d, 0.0).to(tl.float32)
    q += tl.load(bias_ptr + h * dh + d, mask_d, 0.0)
    tile = row * S * dh + s[:, None] * dh + d[None, :]
    k = tl.load(k_ptr + tile, mask, 0.0).to(tl.float32)
    score = tl.where(mask_s, tl.sum(k * q[None, :], axis=1) * scale, float("-inf"))
    weight = tl.exp(score - tl.max(score, axis=0))
    weight = weight / tl.sum(weight, axis=0)
    tl.store(p_ptr + row * S + s, weight, mask_s)
    if DROP:
        weight *= dropout_scale(seed_ptr, site, (row * S + s).to(tl.int32), p_drop)
    v = tl.load(v_ptr + tile, mask, 0.0).to(tl.float32)
    o = tl.sum(v * weight[:, None], axis=0)
    tl.store(o_ptr + b * stride_o + h * dh + d, o.to(o_ptr.dtype.element_ty), mask_d)


@triton.jit(do_not_specialize=["site"])
def attend_backward(
    do_ptr, k_ptr, v_ptr, p_ptr, weight_ptr, dscore_ptr, dq_ptr, seed_ptr, site, scale, p_drop, heads, S, dh,
    stride_do, stride_dq, DROP: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq, and what the products over all ticks need for dk and dv: the scores' gradients, the weights after dropout."""
    row = tl.program_id(0).to(tl.int64)
    b, h = row // heads, row % heads
    s, d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    mask_s, mask_d = s < S, d < dh
    mask = mask_s[:, None] & mask_d[None, :]
    tile = row * S * dh + s[:, None] * dh + d[None, :]
    do = tl.load(do_ptr + b * stride_do + h * dh + d, mask_d, 0.0).to(tl.float32)
    v = tl.load(v_ptr + tile, mask, 0.0).to(tl.float32)
    weight = tl.load(p_ptr + row * S + s, mask_s, 0.0)
    dp = tl.sum(v * do[None, :], axis=1)
    dropped = weight
    if DROP:
        keep = dropout_scale(seed_ptr, site, (row * S + s).to(tl.int32), p_drop)
        dp *= keep
        dropped = weight * keep
    dscore = weight * (dp - tl.sum(weight * dp, axis=0)) * scale
    k = tl.load(k_ptr + tile, mask, 0.0).to(tl.float32)
    dq = tl.sum(k * dscore[:, None], axis=0)
    tl.store(dq_ptr + b * stride_dq + h * dh + d, dq.to(dq_ptr.dtype.element_ty), mask_d)
    tl.store(dscore_ptr + row * S + s, dscore.to(dscore_ptr.dtype.element_ty), mask_s)
    tl.store(weight_ptr + row * S + s, dropped.to(weight_ptr.dtype.element_ty), mask_s)


# ----------------------------------------------------------------------------------------------------------------------
# Synapses: what stands between two matrix products. One program a sample; widths are padded with zeros.


@triton.jit
def _add_two(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def _statistics(y, mask, width, eps):
    """Mean and 1/std; in two passes, for what one pass saves in time it loses where a value is far from the others."""
    mean = tl.sum(y, axis=0) / width
    centred = tl.where(mask, y - mean, 0.0)
    return mean, 1 / tl.sqrt(tl.sum(centred * centred, axis=0) / width + eps)


@triton.jit
def _keep(stat_ptr, b, mean, rstd):
    tl.store(stat_ptr + 2 * b, mean)
    tl.store(stat_ptr + 2 * b + 1, rstd)


@triton.jit
def _value(y_ptr, bias_ptr, place, i, mask):
    return tl.load(y_ptr + place, mask, 0.0).to(tl.float32) + tl.load(bias_ptr + i, mask, 0.0)


@triton.jit
def _normalized(y, stat_ptr, b, mask):
    rstd = tl.load(stat_ptr + 2 * b + 1)
    return tl.where(mask, (y - tl.load(stat_ptr + 2 * b)) * rstd, 0.0), rstd


@triton.jit
def _affine(x, gamma_ptr, beta_ptr, i, mask):
    return x * tl.load(gamma_ptr + i, mask, 0.0) + tl.load(beta_ptr + i, mask, 0.0)


@triton.jit
def _norm_silu(y_ptr, bias_ptr, gamma_ptr, beta_ptr, stat_ptr, b, place, i, mask):
    """From the kept statistics: the normalised input, its 1/std, the LayerNorm's value a and SiLU(a)."""
    x, rstd = _normalized(_value(y_ptr, bias_ptr, place, i, mask), stat_ptr, b, mask)
    a = _affine(x, gamma_ptr, beta_ptr, i, mask)
    return x, rstd, a, a * tl.sigmoid(a)


@triton.jit
def _norm_backward(da, x, rstd, gamma_ptr, i, mask, width):
    dx = da * tl.load(gamma_ptr + i, mask, 0.0)
    total, along = tl.reduce((dx, dx * x), 0, _add_two)
    return rstd * (dx - total / width - x * (along / width))


@triton.jit(do_not_specialize=["site"])
def norm_silu(
    y_ptr, bias_ptr, gamma_ptr, beta_ptr, stat_ptr, x_ptr, seed_ptr, site, p_drop, eps, width, stride,
    DROP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x = dropout(SiLU(LayerNorm(y + bias))), the input of the next product; keeps the statistics."""
    b = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    mask = i < width
    y = _value(y_ptr, bias_ptr, b * stride + i, i, mask)
    mean, rstd = _statistics(y, mask, width, eps)
    _keep(stat_ptr, b, mean, rstd)
    a = _affine((y - mean) * rstd, gamma_ptr, beta_ptr, i, mask)
    h = a * tl.sigmoid(a)
    if DROP:
        h *= dropout_scale(seed_ptr, site, b * stride + i, p_drop)
    tl.store(x_ptr + b * stride + i, h.to(x_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["site"])
def norm_silu_backward(
    dx_ptr, dskip_ptr, y_ptr, bias_ptr, gamma_ptr, beta_ptr, stat_ptr, dy_ptr, dgamma_ptr, dbeta_ptr, seed_ptr, site,
    p_drop, width, stride, DROP: tl.constexpr, SKIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dy from dx (through the dropout) and from the skip; adds to each sample's share of dgamma and dbeta."""
    b = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    mask = i < width
    place = b * stride + i
    dh = tl.load(dx_ptr + place, mask, 0.0).to(tl.float32)
    dgamma, dbeta = tl.load(dgamma_ptr + place, mask, 0.0), tl.load(dbeta_ptr + place, mask, 0.0)
    x, rstd, a, _ = _norm_silu(y_ptr, bias_ptr, gamma_ptr, beta_ptr, stat_ptr, b, place, i, mask)
    if DROP:
        dh *= dropout_scale(seed_ptr, site, place, p_drop)
    if SKIP:
        dh += tl.load(dskip_ptr + place, mask, 0.0)
    gate = tl.sigmoid(a)
    da = tl.where(mask, dh * gate * (1 + a * (1 - gate)), 0.0)
    tl.store(dgamma_ptr + place, dgamma + da * x, mask)
    tl.store(dbeta_ptr + place, dbeta + da, mask)
    dy = _norm_backward(da, x, rstd, gamma_ptr, i, mask, width)
    tl.store(dy_ptr + place, dy.to(dy_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["site"])
def up(
    y_ptr, bias_ptr, gamma_ptr, beta_ptr, stat_ptr, y_skip_ptr, bias_skip_ptr, gamma_skip_ptr, beta_skip_ptr,
    stat_skip_ptr, gamma2_ptr, beta2_ptr, stat2_ptr, x_ptr, pre_ptr, seed_ptr, site, p_drop, eps, width, stride,
    stride_x, DROP: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """LayerNorm(SiLU(LayerNorm(y)) + skip): the next product's input, or (LAST) this tick's row of the trace."""
    b = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    mask = i < width
    place = b * stride + i
    y = _value(y_ptr, bias_ptr, place, i, mask)
    mean, rstd = _statistics(y, mask, width, eps)
    _keep(stat_ptr, b, mean, rstd)
    a = _affine((y - mean) * rstd, gamma_ptr, beta_ptr, i, mask)
    _, _, _, skip = _norm_silu(
        y_skip_ptr, bias_skip_ptr, gamma_skip_ptr, beta_skip_ptr, stat_skip_ptr, b, place, i, mask
    )
    v = a * tl.sigmoid(a) + skip
    mean, rstd = _statistics(v, mask, width, eps)
    _keep(stat2_ptr, b, mean, rstd)
    u = _affine((v - mean) * rstd, gamma2_ptr, beta2_ptr, i, mask)
    if LAST:
        tl.store(pre_ptr + b * stride_x + i, u, mask)
    if DROP:
        u *= dropout_scale(seed_ptr, site, place, p_drop)
    tl.store(x_ptr + b * stride_x + i, u.to(x_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["site_down", "site_up"])
def valley(
    w_ptr, y_ptr, bias_ptr, gamma_ptr, beta_ptr, stat_ptr, h_ptr, w_up_ptr, y_up_ptr, bias_up_ptr, gamma_up_ptr,
    beta_up_ptr, stat_up_ptr, y_skip_ptr, bias_skip_ptr, gamma_skip_ptr, beta_skip_ptr, stat_skip_ptr, x_ptr,
    gamma2_ptr, beta2_ptr, stat2_ptr, x_up_ptr, seed_ptr, site_down, site_up, p_drop, eps, inner, outer, stride_i,
    stride_o, DROP: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """`norm_silu` and `up` of the two innermost layers with the products before them: x (outer) -> x_up (outer).

    What the backward pass reads is stored, rounded, as if the four were four.
    """
    b = tl.program_id(0)
    i, o = tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_O)
    mask_i, mask_o = i < inner, o < outer
    dtype = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + b * stride_o + o, mask_o, 0.0).to(tl.float32)
    w = tl.load(w_ptr + i[:, None] * stride_o + o[None, :], mask_i[:, None] & mask_o[None, :], 0.0).to(tl.float32)
    y = tl.sum(w * x[None, :], axis=1).to(dtype)
    tl.store(y_ptr + b * stride_i + i, y, mask_i)
    y = y.to(tl.float32) + tl.load(bias_ptr + i, mask_i, 0.0)
    mean, rstd = _statistics(y, mask_i, inner, eps)
    _keep(stat_ptr, b, mean, rstd)
    a = _affine((y - mean) * rstd, gamma_ptr, beta_ptr, i, mask_i)
    h = a * tl.sigmoid(a)
    if DROP:
        h *= dropout_scale(seed_ptr, site_down, b * stride_i + i, p_drop)
    h = h.to(dtype)
    tl.store(h_ptr + b * stride_i + i, h, mask_i)
    w = tl.load(w_up_ptr + o[:, None] * stride_i + i[None, :], mask_o[:, None] & mask_i[None, :], 0.0).to(tl.float32)
    y = tl.sum(w * h.to(tl.float32)[None, :], axis=1).to(dtype)
    place = b * stride_o + o
    tl.store(y_up_ptr + place, y, mask_o)
    y = y.to(tl.float32) + tl.load(bias_up_ptr + o, mask_o, 0.0)
    mean, rstd = _statistics(y, mask_o, outer, eps)
    _keep(stat_up_ptr, b, mean, rstd)
    a = _affine((y - mean) * rstd, gamma_up_ptr, beta_up_ptr, o, mask_o)
    _, _, _, skip = _norm_silu(
        y_skip_ptr, bias_skip_ptr, gamma_skip_ptr, beta_skip_ptr, stat_skip_ptr, b, place, o, mask_o
    )
    v = a * tl.sigmoid(a) + skip
    mean, rstd = _statistics(tl.where(mask_o, v, 0.0), mask_o, outer, eps)
    _keep(stat2_ptr, b, mean, rstd)
    u = _affine((v - mean) * rstd, gamma2_ptr, beta2_ptr, o, mask_o)
    if DROP:
        u *= dropout_scale(seed_ptr, site_up, place, p_drop)
    tl.store(x_up_ptr + place, u.to(x_up_ptr.dtype.element_ty), mask_o)


@triton.jit(do_not_specialize=["site"])
def up_backward(
    dx_ptr, y_ptr, bias_ptr, gamma_ptr, beta_ptr, stat_ptr, y_skip_ptr, bias_skip_ptr, gamma_skip_ptr, beta_skip_ptr,
    stat_skip_ptr, gamma2_ptr, stat2_ptr, dy_ptr, dskip_ptr, dgamma_ptr, dbeta_ptr, dgamma2_ptr, dbeta2_ptr, seed_ptr,
    site, p_drop, width, stride, stride_dx, DROP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dy and the skip's gradient; adds to each sample's share of the four LayerNorm gradients."""
    b = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    mask = i < width
    place = b * stride + i
    du = tl.load(dx_ptr + b * stride_dx + i, mask, 0.0).to(tl.float32)
    dgamma, dbeta = tl.load(dgamma_ptr + place, mask, 0.0), tl.load(dbeta_ptr + place, mask, 0.0)
    dgamma2, dbeta2 = tl.load(dgamma2_ptr + place, mask, 0.0), tl.load(dbeta2_ptr + place, mask, 0.0)
    x, rstd, a, h = _norm_silu(y_ptr, bias_ptr, gamma_ptr, beta_ptr, stat_ptr, b, place, i, mask)
    _, _, _, skip = _norm_silu(
        y_skip_ptr, bias_skip_ptr, gamma_skip_ptr, beta_skip_ptr, stat_skip_ptr, b, place, i, mask
    )
    x2, rstd2 = _normalized(h + skip, stat2_ptr, b, mask)
    if DROP:
        du *= dropout_scale(seed_ptr, site, place, p_drop)
    tl.store(dgamma2_ptr + place, dgamma2 + du * x2, mask)
    tl.store(dbeta2_ptr + place, dbeta2 + du, mask)
    dh = _norm_backward(du, x2, rstd2, gamma2_ptr, i, mask, width)
    tl.store(dskip_ptr + place, dh, mask)
    gate = tl.sigmoid(a)
    da = tl.where(mask, dh * gate * (1 + a * (1 - gate)), 0.0)
    tl.store(dgamma_ptr + place, dgamma + da * x, mask)
    tl.store(dbeta_ptr + place, dbeta + da, mask)
    dy = _norm_backward(da, x, rstd, gamma_ptr, i, mask, width)
    tl.store(dy_ptr + place, dy.to(dy_ptr.dtype.element_ty), mask)


@triton.jit
def gated_norm(
    y_ptr, bias_ptr, gamma_ptr, beta_ptr, stat_ptr, x_ptr, pre_ptr, eps, D, stride, stride_x, BLOCK: tl.constexpr
):  # fmt: skip
    """The gated layer: LayerNorm(GLU(y + bias)), this tick's row of the trace."""
    b = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    mask = i < D
    value = _value(y_ptr, bias_ptr, b * stride + i, i, mask)
    gate = _value(y_ptr + D, bias_ptr + D, b * stride + i, i, mask)
    h = value * tl.sigmoid(gate)
    mean, rstd = _statistics(tl.where(mask, h, 0.0), mask, D, eps)
    _keep(stat_ptr, b, mean, rstd)
    u = _affine((h - mean) * rstd, gamma_ptr, beta_ptr, i, mask)
    tl.store(pre_ptr + b * stride_x + i, u, mask)
    tl.store(x_ptr + b * stride_x + i, u.to(x_ptr.dtype.element_ty), mask)


@triton.jit
def gated_norm_backward(
    dx_ptr, y_ptr, bias_ptr, gamma_ptr, stat_ptr, dy_ptr, dgamma_ptr, dbeta_ptr, D, stride, stride_dx,
    BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    mask = i < D
    place = b * stride + i
    du = tl.load(dx_ptr + b * stride_dx + i, mask, 0.0)
    dgamma, dbeta = tl.load(dgamma_ptr + place, mask, 0.0), tl.load(dbeta_ptr + place, mask, 0.0)
    value = _value(y_ptr, bias_ptr, place, i, mask)
    gate = tl.sigmoid(_value(y_ptr + D, bias_ptr + D, b * stride + i, i, mask))
    x, rstd = _normalized(value * gate, stat_ptr, b, mask)
    tl.store(dgamma_ptr + place, dgamma + du * x, mask)
    tl.store(dbeta_ptr + place, dbeta + du, mask)
    dh = _norm_backward(du, x, rstd, gamma_ptr, i, mask, D)
    tl.store(dy_ptr + b * stride + i, (dh * gate).to(dy_ptr.dtype.element_ty), mask)
    dgate = dh * value * gate * (1 - gate)
    tl.store(dy_ptr + b * stride + D + i, dgate.to(dy_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["site"])
def drop(x_ptr, bias_ptr, y_ptr, seed_ptr, site, p_drop, width, n_bias, stride_x, stride_y, BLOCK: tl.constexpr):
    """y = dropout(x + bias), the bias on the first columns; forward and, without bias, backward."""
    b = tl.program_id(0)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i < width
    x = tl.load(x_ptr + b * stride_x + i, mask, 0.0).to(tl.float32) + tl.load(bias_ptr + i, i < n_bias, 0.0)
    if p_drop > 0:
        x *= dropout_scale(seed_ptr, site, b * width + i, p_drop)
    tl.store(y_ptr + b * stride_y + i, x.to(y_ptr.dtype.element_ty), mask)


# ----------------------------------------------------------------------------------------------------------------------
# Neuron-level models. A program has some neighbouring neurons n, whose values lie side by side in the trace (L, B, D),
# and some samples b: tiles are (n, b, m) for the history, (n, b, o) for the hidden layer.


@triton.jit
def _tile(n, b, k, B, K):
    """Numbers of the elements of a tile, for dropout."""
    return ((n[:, None, None] * B + b[None, :, None]) * K + k[None, None, :]).to(tl.uint32)


@triton.jit
def _history(trace_ptr, n, b, m, mask, B, D):
    return tl.load(trace_ptr + m[None, None, :] * (B * D) + b[None, :, None] * D + n[:, None, None], mask, 0.0)


@triton.jit
def _weight1(ptr, n, m, o, mask, M, H):
    place = ptr + n[:, None, None] * (M * 2 * H) + m[None, :, None] * (2 * H) + o[None, None, :]
    return tl.load(place, mask, 0.0), tl.load(place + H, mask, 0.0)


@triton.jit
def _pair(ptr, n, k, K, mask):
    """Two columns of (D, K, 2) weights, for (n, k)."""
    place = ptr + (n[:, None] * K + k[None, :]) * 2
    return tl.load(place, mask, 0.0).to(tl.float32), tl.load(place + 1, mask, 0.0).to(tl.float32)


@triton.jit
def _answer(g, w0, w1, b2_ptr, n, mask_n, t2):
    """The last layer: g (n, b, k) and its two columns (n, k) -> value and gate (n, b). t is 1 / temperature here."""
    b0, b1 = tl.load(b2_ptr + n * 2, mask_n, 0.0), tl.load(b2_ptr + n * 2 + 1, mask_n, 0.0)
    y0 = tl.sum(g * w0[:, None, :], axis=2)
    y1 = tl.sum(g * w1[:, None, :], axis=2)
    return (y0 + b0[:, None]) * t2, (y1 + b1[:, None]) * t2


@triton.jit
def _hidden_bias(b1_ptr, n, o, mask, H):
    place = b1_ptr + n[:, None] * (2 * H) + o[None, :]
    return tl.load(place, mask, 0.0)[:, None, :], tl.load(place + H, mask, 0.0)[:, None, :]


@triton.jit(do_not_specialize=["site", "B"])
def neurons(
    trace_ptr, w1_ptr, b1_ptr, t1_ptr, w2_ptr, b2_ptr, t2_ptr, z_ptr, x_ptr, seed_ptr, site, p_drop, B, D, M, H,
    stride_x, DEEP: tl.constexpr, DROP: tl.constexpr, NEXT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The next activations z (B, D), also (NEXT) where the next tick's product reads. `trace` starts at the window."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    m, o = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_H)
    mask_n, mask_b, mask_m, mask_o = n < D, b < B, m < M, o < H
    dtype = w1_ptr.dtype.element_ty
    mask = mask_n[:, None, None] & mask_b[None, :, None] & mask_m[None, None, :]
    x = _history(trace_ptr, n, b, m, mask, B, D)
    if DROP:
        x = x.to(tl.float32) * dropout_scale(seed_ptr, site, _tile(n, b, m, B, M), p_drop)
    x = x.to(dtype)
    t2 = 1 / tl.load(t2_ptr)
    if DEEP:
        t1 = 1 / tl.load(t1_ptr)
        mask_w = mask_n[:, None, None] & mask_m[None, :, None] & mask_o[None, None, :]
        w_value, w_gate = _weight1(w1_ptr, n, m, o, mask_w, M, H)
        b_value, b_gate = _hidden_bias(b1_ptr, n, o, mask_n[:, None] & mask_o[None, :], H)
        value = (tl.dot(x, w_value, input_precision=PRECISION) + b_value) * t1
        gate = (tl.dot(x, w_gate, input_precision=PRECISION) + b_gate) * t1
        g = value * tl.sigmoid(gate)
        if DROP:
            g *= dropout_scale(seed_ptr, site + 1, _tile(n, b, o, B, H), p_drop)
        g = g.to(dtype).to(tl.float32)
        w20, w21 = _pair(w2_ptr, n, o, H, mask_n[:, None] & mask_o[None, :])
        y0, y1 = _answer(g, w20, w21, b2_ptr, n, mask_n, t2)
    else:
        w20, w21 = _pair(w2_ptr, n, m, M, mask_n[:, None] & mask_m[None, :])
        y0, y1 = _answer(x.to(tl.float32), w20, w21, b2_ptr, n, mask_n, t2)
    z = y0 * tl.sigmoid(y1)
    mask_nb = mask_n[:, None] & mask_b[None, :]
    tl.store(z_ptr + b[None, :] * D + n[:, None], z, mask_nb)
    if NEXT:
        tl.store(x_ptr + b[None, :] * stride_x + n[:, None], z.to(x_ptr.dtype.element_ty), mask_nb)


@triton.jit(do_not_specialize=["site", "B"])
def neurons_backward(
    dz_ptr, trace_ptr, w1_ptr, b1_ptr, t1_ptr, w2_ptr, b2_ptr, t2_ptr, dtrace_ptr, seed_ptr, site, p_drop, B, D, M, H,
    DEEP: tl.constexpr, DROP: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Adds to the gradient of the trace what this tick's activations ask of their M rows."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    m, o = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_H)
    mask_n, mask_b, mask_m, mask_o = n < D, b < B, m < M, o < H
    dtype = w1_ptr.dtype.element_ty
    mask = mask_n[:, None, None] & mask_b[None, :, None] & mask_m[None, None, :]
    x = _history(trace_ptr, n, b, m, mask, B, D)
    if DROP:
        x = x.to(tl.float32) * dropout_scale(seed_ptr, site, _tile(n, b, m, B, M), p_drop)
    x = x.to(dtype)
    t2 = 1 / tl.load(t2_ptr)
    dz = tl.load(dz_ptr + b[None, :] * D + n[:, None], mask_n[:, None] & mask_b[None, :], 0.0)
    if DEEP:
        t1 = 1 / tl.load(t1_ptr)
        mask_w = mask_n[:, None, None] & mask_m[None, :, None] & mask_o[None, None, :]
        w_value, w_gate = _weight1(w1_ptr, n, m, o, mask_w, M, H)
        b_value, b_gate = _hidden_bias(b1_ptr, n, o, mask_n[:, None] & mask_o[None, :], H)
        value = (tl.dot(x, w_value, input_precision=PRECISION) + b_value) * t1
        gate = tl.sigmoid((tl.dot(x, w_gate, input_precision=PRECISION) + b_gate) * t1)
        g = value * gate
        keep = 1.0
        if DROP:
            keep = dropout_scale(seed_ptr, site + 1, _tile(n, b, o, B, H), p_drop)
            g *= keep
        g = g.to(dtype).to(tl.float32)
        w20, w21 = _pair(w2_ptr, n, o, H, mask_n[:, None] & mask_o[None, :])
        y0, y1 = _answer(g, w20, w21, b2_ptr, n, mask_n, t2)
        y1 = tl.sigmoid(y1)
        du0 = dz * y1 * t2
        du1 = du0 * y0 * (1 - y1)
        dg = (du0[:, :, None] * w20[:, None, :] + du1[:, :, None] * w21[:, None, :]) * (keep * t1)
        dvalue = dg * gate
        dgate = dvalue * value * (1 - gate)
        dx = tl.dot(dvalue.to(dtype), tl.permute(w_value, (0, 2, 1)), input_precision=PRECISION)
        dx += tl.dot(dgate.to(dtype), tl.permute(w_gate, (0, 2, 1)), input_precision=PRECISION)
    else:
        w20, w21 = _pair(w2_ptr, n, m, M, mask_n[:, None] & mask_m[None, :])
        y0, y1 = _answer(x.to(tl.float32), w20, w21, b2_ptr, n, mask_n, t2)
        y1 = tl.sigmoid(y1)
        du0 = dz * y1 * t2
        du1 = du0 * y0 * (1 - y1)
        dx = du0[:, :, None] * w20[:, None, :] + du1[:, :, None] * w21[:, None, :]
    if DROP:
        dx *= dropout_scale(seed_ptr, site, _tile(n, b, m, B, M), p_drop)
    place = dtrace_ptr + m[None, None, :] * (B * D) + b[None, :, None] * D + n[:, None, None]
    tl.store(place, tl.load(place, mask, 0.0) + dx, mask)


@triton.jit(do_not_specialize=["site0", "sites", "T", "B", "ticks"])
def neurons_weights(
    dz_ptr, trace_ptr, w1_ptr, b1_ptr, t1_ptr, w2_ptr, b2_ptr, t2_ptr, dw1_ptr, db1_ptr, dt1_ptr, dw2_ptr, db2_ptr,
    dt2_ptr, seed_ptr, site0, sites, p_drop, T, ticks, B, D, M, H, DEEP: tl.constexpr, DROP: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """All weight gradients of some neurons, over all samples and `ticks` of the ticks: one share of the sum."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    share = tl.program_id(1)
    m, o = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_H)
    mask_n, mask_m, mask_o = n < D, m < M, o < H
    mask_no = mask_n[:, None] & mask_o[None, :]
    mask_nm = mask_n[:, None] & mask_m[None, :]
    dtype = w1_ptr.dtype.element_ty
    t2 = 1 / tl.load(t2_ptr)
    dt1, dt2, db20, db21 = (
        tl.zeros((BLOCK_N,), tl.float32),
        tl.zeros((BLOCK_N,), tl.float32),
        tl.zeros((BLOCK_N,), tl.float32),
        tl.zeros((BLOCK_N,), tl.float32),
    )
    mask_w = mask_n[:, None, None] & mask_m[None, :, None] & mask_o[None, None, :]
    if DEEP:
        t1 = 1 / tl.load(t1_ptr)
        w_value, w_gate = _weight1(w1_ptr, n, m, o, mask_w, M, H)
        b_value, b_gate = _hidden_bias(b1_ptr, n, o, mask_no, H)
        w20, w21 = _pair(w2_ptr, n, o, H, mask_no)
        dw_value = tl.zeros((BLOCK_N, BLOCK_M, BLOCK_H), tl.float32)
        dw_gate = tl.zeros((BLOCK_N, BLOCK_M, BLOCK_H), tl.float32)
        db_value = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
        db_gate = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
        dw20 = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
        dw21 = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    else:
        w20, w21 = _pair(w2_ptr, n, m, M, mask_nm)
        dw20 = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        dw21 = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(ticks):
        t = share * ticks + k
        site = site0 + t * sites
        for first in range(0, B, BLOCK_B):
            b = first + tl.arange(0, BLOCK_B)
            mask_b = (b < B) & (b * 0 + t < T)
            mask = mask_n[:, None, None] & mask_b[None, :, None] & mask_m[None, None, :]
            window = trace_ptr + (n * 0 + t + 1)[:, None, None].to(tl.int64) * (B * D)
            x = tl.load(window + m[None, None, :] * (B * D) + b[None, :, None] * D + n[:, None, None], mask, 0.0)
            if DROP:
                x = x.to(tl.float32) * dropout_scale(seed_ptr, site, _tile(n, b, m, B, M), p_drop)
            x = x.to(dtype)
            row = (b + t * B).to(tl.int64) * D
            dz = tl.load(dz_ptr + row[None, :] + n[:, None], mask_n[:, None] & mask_b[None, :], 0.0)
            if DEEP:
                value = (tl.dot(x, w_value, input_precision=PRECISION) + b_value) * t1
                raw = (tl.dot(x, w_gate, input_precision=PRECISION) + b_gate) * t1
                gate = tl.sigmoid(raw)
                g = value * gate
                keep = 1.0
                if DROP:
                    keep = dropout_scale(seed_ptr, site + 1, _tile(n, b, o, B, H), p_drop)
                    g *= keep
                g = g.to(dtype).to(tl.float32)
            else:
                g = x.to(tl.float32)
            y0, y1 = _answer(g, w20, w21, b2_ptr, n, mask_n, t2)
            open_ = tl.sigmoid(y1)
            dy0, dy1 = dz * open_, dz * y0 * open_ * (1 - open_)
            dt2 -= tl.sum(dy0 * y0 + dy1 * y1, axis=1) * t2
            du0, du1 = dy0 * t2, dy1 * t2
            db20 += tl.sum(du0, axis=1)
            db21 += tl.sum(du1, axis=1)
            dw20 += tl.sum(g * du0[:, :, None], axis=1)
            dw21 += tl.sum(g * du1[:, :, None], axis=1)
            if DEEP:
                dg = (du0[:, :, None] * w20[:, None, :] + du1[:, :, None] * w21[:, None, :]) * keep
                dvalue = dg * gate
                dgate = dvalue * value * (1 - gate)
                dt1 -= tl.sum(tl.sum(dvalue * value + dgate * raw, axis=2), axis=1) * t1
                dvalue, dgate = dvalue * t1, dgate * t1
                db_value += tl.sum(dvalue, axis=1)
                db_gate += tl.sum(dgate, axis=1)
                x_T = tl.permute(x, (0, 2, 1))
                dw_value += tl.dot(x_T, dvalue.to(dtype), input_precision=PRECISION)
                dw_gate += tl.dot(x_T, dgate.to(dtype), input_precision=PRECISION)
    at = share * D + n
    tl.store(dt2_ptr + at, dt2, mask_n)
    tl.store(db2_ptr + at * 2, db20, mask_n)
    tl.store(db2_ptr + at * 2 + 1, db21, mask_n)
    if DEEP:
        place = dw1_ptr + at[:, None, None] * (M * 2 * H) + m[None, :, None] * (2 * H) + o[None, None, :]
        tl.store(place, dw_value, mask_w)
        tl.store(place + H, dw_gate, mask_w)
        place = db1_ptr + at[:, None] * (2 * H) + o[None, :]
        tl.store(place, db_value, mask_no)
        tl.store(place + H, db_gate, mask_no)
        place = dw2_ptr + (at[:, None] * H + o[None, :]) * 2
        tl.store(place, dw20, mask_no)
        tl.store(place + 1, dw21, mask_no)
        tl.store(dt1_ptr + at, dt1, mask_n)
    else:
        place = dw2_ptr + (at[:, None] * M + m[None, :]) * 2
        tl.store(place, dw20, mask_nm)
        tl.store(place + 1, dw21, mask_nm)
