"""The tokens file: one format for all commands, older ones still read, and the way back to images in Python."""

import numpy as np
import pytest
import torch
from PIL import Image

from modeling.tokenizers import load_tokenizer
from scripts import inference_tokenizer
from tests.generator_data import call
from utils.errors import UserError
from utils.paths import ROOT
from utils.tokens import read_labels, read_tokens, write_tokens

TOKENS = np.arange(6).reshape(3, 2)


def test_what_was_written_is_read(tmp_path):
    write_tokens(tmp_path / "a.npz", TOKENS.astype(np.int32), ["a", "b", "ü"], tokenizer="mine", seed=3)
    saved = read_tokens(tmp_path / "a.npz")
    assert np.array_equal(saved.tokens, TOKENS) and saved.tokens.dtype == np.int64
    assert (saved.keys, saved.labels, saved.about) == (["a", "b", "ü"], None, {"tokenizer": "mine", "seed": 3})
    write_tokens(tmp_path / "b.npz", TOKENS, list("abc"), labels=np.array([2, -1, 0]), samples=np.zeros(3, int))
    assert read_tokens(tmp_path / "b.npz").labels.tolist() == [2, -1, 0]


def test_the_same_tokens_are_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_tokens(tmp_path / f"{name}.npz", TOKENS, list("abc"), tokenizer="mine")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_files_of_before_are_read(tmp_path):
    """As the three commands wrote them up to 2179dca."""
    np.savez_compressed(tmp_path / "tokenizer.npz", tokens=TOKENS, keys=np.array(["bag", "coat", "coat-2"]))
    np.savez(tmp_path / "reconstruct.npz", tokens=TOKENS.astype(np.int32), keys=np.array(["0", "1", "2"]))
    labels, samples = np.array([0, 0, 9]), np.array([0, 1, 0])
    np.savez(tmp_path / "generator.npz", tokens=TOKENS, labels=labels, samples=samples)
    found = {name: read_tokens(tmp_path / f"{name}.npz") for name in ("tokenizer", "reconstruct", "generator")}
    assert all(np.array_equal(saved.tokens, TOKENS) and saved.about == {} for saved in found.values())
    assert found["tokenizer"].keys == ["bag", "coat", "coat-2"] and found["tokenizer"].labels is None
    assert found["reconstruct"].keys == ["0", "1", "2"]
    assert found["generator"].keys == ["0/0", "0/1", "9/0"] and found["generator"].labels.tolist() == [0, 0, 9]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"keys": list("abc")}, "must hold `tokens` and `keys`"),
        ({"tokens": TOKENS}, "must hold `tokens` and `keys`"),
        ({"tokens": TOKENS, "labels": 3, "samples": np.arange(3)}, "must hold `tokens` and `keys`"),
        ({"tokens": TOKENS, "keys": list("ab")}, "integer tokens (n, N) and n keys"),
        ({"tokens": TOKENS, "keys": "a"}, "integer tokens (n, N) and n keys"),
        ({"tokens": TOKENS / 2, "keys": list("abc")}, "of float64"),
        ({"tokens": TOKENS[0], "keys": list("ab")}, "got (2,)"),
        ({"tokens": TOKENS[:0], "keys": []}, "got (0, 2)"),
        ({"tokens": TOKENS, "keys": list("abc"), "labels": [1, 2]}, "must hold 3 integers"),
        ({"tokens": TOKENS, "keys": list("abc"), "about": "{"}, "cannot be read as such"),
        ({"tokens": TOKENS, "keys": list("abc"), "about": "[1]"}, "`about` is no JSON object"),
    ],
)
def test_what_is_no_tokens_file_is_refused_in_one_sentence(tmp_path, arrays, message):
    np.savez(tmp_path / "tokens.npz", **arrays)
    with pytest.raises(UserError) as error:
        read_tokens(tmp_path / "tokens.npz")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_is_no_file_of_arrays_is_named_once_and_without_advice_to_unpickle_it(tmp_path):
    (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n")
    for read in (read_tokens, lambda path: read_labels(path, 1)):
        for path, reason in ((tmp_path / "image.png", "it is no file of arrays"), (tmp_path, "Is a directory")):
            with pytest.raises(UserError) as error:
                read(path)
            text = str(error.value)
            assert text.startswith(f"{path} must hold") and text.count(str(path)) == 1
            assert f"({reason})" in text and "make it with" in text


def test_three_lines_lead_back_to_images(tmp_path, monkeypatch):
    """Those of the docstring of utils/tokens.py."""
    flags = ("--image", ROOT / "assets/fashion/bag.png", "--lengths", 8, "--device", "cpu", "--output_dir", tmp_path)
    call(monkeypatch, inference_tokenizer.main, *flags)

    saved = read_tokens(tmp_path / "tokens.npz")
    tokenizer, _ = load_tokenizer(checkpoint=saved.about["tokenizer"])
    images = tokenizer.decode_tokens(torch.from_numpy(saved.tokens), length=8).clamp(0, 1)

    written = torch.from_numpy(np.array(Image.open(tmp_path / "bag_8.png"))).permute(2, 0, 1)
    assert images.shape == (1, 3, 32, 32) and (images[0] * 255 - written).abs().max() <= 1
