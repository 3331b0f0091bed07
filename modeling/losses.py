"""What is minimised: pure functions of plain tensors, computed in float32."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def repeat_like(target: Tensor, decoded: Tensor) -> Tensor:
    """The targets (B, ...) of a batch once for each time that it was decoded, (kB, ...): twice in some tail drops."""
    return torch.cat([target] * (len(decoded) // len(target)))


def mean_of_decodings(
    loss: Callable[[Tensor, Tensor], Tensor], decoded: Tensor, target: Tensor, full_weight: float = 1.0
) -> Tensor:
    """A loss of a batch that may have been decoded twice: the mean over both decodings, the whole's weighed.

    Args:
        loss: Of what is decoded and its target, a scalar: a mean over the batch.
        decoded: (B, ...), or (2B, ...): from prefixes, then from all tokens.
        target: (B, ...).
        full_weight: Weight of the decoding from all tokens, where that from a prefix weighs 1.
    """
    if len(decoded) == len(target):
        return loss(decoded, target)
    prefix, full = decoded.chunk(2)
    return (loss(prefix, target) + full_weight * loss(full, target)) / (1 + full_weight)


def code_prediction_loss(logits: Tensor, codes: Tensor) -> Tensor:
    """Stage 1: cross-entropy of the decoder's logits against the teacher's codes, mean over all positions.

    Args:
        logits: (B, V, G, G) over the V pixel codes.
        codes: (B, G*G) int64, 0..V-1, row by row.
    """
    return F.cross_entropy(logits.flatten(2).float(), codes)


def l1_loss(reconstruction: Tensor, image: Tensor) -> Tensor:
    """Mean absolute difference of two batches of images, (B, 3, P, P)."""
    return F.l1_loss(reconstruction.float(), image.float())


def l2_loss(reconstruction: Tensor, image: Tensor) -> Tensor:
    """Mean squared difference of two batches of images, (B, 3, P, P)."""
    return F.mse_loss(reconstruction.float(), image.float())


RECONSTRUCTION_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l1": l1_loss, "l2": l2_loss}


def generator_adversarial_loss(fake: Tensor) -> Tensor:
    """What the reconstruction's side minimises: the negative mean of the discriminator's logits on it, any shape."""
    return -fake.float().mean()


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """What the discriminator minimises (hinge GAN, arXiv 1705.02894): real logits above 1, fake ones below -1.

    Args:
        real, fake: Logits of images and of reconstructions, any shape.
    """
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def lecam_loss(real_mean: Tensor, fake_mean: Tensor, ema_real: Tensor, ema_fake: Tensor) -> Tensor:
    """LeCam regularisation: keeps the discriminator's logits near the moving averages of the other kind.

    Scalars: the batch means of real and fake logits, and their moving averages before this step (arXiv 2104.03310).
    """
    above_fake = F.relu(real_mean.float() - ema_fake)
    below_real = F.relu(ema_real - fake_mean.float())
    return torch.square(above_fake) + torch.square(below_real)


def masked_token_loss(
    logits: Tensor, codes: Tensor, mask: Tensor, label_smoothing: float = 0.1, unmasked_weight: float = 0.1
) -> tuple[Tensor, dict[str, Tensor]]:
    """Generator: cross-entropy of every token, the hidden ones counting most (MaskGIT, arXiv 2202.04200).

    Args:
        logits: (B, N, V).
        codes: The true tokens, (B, N) int64, 0..V-1.
        mask: (B, N) bool, True where the network saw the mask token. Those weigh 1, the others `unmasked_weight`.

    Returns:
        The weighted mean, and logs: `masked_accuracy`, the share of hidden tokens predicted right, per image and then
        averaged, so that images with few hidden tokens count as much as others.
    """
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), codes.flatten(), reduction="none", label_smoothing=label_smoothing
    ).view_as(codes)
    weights = torch.where(mask, 1.0, unmasked_weight)
    loss = (losses * weights).sum() / (weights.sum() + 1e-8)
    correct = (logits.detach().argmax(dim=-1) == codes) & mask
    return loss, {"masked_accuracy": (correct.sum(dim=1) / (mask.sum(dim=1) + 1e-8)).mean()}


def masked_accuracy_by_position(logits: Tensor, codes: Tensor, mask: Tensor, num_bands: int = 8) -> Tensor:
    """Share of hidden tokens predicted right in each band of positions, the first N/num_bands tokens first.

    The leading tokens of a One-D-Piece image carry the most, so a generator learns the bands at different speeds.

    Args:
        logits, codes, mask: As in `masked_token_loss`.

    Returns:
        (num_bands,), over the whole batch; 0 for a band without a hidden token.
    """
    correct = (logits.detach().argmax(dim=-1) == codes) & mask
    right, hidden = (
        torch.stack([band.sum() for band in counts.sum(dim=0).tensor_split(num_bands)]) for counts in (correct, mask)
    )
    return right / (hidden + 1e-8)
