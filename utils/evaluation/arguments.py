"""The arguments of the commands that evaluate."""

import argparse
from pathlib import Path

from utils.errors import UserError
from utils.evaluation.metrics import PERCEPTUAL_DISTANCES
from utils.inference import add_batch_size_argument, parse_batch_size


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
        help="results on the same images to show beside these",
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
