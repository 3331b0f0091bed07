"""The flags that say what is written of reconstructions, and what instead of them."""

import argparse

from utils.errors import UserError
from utils.evaluation.image_formats import Storage, available
from utils.evaluation.reconstruction_files import Wanted
from utils.inference import parse_lengths

STORED_AS = {"jp2": "jpeg2000", "jpg": "jpeg", "webp": "webp"}  # flags, and the formats that they mean


def add_wanted_arguments(parser: argparse.ArgumentParser) -> None:
    """What `wanted_of` reads."""
    lengths = parser.add_mutually_exclusive_group()
    lengths.add_argument("--length", type=int, help="tokens to decode from (default: all)")
    lengths.add_argument("--lengths", help="several, such as 8,32,256: encoded once, decoded at each")
    parser.add_argument("--tokens", action="store_true", help="also tokens.npz: tokens (n, N) and keys")
    parser.add_argument("--labels", action="store_true", help="also labels.npy: class ids, -1 where there is none")
    parser.add_argument("--png", action="store_true", help="also png/000000.png, ..., in the order of images.npy")
    parser.add_argument(
        "--save_raw", action="store_true", help="also raw.npy: the decoder's output, float32, unclamped"
    )
    parser.add_argument("--without_image", action="store_true", help="no images.npy: tokens and labels only")


def add_storage_arguments(parser: argparse.ArgumentParser) -> None:
    """What `storage_of` reads."""
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--original", action="store_true", help="the cropped originals instead of reconstructions")
    instead.add_argument("--jp2", action="store_true", help="originals through JPEG 2000")
    instead.add_argument("--jpg", action="store_true", help="originals through JPEG")
    instead.add_argument("--webp", action="store_true", help="originals through WebP")
    parser.add_argument(
        "--jp2_compression_rate", type=float, default=100, help="raw size over file size (default: %(default)s)"
    )
    parser.add_argument("--jpg_compression_rate", type=int, default=75, help="quality 0-100 (default: %(default)s)")
    parser.add_argument("--webp_compression_rate", type=int, default=75, help="quality 0-100 (default: %(default)s)")


def check(arguments: argparse.Namespace) -> None:
    """Refuse flags that exclude each other, and rates that no format has."""
    asks_for_length = arguments.lengths is not None or arguments.length is not None
    is_decoded = not (stored_as(arguments) or arguments.original)
    if not is_decoded and (asks_for_length or arguments.save_raw):
        raise UserError("--length, --lengths and --save_raw are for the tokenizer's own images: leave them out here")
    if arguments.without_image:
        if arguments.png or arguments.save_raw or not is_decoded or asks_for_length:
            raise UserError("--without_image writes no images: leave out what asks for some")
        if not (arguments.tokens or arguments.labels):
            raise UserError("--without_image leaves nothing to write: add --tokens or --labels")
    for name, lowest in (("jp2_compression_rate", 1), ("jpg_compression_rate", 0), ("webp_compression_rate", 0)):
        value = getattr(arguments, name)
        if value < lowest or (value > 100 and name != "jp2_compression_rate"):
            raise UserError(f"--{name} must be {'1 or more' if lowest else 'in 0..100'}, got {value}")


def wanted_of(arguments: argparse.Namespace) -> Wanted:
    """What is to be written. Whether the tokenizer has the lengths is not known yet."""
    lengths = parse_lengths(arguments.lengths) if arguments.lengths else [arguments.length]
    return Wanted(
        [] if arguments.without_image else lengths,
        apart=arguments.lengths is not None,
        raw=arguments.save_raw,
        tokens=arguments.tokens,
        labels=arguments.labels,
        png=arguments.png,
    )


def stored_as(arguments: argparse.Namespace) -> str | None:
    """The image format that was asked for, by its flag."""
    return next((name for name in STORED_AS if getattr(arguments, name)), None)


def storage_of(arguments: argparse.Namespace) -> Storage | None:
    """What gives the originals, plainly or as a format stores them, where these are asked for."""
    if arguments.original:
        return Storage(None, 0)
    name = stored_as(arguments)
    return Storage(available(STORED_AS[name]), getattr(arguments, f"{name}_compression_rate")) if name else None
