"""Generate images by class, and show them on one labelled grid: a row a class, a column a sample.

    python3 scripts/inference_generator.py
    python3 scripts/inference_generator.py --labels Dress 9 --num_images 4 --lengths 1,4,16,32
    python3 scripts/inference_generator.py --num_tokens 8                        # drafts: the first tokens alone
    python3 scripts/inference_generator.py --like output/inference_generator/grid.png         # the same settings
    python3 scripts/inference_generator.py --config configs/training/generator/maskgit_one-d-piece_s256.yaml

The last takes the published generator and tokenizer from the hub, the others the bundled ones (garments, 32 x 32
pixels). Into --output_dir go every image (CLASS_SAMPLE.png), grid.png, with --lengths also lengths.png (the first
sample of each class from so many tokens), and tokens.npz (see utils/tokens.py); those of an earlier run are removed.
--seed, the class and the number decide an image: asking for others beside it does not change it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before other projects' packages of our names

from utils.cli import Parser, pick_device, run  # first, so that Ctrl-C ends this quietly from here on

# isort: split
import argparse
from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from modeling.generators import BUNDLED_GENERATOR, class_names, load_generator, load_its_tokenizer, sample
from modeling.identity import tokens_record
from modeling.prefixes import check_decodable, decode_prefixes
from modeling.samplers.settings import SAMPLER_FLAGS, SamplerSettings, sampler_settings
from utils.class_names import file_stem, parse_labels
from utils.errors import UserError
from utils.evaluation.report import tokens_text
from utils.flags import given_fields
from utils.images import contact_sheet, tile_side, to_pil, write_image
from utils.inference import (
    add_batch_size_argument,
    add_model_arguments,
    add_speed_arguments,
    check_lengths,
    choose_batch_size,
    parse_lengths,
    prepared,
)
from utils.lock import FolderLock
from utils.result_folder import ResultFolder
from utils.sampling_record import add_sampling_arguments, sampling_record, take_like
from utils.tokens import TOKENS_FILE, write_tokens

GRID, PREFIXES = "grid.png", "lengths.png"
TILE_RANGE = 96, 256  # pixels a side of an image on the sheets


def main() -> None:
    arguments = parse_arguments()
    with FolderLock(arguments.output_dir), ResultFolder(arguments.output_dir) as folder:
        sample_images(arguments, folder)


def sample_images(arguments: argparse.Namespace, folder: ResultFolder) -> None:
    device = pick_device(arguments.device)
    generator, located = load_generator(arguments.config, arguments.checkpoint, device=device)
    names = class_names(generator.config)
    labels = parse_labels(arguments.labels, names)
    tokenizer, its_located = load_its_tokenizer(generator, located, arguments.tokenizer_checkpoint, device=device)
    check_decodable(arguments.lengths, tokenizer)
    arithmetic = prepared(arguments, generator, tokenizer)
    settings = sampler_settings(generator.config, **given_fields(arguments, SamplerSettings))
    check_lengths(arguments.lengths, settings.num_tokens or None, "--lengths")
    print(f"generator      {located.name}: {generator.num_classes} classes, {generator.num_tokens} tokens an image")
    print(f"tokenizer      {its_located.name}: {tokenizer.image_size} x {tokenizer.image_size} pixels")
    print(f"sampler        {settings}{settings.caution(generator.num_tokens)}")

    wanted = [(label, number) for label in labels for number in range(arguments.num_images)]
    keys = [f"{file_stem(label, names)}_{number:03d}" for label, number in wanted]
    sheets = [GRID] * arguments.grid + [PREFIXES] * bool(arguments.lengths)
    if note := folder.claim([*(f"{key}.png" for key in keys), *sheets, TOKENS_FILE]):
        print(f"results        {note}")
    draw = partial(sample, generator, tokenizer, settings=settings, seed=arguments.seed, arithmetic=arithmetic)
    batch_size = choose_batch_size(
        arguments.batch_size, lambda num: list(draw(wanted[:num], batch_size=num)), device, most=len(wanted)
    )
    tokens, images = write_all(draw(wanted, batch_size=batch_size), keys, folder)
    about = {**tokens_record(tokenizer, its_located.source), "generator": located.source}
    about |= sampling_record(settings, arguments.seed)
    ids, samples = np.array(wanted).T
    write_tokens(folder / TOKENS_FILE, tokens.numpy(), keys, labels=ids, samples=samples, **about)
    print(f"images         {arguments.output_dir / 'CLASS_SAMPLE.png'}: {len(images)}")
    print(f"tokens         {arguments.output_dir / TOKENS_FILE}")
    titles = [names[label] for label in labels]
    if arguments.grid:
        rows = [images[first : first + arguments.num_images] for first in range(0, len(images), arguments.num_images)]
        title = f"samples of seed {arguments.seed}"
        write_image(sheet(rows, row_titles=titles, title=title), folder / GRID, about)
        print(f"grid           {arguments.output_dir / GRID}: a row a class")
    if arguments.lengths:
        firsts = tokens[:: arguments.num_images].to(device)
        rows = decode_prefixes(tokenizer, firsts, arguments.lengths, batch_size, arithmetic)
        columns = list(map(tokens_text, arguments.lengths))
        title = f"first sample of each class, seed {arguments.seed}"
        write_image(sheet(rows, row_titles=titles, column_titles=columns, title=title), folder / PREFIXES, about)
        print(f"lengths        {arguments.output_dir / PREFIXES}: the first sample of each class")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    add_model_arguments(parser, "generator", BUNDLED_GENERATOR)
    parser.add_argument("--tokenizer_checkpoint", help="its tokenizer (default: the one it was trained with)")
    parser.add_argument("--labels", nargs="+", metavar="CLASS", help="numbers or names, names first (default: ten)")
    parser.add_argument("--num_images", type=int, default=8, help="images of each class (default: %(default)s)")
    add_batch_size_argument(parser, "images at a time", default=16)
    parser.add_argument("--lengths", nargs="+", metavar="LENGTH", help="numbers of tokens to decode, such as 1,4,16")
    parser.add_argument(
        "--grid", action=argparse.BooleanOptionalAction, default=True, help="write grid.png (default: yes)"
    )
    parser.add_argument(
        "--output_dir", type=Path, default=Path("output/inference_generator"), help="default: %(default)s"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: %(default)s)")
    add_speed_arguments(parser)
    add_sampling_arguments(parser, SamplerSettings, SAMPLER_FLAGS)
    arguments = parser.parse_args()
    take_like(arguments, SamplerSettings)
    arguments.lengths = parse_lengths(arguments.lengths) if arguments.lengths else []
    if arguments.num_images < 1:
        raise UserError(f"--num_images must be 1 or more, got {arguments.num_images}")
    return arguments


def write_all(
    batches: Iterable[tuple[Tensor, Tensor]], keys: Sequence[str], folder: ResultFolder
) -> tuple[Tensor, list[Image.Image]]:
    """Write each image as it comes; returns all tokens (n, N) and images."""
    tokens, images = [], []
    with tqdm(total=len(keys), unit="image", leave=False, dynamic_ncols=True, disable=None) as progress:
        for codes, pixels in batches:
            tokens.append(codes.cpu())
            for image in map(to_pil, pixels):
                write_image(image, folder / f"{keys[len(images)]}.png")
                images.append(image)
            progress.update(len(codes))
    return torch.cat(tokens), images


def sheet(rows: Sequence[Sequence[Image.Image]], **titles) -> Image.Image:
    return contact_sheet(rows, tile=tile_side(rows[0][0].width, *TILE_RANGE), **titles)


if __name__ == "__main__":
    run(main)
