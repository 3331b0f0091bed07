"""What frozen networks share: they never train, look at 8-bit images, and get their weights with one clear error."""

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling.checkpoints.state import load_strict, read_state_dict
from utils.errors import UserError
from utils.files import sha256_of


class FrozenNetwork(nn.Module):
    """A network that is never trained: no gradients for its parameters, always in evaluation mode, float32."""

    def freeze(self) -> None:
        self.requires_grad_(False)
        self.to(memory_format=torch.channels_last)
        self.eval()

    def train(self, mode: bool = True) -> "FrozenNetwork":
        return super().train(False)


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

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, weights: str | os.PathLike | None = None, **options: Any):
        super().__init__()
        import timm
        from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

        try:
            self.network = timm.create_model(name, pretrained=weights is None, **options)
        except Exception as error:  # timm, the hub and the network raise errors of many classes
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"the timm model {name} could not be loaded ({reason}): correct the name, connect to the network, or "
                "give --weights FILE"
            ) from error
        if weights is not None:
            state = read_state_dict(weights)
            if isinstance(self.network, VisionTransformer):  # timm resamples positions only of what it downloads
                state = checkpoint_filter_fn(state, self.network)
            if options.get("num_classes") == 0:  # timm's files hold the classifier too
                wanted = self.network.state_dict()
                state = {key: value for key, value in state.items() if key in wanted}
            load_strict(self.network, state, weights)
        settings = timm.data.resolve_model_data_config(self.network)
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
    """The file of `url` in torch.hub's cache, fetched first if it is not there.

    Args:
        what: What it is, and
        alternative: what else can be done, both for the error.
    """
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
