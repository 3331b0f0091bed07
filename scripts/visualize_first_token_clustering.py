"""Show pictures whose first tokens are the same.

    python3 scripts/reconstruct_tokenizer.py --config configs/fashion/eval.yaml --output_dir output/tokens --tokens
    python3 scripts/visualize_first_token_clustering.py --data output/tokens/tokens.npz
    python3 scripts/visualize_first_token_clustering.py --data output/tokens/tokens.npz --prefix 1208

Without --prefix it lists the most frequent first codes and first pairs, and draws a grid for each of those codes and a
row of each on one sheet, most_frequent.png. With --prefix, one code or several such as 1208,17, it draws the pictures
whose tokens begin with them. Where there are more than fit, --seed draws them. The pictures come from --images: a .npy
file (as reconstruct_tokenizer.py writes it, in the order of the tokens), a folder (files named by key, or numbered in
that order), or the configuration whose evaluation pictures were tokenized. images.npy beside the tokens is taken when
nothing is given.
"""

import argparse
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from utils.analysis import frequent_prefixes, nearest_prefixes, read_tokens, with_prefix
from utils.cli import UserError, run
from utils.config import load_config
from utils.images import contact_sheet, write_picture

NUM_LISTED = 10
NUM_NEAREST = 5
OVERVIEW = "most_frequent.png"
ROW_LENGTH = 10  # pictures
BATCH_SIZE = 64  # pictures read at once
SMALLEST_TILE, LARGEST_TILE = 96, 192  # pixels


def main() -> None:
    arguments = parse_arguments()
    tokens, keys = read_tokens(arguments.data)
    num_images, num_tokens = tokens.shape
    images = arguments.images or arguments.data.with_name("images.npy")
    if arguments.images is None and not images.is_file():
        raise UserError(
            f"there is no {images}: give the pictures as --images (a .npy file, a folder or a configuration)"
        )
    if arguments.prefix is None:
        codes = frequent_prefixes(tokens, 1)
        print(f"{num_images:,} pictures; {len(codes)} different first codes, the most frequent:")
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
    pictures = read_pictures(images, keys, sorted({int(index) for indices in shown.values() for index in indices}))
    for prefix, indices in shown.items():
        some = f", {len(indices)} shown" if len(indices) < len(found[prefix]) else ""
        tokens_are = "token" if len(prefix) == 1 else "tokens"
        title = f"first {tokens_are} {text_of(prefix)}: {len(found[prefix]):,} of {num_images:,} pictures{some}"
        path = path_of(arguments.out, prefix)
        write_picture(grid([pictures[index] for index in indices.tolist()], columns, title), path)
        print(f"{path}: {title}")
    if arguments.prefix is None:
        path = arguments.out / OVERVIEW
        write_picture(overview(shown, found, pictures), path)
        print(f"{path}: a row of each")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="TOKENS.NPZ", help="tokens and keys of pictures")
    parser.add_argument("--prefix", help="codes that the tokens begin with, such as 1208 or 1208,17")
    parser.add_argument(
        "--out",
        type=Path,
        help="a folder, or with --prefix a .png or .pdf file (default: the folder first_tokens beside the tokens)",
    )
    parser.add_argument("--grid_size", default="5,5", help="ROWS,COLUMNS (default: %(default)s)")
    pictures = parser.add_mutually_exclusive_group()
    pictures.add_argument("--images", type=Path, help=".npy file, folder, or configuration (.yaml) of the pictures")
    pictures.add_argument("--img_dir", type=Path, dest="images", help="the same, by its published name")
    parser.add_argument(
        "--seed", type=int, default=42, help="draws pictures where there are many (default: %(default)s)"
    )
    arguments = parser.parse_args()
    match = re.fullmatch(r"([1-9]\d{0,2}),([1-9]\d{0,2})", arguments.grid_size)
    if match is None:
        raise UserError(f"--grid_size takes rows and columns, 1..999 each, such as 5,5; got {arguments.grid_size}")
    arguments.grid_size = int(match[1]), int(match[2])
    arguments.out = arguments.out or arguments.data.with_name("first_tokens")
    if arguments.seed < 0:
        raise UserError(f"--seed must be 0 or more, got {arguments.seed}")
    if arguments.prefix is None and is_picture(arguments.out):
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
        listed = "; ".join(f"{text_of(other)} ({count} pictures)" for other, count in nearest)
        raise UserError(f"no picture's tokens begin with {text_of(prefix)}; the nearest that exist are {listed}")


def text_of(prefix: Sequence[int]) -> str:
    return ",".join(map(str, prefix))


def print_counts(prefixes: Sequence[tuple[tuple[int, ...], int]], num_images: int) -> None:
    for prefix, count in prefixes:
        print(f"  {text_of(prefix):>12} {count:8,} pictures {count / num_images:7.2%}")


