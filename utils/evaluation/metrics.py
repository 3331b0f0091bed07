"""Distances between images, one number per image, over torchmetrics."""

import math

import torch
from torch import Tensor

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
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return peak_signal_noise_ratio(pixels, target, data_range=(0.0, 1.0), reduction="none", dim=(1, 2, 3))


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
    from torchmetrics.functional.image import structural_similarity_index_measure

    with torch.autocast(pixels.device.type, enabled=False):
        values = structural_similarity_index_measure(pixels, target, data_range=(0.0, 1.0), reduction="none")
    return values.reshape(len(pixels))


def ms_ssim(pixels: Tensor, target: Tensor) -> Tensor:
    """As `ssim`, over five scales, of images of at least 161 pixels a side."""
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    with torch.autocast(pixels.device.type, enabled=False):
        values = multiscale_structural_similarity_index_measure(pixels, target, data_range=(0.0, 1.0), reduction="none")
    return values.reshape(len(pixels))
