"""Generate images by class, and show them on one labelled grid: a row a class, a column a sample.

    python3 scripts/inference_generator.py
    python3 scripts/inference_generator.py --labels Dress 9 --num_images 4 --lengths 1,4,16,32
    python3 scripts/inference_generator.py --config configs/training/generator/maskgit_one-d-piece_s256.yaml

The first two take the bundled generator and tokenizer (garments, 32 x 32 pixels), the last the published ones from the
hub. Into --output_dir go every image (CLASS_SAMPLE.png), grid.png, with --lengths also lengths.png (the first sample of
each class from so many tokens), and tokens.npz (tokens (n, N), labels (n,), samples (n,)); those of an earlier run are
removed. --seed, the class and the number decide an image: asking for others beside it does not change it.
"""

import argparse
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from modeling.generators import (
    BUNDLED_GENERATOR,
    chosen_settings,
    class_names,
    load_generator,
    load_its_tokenizer,
    sample,
)
from modeling.modules.masking import GUIDANCE_DECAYS
from modeling.titok import TiTok
from utils.cli import pick_device, run
from utils.errors import UserError
from utils.files import write_arrays
from utils.images import contact_sheet, to_pil, write_image
from utils.inference import (
    Arithmetic,
    add_batch_size_argument,
    add_sampler_arguments,
    add_speed_arguments,
    choose_batch_size,
    prepared,
    sampler_flags,
)
from utils.result_folder import ResultFolder

DEFAULT_CLASSES = 10  # shown where --labels is not given, evenly spread over all
TILE_RANGE = 96, 256  # pixels a side of an image on the sheets


