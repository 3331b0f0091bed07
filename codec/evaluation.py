"""What rate control and searched tokens come to on many images: every prefix is measured once, then goals choose."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from codec.files import Codec
from codec.length import LengthPredictor, features, places_reaching
from codec.rate import Encoded, Goal, Options, choose, curves, decoded, encode, psnr_of, spread, tried_lengths
from codec.search import searched_lengths
from utils.evaluation.metrics import ssim
from utils.evaluation.report import Row, tokens_text

TARGETS = (17.0, 18.0, 19.0, 20.0, 21.0, 22.0)  # dB that are asked for, to draw a curve
BUDGETS = (3, 5, 7, 10, 13, 16, 20)  # bytes an image


@dataclass(frozen=True)
class Prefixes:
    """What the prefixes of n images come to; L lengths are tried, and the images of D of them looked at closely.

    Args:
        sizes: (n, L) bytes of the payload.
        errors: (n, L) mean squared errors of values in [0, 1].
        features: (n, F), what the length predictor knows.
        ssim: (n, D), at the lengths of `looked_at`; D is 0 where only the errors count.
        perceptual: (n, D), the distance.
        seconds: (n,) of one thread, on average of a batch, to encode, to search and to decode every length.
    """

    sizes: np.ndarray
    errors: np.ndarray
    features: np.ndarray
    ssim: np.ndarray
    perceptual: np.ndarray
    seconds: np.ndarray

    @classmethod
    def joined(cls, parts: Sequence["Prefixes"]) -> "Prefixes":
        return cls(**{one.name: np.concatenate([getattr(part, one.name) for part in parts]) for one in fields(cls)})


def measured(codec: Codec, pixels: Tensor, effort: int, looks_closely: bool = True) -> Prefixes:
    """Images (B, 3, P, P) uint8, compressed and compared.

    Args:
        looks_closely: Take SSIM and the perceptual distance, too.
    """
    lengths = np.array(tried_lengths(codec.tokenizer))
    started = time.process_time()
    plain = encode(codec.tokenizer, pixels)
    encoded = codec.searched(plain, lengths, effort)
    tokens = encoded.tokens.cpu().numpy()
    errors, _ = curves(codec.tokenizer, encoded, lengths.tolist())
    sizes = np.min([model.prefix_bytes(tokens) for model in codec.models.by_mode.values()], axis=0)
    seconds = (time.process_time() - started) / len(pixels)
    similar = distant = np.empty((len(pixels), 0))
    if looks_closely:
        similar, distant = closer(codec, encoded, looked_at(lengths))
    return Prefixes(
        sizes=sizes[:, lengths - 1],
        errors=errors,
        features=features(codec.tokenizer, plain).astype(np.float32),
        ssim=similar,
        perceptual=distant,
        seconds=np.full(len(pixels), seconds),
    )


def looked_at(lengths: np.ndarray) -> list[int]:
    """1, 2, 4, ... and the last of the lengths that are tried: only all tokens of a tokenizer that needs them."""
    return [length for length in searched_lengths(int(lengths[-1])) if length in lengths]


@torch.inference_mode()
def closer(codec: Codec, encoded: Encoded, lengths: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """SSIM and the perceptual distance (B, D) of prefixes."""
    originals = encoded.pixels.float() / 255
    distance = codec.distance.distance_to(originals)
    looks = []
    for images in decoded(codec.tokenizer, encoded.tokens, lengths):
        images = images.float() / 255
        looks.append(torch.stack([ssim(images, originals), distance(images)]))
    similar, distant = torch.stack(looks, dim=2).cpu().numpy()
    return similar, distant


class Results:
    """The choices that goals make among the prefixes of one effort.

    Args:
        lengths: (L,), those that were tried.
    """

    def __init__(self, prefixes: Prefixes, lengths: np.ndarray, effort: int):
        self.prefixes, self.lengths, self.effort = prefixes, lengths, effort
        self.sizes, self.errors = prefixes.sizes, prefixes.errors
        self.psnr = psnr_of(prefixes.errors)
        self.mean_bytes = self.sizes.mean(axis=0)
        self.rows = np.arange(len(self.sizes))

    def of_lengths(self) -> list[Row]:
        """A row for each length that was looked at closely: all images have so many tokens."""
        rows = []
        for column, length in enumerate(looked_at(self.lengths)):
            place = int(np.flatnonzero(self.lengths == length)[0])
            row = self._row(tokens_text(length), "one length", np.full(len(self.rows), place))
            if self.prefixes.ssim.shape[1]:
                row["ssim"] = float(self.prefixes.ssim[:, column].mean())
                row["perceptual_efficientnet_lite0"] = float(self.prefixes.perceptual[:, column].mean())
            rows.append(row)
        return rows

    def of_psnr(self, target: float, fewest: str = "bytes") -> Row:
        """Each image has the smallest prefix of so many dB, or its best one.

        Args:
            fewest: "bytes", where the best of the prefixes of as many bytes is taken; or "tokens".
        """
        places = self._reaching(target, fewest)
        name = f"{target:g} dB" + ", fewest tokens" * (fewest == "tokens")
        return self._row(name, "PSNR asked for", places) | {"reached": self._share_of(places, target)}

    def fits(self, bytes_per_image: float) -> bool:
        """Whether so many bytes on average are enough for the smallest files of all images."""
        return int(bytes_per_image * len(self.rows)) >= self.sizes.min(axis=1).sum()

    def of_budget(self, bytes_per_image: float) -> Row:
        """So many bytes on average are spread over the images."""
        budget = int(bytes_per_image * len(self.rows))
        places = spread(self.sizes, self.errors, budget)
        unspent = budget - int(self.sizes[self.rows, places].sum())
        return self._row(f"{bytes_per_image:g} bytes", "budget", places) | {"unspent_bytes": unspent}

    def of_guesses(self, target: float, predictor: LengthPredictor) -> Row:
        """As `of_psnr`, where lengths are guessed and few of them decoded; all where no decoded one is enough."""

        def look(rows: np.ndarray, places: np.ndarray) -> np.ndarray:
            return self.errors[rows, places]

        expected = predictor.expected(self.prefixes.features, self.lengths)
        places, errors, num_decoded = places_reaching(expected, self.lengths, target, look)
        missed, searched = psnr_of(errors) < target, self._reaching(target)
        places = np.where(missed, searched, places)
        row = self._row(f"{target:g} dB, fast", "PSNR guessed", places)
        return row | {
            "reached": self._share_of(places, target),
            "decodes": (num_decoded + int(missed.sum()) * len(self.lengths)) / len(places),
            "more_bytes": row["bytes_per_image"] / float(self.sizes[self.rows, searched].mean()) - 1,
        }

    def _reaching(self, target: float, fewest: str = "bytes") -> np.ndarray:
        """The place (n,) among the lengths that each image has. Arguments as of `of_psnr`."""
        sizes = self.sizes if fewest == "bytes" else np.broadcast_to(self.lengths, self.sizes.shape)
        options = [Options(self.lengths[:, None], *of) for of in zip(sizes, self.errors, strict=True)]
        return np.array([choose(one, Goal("psnr", target)).option for one in options])

    def _share_of(self, places: np.ndarray, target: float) -> float:
        """Of the images that have so many dB."""
        return float((self.psnr[self.rows, places] >= target).mean())

    def at_equal_bytes(self, num_bytes: float) -> dict[str, float]:
        """Statistics of the PSNR of one length for all, between the two lengths of about so many bytes."""
        statistics = np.stack([statistics_of(psnr) for psnr in self.psnr.T])  # (L, 3)
        return named([np.interp(num_bytes, self.mean_bytes, column) for column in statistics.T])

    def _row(self, name: str, how: str, places: np.ndarray) -> Row:
        """A row for plots and tables of the prefix at a place among the lengths that each image has."""
        psnr = self.psnr[self.rows, places]
        return {
            "name": f"{name}, effort {self.effort}",
            "system": f"effort {self.effort}, {how}",
            "bytes_per_image": float(self.sizes[self.rows, places].mean()),
            **named(statistics_of(psnr)),
            "tokens": float(self.lengths[places].mean()),
        }


def statistics_of(psnr: np.ndarray) -> tuple[float, float, float]:
    return float(psnr.mean()), float(psnr.std()), float(np.percentile(psnr, 5))


def named(statistics: Sequence[float]) -> dict[str, float]:
    return dict(zip(("psnr", "psnr_deviation", "psnr_5th_percentile"), map(float, statistics), strict=True))


def gains(better: Results, plain: Results) -> dict[str, Any]:
    """What an effort gains over another on the same images.

    Returns:
        "at_equal_tokens", dB at each length; "at_equal_bytes", dB at each length, beside the plain curve between its
        lengths, None beyond them; "at_most_bytes", dB where the shorter of the two curves ends; "more_bytes" at each
        length; all on average.
    """
    means = [results.psnr.mean(axis=0) for results in (better, plain)]
    curves = [(np.log(results.mean_bytes), mean) for results, mean in zip((better, plain), means, strict=True)]
    beside = np.interp(curves[0][0], *curves[1], left=np.nan, right=np.nan)
    end = min(sizes.max() for sizes, _ in curves)
    last = [float(np.interp(end, *curve)) for curve in curves]
    return {
        "at_equal_tokens": (means[0] - means[1]).tolist(),
        "at_equal_bytes": [None if np.isnan(gain) else float(gain) for gain in means[0] - beside],
        "at_most_bytes": last[0] - last[1],
        "more_bytes": (better.mean_bytes - plain.mean_bytes).tolist(),
    }
