"""Read compressed files (.1dp) back into images.

    python3 scripts/decompress.py bag.1dp -o bag.png
    python3 scripts/decompress.py output/fashion_1dp -o output/fashion_png
    python3 scripts/decompress.py bag.1dp -o - --tokens 8 > bag_8_tokens.png
    python3 scripts/decompress.py bag.1dp -o bag_invented.png --tokens 4 --complete --seed 1

IN is a file, a folder, whose tree is kept, or - for the standard input. Without -o images are written beside the files,
as PNG; -o NAME.jpg and so on choose another format. The bundled model that wrote a file is found by itself; another one
is named by --checkpoint. Of a cut file what is left of it is shown. With --complete a generator invents the tokens that
are not there: the image is sharp, and what the first tokens do not say is not what was compressed. The exit status is 0
where all files were read, and 1 where some were not.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before other projects' packages of our names

from utils.cli import Parser, counted, pick_device, run  # first, so that Ctrl-C ends this quietly from here on

# isort: split
import argparse
import io
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tqdm import tqdm

from utils.errors import UserError, reason

if TYPE_CHECKING:
    from PIL import Image

    from codec.completion import Completer
    from codec.conversions import Conversion
    from codec.files import Codec


def main() -> None:
    arguments = parse_arguments()
    # Slow to import, too slow for --help.
    from codec.conversions import conversions, list_compressed, report_failures
    from codec.files import codec_for, load_codec

    plan = conversions(arguments.input, arguments.output, ".png", list_compressed, force=arguments.force)
    device = pick_device(arguments.device)
    is_named = arguments.config or arguments.checkpoint or arguments.bare
    codec = load_codec(arguments.config, arguments.checkpoint, device) if is_named else None
    completer = None
    if arguments.complete:
        from codec.completion import Completer

        completer = Completer(arguments.complete, arguments.seed, arguments.label, arguments.generator)
    failures, done, num_cut = [], [], 0
    # disable=None: no bar where nobody watches, in files and pipes.
    for one in tqdm(plan, unit="image", leave=False, dynamic_ncols=True, disable=None if len(plan) > 1 else True):
        try:
            data = one.read()
            image, kept, is_cut = decoded(data, codec or codec_for(data, device), completer, arguments)
            one.write(in_format(image, one.target))
        except BrokenPipeError:  # nobody reads the standard output any more
            raise
        except (UserError, OSError) as error:
            failures.append((one, reason(error)))
            continue
        done.append((one, image.size, kept))
        num_cut += is_cut
    report(done, arguments.tokens)
    if num_cut:
        what = "the file is" if len(plan) == 1 else f"{num_cut} of {len(plan)} files are"
        shown = "the rest is invented" if completer else "shown is what the tokens say that are there"
        print(f"{what} cut: {shown}", file=sys.stderr)
    if completer and completer.num_completed:
        print(f"{completer}: not what was compressed", file=sys.stderr)
    report_failures(failures, len(plan))


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("input", metavar="IN", help="file, folder of files, or - for the standard input")
    parser.add_argument("-o", "--output", metavar="OUT", help="image, folder, or - for the standard output")
    parser.add_argument("--tokens", type=int, metavar="N", help="read the first N alone, of each tile")
    parser.add_argument(
        "--bare", action="store_true", help="IN is a payload without a header: name its --checkpoint, --tokens, --mode"
    )
    parser.add_argument("--mode", choices=("fixed", "tables", "network"), help="with --bare: bits of tokens")
    parser.add_argument(
        "--complete",
        nargs="?",
        const="vivid",
        choices=("faithful", "vivid"),
        help="invent the tokens that are not there: drawn ones (vivid, the default) or the likeliest (faithful)",
    )
    parser.add_argument("--seed", type=int, default=42, help="of what is invented (default: %(default)s)")
    parser.add_argument("--label", metavar="CLASS", help="number or name of what is shown (default: not known)")
    parser.add_argument("--generator", help="what invents (default: the bundled one of a bundled model)")
    parser.add_argument("--force", action="store_true", help="replace files that are there")
    parser.add_argument("--config", help="configuration of the model; its own when not given")
    parser.add_argument("--checkpoint", help="the model: bundled name, folder, training output, file or hub id")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.tokens is not None and arguments.tokens < 1:
        raise UserError(f"--tokens must be 1 or more, got {arguments.tokens}")
    if arguments.bare and arguments.tokens is None:
        raise UserError("--bare needs --tokens N: a payload does not say how many it holds")
    if arguments.complete and arguments.bare:
        raise UserError("--complete is for files: a payload without a header is complete")
    if not arguments.complete and (arguments.label or arguments.generator):
        raise UserError("--label and --generator go with --complete")
    if arguments.mode and not arguments.bare:
        raise UserError("--mode is for --bare: a file says it itself")
    return arguments


def decoded(
    data: bytes, codec: "Codec", completer: "Completer | None", arguments: argparse.Namespace
) -> tuple["Image.Image", list[int], bool]:
    """The image of a file, how many tokens each of its tiles, or it, is made of, and whether a cut took asked ones."""
    if arguments.bare:
        from codec.files import MODES

        return codec.decompress_bare(data, arguments.tokens, MODES.get(arguments.mode)), [arguments.tokens], False
    read = codec.read(data, arguments.tokens)
    shown = completer(read, codec) if completer else read
    kept, asked = read.certain.tolist(), [min(length, arguments.tokens or length) for length in read.header.lengths]
    return codec.images([shown])[0], kept, read.is_cut and kept != asked


def report(shown: Sequence[tuple["Conversion", tuple[int, int], list[int]]], asked: int | None) -> None:
    """What was written and where, on the standard error."""
    from codec.conversions import place_of

    if not shown:
        return
    one, (width, height), kept = shown[0]
    if len(shown) == 1:
        tokens = counted(sum(kept), "token") + (f" in {len(kept):,} tiles" if len(kept) > 1 else "")
        what = f"{one.target or 'the standard output'}: {width} x {height} pixels from {tokens}"
    else:
        what = f"{len(shown)} images into {place_of([one for one, _, _ in shown])}"
    print(f"wrote {what}", file=sys.stderr)
    if fewer := sum(max(kept) < (asked or 0) for _, _, kept in shown):
        where = "the file has" if len(shown) == 1 else f"{fewer} of {len(shown)} files have"
        print(f"{where} fewer tokens than the {asked} of --tokens: all that are there were read", file=sys.stderr)


def in_format(image: "Image.Image", target: Path | None) -> bytes:
    """The bytes of an image file, of the format that its name says; PNG for the standard output."""
    from PIL import Image, UnidentifiedImageError

    ending = ".png" if target is None else target.suffix.lower()
    name = Image.registered_extensions().get(ending)
    if name not in Image.SAVE:
        raise UserError(f"{target} has no ending of an image format that can be written, such as .png")
    file = io.BytesIO()
    try:
        image.save(file, name)
        if name in Image.OPEN and (size := Image.open(file).size) != image.size:  # Pillow reads not all that it writes
            raise ValueError(f"it would become {size[0]} x {size[1]}")
    except (OSError, ValueError, struct.error) as error:  # as each of Pillow's formats has it
        width, height = image.size
        what = "no reader would know it" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(
            f"an image of {width} x {height} pixels cannot be written as {name} ({what}): take another ending than "
            f"{ending}, such as .png"
        ) from error
    return file.getvalue()


if __name__ == "__main__":
    run(main)
