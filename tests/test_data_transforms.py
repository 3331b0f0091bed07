"""Images become the pixels that the published models were trained on."""

import io
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import DataError
from data.transforms import MAX_PIXELS, EvalTransform, TrainTransform, decode_image
from tests.fill import assert_close
from tests.fill import image as noise
from tests.shard_data import bomb

GOLDEN = np.load(Path(__file__).parent / "golden" / "preprocess.npz")


def photo(height: int, width: int) -> Image.Image:
    pixels = (noise(40, 1, height, width)[0] * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def encode(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("size", [(300, 411), (700, 513), (100, 180), (256, 256)])
def test_evaluation_pixels_equal_the_published_ones(size):
    pixels = EvalTransform(256)(photo(*size))
    assert pixels.dtype == torch.uint8
    assert_close(pixels / 255, GOLDEN, f"eval_{size[0]}x{size[1]}")


def test_evaluation_resizes_to_the_crop_and_training_to_the_shorter_edge():
    assert_close(EvalTransform(128)(photo(300, 411)) / 255, GOLDEN, "eval_160_128")
    pixels = TrainTransform(160, 128, False, False)(photo(300, 411), random.Random(0))
    assert_close(pixels / 255, GOLDEN, "train_160_128")


def test_all_chance_comes_from_the_given_source():
    transform = pickle.loads(pickle.dumps(TrainTransform(40, 32, True, True)))
    state = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()
    first = [transform(photo(50, 60), random.Random(seed)) for seed in range(20)]
    again = [transform(photo(50, 60), random.Random(seed)) for seed in range(20)]
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))
    assert len({a.numpy().tobytes() for a in first}) > 10
    assert state[0] == random.getstate() and state[1].equal(torch.get_rng_state())
    assert (state[2] == np.random.get_state()[1]).all()


def test_half_of_the_images_are_mirrored():
    transform = TrainTransform(8, 8, True, True)
    source = photo(8, 8)
    plain = torch.from_numpy(np.array(source)).permute(2, 0, 1)
    rng = random.Random(0)
    mirrored = [not transform(source, rng).equal(plain) for _ in range(400)]
    assert 160 < sum(mirrored) < 240
    assert TrainTransform(8, 8, True, False)(source, rng).equal(plain)


def test_random_crops_reach_every_place():
    wide = Image.fromarray(np.arange(12, dtype=np.uint8)[None, :, None].repeat(8, 0).repeat(3, 2))
    transform = TrainTransform(8, 8, True, False)
    rng = random.Random(0)
    assert {int(transform(wide, rng)[0, 0, 0]) for _ in range(100)} == {0, 1, 2, 3, 4}


def test_a_crop_larger_than_the_image_is_an_error():
    with pytest.raises(DataError, match=r"resize_shorter_edge must be at least crop_size \(64\), got 32"):
        TrainTransform(32, 64, True, True)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16", "I"])
def test_every_kind_of_image_becomes_rgb(mode):
    grey = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1))
    if mode in ("I;16", "I"):
        source = Image.fromarray((grey.astype(np.uint16) << 8) | 255)
        source = source if mode == "I;16" else source.convert("I")
    else:
        source = Image.fromarray(grey if mode != "1" else grey // 128 * 255).convert("RGB")
        source = source.quantize(64) if mode == "P" else source.convert(mode)
    decoded = decode_image(encode(source, "TIFF" if mode in ("CMYK", "I") else "PNG"))
    assert decoded.mode == "RGB" and decoded.size == (32, 32)
    want = grey // 128 * 255 if mode == "1" else grey
    assert np.abs(np.array(decoded).astype(int) - want[:, :, None]).max() <= 1


def test_the_orientation_note_of_a_photograph_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    assert decode_image(encode(photo(20, 30), "JPEG", exif=exif)).size == (30, 20)


def test_huge_images_are_refused_before_they_are_decoded():
    with pytest.raises(DataError, match=f"at most {MAX_PIXELS} pixels, got 12000 x 12000"):
        decode_image(bomb(12000, 12000))
    with pytest.raises(DataError, match="decompression bomb"):
        decode_image(bomb(60000, 60000))


def test_a_thin_image_cannot_grow_without_limit():
    with pytest.raises(DataError, match="at most .* pixels, got 256 x 7680000"):
        EvalTransform(256)(Image.new("RGB", (1, 30000)))


@pytest.mark.parametrize("data", [b"", b"no image", encode(photo(64, 64), "PNG")[:900], b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_broken_bytes_are_one_sentence(data):
    with pytest.raises(DataError, match="expected a whole image .JPEG, PNG, .* got bytes that do not decode: "):
        decode_image(data)
