"""The arguments of the commands that evaluate."""

import argparse
from pathlib import Path
from typing import Any

from utils.evaluation.metrics import PERCEPTUAL_DISTANCES
from utils.files import sha256_of
from utils.inference import add_batch_size_argument, parse_batch_size

INCEPTION = "inception"


def add_arguments(
    parser: argparse.ArgumentParser, output_dir: str, auto_batch_size: bool = False, features: str = INCEPTION
) -> None:
    """The arguments of every command that scores images against their originals.

    Args:
        auto_batch_size: As of `add_common_arguments`.
        features: What --features is by default.
    """
    add_feature_arguments(parser, features)
    parser.add_argument(
        "--perceptual",
        nargs="+",
        choices=PERCEPTUAL_DISTANCES,
        default=["efficientnet_lite0"],
        help="perceptual distances (default: efficientnet_lite0, which needs no download)",
    )
    add_num_images_argument(parser)
    add_common_arguments(parser, output_dir, auto_batch_size)


def add_feature_arguments(parser: argparse.ArgumentParser, default: str = INCEPTION) -> None:
    parser.add_argument(
        "--features",
        default=default,
        metavar="NAME",
        help="network of the Frechet distance: inception (the FID), efficientnet_lite0 (needs no download, but its "
        "distance is no FID), dinov2, timm:NAME, or none (default: %(default)s)",
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
        add_batch_size_argument(parser, "images at a time", default_is=default)
    else:
        parser.add_argument("--batch_size", type=parse_batch_size, help=f"images at a time (default: {default})")
    add_device_argument(parser)


def add_num_images_argument(
    parser: argparse.ArgumentParser,
    which: str = "N images, evenly spaced ones of a folder or the first of every shard alike",
    default: str = "dataset.params.max_eval_examples of the configuration, or all",
) -> None:
    parser.add_argument("--num_images", type=parse_batch_size, metavar="N", help=f"only {which} (default: {default})")


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: %(default)s)")


def add_tokenizer_arguments(parser: argparse.ArgumentParser, required: bool) -> None:
    """--config and --checkpoint of a tokenizer, and a.b=c after the flags."""
    parser.add_argument(
        "--config", required=required, help="configuration of the tokenizer and of the evaluation images"
    )
    parser.add_argument("--checkpoint", help="hub id, folder, training output, file, or step (default: the config's)")
    add_overrides(parser)


def tokenizer_facts(arguments: argparse.Namespace, name: str | None, weights: Path | None) -> dict[str, Any]:
    """What a protocol says of those arguments, and of --precision and --compile.

    Args:
        name, weights: Of the tokenizer that was loaded, and its file; None where none was needed.
    """
    return {
        "config": arguments.config,
        "overrides": arguments.overrides,
        "checkpoint": name,
        "checkpoint_sha256": weights and sha256_of(weights),
        "tokenizer_precision": arguments.precision,
        "compiled": bool(arguments.compile),
    }


def add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="values of the configuration to change")
