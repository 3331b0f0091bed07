"""Tokenize images, and show them again from 1, 2, 4, ... tokens.

    python3 scripts/inference_tokenizer.py --image assets/fashion
    python3 scripts/inference_tokenizer.py --config configs/eval/one-d-piece_s256.yaml --image assets/photos/chelsea.png

The first takes the bundled model (garments, 32 x 32 pixels), the second the published one from the hub. Of each image
the shorter edge is scaled to the model's size and the centre is kept. Into --output_dir go IMAGE_LENGTH.png for every
length, tokens.npz (tokens (n, N), keys) and contact_sheet.png; those of an earlier run are removed.
"""

import argparse
import math
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data import DataError
from data.image_sources import list_images
from modeling.checkpoints.locate import Located
from modeling.checkpoints.published import BUNDLED
from modeling.titok import TiTok
from modeling.tokenizers import BUNDLED_TOKENIZER, default_lengths, load_tokenizer
from utils.cli import pick_device, run
from utils.errors import UserError
from utils.evaluation.metrics import psnr, ssim
from utils.files import replacing
from utils.images import contact_sheet, to_pil, write_image
from utils.inference import Arithmetic, add_batch_size_argument, add_speed_arguments, choose_batch_size, prepared
from utils.paths import ROOT
from utils.result_folder import ResultFolder

MOST_SHOWN = 16  # images on the contact sheet and in the second table
TILE_RANGE = 128, 256  # pixels a side on the contact sheet
LONGEST_NAME = 20  # characters, likewise
COLOUR = 4 / 255  # mean difference of a pixel's channels above which an image counts as coloured


@dataclass(frozen=True)
class ImageFile:
    """An image to read, the name of what is made of it, and whether the user named this very file."""

    path: Path
    key: str
    is_named: bool


@dataclass(frozen=True)
class Result:
    """One image as the model gives it back; the dicts are by number of tokens."""

    file: ImageFile
    tokens: Tensor  # (N,)
    original: Image.Image
    images: dict[int, Image.Image]
    psnr: dict[int, float]
    ssim: dict[int, float]
    is_coloured: bool


def main() -> None:
    arguments = parse_arguments()
    files = find_images(arguments.image)
    lengths = parse_lengths(arguments.lengths)
    folder = ResultFolder(arguments.output_dir)
    device = pick_device(arguments.device)
    tokenizer, located = load_tokenizer(arguments.config, arguments.checkpoint, device=device)
    arithmetic = prepared(arguments, tokenizer)
    lengths = lengths or default_lengths(tokenizer)
    bits = math.log2(tokenizer.codebook_size)
    size = tokenizer.image_size
    name = model_name(located)
    print(f"model          {name}: {size} x {size} pixels, up to {tokenizer.num_latent_tokens} tokens of {bits:g} bits")

    def try_batch(num_images: int) -> None:
        black = (files[0], torch.zeros(3, size, size, dtype=torch.uint8))
        list(reconstruct_batch(tokenizer, [black] * num_images, lengths, arithmetic))

    batch_size = choose_batch_size(arguments.batch_size, try_batch, device, most=len(files))
    broken: list[tuple[ImageFile, str]] = []
    keys, tokens, scores, shown, coloured = [], [], [], [], []
    to_show = choose(files, arguments.seed)
    for result in reconstruct(tokenizer, files, lengths, batch_size, arithmetic, broken):
        for length, image in result.images.items():
            write_image(image, folder / f"{result.file.key}_{length}.png")
        keys.append(result.file.key)
        tokens.append(result.tokens)
        scores.append([(result.psnr[length], result.ssim[length]) for length in lengths])
        coloured += [result.file.key] if result.is_coloured else []
        shown += [result] if result.file in to_show else []
    if not keys:
        raise UserError(f"none of the {len(files)} images can be used; {describe(broken)}")

    write_tokens(folder / "tokens.npz", torch.stack(tokens).numpy(), keys)
    write_image(sheet(shown, lengths, bits, title=name), folder / "contact_sheet.png")
    print_table(np.array(scores), lengths, bits, size)
    if len(shown) == len(keys) > 1:
        print_images(shown, lengths)
    if coloured and is_bundled(located):
        print(
            f"\nnote: {BUNDLED_TOKENIZER} has seen nothing but grey garments, and {clip(coloured[0])}"
            f"{f' and {len(coloured) - 1} more are' if len(coloured) > 1 else ' is'} in colour: expect a garment-like "
            "shadow of it. For photographs take --config configs/eval/one-d-piece_s256.yaml (from the hub)."
        )
    some = f" ({len(shown)} of {len(keys)} images, drawn by --seed)" if len(shown) < len(keys) else ""
    print(f"\ncontact sheet  {arguments.output_dir / 'contact_sheet.png'}{some}")
    print(f"images       {arguments.output_dir / 'IMAGE_LENGTH.png'}")
    print(f"tokens         {arguments.output_dir / 'tokens.npz'}")
    if any(file.is_named for file, _ in broken):
        raise UserError(f"{describe(broken)}; the other {len(keys)} are done")
    if broken:
        print(f"skipped {describe(broken)}", file=sys.stderr)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--image",
        nargs="+",
        type=Path,
        default=[ROOT / "assets/fashion"],
        metavar="PATH",
        help="image files and folders of images (default: assets/fashion of this project)",
    )
    parser.add_argument("--config", help="configuration of the model; its own, or the bundled model's, when not given")
    parser.add_argument(
        "--checkpoint",
        help="hub id, folder made by save_pretrained, training output or one of its checkpoints, weights file, bundled "
        f"model, or a step number of the config's output folder (default: the run in the config's output folder, else "
        f"the published model that the config names; without a config {BUNDLED_TOKENIZER})",
    )
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
    return parser.parse_args()


