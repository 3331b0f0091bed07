"""An image at every length, and a compressed file cut anywhere: all is decoded once, then only shown."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from codec.bitstream import Fit, Geometry, unpack
from codec.canvas import TURNING_SIDES, Canvas, counting_box, from_squares, tile_count
from codec.completion import Completer
from codec.entropy import TokensRead, write_tokens
from codec.files import BATCH, FITS, Codec, Settings
from codec.rate import best_within, decoded, encode, psnr_of, smallest_reaching, squared_error, tried_lengths
from data.transforms import as_shown
from playground.models import Models
from utils.domains import DOMAINS, warning
from utils.errors import UserError
from utils.evaluation.metrics import SSIM_SMALLEST, ssim

MAX_TILES = (96, 36, 18, 9)  # of an image that is compressed, by effort: a quarter of a minute of one core
MAX_TILES_OPENED = 256
TILE_LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
LARGEST_SHOWN = 512  # pixels a side of what a file's square is enlarged to
TARGETS = {"PSNR of at least (dB)": "psnr", "a file of at most (bytes)": "max_bytes"}


@dataclass(frozen=True)
class Prepared:
    """An image decoded at every length that the slider has.

    Args:
        model, name: Of the codec, and of the image, without ending.
        fit: Of `codec.files.FITS`.
        note: What was done to the image, for the visitor; may be empty.
        tokens: (T, N), of its tiles; (1, N) where there are none.
        original: (H, W, 3) uint8, at the model's scale.
        lengths: (L,), tokens of each tile, rising.
        frames: (L, H, W, 3) uint8.
        files: L of them.
        errors, ssim: (L,), of the frames; NaN where the image is too small for SSIM.
    """

    model: str
    name: str
    fit: str
    note: str
    tokens: np.ndarray
    original: np.ndarray
    lengths: np.ndarray
    frames: np.ndarray
    files: Sequence[bytes]
    errors: np.ndarray
    ssim: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        return np.array([len(data) for data in self.files])

    @property
    def psnr(self) -> np.ndarray:
        return psnr_of(self.errors)

    @property
    def pixels(self) -> int:
        return self.original.shape[0] * self.original.shape[1]

    def place(self, num_tokens: int) -> int:
        """The last length of at most so many tokens: the slider has places between where not every one is decoded."""
        return max(0, int(np.searchsorted(self.lengths, num_tokens, side="right")) - 1)

    def reaching(self, target: str, value: float | None) -> tuple[int, bool]:
        """The length that a target means, and whether it is reached there; if not it is the nearest one.

        Args:
            target: One of the values of `TARGETS`.
        """
        if value is None:
            raise UserError("a target needs a number: write one beside it")
        if target == "psnr":
            place, nearest = smallest_reaching(self.sizes, self.errors, self.psnr, value), int(self.errors.argmin())
        else:
            place, nearest = best_within(self.sizes, self.errors, value), 0
        return int(self.lengths[nearest if place is None else place]), place is not None


def prepare(codec: Codec, image: Image.Image, name: str, fit: str = "crop", effort: int = 0) -> Prepared:
    """Encode an image as it was opened, decode it at every length, and write the file of each."""
    domain = DOMAINS.get(codec.name)
    notes = [warning(codec.name, "this image is")] if domain and domain.is_unlike(as_shown(image)) else []
    image, reduced = bounded(image, codec.side, effort) if fit == "tile" else (image, "")
    canvas = codec.canvas(image, Settings(fit=FITS[fit], effort=effort))
    if fit != "tile" and canvas.geometry is not None:
        reduced = _reduced(*_upright_size(canvas.geometry), fit, codec.side)
    note = "; ".join([*notes, *filter(None, [reduced])])
    tokens = _tokens(codec, canvas, effort)
    lengths = _lengths(codec, canvas)
    original = _whole(iter([canvas.squares]), canvas, codec.side)
    frames = np.stack(
        [_whole(rows, canvas, codec.side) for rows in _decoded_rows(codec, torch.from_numpy(tokens), lengths)]
    )
    files = [_written(codec, tokens[:, :length], canvas.geometry) for length in lengths]
    measured = _measured(frames, original)
    return Prepared(codec.name, name, fit, note, tokens, original, np.array(lengths), frames, files, *measured)


def bounded(image: Image.Image, side: int, effort: int = 0) -> tuple[Image.Image, str]:
    """The image, scaled down where it would take more tiles than `MAX_TILES`, and what is said of that."""
    width, height = image.size
    factor = 1.0
    while _num_tiles(round(width * factor), round(height * factor), side) > MAX_TILES[effort]:
        factor *= 0.95
    if factor == 1.0:
        return image, ""
    image = as_shown(image)
    size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    note = f"scaled down from {image.width:,} x {image.height:,}: more tiles would keep you waiting here"
    return image.resize(size, Image.Resampling.BICUBIC), note


def _reduced(width: int, height: int, fit: str, side: int) -> str:
    """What is said of an image that loses most of its pixels."""
    if min(width, height) >= 4 * side:
        return f"{width:,} x {height:,} pixels, of which the model sees {side} x {side}: the fit tile keeps them all"
    if fit == "crop" and max(width, height) >= 2 * min(width, height):
        return f"{width:,} x {height:,} pixels, of which the middle square is kept: the fits pad and tile keep the rest"
    return ""


def _num_tiles(width: int, height: int, side: int) -> int:
    return tile_count(max(1, width), side) * tile_count(max(1, height), side)


def _tokens(codec: Codec, canvas: Canvas, effort: int) -> np.ndarray:
    """(T, N), as `Codec.compress` searches them."""
    lengths, parts = np.array(tried_lengths(codec.tokenizer)), []
    squares, shares = torch.tensor(canvas.squares).permute(0, 3, 1, 2), torch.tensor(canvas.shares).unsqueeze(1)
    for some, weights in zip(squares.split(BATCH), shares.split(BATCH), strict=True):
        encoded = encode(codec.tokenizer, some)
        parts.append(codec.searched(encoded, lengths, effort, weights.to(encoded.tokens.device)).tokens.cpu().numpy())
    return np.concatenate(parts)


def _lengths(codec: Codec, canvas: Canvas) -> list[int]:
    if len(canvas.squares) == 1:
        return tried_lengths(codec.tokenizer)
    total = codec.tokenizer.num_latent_tokens
    if codec.tokenizer.strict_length_assertion:
        return [total]
    return [length for length in TILE_LENGTHS if length < total] + [total]


def _decoded_rows(codec: Codec, tokens: Tensor, lengths: Sequence[int]) -> Iterator[Iterator[np.ndarray]]:
    """The squares of each length, as `_whole` takes them."""
    tokens = tokens.to(codec.tokenizer.latent_tokens.device)
    for length in lengths:
        parts = (next(decoded(codec.tokenizer, some, [length])) for some in tokens.split(BATCH))
        yield iter([np.concatenate([part.permute(0, 2, 3, 1).cpu().numpy() for part in parts])])


def _whole(squares: Iterator[np.ndarray], canvas: Canvas, side: int) -> np.ndarray:
    """(H, W, 3) uint8 of all squares (T, P, P, 3): the image at the model's scale."""
    geometry = canvas.geometry
    everything = next(squares)
    if geometry is not None and geometry.tiles is not None:
        rows = iter(everything.reshape(geometry.tiles.rows, geometry.tiles.columns, *everything.shape[1:]))
        return np.asarray(from_squares(rows, np.ones(len(everything), bool), geometry, side))
    return everything[0][counting_box(canvas.shares[0])]


