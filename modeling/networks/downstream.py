"""The networks of the downstream evaluations: classes, CLIP embedding, depth, segments and objects of images."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from modeling.checkpoints.state import read_state_dict
from modeling.networks.efficientnet import PREPARATION, EfficientNetLite0
from modeling.networks.frozen import ImageNetwork, TimmNetwork, download, sha256_of_tensors
from utils.errors import UserError
from utils.evaluation.agreement import Detection, PerImage, Score, Segmentation, classification, depth, similarity
from utils.files import sha256_of

INSTALL = "pip install -c constraints.txt -e '.[downstream]' (in the root of the repository)"


class EfficientNetClassifier(ImageNetwork):
    """EfficientNet-Lite0 with its 1,000 ImageNet classes; needs no download."""

    preparation = PREPARATION

    def __init__(self):
        super().__init__()
        self.network = EfficientNetLite0(with_classifier=True)
        self.weights_sha256 = sha256_of_tensors(self.network)
        self.freeze()

    def look(self, images: Tensor) -> Tensor:
        """Logits (B, 1000)."""
        return self.network.pooled(images.float() / 255)


class TorchvisionNetwork(ImageNetwork):
    """A torchvision model with its default weights and the preparation that belongs to them.

    Args:
        name: torchvision's name of the model.
        kind: Its module in torchvision.models: "" (classification), "segmentation" or "detection".

    Raises:
        UserError: torchvision has no such model with weights, or the weights could not be loaded.
    """

    def __init__(self, name: str, kind: str):
        super().__init__()
        from torchvision import models

        names = models.list_models(getattr(models, kind) if kind else models)
        if name not in names:
            raise UserError(
                f"--model must be a {kind or 'classification'} model of torchvision, got {name}: {', '.join(names)}"
            )
        weights = models.get_model_weights(name).DEFAULT
        alternative = "take another --model" if kind else "take --model efficientnet_lite0, which needs no download"
        file = download(weights.url, f"torchvision's weights of {name}", alternative)
        read_state_dict(file)  # torchvision would unpickle anything: this refuses all but tensors
        self.network = models.get_model(name, weights=weights)  # finds them where `download` put them
        self.prepare = weights.transforms()
        self.num_classes = len(weights.meta["categories"])
        self.weights_sha256 = sha256_of(file)
        self.preparation = " ".join(repr(self.prepare).split())
        self.freeze()


class TorchvisionClassifier(TorchvisionNetwork):
    """Logits (B, classes)."""

    def __init__(self, name: str):
        super().__init__(name, "")

    def look(self, images: Tensor) -> Tensor:
        return self.network(self.prepare(images))


class TorchvisionSegmenter(TorchvisionNetwork):
    """The class of each pixel, (B, H, W)."""

    def __init__(self, name: str):
        super().__init__(name, "segmentation")

    def look(self, images: Tensor) -> Tensor:
        logits = self.network(self.prepare(images))["out"]
        return F.interpolate(logits, size=images.shape[-2:], mode="bilinear").argmax(dim=1)


class TorchvisionDetector(TorchvisionNetwork):
    """For each image `boxes` (k, 4) as x1, y1, x2, y2 in its pixels, `labels` (k,) and `scores` (k,)."""

    def __init__(self, name: str):
        super().__init__(name, "detection")

    def look(self, images: Tensor) -> list[dict[str, Tensor]]:
        return self.network(list(self.prepare(images)))


class HubNetwork(ImageNetwork):
    """A transformers model with its image processor.

    Args:
        name: Of a repository on the hub, or a folder with its files.

    Raises:
        UserError: transformers is not installed, or the model could not be loaded or is of another kind.
    """

    architecture: str  # in transformers

    def __init__(self, name: str):
        super().__init__()
        try:
            import transformers
        except ImportError as error:
            raise UserError(f"{name} needs the package transformers, which is not installed: {INSTALL}") from error
        transformers.logging.set_verbosity_error()  # what it reports of weights is checked below
        try:
            self.prepare = transformers.AutoImageProcessor.from_pretrained(name)
            self.network, loaded = getattr(transformers, self.architecture).from_pretrained(
                name, dtype="float32", output_loading_info=True
            )
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{name} could not be loaded as a {self.architecture} ({reason}): correct --model, connect to the "
                f"network, or fetch it elsewhere (hf download {name} --local-dir FOLDER) and give --model FOLDER"
            ) from error
        if loaded["missing_keys"]:  # transformers would go on with random values
            raise UserError(
                f"{name} is no {self.architecture}: it lacks {len(loaded['missing_keys'])} tensors, the first is "
                f"{min(loaded['missing_keys'])}"
            )
        self.weights_sha256 = sha256_of_tensors(self.network)
        self.preparation = f"{type(self.prepare).__name__} of {name}"
        self.freeze()

    def outputs(self, images: Tensor) -> Any:
        prepared = self.prepare(images=list(images), return_tensors="pt")
        return self.network(prepared["pixel_values"].to(images.device))


class ClipEmbedding(HubNetwork):
    """CLIP's embedding (arXiv 2103.00020), (B, D)."""

    architecture = "CLIPVisionModelWithProjection"

    def look(self, images: Tensor) -> Tensor:
        return self.outputs(images).image_embeds


class Depth(HubNetwork):
    """Depth in the units and at the resolution of the network, (B, h, w).

    Depth Anything's (arXiv 2401.10891) is relative and inverse: larger is nearer.
    """

    architecture = "AutoModelForDepthEstimation"

    def look(self, images: Tensor) -> Tensor:
        return self.outputs(images).predicted_depth


def classifier(name: str, weights: str | os.PathLike | None = None) -> ImageNetwork:
    """A network that gives logits: "efficientnet_lite0" (no download), "timm:NAME", or a torchvision model.

    Args:
        weights: A local file for a timm model.
    """
    if name.startswith("timm:"):
        return TimmNetwork(name.removeprefix("timm:"), weights)
    return EfficientNetClassifier() if name == "efficientnet_lite0" else TorchvisionClassifier(name)


class Task(NamedTuple):
    """One kind of downstream evaluation.

    Attributes:
        model: The network's name by default.
        load: From a name (and `weights`, a file, for timm's) to the network.
        score: From the network to an empty score of its predictions.
    """

    model: str
    load: Callable[..., ImageNetwork]
    score: Callable[[ImageNetwork], Score]


TASKS = {
    "classification": Task("convnext_base", classifier, lambda network: PerImage(classification)),
    "clip": Task("openai/clip-vit-base-patch32", ClipEmbedding, lambda network: PerImage(similarity)),
    "depth": Task("depth-anything/Depth-Anything-V2-Small-hf", Depth, lambda network: PerImage(depth)),
    "segmentation": Task("deeplabv3_resnet50", TorchvisionSegmenter, lambda network: Segmentation(network.num_classes)),
    "detection": Task("fasterrcnn_resnet50_fpn_v2", TorchvisionDetector, lambda network: Detection(INSTALL)),
}
