"""What the images of a tokenizer score against their originals, by the number of tokens they are decoded from."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from modeling.checkpoints.locate import Located, locate_configured
from modeling.checkpoints.registry import declared_classes
from modeling.networks.judges import Judges
from modeling.pixel_vqgan import PixelVQGAN
from modeling.titok import TiTok
from modeling.tokenizers import load_tokenizer, reconstruct
from utils.errors import UserError
from utils.evaluation.comparison import Comparison
from utils.evaluation.metrics import to_uint8
from utils.evaluation.report import Row, tokens_text
from utils.evaluation.statistics import CodeCounts
from utils.inference import Arithmetic


class TeacherTokens(nn.Module):
    """A teacher as a tokenizer: the codes of its grid are the tokens, and nothing is decoded but all of them."""

    strict_length_assertion = True

    def __init__(self, teacher: PixelVQGAN, image_size: int):
        super().__init__()
        self.teacher, self.image_size = teacher, image_size
        self.num_latent_tokens = (image_size // teacher.downsampling) ** 2
        self.codebook_size = teacher.quantize.codebook_size

    @property
    def latent_tokens(self) -> Tensor:
        """The codebook: tells device and precision."""
        return self.teacher.quantize.embedding.weight

    def encode(self, pixels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """As `TiTok.encode`; codes (B, 1, G*G)."""
        z_quantized, result = self.teacher.quantize(self.teacher.encoder(pixels))
        return z_quantized, {"min_encoding_indices": result["min_encoding_indices"].flatten(1)[:, None]}

    def decode(self, z_quantized: Tensor, length: int | None = None) -> Tensor:
        if length not in (None, self.num_latent_tokens):
            raise UserError(f"a teacher decodes all of its {self.num_latent_tokens} codes, got a length of {length}")
        return self.teacher.decoder(z_quantized)


def load_scored(config: DictConfig, checkpoint: str | None, device: str | torch.device) -> tuple[Any, Located]:
    """The tokenizer or the teacher that a configuration and --checkpoint mean; errors as of `load_tokenizer`."""
    if PixelVQGAN not in declared_classes(config)[-1:]:
        return load_tokenizer(config, checkpoint, device=device)
    located = locate_configured(config, checkpoint)
    teacher = PixelVQGAN.from_pretrained(located, config=config, device=device)
    return TeacherTokens(teacher, config.dataset.preprocessing.crop_size), located


class ReconstructionScores:
    """The images of a tokenizer at each length, each process its share.

    Args:
        lengths: Numbers of tokens.
        arithmetic: The context of decoding, see `utils.inference.prepared`.

    Attributes:
        bits: Of a token.
        comparison: Knows the originals.
    """

    def __init__(
        self, tokenizer: TiTok | TeacherTokens, lengths: Sequence[int], arithmetic: Arithmetic, judges: Judges
    ):
        self.tokenizer, self.lengths, self.arithmetic, self.judges = tokenizer, lengths, arithmetic, judges
        self.bits = math.log2(tokenizer.codebook_size)
        self.comparison = judges.comparison(tokenizer.image_size)
        self.counts = CodeCounts(tokenizer.num_latent_tokens, tokenizer.codebook_size)

    def update(self, pixels: Tensor, keys: Sequence[str]) -> None:
        """Add images (B, 3, P, P) uint8 on the tokenizer's device."""
        self.counts.update(self._compare(self.comparison, pixels, keys))

    def try_batch(self, num: int) -> None:
        """The work of a batch of so many images, whose scores are thrown away."""
        size = self.tokenizer.image_size
        pixels = torch.zeros(num, 3, size, size, dtype=torch.uint8, device=self.tokenizer.latent_tokens.device)
        self._compare(self.judges.comparison(size), pixels, list(map(str, range(num))))

    def _compare(self, comparison: Comparison, pixels: Tensor, keys: Sequence[str]) -> Tensor:
        """Add images and what their tokens give back to the comparison; the tokens, (B, N)."""
        codes, decoded = reconstruct(self.tokenizer, pixels, self.lengths, self.arithmetic)
        comparison.update(pixels, {tokens_text(length): to_uint8(images) for length, images in decoded}, keys)
        return codes

    def finish(self, name: str) -> tuple[dict[str, Any], str]:
        """`rows` and `codebook` for the results, and what to say of the codes; all processes call this together.

        Args:
            name: What the tokenizer is called.
        """
        scores = self.comparison.finish([tokens_text(length) for length in self.lengths])
        rows = [self._row(length, name) | scores[tokens_text(length)] for length in self.lengths]
        codebook = self.counts.finish(self.comparison.processes)
        used, perplexity, entropy = (codebook[measure] for measure in ("usage", "perplexity", "entropy_bits"))
        note = f"codes used {used:.1%}, perplexity {perplexity:.1f}, entropy {entropy:.2f} of {self.bits:.0f} bits"
        return {"rows": rows, "codebook": codebook}, note

    def _row(self, length: int, system: str) -> Row:
        """What a row says of images of `length` tokens, before their scores."""
        return {
            "name": tokens_text(length),
            "system": system,
            "tokens": length,
            "bytes_per_image": math.ceil(length * self.bits / 8),
            "bits_per_pixel": length * self.bits / self.tokenizer.image_size**2,
        }
