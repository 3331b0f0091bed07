"""Convolutional encoder and decoder of the pixel VQGAN (MaskGIT, arXiv 2202.04200, section 3.1)."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from modeling.modules.group_norm import has_kernels, norm_silu

LAYOUT = torch.channels_last  # several times faster than the default on CPUs and on tensor cores


def _conv(inputs: int, outputs: int, kernel_size: int = 3, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel_size, padding=kernel_size // 2, bias=bias)


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


def _enlarged(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """A 3x3 convolution of `x` enlarged twice by nearest neighbour.

    On CUDA, and for inference on CPUs, as one transposed convolution, whose 4x4 kernel is the sum of the 3x3 one at the
    four places of a doubled pixel: 4/9 of the arithmetic, half of the time, and no enlarged `x` to keep for gradients.
    """
    if x.device.type != "cuda" and (x.device.type != "cpu" or torch.is_grad_enabled()):
        return conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    return _enlarged_by_transposing(x, conv)


def _enlarged_by_transposing(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """`_enlarged` as one transposed convolution; gradients flow to both arguments."""
    weight = rearrange(conv.weight, "o i h w -> h w i o").flip(0, 1).contiguous()  # (3, 3, inputs, outputs)
    # Padded first: of additions to slices torch.compile makes an expression that takes it more than a minute.
    kernel = F.pad(weight, (0, 0, 0, 0, 0, 1, 0, 1))  # (4, 4, inputs, outputs)
    for row, column in ((0, 1), (1, 0), (1, 1)):
        kernel += F.pad(weight, (0, 0, 0, 0, column, 1 - column, row, 1 - row))
    return F.conv_transpose2d(x, rearrange(kernel, "h w i o -> i o h w"), conv.bias, stride=2, padding=1)


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice, beside a shortcut.

    Where channels change, the shortcut convolution reads the block's own output, not its input: the published
    weights were trained so.
    """

    def __init__(self, inputs: int, outputs: int, norm_groups: int):
        super().__init__()
        self.norm1 = _norm(inputs, norm_groups)
        self.conv1 = _conv(inputs, outputs)
        self.norm2 = _norm(outputs, norm_groups)
        self.conv2 = _conv(outputs, outputs)
        self.nin_shortcut = _conv(outputs, outputs, kernel_size=1) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(norm_silu(x, self.norm1))
        h = self.conv2(norm_silu(h, self.norm2))
        return (x if self.nin_shortcut is None else self.nin_shortcut(h)) + h


class Level(nn.Module):
    """Residual blocks at one resolution and, going up, the convolution after the enlargement."""

    def __init__(self, inputs: int, outputs: int, num_res_blocks: int, norm_groups: int, upsample: bool = False):
        super().__init__()
        self.block = nn.Sequential(
            *(ResidualBlock(inputs if index == 0 else outputs, outputs, norm_groups) for index in range(num_res_blocks))
        )
        self.upsample_conv = _conv(outputs, outputs, bias=True) if upsample else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        return x if self.upsample_conv is None else _enlarged(x, self.upsample_conv)

    def compile(self, *arguments: Any, **options: Any) -> None:
        """As `nn.Module.compile`, but not where `norm_silu` is a kernel: that is as fast, and needs no minute."""
        if not has_kernels(next(self.parameters()).device):
            super().compile(*arguments, **options)


class ConvEncoder(nn.Module):
    """Image to a grid of vectors: a level per multiplier, halved between levels by average pooling.

    Args:
        channels: Channels at full resolution, a multiple of `norm_groups`.
        channel_multipliers: One per level, finest first.
        num_res_blocks: Residual blocks a level.
        latent_channels: Channels of the output.
        norm_groups: Groups of each GroupNorm. With as many as there are channels, each loses its mean, and the
            network what colour an image has all over.
    """

    def __init__(
        self,
        *,
        channels: int,
        channel_multipliers: Sequence[int],
        num_res_blocks: int,
        latent_channels: int,
        norm_groups: int = 32,
    ):
        super().__init__()
        widths = [channels * multiplier for multiplier in (1, *channel_multipliers)]
        self.conv_in = _conv(3, channels)
        self.down = nn.ModuleList(
            Level(inputs, outputs, num_res_blocks, norm_groups)
            for inputs, outputs in zip(widths[:-1], widths[1:], strict=True)
        )
        self.mid = nn.Sequential(*(ResidualBlock(widths[-1], widths[-1], norm_groups) for _ in range(num_res_blocks)))
        self.norm_out = _norm(widths[-1], norm_groups)
        self.conv_out = _conv(widths[-1], latent_channels, kernel_size=1, bias=True)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, P, P) to (B, latent_channels, G, G), G = P / 2^(levels - 1)."""
        x = self.conv_in(pixels.contiguous(memory_format=LAYOUT))
        for index, level in enumerate(self.down):
            x = level(x if index == 0 else F.avg_pool2d(x, 2))
        return self.conv_out(norm_silu(self.mid(x), self.norm_out))


class ConvDecoder(nn.Module):
    """Grid of vectors to an image; arguments as for `ConvEncoder`."""

    def __init__(
        self,
        *,
        channels: int,
        channel_multipliers: Sequence[int],
        num_res_blocks: int,
        latent_channels: int,
        norm_groups: int = 32,
    ):
        super().__init__()
        widths = [channels * multiplier for multiplier in (*channel_multipliers, channel_multipliers[-1])]
        self.conv_in = _conv(latent_channels, widths[-1], bias=True)
        self.mid = nn.Sequential(*(ResidualBlock(widths[-1], widths[-1], norm_groups) for _ in range(num_res_blocks)))
        self.up = nn.ModuleList(
            Level(widths[index + 1], widths[index], num_res_blocks, norm_groups, upsample=index > 0)
            for index in range(len(channel_multipliers))
        )
        self.norm_out = _norm(widths[0], norm_groups)
        self.conv_out = _conv(widths[0], 3, bias=True)

    def forward(self, z: Tensor) -> Tensor:
        """(B, latent_channels, G, G) to an unclamped image (B, 3, P, P)."""
        x = self.mid(self.conv_in(z.contiguous(memory_format=LAYOUT)))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(norm_silu(x, self.norm_out))
