"""A tokenizer as ONNX gives the tokens and images that PyTorch gives, at every length and batch size."""

import json

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper

from modeling.one_d_piece import OneDPiece
from modeling.onnx import OnnxTokenizer, as_halved, differences, halve, write_onnx
from modeling.titok import TiTok
from scripts import export_onnx
from tests.test_tokenizer import tiny_config
from utils.config import load_config
from utils.errors import UserError
from utils.paths import ROOT


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The bundled tokenizer and its two graphs."""
    tokenizer = OneDPiece.from_pretrained("one-d-piece_fashion")
    return tokenizer, OnnxTokenizer(write_onnx(tokenizer, tmp_path_factory.mktemp("onnx")))


@pytest.mark.parametrize("batch", [1, 3])
def test_every_length_and_batch_size_gives_what_pytorch_gives(exported, batch):
    tokenizer, onnx = exported
    pixels = torch.rand(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    found = dict(differences(tokenizer, onnx, pixels, range(1, 33)))
    assert len(found) == 32 and max(found.values()) < 0.01


def test_tokens_behind_the_length_do_not_matter(exported):
    _, onnx = exported
    tokens = np.random.default_rng(0).integers(0, 1024, (1, 32))
    other = tokens.copy()
    other[:, 5:] = 7
    assert np.array_equal(onnx.decode(tokens, 5), onnx.decode(other, 5))
    assert not np.array_equal(onnx.decode(tokens, 6), onnx.decode(other, 6))


def random_tokenizer(kind, **values):
    torch.manual_seed(0)
    return kind(tiny_config(**values)).eval()


def test_half_precision_stores_what_rounded_weights_give(tmp_path):
    tokenizer = random_tokenizer(OneDPiece)
    paths = write_onnx(tokenizer, tmp_path, halved=True)
    stored = sum(value.numel() for value in tokenizer.state_dict().values()) * 2
    assert sum(path.stat().st_size for path in paths.values()) < 1.5 * stored
    as_halved(tokenizer)
    pixels = torch.rand(3, 3, tokenizer.image_size, tokenizer.image_size)
    assert all(difference < 0.1 for _, difference in differences(tokenizer, OnnxTokenizer(paths), pixels, [1, 8]))


def test_weights_that_half_precision_cannot_hold_are_refused():
    tensor = numpy_helper.from_array(np.full((32, 32), 1e5, np.float32), "large")
    with pytest.raises(UserError, match="the weights large do not fit float16"):
        halve(helper.make_model(helper.make_graph([], "graph", [], [], initializer=[tensor])))


def test_the_command_writes_files_that_load_without_this_project(tmp_path, monkeypatch, capsys):
    random_tokenizer(OneDPiece).save_pretrained(tmp_path / "model")
    arguments = ["--checkpoint", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out"), "--precision", "fp32"]
    monkeypatch.setattr("sys.argv", ["export_onnx.py", *arguments])
    export_onnx.main()
    assert "tokens equal to PyTorch's" in capsys.readouterr().out
    facts = json.loads((tmp_path / "out/model.json").read_text())
    session = onnxruntime.InferenceSession(tmp_path / "out/encoder.onnx")
    size = facts["image_size"]
    tokens = session.run(None, {"pixels": np.zeros((1, 3, size, size), np.float32)})[0]
    assert tokens.shape == (1, facts["num_tokens"]) and tokens.dtype == np.int64


@pytest.mark.parametrize("name", ["model.json", "encoder.onnx", "decoder_fp16.onnx"])
def test_the_command_replaces_nobody_else_s_file(tmp_path, monkeypatch, name):
    (tmp_path / name).write_text("mine")
    monkeypatch.setattr("sys.argv", ["export_onnx.py", "--output_dir", str(tmp_path)])
    with pytest.raises(UserError, match=f"holds {name}, and no command of ours has left it there"):
        export_onnx.main()
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.long
@pytest.mark.parametrize("name", ["one-d-piece_s256", "titok_b64"])
def test_published_configurations_are_exported(tmp_path, name):
    torch.manual_seed(0)
    config = load_config(ROOT / f"configs/eval/{name}.yaml")
    tokenizer = (OneDPiece if "piece" in name else TiTok)(config).eval()
    onnx = OnnxTokenizer(write_onnx(tokenizer, tmp_path))
    lengths = [64] if "titok" in name else [1, 100, 256]
    assert all(difference < 1 for _, difference in differences(tokenizer, onnx, torch.rand(1, 3, 256, 256), lengths))
