"""Distances between images, one number per image.

PSNR and SSIM are ours, and equal to torchmetrics' (tests/test_evaluation.py): importing torchmetrics takes two seconds,
which is half of the time of a command on one image.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

SSIM_SIGMA, SSIM_RADIUS = 1.5, 5  # pixels, of its Gaussian window
SSIM_SMALLEST = 2 * SSIM_RADIUS + 1  # pixels a side that the window needs
SSIM_K1, SSIM_K2 = 0.01, 0.03
MS_SSIM_SMALLEST = 161  # pixels a side that five scales of an 11-pixel window need

PERCEPTUAL_DISTANCES = (
    "efficientnet_lite0",
    "convnext_s",
    "lpips_alex",
    "lpips_vgg",
)


def to_uint8(pixels: Tensor) -> Tensor:
    """Images in [0, 1] (anything beyond is clamped) to uint8, by rounding."""
    return (pixels.float().clamp(0, 1) * 255).round().to(torch.uint8)


def psnr(pixels: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, (B,), of (B, 3, H, W) in [0, 1]; higher is better.

    The published mean over a set is the mean of these, not the PSNR of the mean error. Identical images give inf.
    """
    return -10 * mse(pixels.clamp(0, 1), target.clamp(0, 1)).log10()


def mse(pixels: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each image, (B,), of (B, 3, H, W) in [0, 1]."""
    return (pixels - target).square().flatten(1).mean(dim=1)


def psnr_of_mse(error: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error, such as that of a whole set of images."""
    return -10 * math.log10(error) if error else math.inf


def ssim(pixels: Tensor, target: Tensor) -> Tensor:
    """Structural similarity of each image, (B,), of (B, 3, H, W) in [0, 1]; 1 is identical (Wang et al., 2004).

    In float32 under any autocast: its variances are small differences, and 0.91 came out as 0.93 in bfloat16.
    """
    with torch.autocast(pixels.device.type, enabled=False):
        x, y = (
            F.pad(image.clamp(0, 1), [SSIM_RADIUS] * 4, mode="reflect") for image in (pixels.float(), target.float())
        )
        means = _blurred(torch.cat([x, y, x * x, y * y, x * y])).unflatten(0, (5, -1))
        mean_x, mean_y, mean_xx, mean_yy, mean_xy = means
        variances = (mean_xx - mean_x**2).clamp(min=0) + (mean_yy - mean_y**2).clamp(min=0)
        luminance = (2 * mean_x * mean_y + SSIM_K1**2) / (mean_x**2 + mean_y**2 + SSIM_K1**2)
        structure = (2 * (mean_xy - mean_x * mean_y) + SSIM_K2**2) / (variances + SSIM_K2**2)
        return (luminance * structure).flatten(1).mean(dim=1)


def _blurred(images: Tensor) -> Tensor:
    """(B, C, H, W) under a Gaussian window, without padding."""
    offsets = torch.arange(-SSIM_RADIUS, SSIM_RADIUS + 1, device=images.device, dtype=images.dtype)
    line = (-(offsets**2) / (2 * SSIM_SIGMA**2)).exp()
    line = line / line.sum()
    window = torch.outer(line, line).expand(images.shape[1], 1, -1, -1)
    return F.conv2d(images, window, groups=images.shape[1])


def ms_ssim(pixels: Tensor, target: Tensor) -> Tensor:
    """As `ssim`, over five scales, of images of at least 161 pixels a side."""
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    with torch.autocast(pixels.device.type, enabled=False):
        values = multiscale_structural_similarity_index_measure(pixels, target, data_range=(0.0, 1.0), reduction="none")
    return values.reshape(len(pixels))