def _written(codec: Codec, tokens: np.ndarray, geometry: Geometry | None) -> bytes:
    if geometry is not None and geometry.tiles is not None:
        geometry = replace(geometry, tiles=replace(geometry.tiles, lengths=(tokens.shape[1],) * len(tokens)))
    return write_tokens(tokens, codec.models, geometry)


def _measured(frames: np.ndarray, original: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean squared errors and SSIM of frames (L, H, W, 3), (L,) each."""
    images = torch.from_numpy(frames).permute(0, 3, 1, 2)
    target = torch.tensor(original).permute(2, 0, 1).expand(images.shape)
    errors = squared_error(images, target).numpy()
    if min(original.shape[:2]) < SSIM_SMALLEST:
        return errors, np.full(len(frames), np.nan)
    return errors, torch.cat([ssim(*pair) for pair in _pairs(images, target)]).numpy()


def _pairs(images: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """In [0, 1], a few at a time."""
    for some, same in zip(images.split(8), target.split(8), strict=True):
        yield some.float() / 255, same.float() / 255


@dataclass(frozen=True)
class Opened:
    """A compressed file that a visitor gave.

    Args:
        whole_size: Its bytes before it was cut, if it was.
    """

    model: str
    name: str
    data: bytes
    header_size: int
    whole_size: int


@dataclass(frozen=True)
class Shown:
    """What is left of a file that was cut behind so many bytes.

    Args:
        image: (H, W, 3) uint8; None where nothing is left.
        known, total: Tokens.
        size: Width and height of the image that the file holds.
        inventor: The generator that made the tokens beyond those, if one did.
    """

    image: np.ndarray | None
    num_bytes: int
    known: int
    total: int
    size: tuple[int, int]
    inventor: str = ""


def open_file(models: Models, data: bytes, name: str) -> Opened:
    """Look at a file, whose model is found by its header.

    Raises:
        FormatError: It is damaged, or another model's.
        UserError: It holds more tiles than this page shows.
    """
    file = unpack(data)
    num_tiles = len(file.header.lengths)
    if num_tiles > MAX_TILES_OPENED:
        raise UserError(
            f"the file has {num_tiles:,} tiles, and this page shows {MAX_TILES_OPENED}: take scripts/decompress.py"
        )
    codec = models.codec_of(file.header.tokenizer)
    codec.read(data)
    return Opened(codec.name, name, data, file.header_size, file.header_size + file.header.payload_size)


def cut(codec: Codec, opened: Opened, num_bytes: int, completer: Completer | None = None) -> Shown:
    """The image of the first bytes of a file, whose other tokens `completer` invents where there is one."""
    header = unpack(opened.data).header
    geometry = header.geometry
    size = (codec.side, codec.side) if geometry is None else _upright_size(geometry)
    total, data = sum(header.lengths), opened.data[:num_bytes]
    if num_bytes <= opened.header_size and header.payload_size:
        return Shown(None, len(data), 0, total, size)
    try:
        read = codec.read(data)
    except UserError:  # not one token is certain: of the whole file it was read
        return Shown(None, len(data), 0, total, size)
    known, inventor = int(read.certain.sum()), ""
    if completer is not None and (read.certain < codec.models.num_tokens).any():
        read, inventor = completer(read, codec), completer.name_for(codec)
    image = np.asarray(codec.images([_small(read)])[0])
    return Shown(image, len(data), known, total, size, inventor)


def _upright_size(geometry: Geometry) -> tuple[int, int]:
    turned = geometry.orientation in TURNING_SIDES
    return (geometry.height, geometry.width) if turned else (geometry.width, geometry.height)


def _small(read: TokensRead) -> TokensRead:
    """What was read, for an image of at most `LARGEST_SHOWN` pixels a side, unless it has tiles."""
    geometry = read.header.geometry
    if geometry is None or geometry.fit == Fit.TILE:
        return read
    factor = min(1.0, LARGEST_SHOWN / max(geometry.width, geometry.height))
    width, height = (max(1, round(length * factor)) for length in (geometry.width, geometry.height))
    return replace(read, header=replace(read.header, geometry=replace(geometry, width=width, height=height)))