def main() -> None:
    arguments = parse_arguments()
    lengths = parse_lengths(arguments.lengths)
    folder = ResultFolder(arguments.output_dir)
    device = pick_device(arguments.device)
    generator, located = load_generator(arguments.config, arguments.checkpoint, device=device)
    names = class_names(generator.config)
    labels = parse_labels(arguments.labels, names)
    tokenizer, tokenizer_located = load_its_tokenizer(generator, located, arguments.tokenizer_checkpoint, device=device)
    check_lengths(lengths, tokenizer)
    arithmetic = prepared(arguments, generator, tokenizer)
    settings = chosen_settings(generator.config, sampler_flags(arguments))
    print(f"generator      {located.name}: {generator.num_classes} classes, {generator.num_tokens} tokens an image")
    print(f"tokenizer      {tokenizer_located.name}: {tokenizer.image_size} x {tokenizer.image_size} pixels")
    print(f"sampler        {', '.join(f'{name} {value}' for name, value in settings.items())}")

    wanted = [(label, number) for label in labels for number in range(arguments.num_images)]
    stems = {label: file_stem(label, names) for label in labels}
    draw = partial(sample, generator, tokenizer, seed=arguments.seed, arithmetic=arithmetic, **settings)
    batch_size = choose_batch_size(
        arguments.batch_size, lambda num: list(draw(wanted[:num], batch_size=num)), device, most=len(wanted)
    )
    tokens, images = [], []
    with tqdm(total=len(wanted), unit="image", leave=False, dynamic_ncols=True, disable=None) as progress:
        for codes, pixels in draw(wanted, batch_size=batch_size):
            for image in pixels:
                label, number = wanted[len(images)]
                images.append(to_pil(image))
                write_image(images[-1], folder / f"{stems[label]}_{number:03d}.png")
            tokens.append(codes.cpu())
            progress.update(len(codes))
    tokens = torch.cat(tokens)

    write_arrays(
        folder / "tokens.npz",
        tokens=tokens.numpy(),
        labels=np.array([label for label, _ in wanted]),
        samples=np.array([number for _, number in wanted]),
    )
    print(f"images         {arguments.output_dir / 'CLASS_SAMPLE.png'}: {len(images)}")
    print(f"tokens         {arguments.output_dir / 'tokens.npz'}")
    titles = [names[label] for label in labels]
    rows = [images[first : first + arguments.num_images] for first in range(0, len(images), arguments.num_images)]
    if arguments.grid:
        show(rows, folder / "grid.png", row_titles=titles, title=f"samples of seed {arguments.seed}")
        print(f"grid           {arguments.output_dir / 'grid.png'}")
    if lengths:
        rows = prefixes(tokenizer, tokens[:: arguments.num_images].to(device), lengths, batch_size, arithmetic)
        columns = [f"{length} token{'s' if length > 1 else ''}" for length in lengths]
        show(rows, folder / "lengths.png", row_titles=titles, column_titles=columns)
        print(f"lengths        {arguments.output_dir / 'lengths.png'}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="configuration of the generator (default: the checkpoint's own)")
    parser.add_argument(
        "--checkpoint",
        help="hub id, folder made by save_pretrained, training output or one of its checkpoints, weights file, bundled "
        "model, or a step number of the config's output folder (default: the run in the config's output folder, else "
        f"the published model of that config; without a config {BUNDLED_GENERATOR})",
    )
    parser.add_argument("--tokenizer_checkpoint", help="its tokenizer (default: the one it was trained with)")
    parser.add_argument("--labels", nargs="+", metavar="CLASS", help="numbers or names (default: ten of the classes)")
    parser.add_argument("--num_images", type=int, default=8, help="images of each class (default: %(default)s)")
    add_batch_size_argument(parser, "images at a time", default=16)
    parser.add_argument("--seed", type=int, default=42, help="default: %(default)s")
    parser.add_argument("--lengths", nargs="+", metavar="LENGTH", help="numbers of tokens to decode, such as 1,4,16")
    parser.add_argument(
        "--grid", action=argparse.BooleanOptionalAction, default=True, help="write grid.png (default: yes)"
    )
    parser.add_argument(
        "--output_dir", type=Path, default=Path("output/inference_generator"), help="default: %(default)s"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: %(default)s)")
    add_speed_arguments(parser)
    add_sampler_arguments(parser, GUIDANCE_DECAYS)
    arguments = parser.parse_args()
    if arguments.num_images < 1:
        raise UserError(f"--num_images must be 1 or more, got {arguments.num_images}")
    return arguments


def parse_labels(texts: Sequence[str] | None, names: Sequence[str]) -> list[int]:
    """Class ids of numbers and names ("Ankle boot"; case does not matter), each once, in the order given."""
    if texts is None:
        count = min(DEFAULT_CLASSES, len(names))
        return [index * len(names) // count for index in range(count)]
    by_name = {name.casefold(): label for label, name in enumerate(names)}
    labels = []
    for text in texts:
        label = int(text) if text.isdecimal() else by_name.get(text.casefold())
        if label is None or label >= len(names):
            numbers_only = list(names) == [str(number) for number in range(len(names))]
            known = "" if numbers_only else f" or one of {', '.join(names)}"
            raise UserError(f"--labels takes classes, a number in 0..{len(names) - 1}{known}, got {text!r}")
        labels.append(label)
    return list(dict.fromkeys(labels))


def parse_lengths(texts: Sequence[str] | None) -> list[int]:
    """Texts such as "16" and "1,4" as [1, 4, 16]."""
    words = [word for text in texts or [] for word in text.split(",")]
    try:
        return sorted({int(word) for word in words})
    except ValueError as error:
        raise UserError(f"--lengths takes whole numbers such as 1,4,16, got {' '.join(texts)}") from error


def check_lengths(lengths: Sequence[int], tokenizer: TiTok) -> None:
    """Before the sampling, because the images may take long."""
    total = tokenizer.num_latent_tokens
    smallest = total if tokenizer.strict_length_assertion else 1
    for length in lengths:
        if not smallest <= length <= total:
            allowed = f"{total} alone" if smallest == total else f"{smallest}..{total}"
            raise UserError(f"--lengths must be in {allowed} for this tokenizer, got {length}")


def file_stem(label: int, names: Sequence[str]) -> str:
    """ "0_t-shirt-top", or the number alone where the class has no name."""
    number = f"{label:0{len(str(len(names) - 1))}d}"
    name = re.sub(r"[^a-z0-9]+", "-", names[label].casefold()).strip("-")
    return number if names[label] == str(label) or not name else f"{number}_{name}"


@torch.no_grad()
def prefixes(
    tokenizer: TiTok, tokens: torch.Tensor, lengths: Sequence[int], batch_size: int, arithmetic: Arithmetic
) -> list[list[Image.Image]]:
    """A row of images for each of `tokens` (n, N), from so many of its first tokens."""
    rows = []
    for batch in tokens.split(batch_size):
        with arithmetic():
            columns = [tokenizer.decode_tokens(batch, length=length) for length in lengths]
        rows += [[to_pil(pixels) for pixels in row] for row in zip(*columns, strict=True)]
    return rows


def show(rows: Sequence[Sequence[Image.Image]], path: Path, **titles) -> None:
    smallest, largest = TILE_RANGE
    side = rows[0][0].width
    tile = min(side * -(-smallest // side), largest)  # a multiple of the side: all pixels enlarge alike
    write_image(contact_sheet(rows, tile=tile, **titles), path)


if __name__ == "__main__":
    run(main)
