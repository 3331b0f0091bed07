"""The networks behind the measures of an evaluation."""

import argparse
from typing import Any

from modeling.networks.frechet import SetFeatures, set_features
from modeling.networks.frozen import FrozenNetwork, sha256_of_tensors
from modeling.networks.perceptual import perceptual_measure
from utils.evaluation.comparison import Comparison, Measure, against
from utils.evaluation.metrics import MS_SSIM_SMALLEST, ms_ssim, psnr, ssim
from utils.processes import Processes


class Networks:
    """The networks of the measures that were asked for, loaded before the first image is read.

    Raises:
        UserError: Weights could not be loaded.
    """

    def __init__(self, arguments: argparse.Namespace, processes: Processes):
        self.processes = processes
        self.features = load_features(arguments, processes)
        self.perceptual: dict[str, FrozenNetwork] = {}
        for name in dict.fromkeys(arguments.perceptual):
            key = name if name.startswith("lpips_") else f"perceptual_{name}"
            self.perceptual[key] = perceptual_measure(name).to(processes.device)

    def comparison(self, image_size: int) -> Comparison:
        """An empty comparison of images whose shorter side has `image_size` pixels."""
        measures: dict[str, Measure] = {"psnr": against(psnr), "ssim": against(ssim)}
        if image_size >= MS_SSIM_SMALLEST:  # it is not defined for smaller images
            measures["ms_ssim"] = against(ms_ssim)
        measures |= {key: network.distance_to for key, network in self.perceptual.items()}
        return Comparison(measures, self.features, self.processes)

    def record(self) -> dict[str, Any]:
        """For the protocol."""
        return {
            "feature_network": feature_record(self.features),
            "perceptual_networks": {
                key: {"weights_sha256_of_tensors": sha256_of_tensors(network)}
                for key, network in self.perceptual.items()
            },
        }


def load_features(arguments: argparse.Namespace, processes: Processes) -> SetFeatures | None:
    if arguments.features == "none":
        return None
    return set_features(arguments.features, arguments.weights).to(processes.device)


def feature_record(network: SetFeatures | None) -> dict[str, Any] | None:
    if network is None:
        return None
    return {
        "distance": network.title,
        "dimension": network.dimension,
        "preparation": network.preparation,
        "weights_sha256": network.weights_sha256,
    }
