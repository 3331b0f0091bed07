"""Tokenize images, and show them again from 1, 2, 4, ... tokens.

    python3 scripts/inference_tokenizer.py --image assets/fashion
    python3 scripts/inference_tokenizer.py --config configs/eval/one-d-piece_s256.yaml --image assets/photos/chelsea.png

The first takes the bundled model (garments, 32 x 32 pixels), the second the published one from the hub. Of each image
the shorter edge is scaled to the model's size and the centre is kept; it is turned upright as its EXIF data say, and
what is transparent becomes white. Into --output_dir go IMAGE_LENGTH.png for every length, tokens.npz (see
utils/tokens.py) and contact_sheet.png. What an earlier run has written there is removed, and nothing else: a file of
such a name that is not from here is an error.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before other projects' packages of our names

from utils.cli import Parser, pick_device, run  # first, so that Ctrl-C ends this quietly from here on

# isort: split
import argparse
import math
import random

import numpy as np
import torch

from data.own_images import ImageBatches, ImageFile, describe, find_images
from modeling.identity import tokens_record
from modeling.prefixes import check_decodable, reconstructions, write_reconstructions
from modeling.tokenizers import BUNDLED_TOKENIZER, default_lengths, load_tokenizer
from utils.errors import UserError
from utils.images import write_image
from utils.inference import (
    add_batch_size_argument,
    add_model_arguments,
    add_speed_arguments,
    choose_batch_size,
    parse_lengths,
    prepared,
)
from utils.lock import FolderLock
from utils.paths import ROOT
from utils.reconstructions import Reconstructions
from utils.result_folder import ResultFolder
from utils.tokens import TOKENS_FILE, write_tokens

MOST_SHOWN = 16  # images on the contact sheet and in the second table
SHEET = "contact_sheet.png"


def main() -> None:
    arguments = parse_arguments()
    with FolderLock(arguments.output_dir), ResultFolder(arguments.output_dir) as folder:
        reconstruct_images(arguments, folder)


def reconstruct_images(arguments: argparse.Namespace, folder: ResultFolder) -> None:
    files, notes = find_images(arguments.image, arguments.output_dir)
    for note in notes:
        print(f"images         {note}")
    device = pick_device(arguments.device)
    tokenizer, located = load_tokenizer(arguments.config, arguments.checkpoint, device=device)
    arithmetic = prepared(arguments, tokenizer)
    check_decodable(arguments.lengths, tokenizer)
    size, bits = tokenizer.image_size, math.log2(tokenizer.codebook_size)
    kept = Reconstructions(located.name, arguments.lengths or default_lengths(tokenizer), bits, size, MOST_SHOWN)
    print(f"model          {kept.title}: {size} x {size} pixels, ", end="")
    print(f"up to {tokenizer.num_latent_tokens} tokens of {bits:g} bits")

    def try_batch(num_images: int) -> None:
        black = torch.zeros(num_images, 3, size, size, dtype=torch.uint8)
        list(reconstructions(tokenizer, black, kept.lengths, arithmetic))

    made = [f"{file.key}_{length}.png" for file in files for length in kept.lengths]
    if note := folder.claim([*made, TOKENS_FILE, SHEET]):
        print(f"results        {note}")
    batch_size = choose_batch_size(arguments.batch_size, try_batch, device, most=len(files))
    batches = ImageBatches(files, size, batch_size)
    write_reconstructions(tokenizer, batches, kept, arithmetic, folder, order_to_show(files, arguments.seed))
    if not kept.keys:
        raise UserError(f"none of the {len(files)} images can be used; {describe(batches.broken)}")
    about = {**tokens_record(tokenizer, located.source), "preparation": batches.preparation}
    write_tokens(folder / TOKENS_FILE, np.stack(kept.tokens), kept.keys, **about)
    write_image(kept.sheet(), folder / SHEET)
    report(kept, arguments.output_dir)
    if any(file.is_named for file, _ in batches.broken):
        raise UserError(f"{describe(batches.broken)}; the other {len(kept.keys)} are done")
    if batches.broken:
        print(f"skipped {describe(batches.broken)}", file=sys.stderr)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "--image",
        nargs="+",
        type=Path,
        default=[ROOT / "assets/fashion"],
        metavar="PATH",
        help="image files and folders of images (default: assets/fashion of this project)",
    )
    add_model_arguments(parser, "tokenizer", BUNDLED_TOKENIZER)
    parser.add_argument(
        "--lengths",
        nargs="+",
        metavar="LENGTH",
        help="numbers of tokens, such as 1,4,16 (default: 1,2,4,... up to all)",
    )
    parser.add_argument(
        "--output_dir", type=Path, default=Path("output/inference_tokenizer"), help="default: %(default)s"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: %(default)s)")
    add_batch_size_argument(parser, "images at a time", default=16)
    add_speed_arguments(parser)
    parser.add_argument(
        "--seed",
        type=int,
        default=42,
        help=f"draws the images on the contact sheet where there are more than {MOST_SHOWN} (default: %(default)s)",
    )
    arguments = parser.parse_args()
    arguments.lengths = parse_lengths(arguments.lengths) if arguments.lengths else []
    return arguments


def order_to_show(files: list[ImageFile], seed: int) -> dict[ImageFile, int]:
    """The place of each file in the order in which they are wanted on the sheet; broken ones make room for the next."""
    draw = random.Random(seed)
    first = files if len(files) <= MOST_SHOWN else draw.sample(files, MOST_SHOWN)
    chosen = set(first)
    rest = [file for file in files if file not in chosen]
    return {file: place for place, file in enumerate([*first, *draw.sample(rest, len(rest))])}


def report(kept: Reconstructions, output_dir: Path) -> None:
    """The tables, and where everything is."""
    count, num_shown = len(kept.keys), len(kept.shown)
    print(f"\n{kept.tables()}")
    some = f" ({num_shown} of {count} images, drawn by --seed)" if num_shown < count else ""
    print(f"\ncontact sheet  {output_dir / SHEET}{some}")
    print(f"images         {output_dir / 'IMAGE_LENGTH.png'}")
    print(f"tokens         {output_dir / TOKENS_FILE}")


if __name__ == "__main__":
    run(main)
