"""Images from their first tokens alone."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from modeling.titok import TiTok
from modeling.tokenizers import reconstruct
from utils.errors import UserError
from utils.evaluation.metrics import psnr, ssim
from utils.images import to_pil, write_image
from utils.inference import Arithmetic, check_lengths
from utils.reconstructions import Reconstruction, Reconstructions
from utils.result_folder import ResultFolder


def check_decodable(lengths: Sequence[int], tokenizer: TiTok, flag: str = "--lengths") -> None:
    """Refuse token counts that the tokenizer does not decode, before the work, which may take long."""
    total = tokenizer.num_latent_tokens
    check_lengths(lengths, total, flag)
    if tokenizer.strict_length_assertion and set(lengths) - {total}:
        raise UserError(f"{flag} must be {total} alone for this tokenizer, got {', '.join(map(str, lengths))}")


def reconstructions(
    tokenizer: TiTok, pixels: Tensor, lengths: Sequence[int], arithmetic: Arithmetic
) -> Iterator[Reconstruction]:
    """Images (B, 3, P, P) uint8 as the tokenizer gives them back from each number of their first tokens.

    Args:
        arithmetic: The context in which to decode, see `utils.inference.prepared`.
    """
    originals = pixels.to(tokenizer.latent_tokens.device) / 255
    tokens, decoded = reconstruct(tokenizer, pixels, lengths, arithmetic)
    images = {length: batch.float().clamp(0, 1) for length, batch in decoded}
    psnrs = {length: psnr(batch, originals).tolist() for length, batch in images.items()}
    ssims = {length: ssim(batch, originals).tolist() for length, batch in images.items()}
    for index in range(len(pixels)):
        yield Reconstruction(
            tokens=tokens[index].cpu().numpy(),
            original=to_pil(originals[index]),
            images={length: to_pil(batch[index]) for length, batch in images.items()},
            psnr={length: values[index] for length, values in psnrs.items()},
            ssim={length: values[index] for length, values in ssims.items()},
        )


def write_reconstructions(
    tokenizer: TiTok,
    batches: Iterable[Sequence[tuple[Any, Tensor]]],
    kept: Reconstructions,
    arithmetic: Arithmetic,
    folder: ResultFolder,
    ranks: Mapping[Any, int],
) -> None:
    """Write what each number of tokens gives back of images, as KEY_LENGTH.png, and keep what is said of it.

    Args:
        batches: Files, each with a `key`, and their pixels, (3, P, P) uint8.
        ranks: Of the files; those of the lowest that can be used are kept whole.
    """
    for batch in batches:
        pixels = torch.stack([image for _, image in batch])
        for (file, _), result in zip(batch, reconstructions(tokenizer, pixels, kept.lengths, arithmetic), strict=True):
            for length, image in result.images.items():
                write_image(image, folder / f"{file.key}_{length}.png")
            kept.add(file.key, result, ranks[file])


@torch.no_grad()
def decode_prefixes(
    tokenizer: TiTok, tokens: Tensor, lengths: Sequence[int], batch_size: int, arithmetic: Arithmetic
) -> list[list[Image.Image]]:
    """A row of images for each of `tokens` (n, N), one from each number of its first tokens."""
    rows = []
    for batch in tokens.split(batch_size):
        with arithmetic():
            columns = [tokenizer.decode_tokens(batch, length=length) for length in lengths]
        rows += [[to_pil(pixels) for pixels in row] for row in zip(*columns, strict=True)]
    return rows
