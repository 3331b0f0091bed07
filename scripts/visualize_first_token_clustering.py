"""Show images whose first tokens are the same.

    python3 scripts/reconstruct_tokenizer.py --config configs/fashion/eval.yaml --output_dir output/tokens --tokens
    python3 scripts/visualize_first_token_clustering.py --data output/tokens/tokens.npz
    python3 scripts/visualize_first_token_clustering.py --data output/tokens/tokens.npz --prefix 1208

Without --prefix it lists the most frequent first codes and first pairs, and draws a grid for each of those codes and a
row of each on one sheet, most_frequent.png. With --prefix, one code or several such as 1208,17, it draws the images
whose tokens begin with them. Where there are more than fit, --seed draws them. The images come from --images: a .npy
file (as reconstruct_tokenizer.py writes it, in the order of the tokens), a folder (files named by key, or numbered in
that order), or the configuration whose evaluation images were tokenized. images.npy beside the tokens is taken when
nothing is given.
"""

import argparse
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from utils.cli import run
from utils.config import load_config
from utils.errors import UserError
from utils.images import contact_sheet, write_image
from utils.token_statistics import frequent_prefixes, nearest_prefixes, read_tokens, with_prefix

NUM_LISTED = 10
NUM_NEAREST = 5
OVERVIEW = "most_frequent.png"
ROW_LENGTH = 10  # images
BATCH_SIZE = 64  # images read at once
SMALLEST_TILE, LARGEST_TILE = 96, 192  # pixels


def main() -> None:
    arguments = parse_arguments()
    tokens, keys = read_tokens(arguments.data)
    num_images, num_tokens = tokens.shape
    source = arguments.images or arguments.data.with_name("images.npy")
    if arguments.images is None and not source.is_file():
        raise UserError(f"there is no {source}: give the images as --images (a .npy file, a folder or a configuration)")
    if arguments.prefix is None:
        codes = frequent_prefixes(tokens, 1)
        print(f"{num_images:,} images; {len(codes)} different first codes, the most frequent:")
        print_counts(codes[:NUM_LISTED], num_images)
        if num_tokens > 1:
            pairs = frequent_prefixes(tokens, 2)
            print(f"{len(pairs)} different first pairs, the most frequent:")
            print_counts(pairs[:NUM_LISTED], num_images)
        prefixes = [prefix for prefix, _ in codes[:NUM_LISTED]]
    else:
        prefixes = [parse_prefix(arguments.prefix, num_tokens)]
        check_exists(tokens, prefixes[0])

    rows, columns = arguments.grid_size
    draws = np.random.default_rng(arguments.seed)
    found = {prefix: with_prefix(tokens, prefix) for prefix in prefixes}
    shown = {
        prefix: indices if len(indices) <= rows * columns else np.sort(draws.choice(indices, rows * columns, False))
        for prefix, indices in found.items()
    }
    images = read_images(source, keys, sorted({int(index) for indices in shown.values() for index in indices}))
    for prefix, indices in shown.items():
        some = f", {len(indices)} shown" if len(indices) < len(found[prefix]) else ""
        tokens_are = "token" if len(prefix) == 1 else "tokens"
        title = f"first {tokens_are} {text_of(prefix)}: {len(found[prefix]):,} of {num_images:,} images{some}"
        path = path_of(arguments.out, prefix)
        write_image(grid([images[index] for index in indices.tolist()], columns, title), path)
        print(f"{path}: {title}")
    if arguments.prefix is None:
        path = arguments.out / OVERVIEW
        write_image(overview(shown, found, images), path)
        print(f"{path}: a row of each")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="TOKENS.NPZ", help="tokens and keys of images")
    parser.add_argument("--prefix", help="codes that the tokens begin with, such as 1208 or 1208,17")
    parser.add_argument(
        "--out",
        type=Path,
        help="a folder, or with --prefix a .png or .pdf file (default: the folder first_tokens beside the tokens)",
    )
    parser.add_argument("--grid_size", default="5,5", help="ROWS,COLUMNS (default: %(default)s)")
    images = parser.add_mutually_exclusive_group()
    images.add_argument("--images", type=Path, help=".npy file, folder, or configuration (.yaml) of the images")
    images.add_argument("--img_dir", type=Path, dest="images", help="the same, by its published name")
    parser.add_argument("--seed", type=int, default=42, help="draws images where there are many (default: %(default)s)")
    arguments = parser.parse_args()
    match = re.fullmatch(r"([1-9]\d{0,2}),([1-9]\d{0,2})", arguments.grid_size)
    if match is None:
        raise UserError(f"--grid_size takes rows and columns, 1..999 each, such as 5,5; got {arguments.grid_size}")
    arguments.grid_size = int(match[1]), int(match[2])
    arguments.out = arguments.out or arguments.data.with_name("first_tokens")
    if arguments.seed < 0:
        raise UserError(f"--seed must be 0 or more, got {arguments.seed}")
    if arguments.prefix is None and is_image(arguments.out):
        raise UserError(
            f"--out must be a folder when no --prefix is given, got {arguments.out}: there are several grids"
        )
    return arguments


def parse_prefix(text: str, num_tokens: int) -> tuple[int, ...]:
    words = text.split(",")
    if not all(re.fullmatch(r"\d{1,9}", word.strip()) for word in words):
        raise UserError(f"--prefix takes codes such as 1208 or 1208,17, got {text}")
    if len(words) > num_tokens:
        raise UserError(f"--prefix must have at most {num_tokens} codes, the length of a sequence, got {len(words)}")
    return tuple(int(word) for word in words)


