"""From images to compressed files and back: a tokenizer, its entropy models, and the choice between prefixes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from codec.bitstream import TOKENIZER_BYTES, Fit, FormatError, Geometry, Header, Mode, may_hold, unpack
from codec.canvas import Canvas, check_cover, from_squares, to_canvas
from codec.entropy import EntropyModel, TokensRead, entropy_models_of, read_tokens, write_tokens
from codec.known_models import described, known_by
from codec.length import FILE as LENGTH_FILE
from codec.length import LengthPredictor, lengths_reaching, load_length_predictor
from codec.rate import (
    Choice,
    Encoded,
    Goal,
    Options,
    Score,
    choose,
    curves,
    encode,
    frontier,
    goal_of,
    psnr_of,
    smallest_seen,
    spread,
    tile_lengths,
    tried_lengths,
    within,
)
from codec.search import EFFORTS, Bits, effort_of, search, searched_lengths
from modeling.identity import identity
from modeling.networks.perceptual import PerceptualDistance
from modeling.titok import TiTok
from modeling.tokenizers import BUNDLED_TOKENIZER, load_tokenizer
from utils.errors import UserError
from utils.evaluation.metrics import SSIM_SMALLEST, ssim, to_uint8
from utils.evaluation.protocol import exact_arithmetic
from utils.files import sha256_of

BATCH = 64  # squares at once
PERCEPTUAL = "efficientnet_lite0"  # the perceptual distance that needs no download
FITS = {fit.name.lower(): fit for fit in Fit}
MODES = {mode.name.lower(): mode for mode in Mode}


@dataclass(frozen=True)
class Settings:
    """How images are written.

    Args:
        effort: 0 to 3, how long better tokens are searched.
        is_fast: Guess the length that a PSNR needs, instead of decoding every one.
        mode: What gives tokens their bits; what makes the smallest file where not given.
        is_bare: Write payloads without headers, whose reader must know what they say: so many tokens as the goal
            "tokens" says are exactly so many.
    """

    goal: Goal = Goal()
    fit: Fit = Fit.CROP
    effort: int = 0
    is_fast: bool = False
    mode: Mode | None = None
    is_bare: bool = False

    def __post_init__(self):
        effort_of(self.effort)
        if self.is_bare and self.fit == Fit.TILE:
            raise UserError("bare payloads hold no tiles: leave bare out, or fit the image otherwise")
        if self.is_fast and (self.goal.measure != "psnr" or self.fit == Fit.TILE):
            raise UserError("fast is for psnr, and not for the fit tile: leave it out, or ask for a psnr")
        if self.fit == Fit.TILE and self.goal.measure in ("ssim", "perceptual"):
            raise UserError(f"{self.goal.measure} cannot be asked for with the fit tile: ask for psnr, tokens or bytes")


@dataclass(frozen=True)
class Square:
    """What the prefixes of one square come to, with W choices of its tokens: searched ones, the encoder's.

    Args:
        tokens: (W, N).
        lengths: (L,), the prefixes that were looked at.
        errors: (W, L), mean squared errors of values in [0, 1].
        scores: (W, L), of the measure that was asked for, higher is better.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    errors: np.ndarray
    scores: np.ndarray | None = None


@dataclass(frozen=True)
class Draft:
    """An image as tokens, before it is chosen how many of them are kept.

    Args:
        tokens: (W, T, N), W choices of the tokens of its T tiles; one tile where there are none.
        options: O of them.
        choices: (O,), whose tokens each option means.
        area: Pixels of the image at the model's scale.
        geometry: That of tiles lacks their lengths.
        original: (H, W, 3) uint8, upright, what tiles are to show together; None without tiles.
    """

    tokens: np.ndarray
    options: Options
    choices: np.ndarray
    area: int
    geometry: Geometry | None
    original: np.ndarray | None = None


@dataclass(frozen=True)
class Written:
    """A file and what it holds.

    Args:
        num_tokens: Of all tiles.
        psnr: In dB, of the image at the model's scale; of tiles that nobody has looked at together at least so much.
        is_reached: Whether it has the quality that was asked for.
    """

    data: bytes
    num_tokens: int
    psnr: float
    area: int
    is_reached: bool


