"""Write what a tokenizer makes of the evaluation images: images.npy, tokens.npz, labels.npy, all sorted by key.

  python3 scripts/reconstruct_tokenizer.py --config configs/fashion/eval.yaml --length=8 --output_dir DIR
  accelerate launch --num_processes 4 scripts/reconstruct_tokenizer.py --config configs/eval/one-d-piece_s256.yaml \\
      --lengths 8,32,256 --output_dir DIR --tokens --labels

images.npy is (n, P, P, 3) uint8, rounded. With --lengths each length has a folder of its own, DIR/length_8 and so on.
--original, --jp2, --jpg and --webp write the cropped originals, or what an image format leaves of them, in place of the
tokenizer's images. The files are the same for any number of processes; with --precision fp64 also for any
--batch_size and device, which in fp32 move about one value in a thousand by one grey level.
"""

from utils.cli import Parser, run  # first, so that Ctrl-C ends this quietly from here on

# isort: split
import argparse
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from modeling.checkpoints.locate import Located
from modeling.titok import TiTok
from modeling.tokenizers import load_tokenizer, reconstruct
from utils.config import load_config
from utils.errors import UserError
from utils.evaluation.arguments import (
    add_device_argument,
    add_num_images_argument,
    add_tokenizer_arguments,
    tokenizer_facts,
)
from utils.evaluation.image_formats import Storage, available
from utils.evaluation.reconstruction_files import RECORD, Length, Made, ReconstructionFiles, keys_text
from utils.evaluation.report import write_results
from utils.evaluation.session import Session
from utils.images import to_array
from utils.inference import (
    AUTO,
    DOUBLE,
    Arithmetic,
    add_batch_size_argument,
    add_speed_arguments,
    check_lengths,
    choose_batch_size,
    parse_lengths,
    prepared,
)
from utils.tokens import TOKENS_FILE

FORMATS = {"jp2": "jpeg2000", "jpg": "jpeg", "webp": "webp"}


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    add_tokenizer_arguments(parser, required=True)
    parser.add_argument("--output_dir", required=True)
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
    parser.add_argument("--dry_run", action="store_true", help="one batch a process only, to try the command out")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--original", action="store_true", help="the cropped originals in place of reconstructions")
    instead.add_argument("--jp2", action="store_true", help="originals through JPEG 2000")
    instead.add_argument("--jpg", action="store_true", help="originals through JPEG")
    instead.add_argument("--webp", action="store_true", help="originals through WebP")
    parser.add_argument(
        "--jp2_compression_rate", type=float, default=100, help="raw size over file size (default: %(default)s)"
    )
    parser.add_argument("--jpg_compression_rate", type=int, default=75, help="quality 0-100 (default: %(default)s)")
    parser.add_argument("--webp_compression_rate", type=int, default=75, help="quality 0-100 (default: %(default)s)")
    add_batch_size_argument(parser, "images at once", default_is="the configuration's")
    add_speed_arguments(parser, with_double=True)
    add_num_images_argument(parser)
    add_device_argument(parser)
    arguments = parser.parse_args()
    check(arguments)
    return arguments


def check(arguments: argparse.Namespace) -> None:
    """Refuse flags that exclude each other."""
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


def results_of(arguments: argparse.Namespace) -> list[str]:
    """The files that will be written, by their paths in the output folder; of PNG files those that are there now."""
    images = [] if arguments.without_image else ["images.npy"] + ["raw.npy"] * arguments.save_raw
    lengths = parse_lengths(arguments.lengths) if arguments.lengths else []
    folders = [f"length_{length}/" for length in lengths] or [""]
    names = [RECORD] + [TOKENS_FILE] * arguments.tokens + ["labels.npy"] * arguments.labels
    names += [folder + name for folder in folders for name in images]
    if arguments.png:
        places = [(folder, Path(arguments.output_dir, folder, "png")) for folder in folders]
        names += [f"{folder}png/{path.name}" for folder, place in places for path in place.glob("[0-9]*.png")]
    return names


def stored_as(arguments: argparse.Namespace) -> str | None:
    """The image format that was asked for."""
    return next((name for name in FORMATS if getattr(arguments, name)), None)


def main() -> None:
    arguments = parse_arguments()
    with Session(arguments.device, arguments.output_dir, results_of(arguments)) as session:
        config = load_config(arguments.config, arguments.overrides)
        instead = in_place_of_tokenizer(arguments)
        tokenizer = located = None
        if arguments.tokens or not (instead or arguments.without_image):
            tokenizer, located = load_reconstructor(arguments, config, session)
        elif arguments.batch_size == AUTO or arguments.compile or arguments.precision != "fp32":
            raise UserError(
                "--precision, --compile and --batch_size auto are for a tokenizer, and none is needed here: leave them "
                "out"
            )
        keys, facts, written = write_files(arguments, config, tokenizer, instead, session)
        lengths = tokenizer.lengths if tokenizer else []
        num_images, num_bytes = len(keys), session.sum(instead.num_bytes if instead else 0)
        bytes_per_image = num_bytes / num_images if stored_as(arguments) else None
        record = session.record(
            **facts,
            dry_run=arguments.dry_run,
            **tokenizer_facts(arguments, located and located.name, located and located.weights),
            lengths=[length or tokenizer.model.num_latent_tokens for length in lengths] or None,
            stored_as=stored_as(arguments),
            stored_bytes_per_image=bytes_per_image,
            keys=keys_text(keys),
        )
        if session.processes.is_main:
            written.append(session.output_dir / RECORD)
            write_results(session.results.place(written[-1]), record)
            session.results.finish()
        for path in written:
            session.say(f"wrote {path}")
        if stored_as(arguments):
            session.say(f"{bytes_per_image:,.1f} bytes per image as {stored_as(arguments)}, headers included")
        session.say(f"{num_images:,} images{' (a dry run: one batch a process)' if arguments.dry_run else ''}")


