"""Patch discriminator of stage 2: which 16 x 16 regions of an image look real."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BlurDown(nn.Module):
    """Halve height and width (rounding up) after a fixed 4 x 4 binomial blur, so that nothing aliases.

    As much zero padding as the output needs; where it is odd, the larger part goes to the bottom and right.
    """

    kernel: Tensor

    def __init__(self):
        super().__init__()
        row = torch.tensor([1.0, 3.0, 3.0, 1.0])
        kernel = torch.outer(row, row)
        self.register_buffer("kernel", (kernel / kernel.sum())[None, None])

    def forward(self, x: Tensor) -> Tensor:
        channels, height, width = x.shape[1:]
        # Output i reads inputs 2i - before .. 2i - before + 3: two pixels too many for an even side, three for an odd.
        x = F.pad(x, (1, 1 + width % 2, 1, 1 + height % 2))
        kernel = self.kernel.to(x.dtype).expand(channels, 1, 4, 4)
        return F.conv2d(x, kernel, stride=2, groups=channels)


class NLayerDiscriminator(nn.Module):
    """Convolutional discriminator with blurred down-sampling; spec of the published stage 2.

    Args:
        channels: Channels of the first stage; each further stage doubles them. A multiple of 32.
        num_stages: How often the image is halved.
        grid_size: Side of the grid of logits, whatever the size of the image.
    """

    def __init__(self, channels: int = 128, num_stages: int = 3, grid_size: int = 16):
        super().__init__()
        self.block_in = nn.Sequential(nn.Conv2d(3, channels, 5, padding=2), nn.LeakyReLU(0.1))
        stages, inputs = [], channels
        for stage in range(num_stages):
            outputs = channels * 2**stage
            stages.append(
                nn.Sequential(
                    nn.Conv2d(inputs, outputs, 3, padding=1),
                    BlurDown(),
                    nn.GroupNorm(32, outputs, eps=1e-5),
                    nn.LeakyReLU(0.1),
                )
            )
            inputs = outputs
        self.blocks = nn.ModuleList(stages)
        self.pool = nn.AdaptiveMaxPool2d(grid_size)
        self.to_logits = nn.Sequential(
            nn.Conv2d(inputs, inputs, 1), nn.LeakyReLU(0.1), nn.Conv2d(inputs, 1, 5, padding=2)
        )

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, 1, grid, grid), high where `image` (B, 3, H, W) in [0, 1] looks real."""
        x = self.block_in(image)
        for block in self.blocks:
            x = block(x)
        return self.to_logits(self.pool(x))
