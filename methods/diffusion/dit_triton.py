"""The parts of a diffusion transformer's block on a GPU, forward and backward, so that little but its products touches memory.

In bf16 a block of width w moves about as many bytes between its products as they take time to compute. What is fused here:

    norm     x' = x + g (y + b);  h = LN(x') (1 + s) + m      one pass over the rows; backward one, with the sums over tokens
    attend   softmax(q k^T / sqrt(d)) v from packed (q, k, v)   backward writes their gradients packed, and the bias's
    mlp      W2 gelu(W1 h + b1)                               gelu and its derivative in their products (cublaslt.py)

Gradients of weights leave their products in float32; rows and products are in half precision. What gives h to the MLP writes a
column of ones beside it, so that the product that makes W1's gradient makes b1's, too. Values differ from the formulas of dit.py
by rounding only (tests/reliability/test_gpu.py).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from methods.diffusion import cublaslt

EPS = 1e-5
ONES = 8  # columns: rows begin at multiples of 16 bytes
LOG2E = 1.4426950408889634


# -- gated residual, layer norm, modulation
@triton.jit
def _norm(X, Y, B, GATE, SHIFT, SCALE, OUT, H, MEAN, RSTD, tokens, stride, eps, W: tl.constexpr, WIDE: tl.constexpr,
          BLOCK: tl.constexpr, FIRST: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    sample = row // tokens
    cols = tl.arange(0, BLOCK)
    inside = cols < W
    x = tl.load(X + row * W + cols, inside, 0.0).to(tl.float32)
    if not FIRST:
        y = tl.load(Y + row * W + cols, inside, 0.0).to(tl.float32) + tl.load(B + cols, inside, 0.0).to(tl.float32)
        x += tl.load(GATE + sample * stride + cols, inside, 0.0).to(tl.float32) * y
        x = x.to(OUT.dtype.element_ty).to(tl.float32)  # as it is stored: backward reads it
        tl.store(OUT + row * W + cols, x.to(OUT.dtype.element_ty), inside)
    mean = tl.sum(x, 0) / W
    centred = tl.where(inside, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / W + eps)
    scale = tl.load(SCALE + sample * stride + cols, inside, 0.0).to(tl.float32)
    shift = tl.load(SHIFT + sample * stride + cols, inside, 0.0).to(tl.float32)
    tl.store(H + row * WIDE + cols, (centred * rstd * (1.0 + scale) + shift).to(H.dtype.element_ty), inside)
    if WIDE > W:
        beside = tl.arange(0, 16)
        tl.store(H + row * WIDE + W + beside, tl.where(beside == 0, 1.0, 0.0).to(H.dtype.element_ty), beside < WIDE - W)
    tl.store(MEAN + row, mean)
    tl.store(RSTD + row, rstd)


@triton.jit
def _norm_backward(DX, DH, X, Y, B, GATE, SCALE, MEAN, RSTD, OUT, DY, SUMS, tokens, stride, W: tl.constexpr,
                   BLOCK: tl.constexpr, ROWS: tl.constexpr, R: tl.constexpr, FIRST: tl.constexpr):
    """ROWS tokens of one sample, R at a time. SUMS (samples, chunks, 4, W): of dh, dh x^, dx (y + b), dx."""
    chunk, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = (cols < W)[None, :]
    scale = 1.0 + tl.load(SCALE + sample * stride + cols, cols < W, 0.0).to(tl.float32)[None, :]
    sum_h = tl.zeros([BLOCK], tl.float32)
    sum_hx = tl.zeros([BLOCK], tl.float32)
    sum_xy = tl.zeros([BLOCK], tl.float32)
    sum_x = tl.zeros([BLOCK], tl.float32)
    if not FIRST:
        gate = tl.load(GATE + sample * stride + cols, cols < W, 0.0).to(tl.float32)[None, :]
        bias = tl.load(B + cols, cols < W, 0.0).to(tl.float32)[None, :]
    for begin in range(0, ROWS, R):
        rows = sample * tokens + chunk * ROWS + begin + tl.arange(0, R)
        at = rows[:, None] * W + cols[None, :]
        dh = tl.load(DH + at, inside, 0.0).to(tl.float32)
        x = tl.load(X + at, inside, 0.0).to(tl.float32)
        dx = tl.load(DX + at, inside, 0.0).to(tl.float32)
        rstd = tl.load(RSTD + rows)[:, None]
        hat = tl.where(inside, (x - tl.load(MEAN + rows)[:, None]) * rstd, 0.0)
        scaled = dh * scale
        along = tl.sum(scaled * hat, 1)[:, None] / W
        mean = tl.sum(scaled, 1)[:, None] / W
        dx += rstd * (scaled - mean - hat * along)
        dx = tl.where(inside, dx, 0.0)
        tl.store(OUT + at, dx.to(OUT.dtype.element_ty), inside)
        sum_h += tl.sum(dh, 0)
        sum_hx += tl.sum(dh * hat, 0)
        if not FIRST:
            y = tl.load(Y + at, inside, 0.0).to(tl.float32) + bias
            tl.store(DY + at, (dx * gate).to(DY.dtype.element_ty), inside)
            sum_xy += tl.sum(dx * y, 0)
            sum_x += tl.sum(dx, 0)
    to = SUMS + (sample * tl.num_programs(0) + chunk) * 4 * W + cols
    tl.store(to, sum_h, cols < W)
    tl.store(to + W, sum_hx, cols < W)
    tl.store(to + 2 * W, sum_xy, cols < W)
    tl.store(to + 3 * W, sum_x, cols < W)


@triton.jit
def _norm_sums(SUMS, GATE, OUT, BIAS, chunks, stride, W: tl.constexpr, BLOCK: tl.constexpr, FIRST: tl.constexpr):
    """SUMS (samples, chunks, 4, W) over chunks: OUT (samples, 3, W) of shift, scale, gate; BIAS (samples, W)."""
    sample, cols = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < W
    a = tl.zeros([BLOCK], tl.float32)
    b = tl.zeros([BLOCK], tl.float32)
    c = tl.zeros([BLOCK], tl.float32)
    d = tl.zeros([BLOCK], tl.float32)
    for chunk in range(chunks):
        at = SUMS + (sample * chunks + chunk) * 4 * W + cols
        a += tl.load(at, inside, 0.0)
        b += tl.load(at + W, inside, 0.0)
        if not FIRST:
            c += tl.load(at + 2 * W, inside, 0.0)
            d += tl.load(at + 3 * W, inside, 0.0)
    to = OUT + sample * 3 * W + cols
    tl.store(to, a.to(OUT.dtype.element_ty), inside)
    tl.store(to + W, b.to(OUT.dtype.element_ty), inside)
    if not FIRST:
        tl.store(to + 2 * W, c.to(OUT.dtype.element_ty), inside)
        tl.store(BIAS + sample * W + cols, d * tl.load(GATE + sample * stride + cols, inside, 0.0).to(tl.float32), inside)


@triton.jit
def _column_sums(X, OUT, rows, W, BLOCK: tl.constexpr, R: tl.constexpr):
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, rows, R):
        at = begin + tl.arange(0, R)
        total += tl.sum(tl.load(X + at[:, None] * W + cols[None, :], (at < rows)[:, None] & (cols < W)[None, :], 0.0), 0)
    tl.store(OUT + cols, total, cols < W)


def column_sums(x: Tensor) -> Tensor:
    """x (rows, w) float32 -> (w,): of the few rows that programs left, in one small launch."""
    out = torch.empty(x.shape[1], device=x.device)
    _column_sums[(triton.cdiv(x.shape[1], 32),)](x, out, *x.shape, 32, 64, num_warps=4)
    return out


NORM = dict(ROWS=64, R=8, num_warps=4)  # of backward; the fastest on an H100, like those of attention below


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, bias, gate, shift, scale, ones):
        n, tokens, w = x.shape
        wide = w + ONES if ones else w
        first = y is None
        assert shift.stride() == scale.stride() and (first or gate.stride() == shift.stride()) and shift.stride(1) == 1
        out, h = x if first else torch.empty_like(x), x.new_empty(n, tokens, wide)
        mean, rstd = (torch.empty(n * tokens, device=x.device) for _ in range(2))
        given = (x, y, bias, gate) if not first else (x, x, x, shift)
        _norm[(n * tokens,)](*given, shift, scale, out, h, mean, rstd, tokens, shift.stride(0), EPS, w, wide,
                             triton.next_power_of_2(w), first, num_warps=4)
        ctx.save_for_backward(out, y, bias, gate, scale, mean, rstd)
        return out, h[..., :w]

    @staticmethod
    @once_differentiable
    def backward(ctx, dx, dh):
        x, y, bias, gate, scale, mean, rstd = ctx.saved_tensors
        n, tokens, w = x.shape
        first = y is None
        rows, block = math.gcd(tokens, NORM["ROWS"]), triton.next_power_of_2(w)
        together = min(rows, NORM["R"], max(1, 8192 // block))
        chunks, stride = tokens // rows, scale.stride(0)
        out, dy = torch.empty_like(x), None if first else torch.empty_like(x)
        sums = torch.empty(n, chunks, 4, w, device=x.device)
        given = (x, x, x, scale) if first else (x, y, bias, gate)
        _norm_backward[(chunks, n)](dx.contiguous(), dh.contiguous(), *given, scale, mean, rstd, out, x if first else dy, sums,
                                    tokens, stride, w, block, rows, together, first, num_warps=NORM["num_warps"])
        modulation, dbias = scale.new_empty(n, 3, w), torch.empty(n, w, device=x.device)
        _norm_sums[(n, triton.cdiv(w, 256))](sums, given[-1], modulation, dbias, chunks, stride, w, 256, first)
        dshift, dscale, dgate = modulation.unbind(1)
        of_branch = (None, None, None) if first else (dy, column_sums(dbias), dgate)
        return (out, *of_branch, dshift, dscale, None)


def norm(x: Tensor, y: Tensor | None, bias: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor,
         ones: bool = False):
    """x, y (n, tokens, w), bias (w,), gate, shift, scale (n, w) -> (x', h); without y, x' = x. ones: h's rows lie ONES columns
    apart, the first of which holds ones, the others zeros."""
    return _Norm.apply(x, y, bias, gate, shift, scale, ones)


# -- attention
@triton.jit
def _attend(QKV, O, L, tokens, heads, scale, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Queries of one block of M tokens, all keys by N. L: log2 of the softmax's denominators, for backward."""
    block, head, sample = tl.program_id(0), tl.program_id(1) % heads, (tl.program_id(1) // heads).to(tl.int64)
    stride = 3 * heads * D
    base = QKV + sample * tokens * stride + head * D
    rows, d = block * M + tl.arange(0, M), tl.arange(0, D)
    q = tl.load(base + rows[:, None] * stride + d[None, :], (rows < tokens)[:, None], 0.0)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    out = tl.zeros([M, D], tl.float32)
    for begin in range(0, tokens, N):
        keys = begin + tl.arange(0, N)
        k = tl.load(base + heads * D + keys[None, :] * stride + d[:, None], (keys < tokens)[None, :], 0.0)
        v = tl.load(base + 2 * heads * D + keys[:, None] * stride + d[None, :], (keys < tokens)[:, None], 0.0)
        s = tl.where((keys < tokens)[None, :], tl.dot(q, k) * scale, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        p, kept = tl.exp2(s - new[:, None]), tl.exp2(top - new)
        total = total * kept + tl.sum(p, 1)
        out = tl.dot(p.to(v.dtype), v, out * kept[:, None])
        top = new
    at = O + (sample * tokens + rows[:, None]) * heads * D + head * D + d[None, :]
    tl.store(at, (out / total[:, None]).to(O.dtype.element_ty), (rows < tokens)[:, None])
    tl.store(L + tl.program_id(1).to(tl.int64) * tokens + rows, top + tl.log2(total), rows < tokens)


@triton.jit
def _attend_backward(QKV, O, L, DO, DQKV, SUMS, tokens, heads, scale, scale2, D: tl.constexpr, B: tl.constexpr,
                     S: tl.constexpr):
    """One block of B tokens, first as keys and values, then as queries, against all others by S."""
    block, head, sample = tl.program_id(0), tl.program_id(1) % heads, (tl.program_id(1) // heads).to(tl.int64)
    stride, wide = 3 * heads * D, heads * D
    base = QKV + sample * tokens * stride + head * D
    o = O + sample * tokens * wide + head * D
    do = DO + sample * tokens * wide + head * D
    lse = L + tl.program_id(1).to(tl.int64) * tokens
    own, d = block * B + tl.arange(0, B), tl.arange(0, D)
    inside = (own < tokens)[:, None]
    mine = own[:, None] * stride + d[None, :]

    k = tl.load(base + wide + mine, inside, 0.0)
    v = tl.load(base + 2 * wide + mine, inside, 0.0)
    dk = tl.zeros([B, D], tl.float32)
    dv = tl.zeros([B, D], tl.float32)
    for begin in range(0, tokens, S):
        rows = begin + tl.arange(0, S)
        there = (rows < tokens)[:, None]
        at = rows[:, None] * wide + d[None, :]
        q = tl.load(base + rows[:, None] * stride + d[None, :], there, 0.0)
        g = tl.load(do + at, there, 0.0)
        delta = tl.sum(g.to(tl.float32) * tl.load(o + at, there, 0.0).to(tl.float32), 1)
        p = tl.exp2(tl.dot(k, tl.trans(q)) * scale2 - tl.load(lse + rows, rows < tokens, float("inf"))[None, :])
        dv = tl.dot(p.to(g.dtype), g, dv)
        ds = p * (tl.dot(v, tl.trans(g)) - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk)
    dk = tl.where(inside, dk * scale, 0.0)
    dv = tl.where(inside, dv, 0.0)
    to = DQKV + sample * tokens * stride + head * D
    tl.store(to + wide + mine, dk.to(DQKV.dtype.element_ty), inside)
    tl.store(to + 2 * wide + mine, dv.to(DQKV.dtype.element_ty), inside)
    sums = SUMS + (sample * tl.num_programs(0) + block) * stride + head * D + d
    tl.store(sums + wide, tl.sum(dk, 0))
    tl.store(sums + 2 * wide, tl.sum(dv, 0))

    at = own[:, None] * wide + d[None, :]
    q_own = tl.load(base + mine, inside, 0.0)
    g_own = tl.load(do + at, inside, 0.0)
    delta_own = tl.sum(g_own.to(tl.float32) * tl.load(o + at, inside, 0.0).to(tl.float32), 1)
    top = tl.load(lse + own, own < tokens, float("inf"))
    dq = tl.zeros([B, D], tl.float32)
    for begin in range(0, tokens, S):
        rows = begin + tl.arange(0, S)
        there = (rows < tokens)[:, None]
        key = tl.load(base + wide + rows[:, None] * stride + d[None, :], there, 0.0)
        value = tl.load(base + 2 * wide + rows[:, None] * stride + d[None, :], there, 0.0)
        share = tl.exp2(tl.dot(q_own, tl.trans(key)) * scale2 - top[:, None])  # beyond the end key = 0: nothing is added
        slope = share * (tl.dot(g_own, tl.trans(value)) - delta_own[:, None])
        dq = tl.dot(slope.to(key.dtype), key, dq)
    dq = tl.where(inside, dq * scale, 0.0)
    tl.store(to + mine, dq.to(DQKV.dtype.element_ty), inside)
    tl.store(sums, tl.sum(dq, 0))


ATTEND = dict(M=64, N=64, num_warps=4, num_stages=3)
ATTEND_BACKWARD = dict(B=64, S=64, num_warps=4, num_stages=3)


def attention(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """qkv (n, tokens, 3 w) -> (n, tokens, w), and log2 of the denominators (n heads, tokens)."""
    n, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    d = width // heads
    out = torch.empty(n, tokens, width, device=qkv.device, dtype=qkv.dtype)
    lse = torch.empty(n * heads, tokens, device=qkv.device)
    _attend[(triton.cdiv(tokens, ATTEND["M"]), n * heads)](qkv, out, lse, tokens, heads, LOG2E / d ** 0.5, d, **ATTEND)
    return out, lse


def attention_backward(qkv, out, lse, gradient, heads: int) -> tuple[Tensor, Tensor]:
    """The gradient of qkv, and its sum over rows (3 w,) in float32."""
    n, tokens, width = out.shape
    d = width // heads
    blocks = triton.cdiv(tokens, ATTEND_BACKWARD["B"])
    dqkv, sums = torch.empty_like(qkv), torch.empty(n * blocks, 3 * width, device=qkv.device)
    _attend_backward[(blocks, n * heads)](qkv, out, lse, gradient.contiguous(), dqkv, sums, tokens, heads, d ** -0.5,
                                          LOG2E / d ** 0.5, d, **ATTEND_BACKWARD)
    return dqkv, column_sums(sums)


# -- a block's products, with the gradients of their weights in float32
def _weight_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """gradient (rows, outputs), x (rows, inputs) -> (outputs, inputs), float32."""
    return torch.mm(gradient.mT, x, out_dtype=torch.float32) if x.is_cuda else (gradient.mT @ x).float()


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, half, half_bias, heads):
        n, tokens, w = x.shape
        rows = x.view(-1, w)
        qkv = torch.addmm(half_bias, rows, half.mT).view(n, tokens, 3 * w)
        out, lse = attention(qkv, heads)
        ctx.heads = heads
        ctx.save_for_backward(rows, half, qkv, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        rows, half, qkv, out, lse = ctx.saved_tensors
        dqkv, bias = attention_backward(qkv, out, lse, gradient, ctx.heads)
        dqkv = dqkv.flatten(0, 1)
        return (dqkv @ half).view_as(out), _weight_gradient(dqkv, rows), bias, None, None, None


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, half):
        ctx.save_for_backward(x, half)
        return x @ half.mT

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, half = ctx.saved_tensors
        return gradient @ half, _weight_gradient(gradient.flatten(0, 1), x.flatten(0, 1)), None


class _MLP(torch.autograd.Function):
    """Of x that `norm` gave with ones beside it."""

    @staticmethod
    def forward(ctx, x, weight, bias, second, half, half_bias, last):
        n, tokens, w = x.shape
        rows = x.as_strided((n * tokens, w + ONES), (w + ONES, 1))
        if cublaslt.available():
            inner, before = cublaslt.gelu(rows[:, :w], half, half_bias)
        else:
            before = torch.addmm(half_bias, rows[:, :w], half.mT)
            inner = F.gelu(before, approximate="tanh")
        ctx.save_for_backward(rows, half, before, inner, last)
        return (inner @ last.mT).view(n, tokens, w)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        rows, half, before, inner, last = ctx.saved_tensors
        given = gradient.flatten(0, 1)
        if cublaslt.available():
            slope = cublaslt.gelu_backward(given, last, before)
        else:
            slope = torch.ops.aten.gelu_backward(given @ last, before, approximate="tanh")
        first, w = _weight_gradient(slope, rows), half.shape[1]
        return (slope @ half).view_as(gradient), first[:, :w], first[:, w], _weight_gradient(given, inner), None, None, None


class _Linear(torch.autograd.Function):
    """Of few rows and a large weight."""

    @staticmethod
    def forward(ctx, x, weight, bias, half, half_bias):
        ctx.save_for_backward(x, half)
        return torch.addmm(half_bias, x, half.mT)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, half = ctx.saved_tensors
        return gradient @ half, _weight_gradient(gradient, x), gradient.float().sum(0), None, None


def transformer(network, x: Tensor, signal: Tensor) -> Tensor:
    """The blocks of dit.py's `network` on x (n, tokens, w), modulated by signal (n, w), up to its last norm. The sum at a
    block's end is made by the norm that follows it."""
    *blocks, ends = halves(network, x.dtype)
    mods = network.modulations(_Linear.apply(signal.to(x.dtype), network.modulation.weight, network.modulation.bias, *ends))
    *mods, (shift, scale) = [m.unbind(1) for m in mods]
    y = bias = gate = None
    for block, m, half in zip(network.blocks, mods, blocks):
        x, h = norm(x, y, bias, gate, m[0], m[1])
        h = _Attend.apply(h, block.qkv.weight, block.qkv.bias, half[0], half[1], block.heads)
        x, h = norm(x, _Project.apply(h, block.out.weight, half[2]), block.out.bias, m[2], m[3], m[4], ones=True)
        y = _MLP.apply(h, block.rise.weight, block.rise.bias, block.fall.weight, *half[3:])
        bias, gate = block.fall.bias, m[5]
    return norm(x, y, bias, gate, shift, scale)[1]


@torch.no_grad()
def halves(network, dtype: torch.dtype) -> list[list[Tensor]]:
    """In `dtype`, by a few launches in all: each block's weights and the biases that its products add; the modulation's."""
    own = [[b.qkv.weight, b.qkv.bias, b.out.weight, b.rise.weight, b.rise.bias, b.fall.weight] for b in network.blocks]
    own.append([network.modulation.weight, network.modulation.bias])
    out = [[torch.empty_like(p, dtype=dtype) for p in parameters] for parameters in own]
    torch._foreach_copy_([p for some in out for p in some], [p for some in own for p in some])
    return out
