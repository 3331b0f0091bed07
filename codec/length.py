"""How many tokens an image needs, guessed from the encoder's output alone, before anything is decoded."""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from codec.rate import Encoded, curves, encode, psnr_of, tried_lengths
from modeling.titok import TiTok
from utils.errors import UserError
from utils.files import replacing

FILE = "length.safetensors"  # beside the tokenizer and its entropy models
ABOUT, VERSION = "length", 1
MOST_LENGTHS = 8  # whose PSNR is predicted; those between are interpolated
HELD_OUT = 5  # every so many-th image is kept apart, to tell how far the guesses are off
RIDGE_STRENGTHS = (1.0, 10.0, 100.0, 1000.0)
CORRECTION = 0.8  # of the error that decoding has shown, which the next guess takes as its own
SHORTER = 0.75  # of a length that reaches the target: one that is longer is not worth another decoding
Look = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class LengthPredictor:
    """Ridge regression from what the encoder says of an image to its PSNR at each length.

    Args:
        lengths: (G,), whose PSNR is predicted.
        weights: (F + 1, G) float16, of the features of `features` and of 1.
        deviations: (G,) float32, standard deviation of the errors on images that it was not fitted to, in dB.
        explained: (G,) float32, share of the variance of the PSNR (R2) that it explains on those.
    """

    lengths: np.ndarray
    weights: np.ndarray
    deviations: np.ndarray
    explained: np.ndarray

    def expected(self, known: np.ndarray, lengths: Sequence[int]) -> np.ndarray:
        """PSNR in dB (B, L) to expect of images of whom `features` (B, F) are known."""
        guesses = with_one(known) @ self.weights.astype(np.float64)
        return np.stack([np.interp(np.log2(lengths), np.log2(self.lengths), row) for row in guesses])

    def describe(self) -> list[str]:
        """Lines that say how far the guesses are off, on images held out."""
        rows = zip(self.lengths, self.deviations, self.explained, strict=True)
        return [
            f"{'tokens':>6} {'off, dB':>9} {'R2':>9}",
            *(f"{length:>6} {off:9.3f} {share:9.3f}" for length, off, share in rows),
        ]

    def save(self, path: str | os.PathLike, tokenizer: bytes) -> None:
        """Write it for the tokenizer of an identity."""
        arrays = {"lengths": self.lengths, "weights": self.weights}
        arrays |= {"deviations": self.deviations, "explained": self.explained}
        about = {"version": VERSION, "tokenizer": tokenizer.hex()}
        with replacing(path) as aside:
            save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, aside, metadata_of(about))
            aside.chmod(0o644)


def metadata_of(about: dict) -> dict[str, str]:
    return {ABOUT: json.dumps(about)}


