"""How many tokens: what every prefix of an image costs and how near it comes, and the choice among them."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from codec.canvas import counting_box
from modeling.titok import TiTok
from utils.errors import UserError
from utils.evaluation.metrics import to_uint8
from utils.evaluation.statistics import doubled

ALL_UP_TO, PER_OCTAVE = 32, 8  # lengths that are tried: each of the first, then so many to a doubling
Score = Callable[[Tensor, Tensor], Tensor]  # of images and originals (B, 3, H, W) in [0, 1]: (B,), higher is better


@dataclass(frozen=True)
class Encoded:
    """What the encoder makes of images.

    Args:
        pixels: (B, 3, P, P) uint8, on the tokenizer's device as the rest is.
        vectors: (B, N, C) before they are quantised, as the encoder gives them.
        tokens: (B, N).
    """

    pixels: Tensor
    vectors: Tensor
    tokens: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def of(self, rows: Tensor) -> "Encoded":
        """Some of the images, by their numbers (b,) on the same device."""
        return Encoded(self.pixels[rows], self.vectors[rows], self.tokens[rows])


@torch.inference_mode()
def encode(tokenizer: TiTok, pixels: Tensor) -> Encoded:
    """Encode images (B, 3, P, P) uint8, in float32."""
    pixels = pixels.to(tokenizer.latent_tokens.device)
    with torch.autocast(pixels.device.type, enabled=False):
        vectors = tokenizer.encoder(pixels.float() / 255, tokenizer.latent_tokens).movedim(1, -1)  # (B, 1, N, C)
        tokens = tokenizer.quantize.nearest(tokenizer.quantize.normalize(vectors.float()))
    return Encoded(pixels, vectors[:, 0], tokens[:, 0])


def tried_lengths(tokenizer: TiTok, most: int | None = None) -> list[int]:
    """The lengths of prefixes to choose from, up to `most`, which is one of them; only all for a tokenizer of one."""
    total = tokenizer.num_latent_tokens
    if most is not None and most < 1:
        raise UserError(f"an image keeps 1 to {total} tokens, got {most}")
    if tokenizer.strict_length_assertion:
        if most is not None and most < total:
            raise UserError(f"this tokenizer needs all of its {total} tokens, got a limit of {most}")
        return [total]
    most = total if most is None else min(most, total)
    later = {round(ALL_UP_TO * 2 ** (step / PER_OCTAVE)) for step in range(PER_OCTAVE * total.bit_length())}
    lengths = {*range(1, ALL_UP_TO + 1), *later, most}
    return sorted(length for length in lengths if length <= most)


@torch.inference_mode()
def decoded(tokenizer: TiTok, tokens: Tensor, lengths: Sequence[int]) -> Iterator[Tensor]:
    """The images (B, 3, P, P) uint8 of the first so many tokens of (B, N), one length after the other."""
    for length in lengths:
        with torch.autocast(tokens.device.type, enabled=False):
            yield to_uint8(tokenizer.decode_tokens(tokens[:, :length]))


def squared_error(images: Tensor, originals: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean squared error of each image, (B,) float64 of values in [0, 1], of (B, 3, H, W) uint8.

    Args:
        weights: Of each pixel, broadcastable to (B, 1, H, W); their sum over an image is not 0.
    """
    errors = doubled((images.float() - originals.float()).square().mean(dim=1) / 255**2)  # (B, H, W)
    if weights is None:
        return errors.mean(dim=(1, 2))
    weights = doubled(weights.squeeze(1).expand_as(errors))
    return (errors * weights).sum(dim=(1, 2)) / weights.sum(dim=(1, 2))