def find_images(paths: Sequence[Path]) -> list[ImageFile]:
    """The files among `paths`, and the images in the folders among them, each with a key of its own."""
    found: list[tuple[Path, str, bool]] = []
    for path in paths:
        if path.is_dir():
            names = list_images(path)
            if not names:
                raise UserError(f"--image {path} is a folder without images: name one that holds some, or a file")
            others = {file for file in path.rglob("[!.]*") if file.is_file()} - {path / name for name in names}
            if others:
                print(f"images       {len(names)} of {path}; left out {len(others)}, such as {min(others).name}")
            found += [(path / name, Path(name).with_suffix("").as_posix().replace("/", "_"), False) for name in names]
        elif path.is_file():
            found.append((path, path.stem, True))
        else:
            raise UserError(f"--image {path} is neither a file nor a folder (working directory {Path.cwd()})")
    files: dict[str, ImageFile] = {}
    for path, name, is_named in found:
        key, number = name, 2
        while key in files:  # images of one name must not overwrite one another's results
            key, number = f"{name}-{number}", number + 1
        files[key] = ImageFile(path, key, is_named)
    return list(files.values())


def parse_lengths(texts: Sequence[str] | None) -> list[int]:
    """Texts such as "16" and "1,4" as [1, 4, 16]; which of them can be decoded is the model's to say."""
    words = [word for text in texts or [] for word in text.split(",")]
    try:
        return sorted({int(word) for word in words})
    except ValueError as error:
        raise UserError(f"--lengths takes whole numbers such as 1,4,16, got {' '.join(texts)}") from error


def choose(files: Sequence[ImageFile], seed: int) -> set[ImageFile]:
    """What goes on the contact sheet: all of a few, some of many."""
    return set(files if len(files) <= MOST_SHOWN else random.Random(seed).sample(files, MOST_SHOWN))


def reconstruct(
    tokenizer: TiTok,
    files: Sequence[ImageFile],
    lengths: Sequence[int],
    batch_size: int,
    arithmetic: Arithmetic,
    broken: list[tuple[ImageFile, str]],
) -> Iterator[Result]:
    """Read, encode and decode a batch at a time; files that cannot be read are added to `broken` with the reason."""
    from data.transforms import EvalTransform, decode_image  # torchvision is slow to import, too slow for --help

    transform = EvalTransform(tokenizer.image_size)
    batch: list[tuple[ImageFile, Tensor]] = []
    # disable=None: no bar where nobody watches, in files and pipes.
    for file in tqdm(files, unit="image", leave=False, dynamic_ncols=True, disable=None):
        try:
            batch.append((file, transform(decode_image(file.path.read_bytes()))))
        except (DataError, OSError) as error:
            broken.append((file, str(error)))
        if len(batch) == batch_size:
            yield from reconstruct_batch(tokenizer, batch, lengths, arithmetic)
            batch = []
    if batch:
        yield from reconstruct_batch(tokenizer, batch, lengths, arithmetic)