def load_length_predictor(path: str | os.PathLike, tokenizer: bytes) -> LengthPredictor:
    """The predictor of a file that `LengthPredictor.save` wrote for this tokenizer.

    Raises:
        UserError: There is none, it is damaged, or it belongs to another tokenizer.
    """
    if not Path(path).is_file():
        raise UserError(f"{path} is not there: scripts/fit_entropy_model.py makes it; or leave --fast out")
    try:
        with safe_open(path, framework="numpy") as file:
            about = json.loads((file.metadata() or {})[ABOUT])
            arrays = {name: file.get_tensor(name) for name in ("lengths", "weights", "deviations", "explained")}
        for name, array in arrays.items():
            if array.shape[-1:] != arrays["lengths"].shape or not np.isfinite(array).all():
                raise ValueError(f"{name} of the shape {array.shape}, or with values that are no numbers")
        theirs = bytes.fromhex(about["tokenizer"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged or no length predictor ({error!r}): fetch or fit it again") from error
    if about["version"] != VERSION or theirs != tokenizer:
        raise UserError(
            f"{path} belongs to the tokenizer {theirs.hex()[:12]} (version {about['version']}), and this is "
            f"{tokenizer.hex()[:12]} (version {VERSION}): fit it again with scripts/fit_entropy_model.py"
        )
    return LengthPredictor(**arrays)


def fit(tokenizer: TiTok, batches: Iterable[Tensor]) -> LengthPredictor:
    """Fit to images, thousands of them: each is decoded at up to `MOST_LENGTHS` lengths.

    Args:
        batches: Images (B, 3, P, P) uint8.

    Raises:
        UserError: There are too few images. Those that come back exactly, whose PSNR is infinite, do not count.
    """
    tried = np.array(tried_lengths(tokenizer))
    wanted = np.geomspace(1, tokenizer.num_latent_tokens, MOST_LENGTHS)
    lengths = np.unique([tried[np.abs(tried - place).argmin()] for place in wanted])
    inputs, targets = [], []
    for pixels in batches:
        encoded = encode(tokenizer, pixels)
        inputs.append(features(tokenizer, encoded))
        targets.append(psnr_of(curves(tokenizer, encoded, lengths.tolist())[0]))
    psnr = np.concatenate([np.empty((0, len(lengths))), *targets])  # (n, G)
    finite = np.isfinite(psnr).all(axis=1)
    held_out = np.arange(finite.sum()) % HELD_OUT == 0
    if held_out.sum() < 2:
        raise UserError(f"a length predictor is fitted to hundreds of images, got {finite.sum()}")
    known, psnr = with_one(np.concatenate(inputs)[finite]), psnr[finite]  # (n, F + 1), (n, G)
    fitted = [ridge(known[~held_out], psnr[~held_out], strength) for strength in RIDGE_STRENGTHS]
    wrong = [psnr[held_out] - known[held_out] @ weights for weights in fitted]
    best = int(np.argmin([np.square(errors).mean() for errors in wrong]))
    deviations = np.sqrt(np.square(wrong[best]).mean(axis=0))
    return LengthPredictor(
        lengths=lengths.astype(np.int64),
        weights=ridge(known, psnr, RIDGE_STRENGTHS[best]).astype(np.float16),
        deviations=deviations.astype(np.float32),
        explained=(1 - np.square(deviations) / psnr[held_out].var(axis=0).clip(1e-12)).astype(np.float32),
    )


def ridge(inputs: np.ndarray, targets: np.ndarray, strength: float) -> np.ndarray:
    """Weights (F + 1, G) of least squares, all but that of the constant in the last place held small."""
    scale = inputs.std(axis=0).clip(1e-6)
    scale[-1] = 1.0
    scaled = inputs / scale
    penalty = np.full(inputs.shape[1], strength)
    penalty[-1] = 1e-6
    return np.linalg.solve(scaled.T @ scaled + np.diag(penalty), scaled.T @ targets) / scale[:, None]


def with_one(inputs: np.ndarray) -> np.ndarray:
    return np.concatenate([inputs, np.ones((len(inputs), 1))], axis=1)


@torch.inference_mode()
def features(tokenizer: TiTok, encoded: Encoded) -> np.ndarray:
    """(B, F) float64: the normalised vectors, their norms, their distances to their codes, statistics of the pixels."""
    vectors = encoded.vectors.float()
    unit = tokenizer.quantize.normalize(vectors)
    nearest = tokenizer.quantize.nearest(unit)  # instead of tokens that may have been searched
    distances = (unit - tokenizer.quantize.lookup(nearest)).norm(dim=-1)  # (B, N)
    parts = [unit.flatten(1), vectors.norm(dim=-1).log(), distances, pixel_statistics(encoded.pixels)]
    return torch.cat(parts, dim=1).cpu().double().numpy()


def pixel_statistics(pixels: Tensor) -> Tensor:
    """(B, 7): mean, deviation, steps across and down, curvature, shares of nearly black and nearly white pixels."""
    grey = pixels.float().mean(dim=1) / 255  # (B, H, W)
    across, down = grey.diff(dim=2), grey.diff(dim=1)
    curvature = across.diff(dim=2).abs().mean(dim=(1, 2)) + down.diff(dim=1).abs().mean(dim=(1, 2))
    statistics = [
        grey.mean(dim=(1, 2)),
        grey.std(dim=(1, 2)),
        across.abs().mean(dim=(1, 2)),
        down.abs().mean(dim=(1, 2)),
        curvature,
        (grey < 0.02).float().mean(dim=(1, 2)),
        (grey > 0.98).float().mean(dim=(1, 2)),
    ]
    return torch.stack(statistics, dim=1)


def lengths_reaching(
    tokenizer: TiTok, encoded: Encoded, predictor: LengthPredictor, target: float, weights: Tensor | None = None
) -> tuple[np.ndarray, np.ndarray, int]:
    """A length (B,) for each image whose PSNR is at least `target` dB, found by guessing and decoding.

    Args:
        weights: Of pixels, as of `codec.rate.squared_error`.

    Returns:
        The lengths, all tokens where none that was decoded is enough; the squared errors (B,) there; how many images
        were decoded.
    """
    lengths = np.array(tried_lengths(tokenizer))
    expected = predictor.expected(features(tokenizer, encoded), lengths.tolist())

    def look(rows: np.ndarray, places: np.ndarray) -> np.ndarray:
        return errors_at(tokenizer, encoded, rows, lengths[places], weights)

    places, errors, num_decoded = places_reaching(expected, lengths, target, look)
    return lengths[places], errors, num_decoded


def places_reaching(
    expected: np.ndarray, lengths: np.ndarray, target: float, look: Look
) -> tuple[np.ndarray, np.ndarray, int]:
    """As `lengths_reaching`, with places among `lengths` (L,), at which `expected` (B, L) dB are expected.

    From a length that is too short it goes up until one reaches the target, and from one that reaches it down, where
    a length that is worth a decoding is expected to do so, too.

    Args:
        look: Called with the numbers of some images (n,) and their places; returns their squared errors.
    """
    rows, last, num_decoded = np.arange(len(expected)), len(lengths) - 1, 0
    least = np.zeros(len(expected), dtype=np.int64)  # shorter ones have been seen to be too short
    found, errors = np.full(len(expected), -1), np.empty(len(expected))
    places = first_reaching(expected, target, least)
    while len(rows):
        at = places[rows]
        seen = look(rows, at)
        num_decoded += len(rows)
        psnr = psnr_of(seen)
        taken = (psnr >= target) | ((at == last) & (found[rows] < 0))
        found[rows[taken]], errors[rows[taken]] = at[taken], seen[taken]
        least[rows[~taken]] = at[~taken] + 1
        corrected = expected[rows] + CORRECTION * (psnr - expected[rows, at])[:, None]
        places[rows] = first_reaching(corrected, target, least[rows])
        rows = rows[(found[rows] < 0) | (lengths[places[rows]] <= SHORTER * lengths[found[rows]])]
    return found, errors, num_decoded


def first_reaching(expected: np.ndarray, target: float, least: np.ndarray) -> np.ndarray:
    """(B,) the first place from `least` (B,) on where `expected` (B, L) is at least `target`; else the last one."""
    reaching = (expected >= target) & (np.arange(expected.shape[1]) >= least[:, None])
    return np.where(reaching.any(axis=1), reaching.argmax(axis=1), expected.shape[1] - 1)


def errors_at(
    tokenizer: TiTok, encoded: Encoded, rows: np.ndarray, lengths: np.ndarray, weights: Tensor | None
) -> np.ndarray:
    """Squared errors (n,) of some images, each at its own length."""
    errors = np.empty(len(rows))
    for length in np.unique(lengths):
        same = lengths == length
        at = torch.from_numpy(rows[same]).to(encoded.tokens.device)
        some = None if weights is None else weights[at]
        errors[same] = curves(tokenizer, encoded.of(at), [int(length)], some)[0][:, 0]
    return errors
