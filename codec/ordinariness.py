"""How ordinary images are: the bits of their tokens under an entropy model, few for what it has often seen."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from codec.entropy import EntropyModel, entropy_models_of
from modeling.identity import identity
from modeling.prefixes import decode_prefixes
from modeling.tokenizers import load_tokenizer
from utils.errors import UserError
from utils.images import contact_sheet, tile_side

SHARES = (5, 50, 95)  # percentiles that are told
NUM_SHOWN = 12  # images of a row of the sheet
BATCH = 64


class Ordinariness:
    """A tokenizer with the best of its entropy models.

    Raises:
        UserError: It has none that was fitted: with fixed bits all images cost the same.
    """

    def __init__(self, config: str | None, checkpoint: str | None):
        self.tokenizer, located = load_tokenizer(config, checkpoint)
        sizes = self.tokenizer.num_latent_tokens, self.tokenizer.codebook_size
        models = entropy_models_of(located.weights.parent, bytes.fromhex(identity(self.tokenizer)), *sizes)
        self.model: EntropyModel = models.best()
        self.name = f"{located.name}, entropy model {self.model.mode.name.lower()}"
        if len(models.by_mode) == 1:
            raise UserError(f"{located.name} has no entropy model: fit one with scripts/fit_entropy_model.py")

    def bits(self, tokens: np.ndarray) -> np.ndarray:
        """Of all tokens of each image, (n,), for tokens (n, N)."""
        batches = tqdm(_batches(tokens), "bits", unit="batch", leave=False, delay=1.0, dynamic_ncols=True)
        return np.concatenate([self.model.prefix_bits(part)[:, -1] for part in batches])

    def sheet(self, tokens: np.ndarray, bits: np.ndarray) -> Image.Image:
        """The most ordinary images and the strangest ones, as the tokens show them, with their bits."""
        order = np.argsort(bits, kind="stable")
        rows = [order[:NUM_SHOWN], order[::-1][:NUM_SHOWN]]
        images = [self._decoded(tokens[row]) for row in rows]
        captions = [[f"{bits[index]:.0f} bits" for index in row] for row in rows]
        tile = tile_side(images[0][0].width, 64, 256)
        titles = ["most ordinary", "strangest"]
        return contact_sheet(images, row_titles=titles, captions=captions, title=self.name, tile=tile)

    def _decoded(self, tokens: np.ndarray) -> list[Image.Image]:
        whole = [self.tokenizer.num_latent_tokens]
        rows = decode_prefixes(self.tokenizer, torch.from_numpy(tokens), whole, BATCH, torch.no_grad)
        return [image for (image,) in rows]


def bits_row(name: str, bits: np.ndarray) -> dict[str, Any]:
    """What the bits of some images come to."""
    shares = {f"percentile_{share}": float(np.percentile(bits, share)) for share in SHARES}
    return {"images": name, "num_images": len(bits), "mean": float(bits.mean()), **shares}


def bits_table(rows: list[dict[str, Any]]) -> str:
    """The rows of `bits_row`."""
    lines = [" images                        number   bits   5 %    50 %   95 %"]
    for row in rows:
        shares = " ".join(f"{row[f'percentile_{share}']:6.1f}" for share in SHARES)
        lines.append(f" {row['images']:28} {row['num_images']:7,} {row['mean']:6.1f} {shares}")
    return "\n".join(lines)


def _batches(tokens: np.ndarray) -> list[np.ndarray]:
    return np.split(tokens, range(BATCH, len(tokens), BATCH))