class Reconstructor(NamedTuple):
    """A tokenizer, and what is wanted of it.

    Attributes:
        source: Where it was found.
        lengths: Numbers of tokens to decode from, None for all; empty for no images.
    """

    model: TiTok
    arithmetic: Arithmetic
    source: str
    lengths: Sequence[Length]
    with_raw: bool
    with_tokens: bool

    def __call__(self, pixels: Tensor, batch_size: int) -> Made:
        """What the tokenizer makes of images (B, 3, P, P) uint8.

        Args:
            batch_size: To which fewer are filled up: arithmetic depends in its last bits on the size of a batch.
        """
        count = len(pixels)
        black = pixels.new_zeros(batch_size - count, *pixels.shape[1:])
        codes, decoded = reconstruct(self.model, torch.cat([pixels, black]), self.lengths, self.arithmetic)
        images, raws = {}, {}
        for length, batch in decoded:
            images[length] = to_array(batch[:count])
            if self.with_raw:
                raws[length] = batch[:count].float().permute(0, 2, 3, 1).cpu().numpy()
        return Made(images, raws, codes[:count].cpu().numpy().astype(np.int32) if self.with_tokens else None)


def load_reconstructor(
    arguments: argparse.Namespace, config: DictConfig, session: Session
) -> tuple[Reconstructor, Located]:
    num_tokens = OmegaConf.select(config, "model.vq_model.num_latent_tokens")
    lengths: list[Length] = [arguments.length]
    if arguments.lengths:
        lengths = parse_lengths(arguments.lengths, num_tokens)
    elif arguments.length is not None:
        check_lengths([arguments.length], num_tokens, "--length")
    if arguments.precision == DOUBLE and session.device.type == "mps":
        raise UserError(f"an Apple GPU has no {DOUBLE}: add --device cpu, or leave out --precision {DOUBLE}")
    model, located = load_tokenizer(config, arguments.checkpoint, device=session.device)
    model.to(torch.float64 if arguments.precision == DOUBLE else torch.float32)
    if arguments.without_image or arguments.original or stored_as(arguments):
        lengths = []
    arithmetic = prepared(arguments, model)
    return Reconstructor(model, arithmetic, located.source, lengths, arguments.save_raw, arguments.tokens), located


def in_place_of_tokenizer(arguments: argparse.Namespace) -> Storage | None:
    """What gives the originals, plainly or as a format stores them, where these are asked for."""
    if arguments.original:
        return Storage(None, 0)
    name = stored_as(arguments)
    return name and Storage(available(FORMATS[name]), getattr(arguments, f"{name}_compression_rate"))


def write_files(
    arguments: argparse.Namespace,
    config: DictConfig,
    tokenizer: Reconstructor | None,
    instead: Storage | None,
    session: Session,
) -> tuple[list[str], dict[str, Any], list[Path | str]]:
    """Write all that was asked for: the keys, facts for the record, and the files."""
    from data.batches import check_count
    from data.evaluation_images import evaluation_images  # torchvision is slow to import, too slow for --help

    size, output_dir = config.dataset.preprocessing.crop_size, session.output_dir
    lengths = [None] if instead else tokenizer.lengths if tokenizer else []
    folders = {length: output_dir / f"length_{length}" if arguments.lengths else output_dir for length in lengths}
    black = torch.zeros(1, 3, size, size, dtype=torch.uint8)
    place = output_dir, folders, size, session.processes, session.results
    with ReconstructionFiles(*place, with_raw=arguments.save_raw) as files:
        batch_size = arguments.batch_size or config.training.per_gpu_batch_size
        batch_size = choose_batch_size(
            batch_size, lambda num: tokenizer(black.expand(num, -1, -1, -1), num), session.device
        )
        batches = evaluation_images(config, arguments.num_images, **session.share(batch_size))
        batch_size = min(batch_size, batches.expected or sys.maxsize)
        for batch in islice(session.each(batches), 1 if arguments.dry_run else None):
            made = tokenizer(batch["image"], batch_size) if tokenizer else Made({}, {}, None)
            if instead:
                made.images[None] = instead(batch["image"])
            files.add(batch["__key__"], batch["class_id"].numpy(), made)
        keys, num_bad = files.sort(arguments.config), session.sum(batches.num_bad)
        if not arguments.dry_run:
            check_count(len(keys), batches.expected, num_bad)
        if not keys:
            raise UserError(f"there was no image ({num_bad} were skipped): check where the images are")
        about = {"tokenizer": tokenizer.source} if tokenizer else {}
        written = files.write(labels=arguments.labels, tokens=arguments.tokens, png=arguments.png, **about)
    facts = {
        "images": {"expected": batches.expected, "written": len(keys), "skipped": num_bad},
        "preparation": batches.preparation,
        "batch_size": batch_size,
    }
    return keys, facts, written


if __name__ == "__main__":
    run(main)
