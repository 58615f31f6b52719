"""Triton kernels of one tick, forward and backward, and of the synchronization over all ticks.

Each does what several modules of `ctm.modules` do between two matrix products. They are called by `ctm.ops.triton_tick`,
which says what the arguments are; `ctm.ops.torch_tick` does the same in plain PyTorch. Buffers are indexed by tick, so that
one recorded sequence of launches (a CUDA graph) serves a whole thought. All arithmetic is fp32, whatever is stored.
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
    bits = _hash(_hash(index.to(tl.uint32) ^ key) + key)
    uniform = (bits >> 8).to(tl.float32) * (1.0 / 16777216.0)
    return tl.where(uniform >= p, 1.0 / (1.0 - p), 0.0)


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
    `before` is s of the tick before, or alpha where this is the first one. At the last tick (END) the adjoints are those
    of what came out; before it they pass through r.
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
    """softmax(q k' scale) v for every sample and head; q gets its bias, in place; p keeps the weights before dropout."""
    row = tl.program_id(0).to(tl.int64)
    b, h = row // heads, row % heads
    s, d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    mask_s, mask_d = s < S, d < dh
    mask = mask_s[:, None] & mask_d[None, :]
    q = tl.load(q_ptr + b * stride_q + h * dh + d, mask_d, 0.0).to(tl.float32)
    q += tl.load(bias_ptr + h * dh + d, mask_d, 0.0)
    tl.store(q_ptr + b * stride_q + h * dh + d, q.to(q_ptr.dtype.element_ty), mask_d)
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
def _normalized(y, mask, width, eps):
    mean = tl.sum(y, axis=0) / width
    centred = tl.where(mask, y - mean, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, axis=0) / width + eps)
    return centred * rstd, rstd


@triton.jit
def _norm_silu(y_ptr, bias_ptr, gamma_ptr, beta_ptr, place, i, mask, width, eps):
    """Recomputed wherever it is needed: normalised input, its 1/std, the LayerNorm's value a and SiLU(a)."""
    y = tl.load(y_ptr + place, mask, 0.0).to(tl.float32) + tl.load(bias_ptr + i, mask, 0.0)
    x, rstd = _normalized(y, mask, width, eps)
    a = x * tl.load(gamma_ptr + i, mask, 0.0) + tl.load(beta_ptr + i, mask, 0.0)
    return x, rstd, a, a * tl.sigmoid(a)


@triton.jit
def _norm_backward(da, x, rstd, gamma_ptr, i, mask, width):
    dx = da * tl.load(gamma_ptr + i, mask, 0.0)
    return rstd * (dx - tl.sum(dx, axis=0) / width - x * (tl.sum(dx * x, axis=0) / width))


@triton.jit
def _add(ptr, place, value, mask):
    tl.store(ptr + place, tl.load(ptr + place, mask, 0.0) + value, mask)


