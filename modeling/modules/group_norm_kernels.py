"""GroupNorm and SiLU in one, forward and backward: the Triton kernels of `group_norm.py`.

Tensors are channels-last: an image is S rows (positions) of C channels. A program reads one part of an image's rows,
tile by tile, and computes in float32; what comes in and goes out has the type of `x`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # numbers that a program holds of a tensor at a time: 32 a thread
MOST_PARTS = 64  # of an image


@triton.jit
def _moments(x, means, squares, S, PART, C: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr):
    """Mean of each group of a part's numbers, and the sum of squares of their distance to it."""
    image, part = tl.program_id(0), tl.program_id(1)
    first, last = part * PART, tl.minimum(part * PART + PART, S)
    channels = tl.arange(0, C)
    x += image.to(tl.int64) * S * C + channels[None, :]
    shift = tl.load(x + first * C).to(tl.float32)  # (1, C): numbers near the mean, so that no difference is lost
    sums, sums_of_squares = tl.zeros([ROWS, C], tl.float32), tl.zeros([ROWS, C], tl.float32)
    for start in range(first, last, ROWS):
        rows = start + tl.arange(0, ROWS)[:, None]
        shifted = tl.where(rows < last, tl.load(x + rows * C, mask=rows < last).to(tl.float32) - shift, 0.0)
        sums += shifted
        sums_of_squares += shifted * shifted
    count = (last - first).to(tl.float32)
    moved = tl.sum(sums, 0, keep_dims=True) / count  # (1, C)
    mean = tl.reshape(shift + moved, [G, C // G])
    square = tl.reshape(tl.sum(sums_of_squares, 0, keep_dims=True) - count * moved * moved, [G, C // G])
    group_mean = tl.sum(mean, 1, keep_dims=True) / (C // G)
    distance = mean - group_mean
    at = (image * tl.num_programs(1) + part) * G + tl.arange(0, G)
    tl.store(means + at, tl.reshape(group_mean, [G]))
    tl.store(squares + at, tl.sum(square + count * distance * distance, 1))


@triton.jit
def _merge(means, squares, mean, scale, S, PART, parts, eps, C: tl.constexpr, G: tl.constexpr, PARTS: tl.constexpr):
    """Mean of each group of an image, and one over its standard deviation, from those of the parts."""
    image = tl.program_id(0)
    part, group = tl.arange(0, PARTS)[:, None], tl.arange(0, G)[None, :]
    at = (image * parts + part) * G + group
    count = tl.where(part < parts, tl.minimum(PART, S - part * PART), 0).to(tl.float32)
    part_mean = tl.load(means + at, mask=part < parts, other=0.0)
    group_mean = tl.sum(part_mean * count, 0, keep_dims=True) / S
    distance = part_mean - group_mean
    square = tl.load(squares + at, mask=part < parts, other=0.0) + (C // G) * count * distance * distance
    at = image * G + tl.arange(0, G)
    tl.store(mean + at, tl.reshape(group_mean, [G]))
    tl.store(scale + at, 1 / tl.sqrt(tl.sum(square, 0) / (S * (C // G)) + eps))


@triton.jit
def _of_channels(values, image, C: tl.constexpr, G: tl.constexpr):
    """The numbers (B, G) of an image's groups, one for each channel, (1, C)."""
    return tl.load(values + image * G + tl.arange(0, C) // (C // G))[None, :]


@triton.jit
def _normalise(x, weight, bias, mean, scale, y, S, PART, C: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr):
    """y = SiLU(GroupNorm(x)) of a part."""
    image, part = tl.program_id(0), tl.program_id(1)
    last = tl.minimum(part * PART + PART, S)
    channels = tl.arange(0, C)[None, :]
    centre, factor = _of_channels(mean, image, C, G), _of_channels(scale, image, C, G) * tl.load(weight + channels)
    offset = tl.load(bias + channels)
    begin = image.to(tl.int64) * S * C + channels
    for start in range(part * PART, last, ROWS):
        rows = start + tl.arange(0, ROWS)[:, None]
        value = tl.load(x + begin + rows * C, mask=rows < last).to(tl.float32)
        value = (value - centre) * factor + offset
        tl.store(y + begin + rows * C, (value * tl.sigmoid(value)).to(y.dtype.element_ty), mask=rows < last)


@triton.jit
def _before_silu(x, gradient, weight, bias, centre, scale, mask):
    """The normalised numbers of a tile, and the gradient of what SiLU reads; 0 outside the mask."""
    normalised = (tl.load(x, mask=mask, other=0.0).to(tl.float32) - centre) * scale
    value = normalised * weight + bias
    sigmoid = tl.sigmoid(value)
    slope = sigmoid * (1 + value * (1 - sigmoid))
    return normalised, tl.load(gradient, mask=mask, other=0.0).to(tl.float32) * slope


@triton.jit
def _sum_gradients(
    x, gradient, weight, bias, mean, scale, sums, S, PART, C: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr
):
    """Of each channel of a part: the sum of the gradients of what SiLU reads, and of them times the normalised."""
    image, part = tl.program_id(0), tl.program_id(1)
    last = tl.minimum(part * PART + PART, S)
    channels = tl.arange(0, C)[None, :]
    centre, factor = _of_channels(mean, image, C, G), _of_channels(scale, image, C, G)
    gain, offset = tl.load(weight + channels), tl.load(bias + channels)
    begin = image.to(tl.int64) * S * C + channels
    plain, weighted = tl.zeros([ROWS, C], tl.float32), tl.zeros([ROWS, C], tl.float32)
    for start in range(part * PART, last, ROWS):
        rows = start + tl.arange(0, ROWS)[:, None]
        at = begin + rows * C
        normalised, inner = _before_silu(x + at, gradient + at, gain, offset, centre, factor, rows < last)
        plain += inner
        weighted += inner * normalised
    at = (image * tl.num_programs(1) + part) * 2 * C + tl.arange(0, C)
    tl.store(sums + at, tl.sum(plain, 0))
    tl.store(sums + at + C, tl.sum(weighted, 0))


@triton.jit
def _spread_gradients(
    x, gradient, weight, bias, mean, scale, plain, weighted, out, S, PART,
    C: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The gradient of x, from the group's means of what `_sum_gradients` sums, times the weights."""
    image, part = tl.program_id(0), tl.program_id(1)
    last = tl.minimum(part * PART + PART, S)
    channels = tl.arange(0, C)[None, :]
    centre, factor = _of_channels(mean, image, C, G), _of_channels(scale, image, C, G)
    group_plain, group_weighted = _of_channels(plain, image, C, G), _of_channels(weighted, image, C, G)
    gain, offset = tl.load(weight + channels), tl.load(bias + channels)
    begin = image.to(tl.int64) * S * C + channels
    for start in range(part * PART, last, ROWS):
        rows = start + tl.arange(0, ROWS)[:, None]
        at = begin + rows * C
        normalised, inner = _before_silu(x + at, gradient + at, gain, offset, centre, factor, rows < last)
        value = factor * (inner * gain - group_plain - normalised * group_weighted)
        tl.store(out + at, value.to(out.dtype.element_ty), mask=rows < last)


def _sizes(x: Tensor, groups: int) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid of programs, and what the kernels of tiles are told."""
    batch, channels, positions = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    rows = max(1, TILE // channels)
    tiles = triton.cdiv(triton.cdiv(positions, rows), MOST_PARTS)  # of a part
    sizes = {"S": positions, "PART": tiles * rows, "C": channels, "G": groups, "ROWS": rows}
    return (batch, triton.cdiv(positions, tiles * rows)), sizes


class GroupNormSiLU(torch.autograd.Function):
    """SiLU(GroupNorm(x)) of (B, C, H, W); C and the number of groups are powers of two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        grid, sizes = _sizes(x, groups)
        batch, parts = grid
        means, squares = x.new_empty(2, batch, parts, groups, dtype=torch.float32)
        mean, scale = x.new_empty(2, batch, groups, dtype=torch.float32)
        y = torch.empty_like(x, memory_format=torch.channels_last)
        with torch.cuda.device_of(x):
            _moments[grid](x, means, squares, **sizes)
            merged = {name: sizes[name] for name in ("S", "PART", "C", "G")}
            _merge[(batch,)](
                means, squares, mean, scale, parts=parts, eps=eps, PARTS=triton.next_power_of_2(parts), **merged
            )
            _normalise[grid](x, weight, bias, mean, scale, y, **sizes)
        ctx.save_for_backward(x, weight, bias, mean, scale)
        ctx.groups = groups
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, scale = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        grid, sizes = _sizes(x, ctx.groups)
        sums = x.new_empty(*grid, 2, x.shape[1], dtype=torch.float32)
        given = x, gradient, weight, bias, mean, scale
        with torch.cuda.device_of(x):
            _sum_gradients[grid](*given, sums, **sizes)
            plain, weighted = sums.sum(1).unbind(1)  # (B, C)
            in_group = sizes["S"] * x.shape[1] // ctx.groups
            means = [(one * weight).view(len(x), ctx.groups, -1).sum(-1) / in_group for one in (plain, weighted)]
            out = torch.empty_like(x, memory_format=torch.channels_last)
            _spread_gradients[grid](*given, *means, out, **sizes)
        return out, weighted.sum(0).to(weight.dtype), plain.sum(0).to(bias.dtype), None, None