def check_exists(tokens: np.ndarray, prefix: tuple[int, ...]) -> None:
    if not len(with_prefix(tokens, prefix)):
        nearest = nearest_prefixes(tokens, prefix, NUM_NEAREST)
        listed = "; ".join(f"{text_of(other)} ({count} images)" for other, count in nearest)
        raise UserError(f"no image's tokens begin with {text_of(prefix)}; the nearest that exist are {listed}")


def text_of(prefix: Sequence[int]) -> str:
    return ",".join(map(str, prefix))


def print_counts(prefixes: Sequence[tuple[tuple[int, ...], int]], num_images: int) -> None:
    for prefix, count in prefixes:
        print(f"  {text_of(prefix):>12} {count:8,} images {count / num_images:7.2%}")


def is_image(path: Path) -> bool:
    return path.suffix.lower() in (".png", ".pdf")


def path_of(out: Path, prefix: Sequence[int]) -> Path:
    return out if is_image(out) else out / f"first_tokens_{'_'.join(map(str, prefix))}.png"


def grid(images: Sequence[Image.Image], columns: int, title: str) -> Image.Image:
    """Rows of images; where they are fewer than a row, a narrower one, and no place is blank but in the last row."""
    rows = [images[first : first + columns] for first in range(0, len(images), columns)]
    return contact_sheet(rows, title=title, tile=tile_of(images[0]))


def overview(
    shown: Mapping[tuple[int, ...], np.ndarray],
    found: Mapping[tuple[int, ...], np.ndarray],
    images: Mapping[int, Image.Image],
) -> Image.Image:
    """A row of images for each prefix, beside the prefix and the number of images that have it."""
    rows = [[images[index] for index in indices[:ROW_LENGTH].tolist()] for indices in shown.values()]
    titles = [f"{text_of(prefix)}   ({len(indices):,})" for prefix, indices in found.items()]
    return contact_sheet(rows, row_titles=titles, tile=tile_of(rows[0][0]))


def tile_of(image: Image.Image) -> int:
    """Pixels a side on a sheet: small images are enlarged by a whole number."""
    return min(image.width * math.ceil(SMALLEST_TILE / image.width), LARGEST_TILE)


# Where the images are


def read_images(source: Path, keys: Sequence[str], indices: Sequence[int]) -> dict[int, Image.Image]:
    """The images of some tokens, by their index.

    Args:
        keys: The keys of all tokens.

    Raises:
        UserError: The source is none, or lacks one of the images.
    """
    if source.is_dir():
        return from_folder(source, keys, indices)
    if source.suffix == ".npy":
        return from_array(source, keys, indices)
    if source.suffix in (".yaml", ".yml"):
        return from_configuration(source, keys, indices)
    raise UserError(f"--images must be a .npy file, a folder or a configuration (.yaml), got {source}")


def from_array(path: Path, keys: Sequence[str], indices: Sequence[int]) -> dict[int, Image.Image]:
    from data.image_sets import open_images  # torchvision is slow to import, too slow for --help

    images = open_images(path)
    if len(images) != len(keys):
        raise UserError(f"{path} must hold the {len(keys)} images of the tokens, in their order, got {len(images)}")
    return {index: Image.fromarray(images.read(index, index + 1)[0]) for index in indices}


def from_folder(folder: Path, keys: Sequence[str], indices: Sequence[int]) -> dict[int, Image.Image]:
    from data.image_sources import list_images
    from data.transforms import decode_image

    files = list_images(folder)
    by_key = {name: file for file in files for name in (file, str(Path(file).with_suffix("").as_posix()))}
    missing = next((key for key in keys if key not in by_key), None)
    if missing is None:
        chosen = {index: by_key[keys[index]] for index in indices}
    elif len(files) == len(keys) and all(Path(file).stem.isdecimal() for file in files):
        numbered = sorted(files, key=lambda file: int(Path(file).stem))
        chosen = {index: numbered[index] for index in indices}
    else:
        raise UserError(
            f"{folder} must hold the {len(keys)} images of the tokens, named by key or numbered, and has no "
            f"{missing}: name the folder of what was tokenized, or its configuration"
        )
    return {index: square(decode_image((folder / file).read_bytes())) for index, file in chosen.items()}


def square(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def from_configuration(path: Path, keys: Sequence[str], indices: Sequence[int]) -> dict[int, Image.Image]:
    """The evaluation images of a configuration, read until all that are wanted were seen."""
    from data.image_shards import evaluation_loader

    wanted = {keys[index]: index for index in indices}
    images: dict[int, Image.Image] = {}
    for batch in evaluation_loader(load_config(path), rank=0, world_size=1, batch_size=BATCH_SIZE, num_workers=0):
        for key, image in zip(batch["__key__"], batch["image"], strict=True):
            if key in wanted:
                images[wanted[key]] = Image.fromarray(image.permute(1, 2, 0).numpy())
        if len(images) == len(wanted):
            return images
    missing = next(key for key, index in wanted.items() if index not in images)
    raise UserError(
        f"the evaluation images of {path} lack {missing}, which was tokenized: give the configuration of the tokens"
    )


if __name__ == "__main__":
    run(main)
