"""Show images whose first tokens are the same.

    python3 scripts/reconstruct_tokenizer.py --config configs/fashion/eval.yaml --output_dir output/tokens --tokens
    python3 scripts/visualize_first_token_clustering.py --data output/tokens/tokens.npz
    python3 scripts/visualize_first_token_clustering.py --data output/tokens/tokens.npz --prefix 774

Without --prefix it lists the most frequent first codes and first pairs, and draws a grid for each of those codes and a
row of each on one sheet, most_frequent.png. With --prefix, one code or several such as 774,864, it draws the images
whose tokens begin with them. Where there are more than fit, --seed draws them. The images come from --images: a .npy
file (as reconstruct_tokenizer.py writes it, by the names in its record; any other in the order of the tokens), a folder
(files named by key, or numbered likewise), or the configuration whose evaluation images were tokenized. When nothing is
given, they are taken from beside the tokens: images.npy, or files named by key, as inference_generator.py writes them.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before other projects' packages of our names

from utils.cli import Parser, run  # first, so that Ctrl-C ends this quietly from here on

# isort: split
import argparse
import re
from collections.abc import Sequence

import numpy as np

from data.token_images import images_beside, read_images
from utils.errors import UserError
from utils.images import write_image
from utils.result_folder import ResultPaths
from utils.token_grids import drawn, grid, most_frequent, overview, parse_prefix, title_of
from utils.token_statistics import with_prefix
from utils.tokens import read_tokens

OVERVIEW = "most_frequent.png"


def main() -> None:
    with ResultPaths() as results:
        visualize(parse_arguments(), results)


def visualize(arguments: argparse.Namespace, results: ResultPaths) -> None:
    saved = read_tokens(arguments.data)
    tokens = saved.tokens
    source = arguments.images or images_beside(arguments.data, saved.keys)
    if source is None:
        raise UserError(
            f"the images of {arguments.data} are not beside it (images.npy, or files named by key): give the images as "
            "--images (a .npy file, a folder or a configuration)"
        )
    if arguments.prefix is None:
        prefixes, listed = most_frequent(tokens)
        print(listed)
    else:
        prefixes = [parse_prefix(arguments.prefix, tokens)]

    paths = {prefix: path_of(arguments.out, prefix) for prefix in prefixes}
    results.claim(*paths.values(), *([] if arguments.prefix else [arguments.out / OVERVIEW]))
    rows, columns = arguments.grid_size
    draws = np.random.default_rng(arguments.seed)
    found = {prefix: with_prefix(tokens, prefix) for prefix in prefixes}
    shown = {prefix: drawn(indices, rows * columns, draws) for prefix, indices in found.items()}
    images = read_images(source, saved.keys, sorted({int(index) for indices in shown.values() for index in indices}))
    for prefix, indices in shown.items():
        title = title_of(prefix, len(found[prefix]), len(indices), len(tokens))
        write_image(grid([images[index] for index in indices.tolist()], columns, title), results.place(paths[prefix]))
        print(f"{paths[prefix]}: {title}")
    if arguments.prefix is None:
        path = arguments.out / OVERVIEW
        write_image(overview(shown, found, images), results.place(path))
        print(f"{path}: a row of each")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, metavar="TOKENS.NPZ", help="a tokens file")
    parser.add_argument("--prefix", help="codes that the tokens begin with, such as 774 or 774,864")
    parser.add_argument(
        *("--output_dir", "--out"),
        dest="out",
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
            f"--output_dir must be a folder when no --prefix is given, got {arguments.out}: there are several grids"
        )
    return arguments


def is_image(path: Path) -> bool:
    return path.suffix.lower() in (".png", ".pdf")


def path_of(out: Path, prefix: Sequence[int]) -> Path:
    return out if is_image(out) else out / f"first_tokens_{'_'.join(map(str, prefix))}.png"


if __name__ == "__main__":
    run(main)
