"""Show images whose first tokens are the same.

    python3 scripts/reconstruct_tokenizer.py --config configs/fashion/eval.yaml --output_dir output/tokens --tokens
    python3 scripts/visualize_first_token_clustering.py --data output/tokens/tokens.npz
    python3 scripts/visualize_first_token_clustering.py --data output/tokens/tokens.npz --prefix 1208

Without --prefix it lists the most frequent first codes and first pairs, and draws a grid for each of those codes and a
row of each on one sheet, most_frequent.png. With --prefix, one code or several such as 1208,17, it draws the images
whose tokens begin with them. Where there are more than fit, --seed draws them. The images come from --images: a .npy
file (as reconstruct_tokenizer.py writes it, in the order of the tokens), a folder (files named by key, or numbered in
that order), or the configuration whose evaluation images were tokenized. When nothing is given, they are taken from
beside the tokens: images.npy, or files named by key, as inference_generator.py writes them.
"""

from utils.cli import Parser, run  # first, so that Ctrl-C ends this quietly from here on

# isort: split
import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data.token_images import images_beside, read_images
from utils.errors import UserError
from utils.images import contact_sheet, tile_side, write_image
from utils.result_folder import ResultPaths
from utils.token_statistics import frequent_prefixes, nearest_prefixes, with_prefix
from utils.tokens import read_tokens

NUM_LISTED = 10
NUM_NEAREST = 5
OVERVIEW = "most_frequent.png"
ROW_LENGTH = 10  # images
TILE_RANGE = 96, 192  # pixels a side


def main() -> None:
    arguments = parse_arguments()
    saved = read_tokens(arguments.data)
    tokens, (num_images, num_tokens) = saved.tokens, saved.tokens.shape
    source = arguments.images or images_beside(arguments.data, saved.keys)
    if source is None:
        raise UserError(
            f"the images of {arguments.data} are not beside it (images.npy, or files named by key): give the images as "
            "--images (a .npy file, a folder or a configuration)"
        )
    if arguments.prefix is None:
        prefixes = most_frequent(tokens)
    else:
        prefixes = [parse_prefix(arguments.prefix, num_tokens)]
        check_exists(tokens, prefixes[0])

    paths, results = {prefix: path_of(arguments.out, prefix) for prefix in prefixes}, ResultPaths()
    results.claim(*paths.values(), *([] if arguments.prefix else [arguments.out / OVERVIEW]))
    rows, columns = arguments.grid_size
    draws = np.random.default_rng(arguments.seed)
    found = {prefix: with_prefix(tokens, prefix) for prefix in prefixes}
    shown = {
        prefix: indices if len(indices) <= rows * columns else np.sort(draws.choice(indices, rows * columns, False))
        for prefix, indices in found.items()
    }
    images = read_images(source, saved.keys, sorted({int(index) for indices in shown.values() for index in indices}))
    for prefix, indices in shown.items():
        some = f", {len(indices)} shown" if len(indices) < len(found[prefix]) else ""
        tokens_are = "token" if len(prefix) == 1 else "tokens"
        title = f"first {tokens_are} {text_of(prefix)}: {len(found[prefix]):,} of {num_images:,} images{some}"
        write_image(grid([images[index] for index in indices.tolist()], columns, title), results.place(paths[prefix]))
        print(f"{paths[prefix]}: {title}")
    if arguments.prefix is None:
        path = arguments.out / OVERVIEW
        write_image(overview(shown, found, images), results.place(path))
        print(f"{path}: a row of each")
    results.finish()


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, metavar="TOKENS.NPZ", help="a tokens file")
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


def most_frequent(tokens: np.ndarray) -> list[tuple[int, ...]]:
    """The most frequent first codes; they and the most frequent pairs are listed."""
    codes = frequent_prefixes(tokens, 1)
    print(f"{len(tokens):,} images; {len(codes)} different first codes, the most frequent:")
    print_counts(codes[:NUM_LISTED], len(tokens))
    if tokens.shape[1] > 1:
        pairs = frequent_prefixes(tokens, 2)
        print(f"{len(pairs)} different first pairs, the most frequent:")
        print_counts(pairs[:NUM_LISTED], len(tokens))
    return [prefix for prefix, _ in codes[:NUM_LISTED]]


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
    return contact_sheet(rows, title=title, tile=tile_side(images[0].width, *TILE_RANGE))


def overview(
    shown: Mapping[tuple[int, ...], np.ndarray],
    found: Mapping[tuple[int, ...], np.ndarray],
    images: Mapping[int, Image.Image],
) -> Image.Image:
    """A row of images for each prefix, beside the prefix and the number of images that have it."""
    rows = [[images[index] for index in indices[:ROW_LENGTH].tolist()] for indices in shown.values()]
    titles = [f"{text_of(prefix)}   ({len(indices):,})" for prefix, indices in found.items()]
    return contact_sheet(rows, row_titles=titles, tile=tile_side(rows[0][0].width, *TILE_RANGE))


if __name__ == "__main__":
    run(main)
