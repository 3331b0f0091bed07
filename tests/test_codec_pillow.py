"""Pillow opens and saves .1dp files after `import codec.pillow`."""

import copy
import io
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError

import codec.pillow
from codec.bitstream import FormatError
from codec.files import compress, load_codec
from tests.codec_images import SIDE, photo, save_codec
from utils.errors import UserError
from utils.paths import ROOT


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_codec(checkpoint=str(save_codec(tmp_path_factory.mktemp("codec") / "model")))


@pytest.fixture
def known(model, monkeypatch):
    monkeypatch.setattr(codec.pillow, "_codecs", {})
    codec.pillow.use(model)


def test_images_are_saved_and_opened(model, known, tmp_path):
    photo(SIDE, SIDE).save(tmp_path / "one.1dp", model=model, tokens=3)
    with Image.open(tmp_path / "one.1dp") as image:
        assert (image.format, image.size, image.mode) == ("1DP", (SIDE, SIDE), "RGB")
        assert image.info == {"tokens": image.info["tokens"], "model": model.name} and image.info["tokens"] <= 3
        pixels = np.asarray(image)
    (expected,) = model.decompress([(tmp_path / "one.1dp").read_bytes()])
    assert np.array_equal(pixels, np.asarray(expected))


def test_a_number_of_tokens_that_is_none_is_one_sentence(model, known, tmp_path):
    with pytest.raises(UserError, match="tokens must be a number, 1 or more, got 'x'"):
        photo(SIDE, SIDE).save(tmp_path / "one.1dp", model=model, tokens="x")


def test_the_size_is_that_of_the_original(model, known):
    for fit, size in (("tile", (40, 23)), ("pad", (40, 23)), ("crop", (23, 23))):
        image = Image.open(io.BytesIO(compress(photo(40, 23), model, fit=fit)))
        assert image.size == size == image.copy().size
        assert image.resize((5, 5)).size == (5, 5)


def test_a_file_opened_by_its_name_is_closed_once_it_is_read(model, known, tmp_path):
    photo(SIDE, SIDE).save(tmp_path / "one.1dp", model=model, tokens=3)
    image = Image.open(tmp_path / "one.1dp")
    file = image.fp
    image.load()
    assert file.closed and image.getpixel((0, 0)) == image.copy().getpixel((0, 0))
    with open(tmp_path / "one.1dp", "rb") as file:
        Image.open(file).load()
        assert not file.closed


def test_an_opened_image_can_be_pickled_and_copied(model, known):
    image = Image.open(io.BytesIO(compress(photo(SIDE, SIDE), model)))
    for again in (pickle.loads(pickle.dumps(image)), copy.deepcopy(image)):
        assert np.array_equal(np.asarray(again), np.asarray(image))


def test_opening_decodes_nothing(model, known, monkeypatch):
    file = compress(photo(SIDE, SIDE), model)
    monkeypatch.setattr(type(model), "decompress", None)
    image = Image.open(io.BytesIO(file))
    assert image.size == (SIDE, SIDE)
    with pytest.raises(TypeError):
        image.load()


def test_a_bundled_model_is_found_and_opening_needs_no_torch(tmp_path):
    path = tmp_path / "bag.1dp"
    path.write_bytes(compress(Image.open(ROOT / "assets/fashion/bag.png"), tokens=2))
    code = f"""
import sys
import codec.pillow
from PIL import Image
image = Image.open({str(path)!r})
assert image.size == (32, 32) and image.info["model"] == "one-d-piece_fashion", image.info
assert "torch" not in sys.modules
image.load()
assert image.getpixel((0, 0)) is not None
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_files_of_unknown_models_say_how_to_open_them(model, monkeypatch):
    monkeypatch.setattr(codec.pillow, "_codecs", {})
    with pytest.raises(FormatError, match="unknown tokenizer .* give it to codec.pillow.use"):
        Image.open(io.BytesIO(compress(photo(SIDE, SIDE), model)))


def test_damaged_files_are_errors(model, known):
    file = bytearray(compress(photo(SIDE, SIDE), model))
    file[-1] ^= 1
    with pytest.raises(FormatError, match="damaged"):
        Image.open(io.BytesIO(bytes(file)))
    with pytest.raises(UnidentifiedImageError):
        Image.open(io.BytesIO(b"\x1d\x00 something else"))


def test_an_image_without_sense_is_not_saved(model, known, tmp_path):
    with pytest.raises(ValueError, match="--tokens and --psnr were given"):
        photo(SIDE, SIDE).save(tmp_path / "one.1dp", model=model, tokens=3, psnr=20.0)
