"""The stage-2 discriminator is the published one, at any size of image."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from modeling.modules.discriminator import BlurDown, NLayerDiscriminator
from tests.fill import assert_close, fill, image

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def golden():
    return np.load(HERE / "golden/discriminator.npz")


@pytest.fixture(scope="module")
def discriminator():
    return fill(NLayerDiscriminator(), 0).eval()


def test_names_and_shapes_are_the_published_ones():
    facts = json.loads((HERE / "facts/state_dicts.json").read_text())["NLayerDiscriminator"]
    discriminator = NLayerDiscriminator()
    assert [[name, list(value.shape)] for name, value in discriminator.state_dict().items()] == facts["state"]
    assert sum(parameter.numel() for parameter in discriminator.parameters()) == facts["parameters"]


@pytest.mark.parametrize(
    ("key", "batch", "height", "width"), [("logits128", 2, 128, 128), ("logits135x201", 1, 135, 201)]
)
def test_logits_equal_the_published_ones(discriminator, golden, key, batch, height, width):
    with torch.no_grad():
        assert_close(discriminator(image(1, batch, height, width)), golden, key)


def test_channels_last_changes_no_logit(discriminator, golden):
    discriminator = NLayerDiscriminator().to(memory_format=torch.channels_last).eval()
    fill(discriminator, 0)
    pixels = image(1, 2, 256, 256).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert_close(discriminator(pixels), golden, "logits256")


def test_blur_kernel_sums_to_one(golden):
    kernel = BlurDown().kernel
    assert_close(kernel, golden, "kernel")
    assert kernel.sum() == 1


@pytest.mark.parametrize("side", [7, 8])
def test_blur_halves_the_sides_rounding_up(side):
    assert BlurDown()(torch.rand(1, 2, side, side)).shape == (1, 2, 4, 4)


def test_small_images_give_the_same_grid():
    small = NLayerDiscriminator(channels=32, num_stages=2, grid_size=8)
    assert small(torch.rand(2, 3, 32, 32)).shape == (2, 1, 8, 8)
