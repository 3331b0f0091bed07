"""Training masks, and the noise of each image."""

import math

import pytest
import torch

from modeling.losses import masked_accuracy_by_position, masked_token_loss
from modeling.modules.masking import (
    ImageNoise,
    draw_seeds,
    gumbel,
    image_seeds,
    random_drop,
    random_mask,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_training_masks_hide_tokens_and_leave_the_others():
    codes = torch.randint(0, 64, (100, 32), generator=seeded())
    before = codes.clone()
    hidden, mask = random_mask(codes, 64, seeded())
    assert torch.equal(codes, before)
    assert (hidden[mask] == 64).all() and torch.equal(hidden[~mask], codes[~mask])
    assert mask.any(dim=1).all()


def test_training_masks_repeat_from_their_seed():
    codes = torch.zeros(4, 32, dtype=torch.long)
    first, again, other = (random_mask(codes, 64, seeded(seed))[1] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_masked_share_follows_the_arccos_law():
    num_tokens = 256
    _, mask = random_mask(torch.zeros(20000, num_tokens, dtype=torch.long), 1, seeded())
    shares = mask.float().mean(dim=1)
    # acos(u) * 2 / pi <= s just where u >= cos(s pi / 2), so P(share <= s) = 1 - cos(s pi / 2).
    for share in (0.1, 0.25, 0.5, 0.75, 0.9):
        rounding = 0.5 / num_tokens
        expected = 1 - math.cos((share + rounding) * math.pi / 2)
        assert (shares <= share).float().mean().item() == pytest.approx(expected, abs=0.012)
    assert shares.mean().item() == pytest.approx(2 / math.pi, abs=0.006)
    # Every position is hidden as often as any other.
    assert (mask.float().mean(dim=0) - 2 / math.pi).abs().max() < 0.02


def test_at_least_one_token_is_hidden_even_of_very_few():
    _, mask = random_mask(torch.zeros(1000, 1, dtype=torch.long), 1, seeded())
    assert mask.all()


def test_classes_are_dropped_at_the_asked_rate():
    torch.manual_seed(0)
    assert random_drop(20000, 0.1, torch.device("cpu")).float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert not random_drop(1000, 0.0, torch.device("cpu")).any()
    assert random_drop(1000, 1.0, torch.device("cpu")).all()


def test_gumbel_noise_is_finite_and_has_the_gumbel_moments():
    assert gumbel(torch.tensor([0.0, 1 - 2.0**-24])).isfinite().all()
    noise = gumbel(torch.rand(200000, generator=seeded()))
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.03)


def test_an_image_draws_the_same_noise_alone_and_in_a_batch():
    together = ImageNoise([5, 6, 7], torch.device("cpu"))
    alone = ImageNoise([6], torch.device("cpu"))
    for _ in range(2):
        assert torch.equal(together.uniform(4, 3)[1], alone.uniform(4, 3)[0])


def test_seeds_of_images_depend_on_run_and_index_alone():
    assert image_seeds(0, [3, 4]) == image_seeds(0, range(5))[3:]
    assert len(set(image_seeds(0, range(1000)) + image_seeds(1, range(1000)))) == 2000
    assert len(set(image_seeds(0, ["a.png", "\xe9.png", "\udce9.png"]))) == 3  # the last is no UTF-8
    one_by_one = seeded()
    assert draw_seeds(3, seeded()) == [draw_seeds(1, one_by_one)[0] for _ in range(3)]


def hand_computed_case():
    logits = torch.tensor([[[2.0, 0.0], [0.0, 0.0]], [[0.0, 1.0], [3.0, 0.0]]])  # (2, 2, 2)
    codes = torch.tensor([[0, 1], [1, 1]])
    mask = torch.tensor([[True, False], [True, True]])
    return logits, codes, mask


def test_the_masked_token_loss_equals_a_hand_computed_case():
    logits, codes, mask = hand_computed_case()

    def smoothed(right, wrong):  # cross-entropy of two classes with smoothing 0.1: targets 0.95 and 0.05
        total = math.log(math.exp(right) + math.exp(wrong))
        return -0.95 * (right - total) - 0.05 * (wrong - total)

    terms = [smoothed(2, 0), smoothed(0, 0), smoothed(1, 0), smoothed(0, 3)]
    weights = [1, 0.1, 1, 1]
    expected = sum(weight * term for weight, term in zip(weights, terms, strict=True)) / (sum(weights) + 1e-8)
    loss, logs = masked_token_loss(logits, codes, mask)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert logs["masked_accuracy"].item() == pytest.approx((1 / 1 + 1 / 2) / 2)


def test_the_masked_token_loss_is_computed_in_float32():
    logits, codes, mask = hand_computed_case()
    loss, _ = masked_token_loss(logits.bfloat16(), codes, mask)
    assert loss.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert masked_token_loss(logits, codes, mask)[0] == masked_token_loss(logits, codes, mask)[0].float()


def test_accuracy_by_position_counts_hidden_tokens_of_each_band():
    codes = torch.zeros(2, 16, dtype=torch.long)
    logits = torch.zeros(2, 16, 3)
    logits[0, :2, 0] = logits[0, 2:, 1] = logits[1, :4, 0] = logits[1, 4:, 2] = 1
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[:, 6:8] = False
    mask[0, 3] = False
    accuracy = masked_accuracy_by_position(logits, codes, mask)
    assert accuracy.tolist() == pytest.approx([1, 2 / 3, 0, 0, 0, 0, 0, 0])
