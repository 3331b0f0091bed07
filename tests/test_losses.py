"""Losses are what spec and papers say, in float32."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from modeling.losses import (
    RECONSTRUCTION_LOSSES,
    code_prediction_loss,
    generator_adversarial_loss,
    hinge_discriminator_loss,
    lecam_loss,
    mean_of_decodings,
)
from tests.fill import integers, tensor


def test_code_prediction_equals_the_published_loss():
    logits, codes = tensor(11, "logits", (2, 1024, 16, 16), 2), integers(11, "codes", (2, 256), 0, 1024)
    golden = np.load(Path(__file__).parent / "golden/loss_stage1.npz")
    assert code_prediction_loss(logits, codes).item() == pytest.approx(
        float(golden["fixed.reconstruction_loss"]), rel=1e-6
    )


def test_code_prediction_reads_the_grid_row_by_row():
    logits = torch.zeros(1, 3, 2, 2)
    logits[0, 2, 0, 1] = 50.0
    codes = torch.tensor([[0, 2, 0, 0]])
    assert code_prediction_loss(logits, codes).item() == pytest.approx(3 / 4 * math.log(3))


def test_reconstruction_losses_are_means_over_everything():
    image, reconstruction = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.5)
    assert RECONSTRUCTION_LOSSES["l1"](reconstruction, image) == 0.5
    assert RECONSTRUCTION_LOSSES["l2"](reconstruction, image) == 0.25


def test_the_whole_weighs_what_it_is_told_to_beside_the_prefix():
    image = torch.zeros(2, 3, 4, 4)
    prefix, full = torch.full_like(image, 3.0), torch.full_like(image, 1.0)
    loss = RECONSTRUCTION_LOSSES["l1"]
    twice = torch.cat([prefix, full])
    assert mean_of_decodings(loss, twice, image) == loss(twice, image.repeat(2, 1, 1, 1)) == 2
    assert mean_of_decodings(loss, twice, image, full_weight=3) == (3 + 3 * 1) / 4
    assert mean_of_decodings(loss, full, image, full_weight=3) == 1


def test_hinge_is_zero_beyond_its_margins():
    assert hinge_discriminator_loss(torch.full((2, 1), 1.5), torch.full((2, 1), -1.5)) == 0
    assert hinge_discriminator_loss(torch.zeros(4), torch.zeros(4)) == 1
    assert hinge_discriminator_loss(torch.tensor([-1.0, 1.0]), torch.tensor([-2.0, 3.0])) == 0.5 * (1 + 2)


def test_generator_wants_high_logits():
    assert generator_adversarial_loss(torch.tensor([1.0, 3.0])) == -2


def test_lecam_penalises_only_the_gap_to_the_other_average():
    one = torch.tensor(1.0)
    assert lecam_loss(one * 3, one * -2, ema_real=one, ema_fake=one * 2) == (3 - 2) ** 2 + (1 + 2) ** 2
    assert lecam_loss(one * 0, one * 5, ema_real=one, ema_fake=one * 2) == 0


def test_losses_of_bfloat16_are_float32():
    half = torch.randn(2, 4, 2, 2).bfloat16()
    codes = torch.zeros(2, 4, dtype=torch.int64)
    zero = torch.tensor(0.0)
    losses = [
        code_prediction_loss(half, codes),
        RECONSTRUCTION_LOSSES["l1"](half, half),
        RECONSTRUCTION_LOSSES["l2"](half, half),
        generator_adversarial_loss(half),
        hinge_discriminator_loss(half, half),
        lecam_loss(half.mean(), half.mean(), zero, zero),
    ]
    assert {loss.dtype for loss in losses} == {torch.float32}
