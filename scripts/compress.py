"""Write images as compressed files (.1dp), of a size or a quality, and say what came out.

    python3 scripts/compress.py assets/fashion/bag.png -o bag.1dp --tokens 16
    python3 scripts/compress.py assets/fashion -o output/fashion_1dp --psnr 20 --effort 2
    python3 scripts/compress.py photo.jpg --checkpoint one-d-piece_emoji --fit tile --max_bytes 2000
    cat photo.png | python3 scripts/compress.py - > photo.1dp

IN is an image, a folder of images, whose tree is kept, or - for the standard input. Without -o files are written beside
the images. Of --tokens, --max_bytes, --budget, --psnr, --ssim and --perceptual one can be asked for: the first three
give the nearest image within the limit, which is not always the one of most tokens, the others the smallest file of at
least that quality. By default up to all tokens are kept. PSNR, SSIM and the perceptual distance (EfficientNet-Lite0)
are those of the image at the model's scale. The exit status is 0 where all images were written, else 1.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before other projects' packages of our names

from utils.cli import Parser, counted, pick_device, run  # first, so that Ctrl-C ends this quietly from here on

# isort: split
import argparse
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from utils.domains import DOMAINS, note_on
from utils.errors import UserError, reason

if TYPE_CHECKING:
    from codec.conversions import Conversion
    from codec.files import Codec, Draft, Settings, Written

Failures = list[tuple["Conversion", str]]


def main() -> None:
    arguments = parse_arguments()
    # Slow to import, too slow for --help.
    from codec.conversions import EXTENSION, conversions, report_failures
    from codec.files import FITS, MODES, Settings, load_codec
    from codec.rate import GOALS, goal_of
    from data.image_sources import list_images

    settings = Settings(
        goal=goal_of(**{name: getattr(arguments, name) for name in GOALS}),
        fit=FITS[arguments.fit],
        effort=arguments.effort,
        is_fast=arguments.fast,
        mode=MODES.get(arguments.mode),
        is_bare=arguments.bare,
    )
    plan = conversions(arguments.input, arguments.output, EXTENSION, list_images, force=arguments.force)
    if settings.is_bare and len(plan) > 1 and settings.goal.measure != "tokens":
        raise UserError(
            f"--{settings.goal.measure} would give each of {len(plan)} payloads its own number of tokens, and without "
            "a header none says it: ask for --tokens, or leave --bare out"
        )
    codec = load_codec(arguments.config, arguments.checkpoint, pick_device(arguments.device))
    failures: Failures = []
    written, done = [], []
    unlike: list[str] = []
    drafts = drafted(plan, codec, settings, failures, unlike)
    for group in [list(drafts)] if settings.goal.measure == "budget" else ([one] for one in drafts):
        try:
            choices = codec.chosen([draft for _, draft in group], settings.goal)
        except UserError as error:
            failures += [(one, str(error)) for one, _ in group]
            continue
        for (one, draft), choice in zip(group, choices, strict=True):
            file = codec.write(draft, choice, settings)
            try:
                one.write(file.data)
            except BrokenPipeError:  # nobody reads the standard output any more
                raise
            except OSError as error:
                failures.append((one, reason(error)))
                continue
            written.append(file)
            done.append(one)
    report(written, done, settings, codec.models.num_tokens)
    if note := note_on(codec.name, unlike):
        print(note, file=sys.stderr)
    report_failures(failures, len(plan))


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("input", metavar="IN", help="image, folder of images, or - for the standard input")
    parser.add_argument("-o", "--output", metavar="OUT", help="file, folder, or - for the standard output")
    parser.add_argument("--tokens", type=int, metavar="N", help="at most so many, of each tile where there are some")
    parser.add_argument("--max_bytes", type=int, metavar="N", help="at most so many, of each file")
    parser.add_argument("--budget", type=int, metavar="N", help="bytes of all files together, spread where they help")
    parser.add_argument("--psnr", type=float, metavar="DB", help="at least so much")
    parser.add_argument("--ssim", type=float, metavar="S", help="at least so much")
    parser.add_argument("--perceptual", type=float, metavar="D", help="a perceptual distance of at most so much")
    parser.add_argument("--fast", action="store_true", help="with --psnr: guess the length, and decode about twice")
    parser.add_argument(
        "--effort", type=int, default=0, metavar="0..3", help="how long better tokens are searched (default: 0)"
    )
    parser.add_argument(
        "--fit",
        default="crop",
        choices=("crop", "pad", "stretch", "tile"),
        help="how an image of another shape becomes the model's square, or squares (default: %(default)s)",
    )
    parser.add_argument("--mode", choices=("fixed", "tables", "network"), help="bits of tokens (default: the fewest)")
    parser.add_argument(
        "--bare",
        action="store_true",
        help="the payload alone, whose reader must know what it holds; with --tokens exactly so many, else all",
    )
    parser.add_argument("--force", action="store_true", help="replace files that are there")
    parser.add_argument("--config", help="configuration of the model; its own when not given")
    parser.add_argument("--checkpoint", help="the model: bundled name, folder, training output, file or hub id")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: %(default)s)")
    return parser.parse_args()


def drafted(
    plan: Sequence["Conversion"], codec: "Codec", settings: "Settings", failures: Failures, unlike: list[str]
) -> Iterator[tuple["Conversion", "Draft"]]:
    """Read and encode some images at a time.

    What cannot be read is added to `failures`, and what is none such as the model has seen to `unlike`.
    """
    from codec.files import BATCH
    from data.transforms import as_shown, decode_as_stored

    waiting, domain = [], DOMAINS.get(codec.name)
    with progress(len(plan), "image") as bar:
        for one in plan:
            try:
                image = decode_as_stored(one.read())
                waiting.append((one, codec.canvas(image, settings)))
                if domain is not None and domain.is_unlike(as_shown(image)):
                    unlike.append(one.name)
            except (UserError, OSError) as error:
                failures.append((one, reason(error)))
                bar.update()
            if sum(len(canvas.squares) for _, canvas in waiting) >= BATCH:
                yield from encoded(waiting, codec, settings)
                bar.update(len(waiting))
                waiting = []
        yield from encoded(waiting, codec, settings)


def encoded(waiting: list, codec: "Codec", settings: "Settings") -> Iterator[tuple["Conversion", "Draft"]]:
    if waiting:
        files, canvases = zip(*waiting, strict=True)
        # Several images are quick enough for the bar of images.
        with progress(len(canvases[0].squares) if len(canvases) == 1 else 0, "tile") as bar:
            drafts = codec.drafts(canvases, settings, bar.update)
        yield from zip(files, drafts, strict=True)


def progress(total: int, unit: str) -> tqdm:
    """A bar, of two or more; none where nobody watches, in files and pipes."""
    return tqdm(total=total, unit=unit, leave=False, dynamic_ncols=True, disable=None if total > 1 else True)


def report(written: Sequence["Written"], done: Sequence["Conversion"], settings: "Settings", most: int) -> None:
    """What came out and where, on the standard error; `most` are the model's tokens."""
    from codec.bitstream import Fit
    from codec.conversions import place_of

    if not written:
        return
    sizes, tokens = [len(one.data) for one in written], [one.num_tokens for one in written]
    if len(written) == 1:
        images, size, length = "1 image", counted(sizes[0], "byte"), counted(tokens[0], "token")
    else:
        images = f"{len(written):,} images, on average"
        size, length = f"{np.mean(sizes):,.1f} bytes", f"{np.mean(tokens):,.1f} tokens"
    bits_per_pixel = 8 * sum(sizes) / sum(one.area for one in written)
    print(
        f"{images}: {size}, {bits_per_pixel:.4f} bits per pixel, {length}, "
        f"{np.mean([one.psnr for one in written]):.2f} dB; {counted(sum(sizes), 'byte')} in all, in {place_of(done)}",
        file=sys.stderr,
    )
    if settings.goal.measure == "tokens" and settings.goal.value and settings.goal.value > most:
        a_tile = " a tile" if settings.fit == Fit.TILE else ""
        print(f"the model makes {most}{a_tile}, fewer than the {settings.goal.value:g} of --tokens", file=sys.stderr)
    if missed := sum(not one.is_reached for one in written):
        print(
            f"{missed} of {len(written)} do not reach {settings.goal.measure} {settings.goal.value:g} with all tokens: "
            "they are as near as the model comes",
            file=sys.stderr,
        )


if __name__ == "__main__":
    run(main)