def curves(
    tokenizer: TiTok,
    encoded: Encoded,
    lengths: Sequence[int],
    weights: Tensor | None = None,
    score: Score | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Errors (B, L) of the prefixes of each length, and their scores (B, L) where one is asked for.

    Args:
        weights: As of `squared_error`.
    """
    originals = encoded.pixels.float() / 255
    errors, scores = [], []
    for images in decoded(tokenizer, encoded.tokens, lengths):
        errors.append(squared_error(images, encoded.pixels, weights))
        if score is not None:
            scores.append(score(images.float() / 255, originals))
    stacked = torch.stack(errors, dim=1).cpu().numpy()
    return stacked, torch.stack(scores, dim=1).cpu().numpy() if scores else None


def within(weights: Tensor, measure: Score) -> Score:
    """A measure of what has weight in each image, by weights (B, 1, H, W) such as a padded one's: it is a rectangle."""
    boxes = [counting_box(shares) for shares in weights.squeeze(1).cpu().numpy()]

    def score(images: Tensor, originals: Tensor) -> Tensor:
        pairs = zip(images.split(1), originals.split(1), boxes, strict=True)
        return torch.cat([measure(image[(..., *box)], original[(..., *box)]) for image, original, box in pairs])

    return score


def psnr_of(errors: np.ndarray) -> np.ndarray:
    """PSNR in dB of mean squared errors of values in [0, 1]; an error of 0 gives inf."""
    with np.errstate(divide="ignore"):
        return -10 * np.log10(errors)


@dataclass(frozen=True)
class Goal:
    """What the user asked for: the best image within a limit, or the smallest file of a quality.

    Args:
        measure: "tokens" (at most, of an image or of each tile), "max_bytes" (of each file), "budget" (bytes of all
            files together), "psnr" (dB, at least), "ssim" (at least) or "perceptual" (distance, at most).
        value: None, with "tokens" alone, is as many as the tokenizer has.
    """

    measure: str = "tokens"
    value: float | None = None

    @property
    def is_quality(self) -> bool:
        return self.measure in QUALITIES


QUALITIES = ("psnr", "ssim", "perceptual")
GOALS = ("tokens", "max_bytes", "budget", *QUALITIES)


def goal_of(**asked: float | None) -> Goal:
    """The one goal that was asked for, all tokens where none was.

    Raises:
        UserError: There are several, or a value makes no sense.
    """
    if unknown := asked.keys() - set(GOALS):
        raise UserError(f"a goal is one of {', '.join(GOALS)}, got {min(unknown)}")
    given = {name: value for name, value in asked.items() if value is not None}
    if len(given) > 1:
        raise UserError(
            f"{' and '.join(f'--{name}' for name in given)} were given: ask for one of "
            f"{', '.join(f'--{name}' for name in asked)}; the rest follows from it"
        )
    name, value = next(iter(given.items()), ("tokens", None))
    least = {"tokens": 1, "max_bytes": 1, "budget": 1, "psnr": 0, "ssim": -1, "perceptual": 0}[name]
    if value is not None and (isinstance(value, bool) or not isinstance(value, Real)):
        raise UserError(f"{name} must be a number, {least} or more, got {value!r}")
    if value is not None and not least <= value < math.inf:
        raise UserError(f"--{name} must be {least} or more, got {value}")
    if name == "tokens" and value is not None and value != int(value):
        raise UserError(f"--tokens must be a whole number, got {value}")
    return Goal(name, value)


@dataclass(frozen=True)
class Options:
    """The ways to write one image, of which one is chosen.

    Args:
        lengths: (O, T), the tokens of each tile; of an image without tiles (O, 1).
        sizes: (O,), bytes of the file.
        errors: (O,), mean squared errors of the image.
        scores: (O,), of the measure that the goal names, higher is better; None where it names none.
    """

    lengths: np.ndarray
    sizes: np.ndarray
    errors: np.ndarray
    scores: np.ndarray | None = None

    @classmethod
    def joined(cls, parts: Sequence["Options"]) -> "Options":
        """Those of all parts, in turn."""
        joined = (np.concatenate([getattr(part, name) for part in parts]) for name in ("lengths", "sizes", "errors"))
        scores = [part.scores for part in parts if part.scores is not None]
        return cls(*joined, np.concatenate(scores) if scores else None)


@dataclass(frozen=True)
class Choice:
    """An option by its number, and whether it is what was asked for.

    Args:
        error: Mean squared error of the image, where that of the option is only an upper bound and it was looked at.
    """

    option: int
    is_reached: bool = True
    error: float | None = None


def choose(options: Options, goal: Goal) -> Choice:
    """The option of one image. Where no option has the quality it is the best one, and not reached.

    Raises:
        UserError: The smallest option has more bytes than are allowed.
    """
    if goal.is_quality:
        scores = psnr_of(options.errors) if goal.measure == "psnr" else options.scores
        target = -goal.value if goal.measure == "perceptual" else goal.value
        option = smallest_reaching(options.sizes, options.errors, scores, target)
        best = int(np.lexsort((options.sizes, -scores))[0])
        return Choice(best if option is None else option, option is not None)
    limit = goal.value if goal.measure == "max_bytes" else np.inf
    option = best_within(options.sizes, options.errors, limit)
    if option is None:
        raise UserError(f"this image takes {options.sizes.min()} bytes at least, and {goal.value:g} are allowed")
    return Choice(option)


GUESSES = 4  # of the option that reaches a target; then halves


def smallest_seen(options: Options, target: float, look: Callable[[int], float]) -> Choice:
    """The smallest option whose PSNR is at least `target` dB, where the errors of `options` are only upper bounds.

    Options are looked at one by one, the next one where so much more than known is expected as the last one has shown.
    Where none has the quality it is the best one that was seen, and not reached.

    Args:
        look: Called with an option; returns the mean squared error of its image.
    """
    order = frontier(options.sizes, options.errors)
    known = psnr_of(options.errors[order].clip(1e-12))  # rising
    short, reaching, gain = -1, len(order), 0.0
    seen: dict[int, float] = {}
    while reaching - short > 1:
        guess = int(np.searchsorted(known + gain, target)) if len(seen) < GUESSES else (short + reaching) // 2
        place = min(max(guess, short + 1), reaching - 1)
        seen[place] = look(order[place])
        psnr = float(psnr_of(np.array(seen[place])))
        gain = psnr - known[place]
        if psnr >= target:
            reaching = place
        else:
            short = place
    best = reaching if reaching in seen else min(seen, key=lambda place: seen[place])
    return Choice(order[best], reaching in seen, seen[best])


# Below, an image has sizes and errors (O,) of its options, in any order; images may have different numbers of them.


def best_within(sizes: np.ndarray, errors: np.ndarray, limit: float) -> int | None:
    """The option of the least error among those of at most `limit` bytes, the smallest of equals; None: there is none.

    More tokens are not always better: from one length to the next the error rises for every tenth image.
    """
    fitting = np.flatnonzero(sizes <= limit)
    if not len(fitting):
        return None
    return int(fitting[np.lexsort((sizes[fitting], errors[fitting]))[0]])


def smallest_reaching(sizes: np.ndarray, errors: np.ndarray, scores: np.ndarray, target: float) -> int | None:
    """The smallest option whose score is at least `target`, of equals the one of least error; None: there is none."""
    reaching = np.flatnonzero(scores >= target)
    if not len(reaching):
        return None
    return int(reaching[np.lexsort((errors[reaching], sizes[reaching]))[0]])


def spread(sizes: Sequence[np.ndarray], errors: Sequence[np.ndarray], budget: int) -> np.ndarray:
    """The option of each image, (B,), with which all together take at most `budget` bytes and err least.

    Bytes go where they lessen the squared error most: along the lower convex hulls of the images' options, which is
    the Lagrangian optimum, then what is left over to the best single steps that fit.

    Args:
        errors: To be summed: weigh images of different sizes by their pixels first.

    Raises:
        UserError: The smallest options of all take more.
    """
    chosen = np.array([int(np.lexsort((error, size))[0]) for size, error in zip(sizes, errors, strict=True)])
    left = int(budget - sum(int(size[at]) for size, at in zip(sizes, chosen, strict=True)))
    if left < 0:
        raise UserError(f"a budget of {budget} bytes is too small: {len(sizes)} images take {budget - left} at least")
    for row, option in _steps(sizes, errors):
        more = int(sizes[row][option] - sizes[row][chosen[row]])
        if more <= left:
            chosen[row], left = option, left - more
    while (step := _best_step(sizes, errors, chosen, left)) is not None:
        row, option = step
        left -= int(sizes[row][option] - sizes[row][chosen[row]])
        chosen[row] = option
    return chosen


def _steps(sizes: Sequence[np.ndarray], errors: Sequence[np.ndarray]) -> list[tuple[int, int]]:
    """(row, option) of every step along the rows' hulls, the most gain a byte first."""
    steps = []
    for row, (size, error) in enumerate(zip(sizes, errors, strict=True)):
        corners = lower_hull(size, error)
        for before, after in zip(corners[:-1], corners[1:], strict=True):
            gain = (error[before] - error[after]) / (size[after] - size[before])
            steps.append((-gain, row, len(steps), after))
    return [(row, option) for _, row, _, option in sorted(steps)]


def lower_hull(sizes: np.ndarray, errors: np.ndarray) -> list[int]:
    """The options on the lower convex hull from the smallest one to the one of least error, by rising size."""
    hull: list[int] = []
    for option in np.lexsort((errors, sizes)).tolist():
        if hull and errors[option] >= errors[hull[-1]]:
            continue
        while len(hull) > 1 and _is_above(sizes, errors, hull[-2], hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _is_above(sizes: np.ndarray, errors: np.ndarray, first: int, middle: int, last: int) -> bool:
    """Whether the middle option lies on or above the line from the first to the last."""
    run, rise = float(sizes[last] - sizes[first]), errors[last] - errors[first]
    return errors[middle] >= errors[first] + rise * (float(sizes[middle] - sizes[first]) / run)


def _best_step(
    sizes: Sequence[np.ndarray], errors: Sequence[np.ndarray], chosen: np.ndarray, left: int
) -> tuple[int, int] | None:
    """The change of one image's option that takes at most `left` more bytes and lessens the error most."""
    best, step = 0.0, None
    for row, (size, error) in enumerate(zip(sizes, errors, strict=True)):
        option = best_within(size, error, int(size[chosen[row]]) + left)
        gain = error[chosen[row]] - error[option]
        if gain > best:
            best, step = gain, (row, option)
    return step


SLOPES = 48  # trades between bytes and errors that tiles are tried with


def tile_lengths(errors: np.ndarray, bits: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ways to cut tiles, whose lengths may differ where that pays for saying so.

    A file says each tile's length in as many bits as the span of lengths needs. For spans of 1, 2, 4, ... lengths from
    several least ones on, and for many trades between bytes and errors, each tile takes its best length. Of all ways
    those are kept of which none is both smaller and nearer, about to a byte.

    Args:
        errors: (T, L), what each tile adds to the mean squared error of the image.
        bits: (M, T, L), of the prefixes of `lengths` (L,), by each of M entropy models; a file takes the best one.

    Returns:
        The tokens of each tile, (O, T), and the mean squared errors of the image, (O,).
    """
    rows = np.arange(len(errors))
    found = [np.full(len(errors), place, np.int16) for place in range(len(lengths))]
    trades = [(of_model, slope) for of_model in bits for slope in _slopes(errors, of_model)]
    for span_bits in range(1, int(lengths[-1] - lengths[0]).bit_length() + 1):
        span = 2**span_bits
        for least in np.unique(np.geomspace(1, max(1, lengths[-1] - span + 1), 6).astype(int)):
            allowed = np.flatnonzero((lengths >= least) & (lengths < least + span)).astype(np.int16)
            if len(allowed) > 1:
                of_allowed = errors[:, allowed]
                found += [allowed[(of_allowed + slope * some[:, allowed]).argmin(axis=1)] for some, slope in trades]
    places = np.unique(np.stack(found), axis=0)  # (O, T)
    # One way after the other: an array of all of them in floats would not fit in memory for thousands of tiles.
    payloads = np.array([int(bits[:, rows, way].sum(axis=1).min()) // 8 + 1 for way in places])
    totals = np.array([errors[rows, way].sum() for way in places])
    spans = lengths[places.max(axis=1)] - lengths[places.min(axis=1)]
    width = np.array([span.bit_length() for span in spans.tolist()])
    best = frontier(payloads + -(-len(errors) * width // 8), totals)
    return lengths[places[best]], totals[best]


def _slopes(errors: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Errors that a bit may cost, from all that are worth a tile's first tokens to less than any is worth."""
    if bits.shape[1] < 2:
        return np.zeros(1)
    gains = -np.diff(errors, axis=1) / np.diff(bits, axis=1).clip(1e-9)
    gains = gains[gains > 0]
    return np.geomspace(gains.min(), gains.max(), SLOPES) if len(gains) else np.zeros(1)


def frontier(sizes: np.ndarray, errors: np.ndarray) -> list[int]:
    """The options of which none is both smaller and nearer, by rising size."""
    best: list[int] = []
    for option in np.lexsort((errors, sizes)).tolist():
        if not best or errors[option] < errors[best[-1]]:
            best.append(option)
    return best