def is_picture(path: Path) -> bool:
    return path.suffix.lower() in (".png", ".pdf")


def path_of(out: Path, prefix: Sequence[int]) -> Path:
    return out if is_picture(out) else out / f"first_tokens_{'_'.join(map(str, prefix))}.png"


def grid(pictures: Sequence[Image.Image], columns: int, title: str) -> Image.Image:
    """Rows of pictures; where they are fewer than a row, a narrower one, and no place is blank but in the last row."""
    rows = [pictures[first : first + columns] for first in range(0, len(pictures), columns)]
    return contact_sheet(rows, title=title, tile=tile_of(pictures[0]))


def overview(
    shown: Mapping[tuple[int, ...], np.ndarray],
    found: Mapping[tuple[int, ...], np.ndarray],
    pictures: Mapping[int, Image.Image],
) -> Image.Image:
    """A row of pictures for each prefix, beside the prefix and the number of pictures that have it."""
    rows = [[pictures[index] for index in indices[:ROW_LENGTH].tolist()] for indices in shown.values()]
    titles = [f"{text_of(prefix)}   ({len(indices):,})" for prefix, indices in found.items()]
    return contact_sheet(rows, row_titles=titles, tile=tile_of(rows[0][0]))


def tile_of(picture: Image.Image) -> int:
    """Pixels a side on a sheet: small pictures are enlarged by a whole number."""
    return min(picture.width * math.ceil(SMALLEST_TILE / picture.width), LARGEST_TILE)


# Where the pictures are


def read_pictures(source: Path, keys: Sequence[str], indices: Sequence[int]) -> dict[int, Image.Image]:
    """The pictures of some tokens, by their index.

    Args:
        keys: The keys of all tokens.

    Raises:
        UserError: The source is none, or lacks one of the pictures.
    """
    if source.is_dir():
        return from_folder(source, keys, indices)
    if source.suffix == ".npy":
        return from_array(source, keys, indices)
    if source.suffix in (".yaml", ".yml"):
        return from_configuration(source, keys, indices)
    raise UserError(f"--images must be a .npy file, a folder or a configuration (.yaml), got {source}")


def from_array(path: Path, keys: Sequence[str], indices: Sequence[int]) -> dict[int, Image.Image]:
    from data.picture_sets import open_pictures  # torchvision is slow to import, too slow for --help

    pictures = open_pictures(path)
    if len(pictures) != len(keys):
        raise UserError(f"{path} must hold the {len(keys)} pictures of the tokens, in their order, got {len(pictures)}")
    return {index: Image.fromarray(pictures.read(index, index + 1)[0]) for index in indices}


def from_folder(folder: Path, keys: Sequence[str], indices: Sequence[int]) -> dict[int, Image.Image]:
    from data.sources import list_pictures
    from data.transforms import decode_image

    files = list_pictures(folder)
    by_key = {name: file for file in files for name in (file, str(Path(file).with_suffix("").as_posix()))}
    missing = next((key for key in keys if key not in by_key), None)
    if missing is None:
        chosen = {index: by_key[keys[index]] for index in indices}
    elif len(files) == len(keys) and all(Path(file).stem.isdecimal() for file in files):
        numbered = sorted(files, key=lambda file: int(Path(file).stem))
        chosen = {index: numbered[index] for index in indices}
    else:
        raise UserError(
            f"{folder} must hold the {len(keys)} pictures of the tokens, named by key or numbered, and has no "
            f"{missing}: name the folder of what was tokenized, or its configuration"
        )
    return {index: square(decode_image((folder / file).read_bytes())) for index, file in chosen.items()}


def square(picture: Image.Image) -> Image.Image:
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side))


def from_configuration(path: Path, keys: Sequence[str], indices: Sequence[int]) -> dict[int, Image.Image]:
    """The evaluation pictures of a configuration, read until all that are wanted were seen."""
    from data.image_shards import evaluation_loader

    wanted = {keys[index]: index for index in indices}
    pictures: dict[int, Image.Image] = {}
    for batch in evaluation_loader(load_config(path), rank=0, world_size=1, batch_size=BATCH_SIZE, num_workers=0):
        for key, image in zip(batch["__key__"], batch["image"], strict=True):
            if key in wanted:
                pictures[wanted[key]] = Image.fromarray(image.permute(1, 2, 0).numpy())
        if len(pictures) == len(wanted):
            return pictures
    missing = next(key for key, index in wanted.items() if index not in pictures)
    raise UserError(
        f"the evaluation pictures of {path} lack {missing}, which was tokenized: give the configuration of the tokens"
    )


if __name__ == "__main__":
    run(main)
