"""The networks behind the measures of an evaluation."""

import os
from collections.abc import Sequence
from typing import Any

from modeling.networks.frechet import SetFeatures, set_features
from modeling.networks.frozen import FrozenNetwork, sha256_of_tensors
from modeling.networks.perceptual import perceptual_measure
from utils.errors import UserError
from utils.evaluation.comparison import Comparison, Measure, against
from utils.evaluation.metrics import MS_SSIM_SMALLEST, ms_ssim, mse, psnr, ssim
from utils.processes import Processes


class Judges:
    """The networks of the measures that were asked for, loaded before the first image is read.

    Args:
        features: Network of the Frechet distance, for `set_features`; "none" for no such distance.
        weights: A file with its weights, where they cannot be downloaded.
        perceptual: Perceptual distances, for `perceptual_measure`.
        processes: The networks go to their device.

    Raises:
        UserError: Weights could not be loaded, or are of no network.
    """

    def __init__(
        self, features: str, weights: str | os.PathLike | None, perceptual: Sequence[str], processes: Processes
    ):
        self.processes = processes
        if features == "none" and weights is not None:
            raise UserError("--weights are of the network of --features, and that is none: leave out one of them")
        self.features = None if features == "none" else set_features(features, weights).to(processes.device)
        self.perceptual: dict[str, FrozenNetwork] = {}
        for name in dict.fromkeys(perceptual):
            key = name if name.startswith("lpips_") else f"perceptual_{name}"
            self.perceptual[key] = perceptual_measure(name).to(processes.device)

    def comparison(self, image_size: int) -> Comparison:
        """An empty comparison of images whose shorter side has `image_size` pixels."""
        measures: dict[str, Measure] = {"psnr": against(psnr), "mse": against(mse), "ssim": against(ssim)}
        if image_size >= MS_SSIM_SMALLEST:  # it is not defined for smaller images
            measures["ms_ssim"] = against(ms_ssim)
        measures |= {key: network.distance_to for key, network in self.perceptual.items()}
        return Comparison(measures, self.features, self.processes)

    def record(self) -> dict[str, Any]:
        """For the protocol."""
        return {
            "feature_network": None if self.features is None else feature_record(self.features),
            "perceptual_networks": {
                key: {"weights_sha256_of_tensors": sha256_of_tensors(network)}
                for key, network in self.perceptual.items()
            },
        }


def feature_record(network: SetFeatures) -> dict[str, Any]:
    """What a protocol says of the network of a Frechet distance."""
    return {
        "distance": network.title,
        "dimension": network.dimension,
        "preparation": network.preparation,
        "weights_sha256": network.weights_sha256,
    }