class Codec:
    """A tokenizer with all that its compressed files need.

    Args:
        name: Of the tokenizer, for messages.
        folder: Where its entropy models are; where there are none tokens take fixed bits.
        weights: Its file, for records.
    """

    def __init__(self, tokenizer: TiTok, name: str, folder: Path | None = None, weights: Path | None = None):
        self.tokenizer, self.name, self.folder, self.weights = tokenizer, name, folder, weights
        self.side = tokenizer.image_size
        self.identity = bytes.fromhex(identity(tokenizer))
        sizes = tokenizer.num_latent_tokens, tokenizer.codebook_size
        self.models = entropy_models_of(folder, self.identity, *sizes)

    def record(self) -> dict[str, Any]:
        """For a protocol."""
        return {
            "checkpoint": self.name,
            "checkpoint_sha256": self.weights and sha256_of(self.weights),
            "tokenizer": self.identity.hex(),
            "entropy_model": self.models.best().identity.hex(),
        }

    @property
    def has_predictor(self) -> bool:
        return self.folder is not None and (self.folder / LENGTH_FILE).is_file()

    @cached_property
    def predictor(self) -> LengthPredictor:
        return load_length_predictor((self.folder or Path()) / LENGTH_FILE, self.identity)

    @cached_property
    def distance(self) -> PerceptualDistance:
        return PerceptualDistance(PERCEPTUAL).to(self.tokenizer.latent_tokens.device)

    # Writing

    def compress(self, images: Sequence[Image.Image], settings: Settings) -> list[Written]:
        """The files of images as they were opened; a budget is that of all together.

        Raises:
            UserError: An image is too large for a file, or cannot be as small as asked for.
        """
        drafts = self.drafts([self.canvas(image, settings) for image in images], settings)
        choices = self.chosen(drafts, settings.goal)
        return [self.write(draft, choice, settings) for draft, choice in zip(drafts, choices, strict=True)]

    def canvas(self, image: Image.Image, settings: Settings) -> Canvas:
        """The squares of an image as it was opened.

        Raises:
            UserError: It is too large for a file, or too small for the measure that is asked for.
        """
        canvas = to_canvas(image, settings.fit, self.side)
        if settings.goal.measure == "ssim":
            check_ssim(canvas)
        return canvas

    def drafts(
        self, canvases: Sequence[Canvas], settings: Settings, progress: Callable[[int], object] | None = None
    ) -> list[Draft]:
        """Encode images, and look what their prefixes come to.

        Args:
            progress: Called with the number of squares of each batch that is done.
        """
        squares = self._squares(canvases, settings, progress)
        return [self._draft(canvas, [next(squares) for _ in canvas.squares], settings) for canvas in canvases]

    def chosen(self, drafts: Sequence[Draft], goal: Goal) -> list[Choice]:
        """The option of each image that a goal means; tiles are decoded to tell what they come to together.

        Raises:
            UserError: An image, or all together, cannot be as small as asked for.
        """
        if goal.measure == "budget":
            # Every pixel counts alike.
            errors = [draft.options.errors * (draft.area / self.side**2) for draft in drafts]
            options = spread([draft.options.sizes for draft in drafts], errors, int(goal.value))
            choices = [Choice(option) for option in options.tolist()]
        else:
            choices = [choose(draft.options, goal) for draft in drafts]
        return [self._looked_at(draft, choice, goal) for draft, choice in zip(drafts, choices, strict=True)]

    def write(self, draft: Draft, choice: Choice, settings: Settings) -> Written:
        """The file of one option of an image."""
        lengths, geometry = tuple(draft.options.lengths[choice.option].tolist()), draft.geometry
        tokens = draft.tokens[draft.choices[choice.option], :, : max(lengths)]
        if geometry is not None and geometry.tiles is not None:
            geometry = replace(geometry, tiles=replace(geometry.tiles, lengths=lengths))
        if settings.is_bare:
            data = self.bare_model(settings.mode).encode(tokens[0])
        else:
            data = write_tokens(tokens, self.models, geometry, settings.mode)
        error = draft.options.errors[choice.option] if choice.error is None else choice.error
        return Written(data, sum(lengths), float(psnr_of(np.array(error))), draft.area, choice.is_reached)

    def _looked_at(self, draft: Draft, choice: Choice, goal: Goal) -> Choice:
        """The choice among tiles, whose errors say only how large that of the image is at most."""
        if draft.original is None:
            return choice

        def look(option: int) -> float:
            lengths = draft.options.lengths[option]
            rows = self._tile_rows(draft.tokens[draft.choices[option]], lengths, draft.geometry.tiles.columns)
            image = from_squares(rows, lengths > 0, draft.geometry, self.side)
            return mean_error(np.asarray(image), draft.original)

        if goal.measure == "psnr":
            return smallest_seen(draft.options, goal.value, look)
        return replace(choice, error=look(choice.option))

    def _squares(
        self, canvases: Sequence[Canvas], settings: Settings, progress: Callable[[int], object] | None
    ) -> Iterator[Square]:
        """All squares of the canvases, a batch at a time."""
        pixels = np.concatenate([canvas.squares for canvas in canvases])
        shares = np.concatenate([canvas.shares for canvas in canvases])
        for first in range(0, len(pixels), BATCH):
            encoded = encode(self.tokenizer, torch.from_numpy(pixels[first : first + BATCH]).permute(0, 3, 1, 2))
            weights = torch.from_numpy(shares[first : first + BATCH]).unsqueeze(1).to(encoded.tokens.device)
            batch = list(self._prefixes(encoded, weights, settings))
            if progress is not None:
                progress(len(batch))
            yield from batch

    def _prefixes(self, encoded: Encoded, weights: Tensor, settings: Settings) -> Iterator[Square]:
        goal, lengths = settings.goal, self._lengths(settings)
        searched = self.searched(encoded, lengths, settings.effort, weights)
        # A search serves several prefixes at once: the one that is wanted may be nearer as the encoder gave it.
        choices = [searched, encoded] if settings.effort else [encoded]
        if not settings.is_fast:
            yield from self._every_prefix(choices, lengths, weights, settings)
            return
        fitting, errors, _ = lengths_reaching(self.tokenizer, searched, self.predictor, goal.value, weights)
        missed = psnr_of(errors) < goal.value
        rows = torch.from_numpy(np.flatnonzero(missed)).to(weights.device)
        # All tokens are not always the best: whether another prefix is nearer, or near enough, only decoding tells.
        others = self._every_prefix([choice.of(rows) for choice in choices], lengths, weights[rows], settings)
        guessed = map(Square, searched.tokens.cpu().numpy()[:, None], fitting[:, None], errors[:, None, None])
        for square, is_missed in zip(guessed, missed, strict=True):
            yield next(others) if is_missed else square

    def _every_prefix(
        self, choices: Sequence[Encoded], lengths: np.ndarray, weights: Tensor, settings: Settings
    ) -> Iterator[Square]:
        """The squares of W choices of their tokens, decoded at all lengths."""
        tokens = np.stack([choice.tokens.cpu().numpy() for choice in choices], axis=1)  # (B, W, N)
        score = self._score(settings, weights)
        found = [curves(self.tokenizer, choice, lengths.tolist(), weights, score) for choice in choices]
        errors = np.stack([of_choice for of_choice, _ in found], axis=1)  # (B, W, L)
        scores = None if found[0][1] is None else np.stack([of_choice for _, of_choice in found], axis=1)
        for row in range(len(tokens)):
            yield Square(tokens[row], lengths, errors[row], None if scores is None else scores[row])

    def _lengths(self, settings: Settings) -> np.ndarray:
        """The prefixes that are looked at."""
        goal = settings.goal
        most = int(goal.value) if goal.measure == "tokens" and goal.value else None
        lengths = np.array(tried_lengths(self.tokenizer, most))
        if not settings.is_bare or goal.measure != "tokens":
            return lengths
        if most is not None and most > lengths[-1]:
            raise UserError(f"a payload holds 1 to {lengths[-1]} tokens, got {most}: ask for fewer")
        return lengths[-1:]

    def searched(self, encoded: Encoded, lengths: np.ndarray, effort: int, weights: Tensor | None = None) -> Encoded:
        """With better tokens for prefixes up to the last of `lengths`, as `effort` says.

        Args:
            weights: Of pixels, as of `codec.rate.squared_error`.
        """
        if not effort:
            return encoded
        several = searched_lengths(int(lengths[-1])) if len(lengths) > 1 else lengths.tolist()
        bits = token_bits(self.models.best())
        return replace(encoded, tokens=search(self.tokenizer, encoded, several, EFFORTS[effort], weights, bits))

    def _score(self, settings: Settings, weights: Tensor) -> Score | None:
        """The measure of a goal that squared errors do not tell, of padded images without their margins.

        Args:
            weights: Of the images' pixels, (B, 1, P, P).
        """
        measures: dict[str, Score] = {
            "ssim": ssim,
            "perceptual": lambda images, originals: -self.distance.per_image(images, originals),
        }
        measure = measures.get(settings.goal.measure)
        if measure is None or settings.fit != Fit.PAD:
            return measure
        return within(weights, measure)

    def bare_model(self, mode: Mode | None) -> EntropyModel:
        """The entropy model of payloads without headers: the one of the mode, or the best.

        Raises:
            UserError: The tokenizer has none of that mode.
        """
        if mode is not None and mode not in self.models.by_mode:
            raise UserError(f"{self.name} has no entropy model of the mode {mode.name.lower()}: leave the mode out")
        return self.models.best() if mode is None else self.models.by_mode[mode]

    def _draft(self, canvas: Canvas, squares: Sequence[Square], settings: Settings) -> Draft:
        tokens = np.stack([square.tokens for square in squares], axis=1)  # (W, T, N)
        options = [self._options(canvas, squares, choice, settings) for choice in range(len(tokens))]
        choices = np.repeat(np.arange(len(options)), [len(some.sizes) for some in options])
        original = None
        if canvas.geometry is not None and (tiles := canvas.geometry.tiles):
            rows = iter(canvas.squares.reshape(tiles.rows, tiles.columns, *canvas.squares.shape[1:]))
            original = np.asarray(from_squares(rows, np.ones(len(squares), bool), canvas.geometry, self.side))
        return Draft(tokens, Options.joined(options), choices, canvas.area, canvas.geometry, original)

    def _options(self, canvas: Canvas, squares: Sequence[Square], choice: int, settings: Settings) -> Options:
        """The ways to write one choice of tokens."""
        tokens, lengths = np.stack([square.tokens[choice] for square in squares]), squares[0].lengths
        is_single = settings.is_bare or settings.mode is not None
        models = [self.bare_model(settings.mode)] if is_single else list(self.models.by_mode.values())
        geometry = canvas.geometry
        if geometry is None or geometry.tiles is None:
            payloads = np.min([model.prefix_bytes(tokens)[0, lengths - 1] for model in models], axis=0)
            headers = [
                0 if settings.is_bare else header_bytes(length, payload, geometry)
                for length, payload in zip(lengths.tolist(), payloads.tolist(), strict=True)
            ]
            scores = squares[0].scores
            return Options(
                lengths[:, None],
                payloads + headers,
                squares[0].errors[choice],
                None if scores is None else scores[choice],
            )
        bits = np.stack([model.prefix_bits(tokens)[:, lengths - 1] for model in models])
        parts = canvas.shares.sum(axis=(1, 2)) / canvas.area
        errors = np.stack([square.errors[choice] for square in squares]) * parts[:, None]
        kept, totals = tile_lengths(errors, bits, lengths)
        sizes = tiled_bytes(models, tokens, kept, geometry)
        best = frontier(sizes, totals)
        return Options(kept[best], sizes[best], totals[best])

    # Reading

    def decompress(self, files: Sequence[bytes], num_tokens: int | None = None) -> list[Image.Image]:
        """The images of files, upright and in their original sizes; of cut files what the tokens that are there show.

        Args:
            num_tokens: The most to read of each tile.

        Raises:
            FormatError: A file is damaged, was written with another tokenizer, or is cut before its first token.
        """
        return self.images([self.read(data, num_tokens) for data in files])

    def decompress_bare(self, payload: bytes, num_tokens: int, mode: Mode | None = None) -> Image.Image:
        """The image of a payload without header, of the model's size.

        Raises:
            FormatError: No encoder of these models writes such a payload. Not every wrong reading is one.
        """
        if not 1 <= num_tokens <= self.models.num_tokens:
            raise UserError(f"a payload holds 1 to {self.models.num_tokens} tokens, got {num_tokens}")
        try:
            tokens, _ = self.bare_model(mode).decode(payload, num_tokens)
        except FormatError as error:
            raise FormatError(f"{error}, or it is of another model, mode or number of tokens") from error
        return Image.fromarray(self._decoded(tokens[None], np.array([num_tokens]))[0])

    def images(self, reads: Sequence[TokensRead]) -> list[Image.Image]:
        """The images of what was read."""
        singles = [read for read in reads if len(read.tokens) == 1]
        longest = max((read.tokens.shape[1] for read in singles), default=0)
        tokens = [np.pad(read.tokens[0], (0, longest - read.tokens.shape[1])) for read in singles]
        squares = iter(self._decoded(np.array(tokens), np.array([read.certain[0] for read in singles])))
        images = []
        for read in reads:
            if len(read.tokens) == 1:
                rows = iter([next(squares)[None]])
            else:
                rows = self._tile_rows(read.tokens, read.certain, read.header.geometry.tiles.columns)
            images.append(from_squares(rows, read.certain > 0, read.header.geometry, self.side))
        return images

    def read(self, data: bytes, num_tokens: int | None = None) -> TokensRead:
        """The tokens of a file. Arguments and errors as of `decompress`."""
        header = unpack(data).header
        if header.tokenizer != self.identity[:TOKENIZER_BYTES]:
            raise FormatError(
                f"the file was written with {described(header.tokenizer)}, and this is {self.name} "
                f"({self.identity[:TOKENIZER_BYTES].hex()}): give the other one as --checkpoint"
            )
        read = read_tokens(data, self.models, num_tokens)
        check_cover(read.header.geometry, self.side)
        if not read.certain.any():
            raise FormatError("the file is cut before its first token: nothing is left of the image; get it again")
        return read

    def _tile_rows(self, tokens: np.ndarray, lengths: np.ndarray, columns: int) -> Iterator[np.ndarray]:
        """(columns, P, P, 3) of each row of tiles (T, N), of which `lengths` (T,) tokens are known."""
        for first in range(0, len(tokens), columns):
            row = slice(first, first + columns)
            yield self._decoded(tokens[row], lengths[row])

    @torch.inference_mode()
    def _decoded(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Squares (T, P, P, 3) uint8; black where a tile has no tokens."""
        squares = np.zeros((len(tokens), self.side, self.side, 3), np.uint8)
        (there,) = np.nonzero(lengths)
        for first in range(0, len(there), BATCH):
            part = there[first : first + BATCH]
            kept = tokens[part, : lengths[part].max()].clip(0)  # what is not known is masked
            device = self.tokenizer.latent_tokens.device
            pixels = self.tokenizer.decode_tokens(torch.from_numpy(kept).to(device), torch.from_numpy(lengths[part]))
            squares[part] = to_uint8(pixels).permute(0, 2, 3, 1).cpu().numpy()
        return squares


def load_codec(
    config: str | DictConfig | None = None, checkpoint: str | None = None, device: str | torch.device = "cpu"
) -> Codec:
    """The codec of the tokenizer that --config and --checkpoint mean; arguments and errors as of `load_tokenizer`."""
    exact_arithmetic()
    tokenizer, located = load_tokenizer(config, checkpoint, device=device)
    return Codec(tokenizer, located.name, located.weights.parent, located.weights)


@cache
def codec_named(checkpoint: str = BUNDLED_TOKENIZER, device: str | torch.device = "cpu") -> Codec:
    """As `load_codec`, loaded once."""
    return load_codec(checkpoint=checkpoint, device=device)


def codec_for(data: bytes, device: str | torch.device = "cpu") -> Codec:
    """The codec of the bundled tokenizer that wrote a file, loaded once.

    Raises:
        FormatError: None of them did, or the bytes are no file.
    """
    header = unpack(data).header
    known = known_by(header.tokenizer)
    if known is None:
        raise FormatError(f"the file was written with {described(header.tokenizer)}: give it as --checkpoint")
    return codec_named(known.name, device)


def mean_error(image: np.ndarray, original: np.ndarray) -> float:
    """Mean squared error of values in [0, 1], of images (H, W, 3) uint8 of any size."""
    # Line by line: large images would not fit in memory in wider numbers.
    lines = zip(image, original, strict=True)
    return sum(int(np.square(line.astype(np.int64) - other).sum()) for line, other in lines) / (image.size * 255**2)


def header_bytes(num_tokens: int, payload_size: int, geometry: Geometry | None) -> int:
    """Bytes of a file before its payload: the same with every tokenizer and entropy model."""
    header = Header(Mode.FIXED, bytes(TOKENIZER_BYTES), b"\0", num_tokens, payload_size, geometry)
    return len(header.pack(bytes(payload_size)))


def tiled_bytes(
    models: Sequence[EntropyModel], tokens: np.ndarray, lengths: np.ndarray, geometry: Geometry
) -> np.ndarray:
    """Bytes of the files (O,) of tiles (T, N), for each way `lengths` (O, T) to cut them."""
    payloads = np.stack([model.tiles_bytes(tokens, lengths) for model in models], axis=1)  # (O, M)
    sizes = []
    for kept, found in zip(lengths.tolist(), payloads.tolist(), strict=True):
        held = [size for model, size in zip(models, found, strict=True) if may_hold(model.mode, size, sum(kept))]
        payload = min(held or found)  # where the one mode that was asked for may not hold them, writing says so
        tiles = replace(geometry.tiles, lengths=tuple(kept))
        sizes.append(payload + header_bytes(max(kept), payload, replace(geometry, tiles=tiles)))
    return np.array(sizes)


def token_bits(model: EntropyModel) -> Bits | None:
    """What every next token costs, for a search; None where all cost the same."""
    if model.mode == Mode.FIXED:
        return None

    def bits(tokens: Tensor) -> Tensor:
        shares = model.frequencies(tokens.cpu().numpy())
        costs = model.total_bits - np.log2(shares)
        return torch.from_numpy(costs.astype(np.float32)).to(tokens.device)

    return bits


def check_ssim(canvas: Canvas) -> None:
    """Refuse an image that is smaller than the window of SSIM.

    Raises:
        UserError: It is.
    """
    height, width = (int(canvas.shares[0].any(axis=axis).sum()) for axis in (1, 0))
    if min(height, width) < SSIM_SMALLEST:
        raise UserError(
            f"ssim needs {SSIM_SMALLEST} pixels a side, and this image has {width} x {height} at the model's scale: "
            "fit it otherwise, or ask for psnr"
        )


def compress(
    images: Image.Image | Sequence[Image.Image],
    model: Codec | str | None = None,
    *,
    fit: str = "crop",
    effort: int = 0,
    fast: bool = False,
    **goal: float | None,
) -> bytes | list[bytes]:
    """The file of an image, or the files of several.

    Args:
        model: A codec, or what `load_codec` takes as its checkpoint; by default the bundled model of garments.
        fit: "crop", "pad", "stretch" or "tile".
        effort: 0 to 3, how long better tokens are searched.
        fast: Guess the length that `psnr` needs, instead of decoding every one.
        goal: One of tokens, max_bytes, budget (of all files), psnr, ssim, perceptual; by default all tokens.

    Raises:
        UserError: What was asked for makes no sense, or cannot be done.
    """
    if fit not in FITS:
        raise UserError(f"fit must be one of {', '.join(FITS)}, got {fit}")
    codec = model if isinstance(model, Codec) else codec_named(model or BUNDLED_TOKENIZER)
    several = [images] if isinstance(images, Image.Image) else list(images)
    written = codec.compress(several, Settings(goal_of(**goal), FITS[fit], effort, fast))
    files = [one.data for one in written]
    return files[0] if isinstance(images, Image.Image) else files


def decompress(
    files: bytes | Sequence[bytes], model: Codec | str | None = None, *, tokens: int | None = None
) -> Image.Image | list[Image.Image]:
    """The image of a file, or the images of several; of a cut file what is left of it shows.

    Args:
        model: As of `compress`; by default the bundled one that wrote the file.
        tokens: The most to read of each tile.

    Raises:
        FormatError: A file is damaged, cut before its first token, or of another model.
    """
    is_one = isinstance(files, (bytes, bytearray, memoryview))
    several = [bytes(files)] if is_one else list(files)
    codec = codec_named(model) if isinstance(model, str) else model
    codecs = [codec or codec_for(data) for data in several]
    images: dict[int, Image.Image] = {}
    for one in dict.fromkeys(codecs):
        places = [place for place, its_codec in enumerate(codecs) if its_codec is one]
        images |= zip(places, one.decompress([several[place] for place in places], tokens), strict=True)
    return images[0] if is_one else [images[place] for place in range(len(several))]
