"""Cut files as whole ones: a generator invents the tokens that are missing."""

from dataclasses import replace

import numpy as np
import torch

from codec.entropy import TokensRead
from codec.files import BATCH, Codec
from modeling.completion import Completion, load_completion
from modeling.modules.masking import image_seeds


class Completer:
    """All tokens for what was read with any tokenizer, each by a generator of its own, loaded once.

    Args:
        way: One of `modeling.completion.WAYS`.
        seed: With a tile's number and tokens it decides what is invented.
        label: Class of what is shown, a number or name; None where it is not known.
        generator: As a checkpoint; by default the bundled one of a bundled tokenizer.

    Attributes:
        num_completed: Files of which something is invented.
    """

    def __init__(self, way: str, seed: int, label: str | None = None, generator: str | None = None):
        self.way, self.seed, self.label, self.generator = way, seed, label, generator
        self.completions: dict[Codec, Completion] = {}
        self.num_completed = 0

    def __str__(self) -> str:
        names = " and ".join(sorted(completion.name for completion in self.completions.values()))
        files = "1 image is" if self.num_completed == 1 else f"{self.num_completed} images are"
        return f"{files} invented beyond the tokens that were read, by {names}, {self.way}, seed {self.seed}"

    def name_for(self, codec: Codec) -> str:
        """Of the generator that continues a tokenizer's tokens."""
        return self._completion(codec).name

    def _completion(self, codec: Codec) -> Completion:
        if codec not in self.completions:
            device = codec.tokenizer.latent_tokens.device
            self.completions[codec] = load_completion(
                codec.tokenizer, codec.name, self.way, self.generator, device=device
            )
        return self.completions[codec]

    def __call__(self, read: TokensRead, codec: Codec) -> TokensRead:
        """What was read, with all tokens of every tile that has any; those that were read stay."""
        completion, total = self._completion(codec), codec.models.num_tokens
        tokens = np.pad(read.tokens, ((0, 0), (0, total - read.tokens.shape[1])))
        lengths = set(read.certain.tolist()) - {0, total}
        for length in lengths:
            (same,) = np.nonzero(read.certain == length)
            for first in range(0, len(same), BATCH):
                tiles = same[first : first + BATCH]
                prefix = torch.from_numpy(read.tokens[tiles, :length].astype(np.int64))
                labels = None if self.label is None else [completion.label(self.label)] * len(tiles)
                seeds = image_seeds(self.seed, tiles.tolist())
                tokens[tiles] = completion.tokens(prefix, seeds, labels).cpu().numpy()
        self.num_completed += bool(lengths)
        return replace(read, tokens=tokens, certain=np.where(read.certain > 0, total, 0))
