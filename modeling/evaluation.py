"""What the commands that evaluate share: their arguments, and the networks behind the measures."""

import argparse
from pathlib import Path
from typing import Any

from modeling.modules.features import (
    PERCEPTUAL_DISTANCES,
    FrozenNetwork,
    SetFeatures,
    perceptual_measure,
    set_features,
    sha256_of_tensors,
)
from utils.cli import UserError
from utils.evaluation.comparison import Comparison, Measure, against
from utils.evaluation.metrics import MS_SSIM_SMALLEST, ms_ssim, psnr, ssim
from utils.inference import add_batch_size_argument, parse_batch_size
from utils.processes import Processes


def add_arguments(parser: argparse.ArgumentParser, output_dir: str, auto_batch_size: bool = False) -> None:
    """The arguments of every command that evaluates."""
    add_feature_arguments(parser)
    parser.add_argument(
        "--perceptual",
        nargs="+",
        choices=PERCEPTUAL_DISTANCES,
        default=["efficientnet_lite0"],
        help="perceptual distances (default: efficientnet_lite0, which needs no download)",
    )
    add_common_arguments(parser, output_dir, auto_batch_size)


def add_feature_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--features",
        default="inception",
        metavar="NAME",
        help="network of the Frechet distance: inception (the FID, default), efficientnet_lite0 (needs no download, "
        "but its distance is no FID), dinov2, timm:NAME, or none",
    )
    parser.add_argument("--weights", metavar="FILE", help="weights of that network, where they cannot be downloaded")


def add_beside_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--beside",
        nargs="+",
        default=[],
        type=_results_file,
        metavar="FILE",
        help="results on the same pictures to show beside these",
    )


def _results_file(path: str) -> str:
    """Before the work, which may take hours."""
    if not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {path} (values a.b=c stand before --beside)")
    return path


def add_common_arguments(parser: argparse.ArgumentParser, output_dir: str, auto_batch_size: bool = False) -> None:
    """--output_dir, --batch_size and --device; with `auto_batch_size` a command whose --batch_size may be auto."""
    parser.add_argument("--output_dir", default=output_dir, help="where results go (default: %(default)s)")
    default = "the configuration's, or 64"
    if auto_batch_size:
        add_batch_size_argument(parser, "images at once", default_is=default)
    else:
        parser.add_argument("--batch_size", type=parse_batch_size, help=f"images at once (default: {default})")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:N or mps")


def parse_lengths(text: str) -> list[int]:
    """ "1,4,16" as [1, 4, 16], sorted, each once; which of them can be decoded is the model's to say."""
    try:
        return sorted({int(word) for word in text.split(",")})
    except ValueError as error:
        raise UserError(f"--lengths takes whole numbers such as 1,4,16, got {text}") from error


class Networks:
    """The networks of the measures that were asked for, loaded before the first image is read.

    Raises:
        UserError: Weights cannot be had.
    """

    def __init__(self, arguments: argparse.Namespace, processes: Processes):
        self.processes = processes
        self.features = load_features(arguments, processes)
        self.perceptual: dict[str, FrozenNetwork] = {}
        for name in dict.fromkeys(arguments.perceptual):
            key = name if name.startswith("lpips_") else f"perceptual_{name}"
            self.perceptual[key] = perceptual_measure(name).to(processes.device)

    def comparison(self, image_size: int) -> Comparison:
        """An empty comparison of pictures whose shorter side has `image_size` pixels."""
        measures: dict[str, Measure] = {"psnr": against(psnr), "ssim": against(ssim)}
        if image_size >= MS_SSIM_SMALLEST:  # it is not defined for smaller pictures
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
