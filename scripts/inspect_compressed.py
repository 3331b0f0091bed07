"""Tell what compressed files (.1dp) hold, without decoding them.

    python3 scripts/inspect_compressed.py bag.1dp output/fashion_1dp

Takes files, folders and - for the standard input. The exit status is 0 where all are sound, and 1 where some are not.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before other projects' packages of our names

from utils.cli import Parser, counted, run  # first, so that Ctrl-C ends this quietly from here on

# isort: split

from codec.bitstream import MAGIC, VERSION, Geometry, unpack
from codec.conversions import STREAM, list_compressed
from codec.entropy import FILE, load_entropy_models, read_tokens
from codec.known_models import KnownModel, described, known_by
from utils.errors import UserError


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE", help="file, folder of files, or - for the standard input")
    num_broken = 0
    for name in listed(parser.parse_args().files):
        try:
            lines = facts(read(name))
        except UserError as error:
            print(f"error: {name}: {error}", file=sys.stderr)
            num_broken += 1
            continue
        print(name)
        for title, text in lines.items():
            print(f"  {title:9} {text}")
    sys.exit(1 if num_broken else 0)


def listed(names: list[str]) -> list[str]:
    """The files among `names`, and those in the folders among them; a folder that has none stays."""
    found = []
    for name in names:
        is_folder = name not in ("", STREAM) and Path(name).is_dir()
        files = [str(Path(name) / one) for one in list_compressed(Path(name))] if is_folder else []
        found += files or [name]
    return found


def read(name: str) -> bytes:
    """
    Raises:
        UserError: It cannot be read.
    """
    if name == STREAM:
        return sys.stdin.buffer.read()
    try:
        return Path(name).read_bytes()
    except IsADirectoryError as error:
        raise UserError("this is a folder without .1dp files: name another, or a file") from error
    except OSError as error:
        raise UserError(f"it cannot be read: {error.strerror}") from error


def facts(data: bytes) -> dict[str, str]:
    """What a file says of itself.

    Raises:
        FormatError: It is none, or damaged.
    """
    file = unpack(data)
    header = file.header
    known = known_by(header.tokenizer)
    num_tokens = sum(header.lengths)
    side = f"{known.image_size} x {known.image_size}" if known else "the model's"
    lines = {
        "format": f"magic {MAGIC:02x}, version {VERSION}, {header.mode.name.lower()}",
        "model": described(header.tokenizer),
        "image": in_words(header.geometry) if header.geometry else f"{side} pixels",
        "tokens": f"{num_tokens:,}",
        "payload": f"{counted(header.payload_size, 'byte')}, {8 * header.payload_size / num_tokens:.2f} bits a token",
        "file": f"{len(data):,} bytes, {file.header_size} of them header",
        "check": "sound",
    }
    if header.geometry and (tiles := header.geometry.tiles):
        lines["tokens"] += f" in {tiles.columns} x {tiles.rows} tiles of {min(tiles.lengths)} to {max(tiles.lengths)}"
    if file.is_cut:
        lines["check"] = f"cut: {len(file.payload):,} of {header.payload_size:,} bytes of the payload are there"
        lines["check"] += certain_tokens(data, known)
    return lines


def in_words(geometry: Geometry) -> str:
    turned = f", turned as EXIF orientation {geometry.orientation} says" if geometry.orientation > 1 else ""
    fit = {"crop": "its middle square", "pad": "padded", "stretch": "stretched", "tile": "in tiles"}
    return f"{geometry.width} x {geometry.height} pixels, {fit[geometry.fit.name.lower()]}{turned}"


def certain_tokens(data: bytes, known: KnownModel | None) -> str:
    """How many tokens a cut file still tells, where its entropy model is known."""
    if known is None:
        return ""
    read = read_tokens(data, load_entropy_models(known.folder / FILE))
    return f", and {counted(int(read.certain.sum()), 'token')}"


if __name__ == "__main__":
    run(main, keeps_memory=False)  # and without torch
