"""What is minimised: pure functions of plain tensors, computed in float32."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


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