@torch.inference_mode()
def reconstruct_batch(
    tokenizer: TiTok,
    batch: Sequence[tuple[ImageFile, Tensor]],
    lengths: Sequence[int],
    arithmetic: Arithmetic,
) -> Iterator[Result]:
    device = tokenizer.latent_tokens.device
    originals = torch.stack([pixels for _, pixels in batch]).to(device) / 255  # (B, 3, P, P)
    z_quantized, encoded = tokenizer.encode(originals)
    with arithmetic():
        decoded = {length: tokenizer.decode(z_quantized, length).float().clamp(0, 1) for length in lengths}
    psnrs = {length: psnr(pixels, originals).tolist() for length, pixels in decoded.items()}
    ssims = {length: ssim(pixels, originals).tolist() for length, pixels in decoded.items()}
    for index, (file, _) in enumerate(batch):
        yield Result(
            file,
            tokens=encoded["min_encoding_indices"][index, 0].cpu(),
            original=to_pil(originals[index]),
            images={length: to_pil(pixels[index]) for length, pixels in decoded.items()},
            psnr={length: values[index] for length, values in psnrs.items()},
            ssim={length: values[index] for length, values in ssims.items()},
            is_coloured=bool((originals[index].amax(dim=0) - originals[index].amin(dim=0)).mean() > COLOUR),
        )


def num_bytes(length: int, bits: float) -> int:
    return math.ceil(length * bits / 8)


def sheet(results: Sequence[Result], lengths: Sequence[int], bits: float, title: str) -> Image.Image:
    """A row an image: the original, then what each number of tokens gives back."""
    size = results[0].original.width
    smallest, largest = TILE_RANGE
    tile = min(size * math.ceil(smallest / size), largest)  # a multiple of the size: all pixels enlarge alike
    captions = []
    for result in results:
        row = [f"original\n{3 * size * size:,} bytes\nas raw RGB"]
        for length in lengths:
            tokens = "1 token" if length == 1 else f"{length} tokens"
            row.append(f"{tokens}\n{num_bytes(length, bits)} bytes\n{result.psnr[length]:.1f} dB")
        captions.append(row)
    return contact_sheet(
        [[result.original, *result.images.values()] for result in results],
        row_titles=[clip(result.file.key) for result in results],
        captions=captions,
        title=title,
        tile=tile,
    )


def print_table(scores: np.ndarray, lengths: Sequence[int], bits: float, size: int) -> None:
    """Means over the images of `scores`, (n, lengths, 2)."""
    print(f"\nmean over {len(scores)} images" if len(scores) > 1 else "")
    print("tokens   bytes   bits/pixel   PSNR (dB)     SSIM")
    for length, (mean_psnr, mean_ssim) in zip(lengths, scores.mean(axis=0), strict=True):
        bits_per_pixel = length * bits / size**2
        print(
            f"{length:6}   {num_bytes(length, bits):5}   {bits_per_pixel:10.4f}   {mean_psnr:9.2f}   {mean_ssim:6.4f}"
        )


def print_images(results: Sequence[Result], lengths: Sequence[int]) -> None:
    width = max(len(clip(result.file.key)) for result in results)
    print("\nPSNR (dB) of each image, by number of tokens")
    print(" " * width + "".join(f"{length:8}" for length in lengths))
    for result in results:
        print(f"{clip(result.file.key):{width}}" + "".join(f"{result.psnr[length]:8.2f}" for length in lengths))


def write_tokens(path: Path, tokens: np.ndarray, keys: Sequence[str]) -> None:
    with replacing(path) as aside:
        np.savez_compressed(aside, tokens=tokens, keys=np.array(keys))


def is_bundled(located: Located) -> bool:
    return located.weights.parent == BUNDLED[BUNDLED_TOKENIZER]


def model_name(located: Located) -> str:
    return f"{BUNDLED_TOKENIZER} (bundled, trained on Fashion-MNIST)" if is_bundled(located) else located.name


def clip(name: str) -> str:
    """A long name by its two ends."""
    half = LONGEST_NAME // 2
    return name if len(name) <= LONGEST_NAME else f"{name[: half - 3]}...{name[-half:]}"


def describe(broken: Sequence[tuple[ImageFile, str]]) -> str:
    """Which files could not be read, and why the first could not."""
    names = ", ".join(str(file.path) for file, _ in broken[:3]) + (", ..." if len(broken) > 3 else "")
    count = f"{len(broken)} broken {'image' if len(broken) == 1 else 'images'}"
    return f"{count}: {names} ({broken[0][1]})"


if __name__ == "__main__":
    run(main)