@triton.jit(do_not_specialize=["site"])
def norm_silu(
    y_ptr, bias_ptr, gamma_ptr, beta_ptr, x_ptr, seed_ptr, site, p_drop, eps, width, stride, DROP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """x = dropout(SiLU(LayerNorm(y + bias))), the input of the next product."""
    b = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    mask = i < width
    _, _, _, h = _norm_silu(y_ptr, bias_ptr, gamma_ptr, beta_ptr, b * stride + i, i, mask, width, eps)
    if DROP:
        h *= dropout_scale(seed_ptr, site, b * stride + i, p_drop)
    tl.store(x_ptr + b * stride + i, h.to(x_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["site"])
def norm_silu_backward(
    dx_ptr, dskip_ptr, y_ptr, bias_ptr, gamma_ptr, beta_ptr, dy_ptr, dgamma_ptr, dbeta_ptr, seed_ptr, site, p_drop,
    eps, width, stride, DROP: tl.constexpr, SKIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dy from dx (through the dropout) and from the skip; adds to each sample's share of dgamma and dbeta."""
    b = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    mask = i < width
    place = b * stride + i
    x, rstd, a, _ = _norm_silu(y_ptr, bias_ptr, gamma_ptr, beta_ptr, place, i, mask, width, eps)
    dh = tl.load(dx_ptr + place, mask, 0.0).to(tl.float32)
    if DROP:
        dh *= dropout_scale(seed_ptr, site, place, p_drop)
    if SKIP:
        dh += tl.load(dskip_ptr + place, mask, 0.0)
    gate = tl.sigmoid(a)
    da = tl.where(mask, dh * gate * (1 + a * (1 - gate)), 0.0)
    _add(dgamma_ptr, place, da * x, mask)
    _add(dbeta_ptr, place, da, mask)
    dy = _norm_backward(da, x, rstd, gamma_ptr, i, mask, width)
    tl.store(dy_ptr + place, dy.to(dy_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["site", "column", "B"])
def up(
    y_ptr, bias_ptr, gamma_ptr, beta_ptr, y_skip_ptr, bias_skip_ptr, gamma_skip_ptr, beta_skip_ptr, gamma2_ptr,
    beta2_ptr, x_ptr, trace_ptr, seed_ptr, site, p_drop, eps, width, stride, B, length, column, DROP: tl.constexpr,
    LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """LayerNorm(SiLU(LayerNorm(y)) + skip): the next product's input, or (LAST) this tick's column of the trace."""
    b = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    mask = i < width
    place = b * stride + i
    _, _, _, h = _norm_silu(y_ptr, bias_ptr, gamma_ptr, beta_ptr, place, i, mask, width, eps)
    _, _, _, skip = _norm_silu(y_skip_ptr, bias_skip_ptr, gamma_skip_ptr, beta_skip_ptr, place, i, mask, width, eps)
    x, _ = _normalized(h + skip, mask, width, eps)
    u = x * tl.load(gamma2_ptr + i, mask, 0.0) + tl.load(beta2_ptr + i, mask, 0.0)
    if LAST:
        tl.store(trace_ptr + (i.to(tl.int64) * B + b) * length + column, u, mask)
    else:
        if DROP:
            u *= dropout_scale(seed_ptr, site, place, p_drop)
        tl.store(x_ptr + place, u.to(x_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["site", "column", "B"])
def up_backward(
    dx_ptr, dtrace_ptr, y_ptr, bias_ptr, gamma_ptr, beta_ptr, y_skip_ptr, bias_skip_ptr, gamma_skip_ptr,
    beta_skip_ptr, gamma2_ptr, dy_ptr, dskip_ptr, dgamma_ptr, dbeta_ptr, dgamma2_ptr, dbeta2_ptr, seed_ptr, site,
    p_drop, eps, width, stride, B, length, column, DROP: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dy and the skip's gradient; adds to each sample's share of the four LayerNorm gradients."""
    b = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    mask = i < width
    place = b * stride + i
    x, rstd, a, h = _norm_silu(y_ptr, bias_ptr, gamma_ptr, beta_ptr, place, i, mask, width, eps)
    _, _, _, skip = _norm_silu(y_skip_ptr, bias_skip_ptr, gamma_skip_ptr, beta_skip_ptr, place, i, mask, width, eps)
    x2, rstd2 = _normalized(h + skip, mask, width, eps)
    if LAST:
        du = tl.load(dtrace_ptr + (i.to(tl.int64) * B + b) * length + column, mask, 0.0)
    else:
        du = tl.load(dx_ptr + place, mask, 0.0).to(tl.float32)
        if DROP:
            du *= dropout_scale(seed_ptr, site, place, p_drop)
    _add(dgamma2_ptr, place, du * x2, mask)
    _add(dbeta2_ptr, place, du, mask)
    dh = _norm_backward(du, x2, rstd2, gamma2_ptr, i, mask, width)
    tl.store(dskip_ptr + place, dh, mask)
    gate = tl.sigmoid(a)
    da = tl.where(mask, dh * gate * (1 + a * (1 - gate)), 0.0)
    _add(dgamma_ptr, place, da * x, mask)
    _add(dbeta_ptr, place, da, mask)
    dy = _norm_backward(da, x, rstd, gamma_ptr, i, mask, width)
    tl.store(dy_ptr + place, dy.to(dy_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["column", "B"])
def gated_norm(
    y_ptr, bias_ptr, gamma_ptr, beta_ptr, trace_ptr, eps, D, stride, B, length, column, BLOCK: tl.constexpr
):  # fmt: skip
    """The gated layer: LayerNorm(GLU(y + bias)), this tick's column of the trace."""
    b = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    mask = i < D
    value = tl.load(y_ptr + b * stride + i, mask, 0.0).to(tl.float32) + tl.load(bias_ptr + i, mask, 0.0)
    gate = tl.load(y_ptr + b * stride + D + i, mask, 0.0).to(tl.float32) + tl.load(bias_ptr + D + i, mask, 0.0)
    x, _ = _normalized(tl.where(mask, value * tl.sigmoid(gate), 0.0), mask, D, eps)
    u = x * tl.load(gamma_ptr + i, mask, 0.0) + tl.load(beta_ptr + i, mask, 0.0)
    tl.store(trace_ptr + (i.to(tl.int64) * B + b) * length + column, u, mask)


@triton.jit(do_not_specialize=["column", "B"])
def gated_norm_backward(
    dtrace_ptr, y_ptr, bias_ptr, gamma_ptr, dy_ptr, dgamma_ptr, dbeta_ptr, eps, D, stride, B, length, column,
    BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    mask = i < D
    value = tl.load(y_ptr + b * stride + i, mask, 0.0).to(tl.float32) + tl.load(bias_ptr + i, mask, 0.0)
    gate = tl.load(y_ptr + b * stride + D + i, mask, 0.0).to(tl.float32) + tl.load(bias_ptr + D + i, mask, 0.0)
    gate = tl.sigmoid(gate)
    x, rstd = _normalized(tl.where(mask, value * gate, 0.0), mask, D, eps)
    du = tl.load(dtrace_ptr + (i.to(tl.int64) * B + b) * length + column, mask, 0.0)
    _add(dgamma_ptr, b * stride + i, du * x, mask)
    _add(dbeta_ptr, b * stride + i, du, mask)
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
# Neuron-level models. One program a neuron: its weights are small, and its history is contiguous in the trace (D, B, L).


@triton.jit
def _history(
    trace_ptr, neuron, b, m, mask, B, M, length, column, seed_ptr, site, p_drop, dtype: tl.constexpr, DROP: tl.constexpr
):
    x = tl.load(trace_ptr + (neuron * B + b)[:, None] * length + column + m[None, :], mask, 0.0)
    if DROP:
        x *= _history_scale(neuron, b, m, B, M, seed_ptr, site, p_drop)
    return x.to(dtype)


@triton.jit
def _history_scale(neuron, b, m, B, M, seed_ptr, site, p_drop):
    return dropout_scale(seed_ptr, site, ((neuron * B + b)[:, None] * M + m[None, :]).to(tl.int32), p_drop)


@triton.jit
def _hidden_scale(neuron, b, o, B, H, seed_ptr, site, p_drop):
    return dropout_scale(seed_ptr, site + 1, ((neuron * B + b)[:, None] * H + o[None, :]).to(tl.int32), p_drop)


@triton.jit
def _column(ptr, i, which: tl.constexpr, mask):
    return tl.load(ptr + i * 2 + which, mask, 0.0).to(tl.float32)


@triton.jit(do_not_specialize=["site", "column", "B"])
def neurons(
    trace_ptr, w1_ptr, b1_ptr, t1_ptr, w2_ptr, b2_ptr, t2_ptr, z_ptr, x_ptr, seed_ptr, site, p_drop, B, D, M, H,
    length, column, stride_x, DEEP: tl.constexpr, DROP: tl.constexpr, NEXT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The next activations z (B, D), and (NEXT) their place in the next tick's product."""
    neuron = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    m, o = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_H)
    mask_b, mask_m, mask_o = b < B, m < M, o < H
    dtype = w1_ptr.dtype.element_ty
    mask = mask_b[:, None] & mask_m[None, :]
    x = _history(trace_ptr, neuron, b, m, mask, B, M, length, column, seed_ptr, site, p_drop, dtype, DROP)
    if DEEP:
        mask_w = mask_m[:, None] & mask_o[None, :]
        w = w1_ptr + neuron * M * 2 * H + m[:, None] * 2 * H + o[None, :]
        t1 = tl.load(t1_ptr)
        value = tl.dot(x, tl.load(w, mask_w, 0.0), input_precision=PRECISION)
        gate = tl.dot(x, tl.load(w + H, mask_w, 0.0), input_precision=PRECISION)
        bias = b1_ptr + neuron * 2 * H + o
        value = (value + tl.load(bias, mask_o, 0.0)[None, :]) / t1
        gate = (gate + tl.load(bias + H, mask_o, 0.0)[None, :]) / t1
        g = value * tl.sigmoid(gate)
        if DROP:
            g *= _hidden_scale(neuron, b, o, B, H, seed_ptr, site, p_drop)
        g = g.to(dtype).to(tl.float32)
        w2 = w2_ptr + neuron * 2 * H
        y0 = tl.sum(g * _column(w2, o, 0, mask_o)[None, :], axis=1)
        y1 = tl.sum(g * _column(w2, o, 1, mask_o)[None, :], axis=1)
    else:
        w1 = w1_ptr + neuron * 2 * M
        y0 = tl.sum(x.to(tl.float32) * _column(w1, m, 0, mask_m)[None, :], axis=1)
        y1 = tl.sum(x.to(tl.float32) * _column(w1, m, 1, mask_m)[None, :], axis=1)
    t2 = tl.load(t2_ptr)
    y0 = (y0 + tl.load(b2_ptr + neuron * 2)) / t2
    y1 = (y1 + tl.load(b2_ptr + neuron * 2 + 1)) / t2
    z = y0 * tl.sigmoid(y1)
    tl.store(z_ptr + b * D + neuron, z, mask_b)
    if NEXT:
        tl.store(x_ptr + b * stride_x + neuron, z.to(x_ptr.dtype.element_ty), mask_b)


@triton.jit(do_not_specialize=["site", "column", "B"])
def neurons_backward(
    dz_ptr, trace_ptr, w1_ptr, b1_ptr, t1_ptr, w2_ptr, b2_ptr, t2_ptr, dtrace_ptr, seed_ptr, site, p_drop, B, D, M, H,
    length, column, DEEP: tl.constexpr, DROP: tl.constexpr, PRECISION: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Adds to the gradient of the trace what this tick's activations ask of their M columns."""
    neuron = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    m, o = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_H)
    mask_b, mask_m, mask_o = b < B, m < M, o < H
    dtype = w1_ptr.dtype.element_ty
    mask = mask_b[:, None] & mask_m[None, :]
    x = _history(trace_ptr, neuron, b, m, mask, B, M, length, column, seed_ptr, site, p_drop, dtype, DROP)
    dz = tl.load(dz_ptr + b * D + neuron, mask_b, 0.0)
    t2 = tl.load(t2_ptr)
    if DEEP:
        mask_w = mask_m[:, None] & mask_o[None, :]
        w = w1_ptr + neuron * M * 2 * H + m[:, None] * 2 * H + o[None, :]
        w_value, w_gate = tl.load(w, mask_w, 0.0), tl.load(w + H, mask_w, 0.0)
        t1 = tl.load(t1_ptr)
        bias = b1_ptr + neuron * 2 * H + o
        value = (tl.dot(x, w_value, input_precision=PRECISION) + tl.load(bias, mask_o, 0.0)[None, :]) / t1
        gate = (tl.dot(x, w_gate, input_precision=PRECISION) + tl.load(bias + H, mask_o, 0.0)[None, :]) / t1
        gate = tl.sigmoid(gate)
        g = value * gate
        keep = 1.0
        if DROP:
            keep = _hidden_scale(neuron, b, o, B, H, seed_ptr, site, p_drop)
            g *= keep
        g = g.to(dtype).to(tl.float32)
        w2 = w2_ptr + neuron * 2 * H
        w20, w21 = _column(w2, o, 0, mask_o), _column(w2, o, 1, mask_o)
        y0 = (tl.sum(g * w20[None, :], axis=1) + tl.load(b2_ptr + neuron * 2)) / t2
        y1 = tl.sigmoid((tl.sum(g * w21[None, :], axis=1) + tl.load(b2_ptr + neuron * 2 + 1)) / t2)
        du0, du1 = dz * y1 / t2, dz * y0 * y1 * (1 - y1) / t2
        dg = (du0[:, None] * w20[None, :] + du1[:, None] * w21[None, :]) * keep / t1
        dvalue, dgate = dg * gate, dg * value * gate * (1 - gate)
        dx = tl.dot(dvalue.to(dtype), tl.trans(w_value), input_precision=PRECISION)
        dx += tl.dot(dgate.to(dtype), tl.trans(w_gate), input_precision=PRECISION)
    else:
        w1 = w1_ptr + neuron * 2 * M
        w10, w11 = _column(w1, m, 0, mask_m), _column(w1, m, 1, mask_m)
        wide = x.to(tl.float32)
        y0 = (tl.sum(wide * w10[None, :], axis=1) + tl.load(b2_ptr + neuron * 2)) / t2
        y1 = tl.sigmoid((tl.sum(wide * w11[None, :], axis=1) + tl.load(b2_ptr + neuron * 2 + 1)) / t2)
        du0, du1 = dz * y1 / t2, dz * y0 * y1 * (1 - y1) / t2
        dx = du0[:, None] * w10[None, :] + du1[:, None] * w11[None, :]
    if DROP:
        dx *= _history_scale(neuron, b, m, B, M, seed_ptr, site, p_drop)
    place = dtrace_ptr + (neuron * B + b)[:, None] * length + column + m[None, :]
    tl.store(place, tl.load(place, mask, 0.0) + dx, mask)


@triton.jit(do_not_specialize=["site0", "sites", "T", "B"])
def neurons_weights(
    dz_ptr, trace_ptr, w1_ptr, b1_ptr, t1_ptr, w2_ptr, b2_ptr, t2_ptr, dw1_ptr, db1_ptr, dt1_ptr, dw2_ptr, db2_ptr,
    dt2_ptr, seed_ptr, site0, sites, p_drop, T, B, D, M, H, length, DEEP: tl.constexpr, DROP: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """All gradients of one neuron's weights, over all ticks and samples."""
    neuron = tl.program_id(0).to(tl.int64)
    m, o = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_H)
    mask_m, mask_o = m < M, o < H
    dtype = w1_ptr.dtype.element_ty
    t1, t2 = tl.load(t1_ptr), tl.load(t2_ptr)
    b20, b21 = tl.load(b2_ptr + neuron * 2), tl.load(b2_ptr + neuron * 2 + 1)
    dt1 = tl.zeros((BLOCK_B,), tl.float32)
    dt2 = tl.zeros((BLOCK_B,), tl.float32)
    db20 = tl.zeros((BLOCK_B,), tl.float32)
    db21 = tl.zeros((BLOCK_B,), tl.float32)
    mask_w = mask_m[:, None] & mask_o[None, :]
    if DEEP:
        w = w1_ptr + neuron * M * 2 * H + m[:, None] * 2 * H + o[None, :]
        w_value, w_gate = tl.load(w, mask_w, 0.0), tl.load(w + H, mask_w, 0.0)
        b_value = tl.load(b1_ptr + neuron * 2 * H + o, mask_o, 0.0)
        b_gate = tl.load(b1_ptr + neuron * 2 * H + H + o, mask_o, 0.0)
        w2 = w2_ptr + neuron * 2 * H
        w20, w21 = _column(w2, o, 0, mask_o), _column(w2, o, 1, mask_o)
        dw_value = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
        dw_gate = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
        db_value = tl.zeros((BLOCK_H,), tl.float32)
        db_gate = tl.zeros((BLOCK_H,), tl.float32)
        dw20 = tl.zeros((BLOCK_H,), tl.float32)
        dw21 = tl.zeros((BLOCK_H,), tl.float32)
    else:
        w1 = w1_ptr + neuron * 2 * M
        w10, w11 = _column(w1, m, 0, mask_m), _column(w1, m, 1, mask_m)
        dw10 = tl.zeros((BLOCK_M,), tl.float32)
        dw11 = tl.zeros((BLOCK_M,), tl.float32)
    for t in range(T):
        for first in range(0, B, BLOCK_B):
            b = first + tl.arange(0, BLOCK_B)
            mask_b = b < B
            mask = mask_b[:, None] & mask_m[None, :]
            site = site0 + t * sites
            x = _history(trace_ptr, neuron, b, m, mask, B, M, length, t + 1, seed_ptr, site, p_drop, dtype, DROP)
            dz = tl.load(dz_ptr + (b + t * B).to(tl.int64) * D + neuron, mask_b, 0.0)
            if DEEP:
                value = (tl.dot(x, w_value, input_precision=PRECISION) + b_value[None, :]) / t1
                raw = (tl.dot(x, w_gate, input_precision=PRECISION) + b_gate[None, :]) / t1
                gate = tl.sigmoid(raw)
                g = value * gate
                keep = 1.0
                if DROP:
                    keep = _hidden_scale(neuron, b, o, B, H, seed_ptr, site, p_drop)
                    g *= keep
                g = g.to(dtype).to(tl.float32)
                y0 = (tl.sum(g * w20[None, :], axis=1) + b20) / t2
                y1 = (tl.sum(g * w21[None, :], axis=1) + b21) / t2
            else:
                wide = x.to(tl.float32)
                y0 = (tl.sum(wide * w10[None, :], axis=1) + b20) / t2
                y1 = (tl.sum(wide * w11[None, :], axis=1) + b21) / t2
            open_ = tl.sigmoid(y1)
            dy0, dy1 = dz * open_, dz * y0 * open_ * (1 - open_)
            dt2 -= (dy0 * y0 + dy1 * y1) / t2
            du0, du1 = dy0 / t2, dy1 / t2
            db20 += du0
            db21 += du1
            if DEEP:
                dw20 += tl.sum(g * du0[:, None], axis=0)
                dw21 += tl.sum(g * du1[:, None], axis=0)
                dg = (du0[:, None] * w20[None, :] + du1[:, None] * w21[None, :]) * keep
                dvalue, dgate = dg * gate, dg * value * gate * (1 - gate)
                dt1 -= tl.sum(dvalue * value + dgate * raw, axis=1) / t1
                dvalue, dgate = dvalue / t1, dgate / t1
                db_value += tl.sum(dvalue, axis=0)
                db_gate += tl.sum(dgate, axis=0)
                dw_value += tl.dot(tl.trans(x), dvalue.to(dtype), input_precision=PRECISION)
                dw_gate += tl.dot(tl.trans(x), dgate.to(dtype), input_precision=PRECISION)
            else:
                dw10 += tl.sum(wide * du0[:, None], axis=0)
                dw11 += tl.sum(wide * du1[:, None], axis=0)
    tl.store(dt2_ptr + neuron, tl.sum(dt2, axis=0))
    tl.store(db2_ptr + neuron * 2, tl.sum(db20, axis=0))
    tl.store(db2_ptr + neuron * 2 + 1, tl.sum(db21, axis=0))
    if DEEP:
        dw = dw1_ptr + neuron * M * 2 * H + m[:, None] * 2 * H + o[None, :]
        tl.store(dw, dw_value, mask_w)
        tl.store(dw + H, dw_gate, mask_w)
        tl.store(db1_ptr + neuron * 2 * H + o, db_value, mask_o)
        tl.store(db1_ptr + neuron * 2 * H + H + o, db_gate, mask_o)
        tl.store(dw2_ptr + neuron * 2 * H + o * 2, dw20, mask_o)
        tl.store(dw2_ptr + neuron * 2 * H + o * 2 + 1, dw21, mask_o)
        tl.store(dt1_ptr + neuron, tl.sum(dt1, axis=0))
    else:
        tl.store(dw1_ptr + neuron * 2 * M + m * 2, dw10, mask_m)
        tl.store(dw1_ptr + neuron * 2 * M + m * 2 + 1, dw11, mask_m)
