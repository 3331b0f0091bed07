"""Images become the pixels that the published models were trained on."""

import io
import pickle
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import DataError
from data.transforms import AS_SHOWN, MAX_PIXELS, EvalTransform, TrainTransform, decode_as_shown, decode_image
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


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_every_kind_of_image_becomes_rgb(mode):
    grey = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1))
    if mode == "I;16":
        source = Image.fromarray((grey.astype(np.uint16) << 8) | 255)
    else:
        source = Image.fromarray(grey if mode != "1" else grey // 128 * 255).convert("RGB")
        source = source.quantize(64) if mode == "P" else source.convert(mode)
    decoded = decode_image(encode(source, "TIFF" if mode == "CMYK" else "PNG"))
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
    with pytest.raises(DataError, match=f"at most {MAX_PIXELS} pixels, got far more: scale it down"):
        decode_image(bomb(60000, 60000))


def test_a_thin_image_cannot_grow_without_limit():
    with pytest.raises(DataError, match="at most .* pixels, got 256 x 7680000"):
        EvalTransform(256)(Image.new("RGB", (1, 30000)))


@pytest.mark.parametrize("data", [b"", b"no image", encode(photo(64, 64), "PNG")[:900], b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_broken_bytes_are_one_sentence(data):
    with pytest.raises(DataError, match="expected a whole image .JPEG, PNG, .* got bytes that do not decode: "):
        decode_image(data)


# As a viewer shows it


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_as_shown_a_photograph_stands_upright(file_format):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    lying = Image.new("RGB", (48, 32), "white")
    lying.paste("black", (0, 0, 48, 16))  # its upper half, which belongs to the right
    shown = decode_as_shown(encode(lying, file_format, exif=exif))
    assert shown.size == (32, 48)
    assert shown.getpixel((28, 24))[0] < 40 and shown.getpixel((4, 24))[0] > 215


def test_a_broken_note_of_orientation_is_no_error():
    data = encode(photo(20, 30), "PNG", exif=b"Exif\0\0no exif at all")
    assert decode_as_shown(data).size == (30, 20)


def half_transparent(mode):
    """Black on the left, on the right fully transparent over black: a viewer shows the right half white."""
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (16, 0, 32, 32))
    if mode == "P":
        palette = Image.new("P", (32, 32), 0)
        palette.putpalette([0, 0, 0, 0, 0, 0])
        palette.paste(1, (16, 0, 32, 32))
        return palette
    return image.convert(mode)


@pytest.mark.parametrize(
    ("mode", "file_format", "options"),
    [
        ("RGBA", "PNG", {}),
        ("LA", "PNG", {}),
        ("P", "PNG", {"transparency": 1}),
        ("P", "PNG", {"transparency": b"\xff\x00"}),
        ("RGBA", "WEBP", {"lossless": True}),
        ("P", "GIF", {"transparency": 1}),
        ("RGBA", "TIFF", {}),
        ("LA", "TIFF", {}),
    ],
)
def test_as_shown_transparency_is_white(mode, file_format, options):
    data = encode(half_transparent(mode), file_format, **options)
    shown = np.asarray(decode_as_shown(data))
    assert (shown[:, :14] == 0).all() and (shown[:, 18:] == 255).all()
    assert (np.asarray(decode_image(data)) == 0).all()  # the published preprocessing drops it


def test_as_shown_half_transparent_ink_is_half_as_dark_and_a_grey_value_can_be_transparent():
    shown = decode_as_shown(encode(Image.new("RGBA", (8, 8), (0, 0, 0, 128)), "PNG"))
    assert shown.getpixel((0, 0)) == (127, 127, 127)
    deep = Image.fromarray(np.full((8, 8), 300, dtype=np.uint16))
    assert decode_as_shown(encode(deep, "PNG", transparency=300)).getpixel((0, 0)) == (255, 255, 255)
    assert decode_as_shown(encode(deep, "PNG", transparency=301)).getpixel((0, 0)) == (1, 1, 1)


def test_as_shown_opaque_images_are_those_of_the_published_preprocessing():
    for mode in ("RGB", "L", "P", "CMYK"):
        data = encode(photo(20, 30).convert(mode), "TIFF" if mode == "CMYK" else "PNG")
        assert np.array_equal(decode_as_shown(data), decode_image(data))


def test_each_way_of_decoding_has_words_for_the_record():
    assert "transparency dropped, EXIF orientation not applied, shorter edge to 32" in EvalTransform(32).description
    assert "transparency on white, upright by EXIF" in EvalTransform(32, AS_SHOWN).description


# Depths


RAMP = np.tile(np.linspace(0, 1, 32), (32, 1))
GREY = np.round(RAMP * 255)


@pytest.mark.parametrize("decode", [decode_image, decode_as_shown])
@pytest.mark.parametrize(
    ("samples", "tiffinfo"),
    [
        (RAMP.astype(np.float32), {}),
        (RAMP.astype(np.float32) * 7 - 3, {340: -3.0, 341: 4.0}),
        (np.round(RAMP * 65535).astype(np.uint16), {}),
        (np.round(RAMP * 65535).astype(np.int32), {340: 0, 341: 65535}),
    ],
)
def test_deep_samples_of_a_tiff_are_scaled_by_what_the_file_says(decode, samples, tiffinfo):
    decoded = np.asarray(decode(encode(Image.fromarray(samples), "TIFF", tiffinfo=tiffinfo))).astype(int)
    assert decoded.shape == (32, 32, 3) and np.abs(decoded - GREY[:, :, None]).max() <= 1


def test_samples_of_twelve_bits_are_scaled_too():
    """As cameras and microscopes write them; Pillow reads them and does not write them."""
    pairs = np.round(RAMP * 4095).astype(int).reshape(-1, 2).tolist()
    packed = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs)
    tags = [(256, 3, 32), (257, 3, 32), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 122), (277, 3, 1)]
    tags += [(278, 3, 32), (279, 4, len(packed))]
    entries = b"".join(struct.pack("<HHI", tag, kind, 1) + struct.pack("<I", value) for tag, kind, value in tags)
    data = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0)
    decoded = np.asarray(decode_image(data + packed))[..., 0].astype(int)
    assert len(data) == 122 and np.abs(decoded - GREY).max() <= 1


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (RAMP.astype(np.float32) * 300, "got mode F, floats in 0..300"),
        (np.where(RAMP > 0.5, np.nan, RAMP).astype(np.float32), "got mode F, floats in nan..nan"),
        ((RAMP * 40000).astype(np.int32), "got mode I, integers in 0..40000"),
    ],
)
def test_samples_that_nothing_says_how_to_scale_are_refused_by_their_mode(samples, message):
    with pytest.raises(DataError, match="expected samples of 8 or 16 bits, or floats in 0..1, " + message):
        decode_image(encode(Image.fromarray(samples), "TIFF"))
