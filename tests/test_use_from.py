"""docs/use_from.md: its lines run as they stand."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from utils.paths import ROOT

PAGE = (ROOT / "docs/use_from.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"^\*\*([\w. ]+)\*\*.*?^```\w+\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))


@pytest.fixture(autouse=True)
def copy(tmp_path, monkeypatch):
    """A folder that looks like the repository and keeps what is written."""
    for path in ROOT.iterdir():
        if path.name[0] != "." and path.name != "output":
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_python(name, **known):
    """What the lines leave behind, run with the imports that go without saying."""
    names = {"Image": Image, "numpy": np, "torch": torch} | known
    exec(compile(BLOCKS[name], f"docs/use_from.md, {name}", "exec"), names)
    return names


def run(*words):
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def pixels():
    from data.transforms import EvalTransform

    with Image.open("assets/emoji/pizza.png") as image:
        return EvalTransform(32)(image.convert("RGB"))[None] / 255


def test_every_place_has_three_lines():
    assert list(BLOCKS) == ["Python", "torch.hub", "Pillow", "Command line", "ONNX", "Browser"]
    assert {len(list(filter(None, block.splitlines()))) for block in BLOCKS.values()} == {3}


def test_python_and_pillow_and_the_command_line_write_and_read_the_same():
    names = run_python("Python")
    expected = np.asarray(Image.open("pizza.png"))
    assert expected.shape == (64, 64, 3) and len(names["data"]) < 40
    run_python("Pillow")
    np.testing.assert_array_equal(np.asarray(Image.open("pizza.png")), expected)
    assert Path("pizza.1dp").read_bytes() == names["data"]
    Path("pizza.1dp").unlink()
    Path("pizza.png").unlink()
    printed = [run(*[sys.executable, *shlex.split(line)[1:]]) for line in BLOCKS["Command line"].splitlines()]
    assert "one-d-piece_emoji" in printed[1]
    np.testing.assert_array_equal(np.asarray(Image.open("pizza.png")), expected)


def test_torch_hub_gives_the_tokenizer():
    with torch.no_grad():
        names = run_python("torch.hub", pixels=pixels())
    assert names["tokens"].shape == (1, 1, 32) and names["image"].shape == (1, 3, 32, 32)


@pytest.mark.long
def test_onnx_gives_the_same_as_torch():
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    (command,) = re.findall(r"`(python3 scripts/export_onnx.py [^`]+)`", PAGE)
    run(sys.executable, *shlex.split(command)[1:])
    with torch.no_grad():
        expected = run_python("torch.hub", pixels=pixels())
    names = run_python("ONNX", onnxruntime=onnxruntime, pixels=pixels())
    np.testing.assert_array_equal(names["tokens"], expected["tokens"][:, 0])
    np.testing.assert_allclose(names["image"], expected["image"].clamp(0, 1), atol=1 / 255)


def test_the_pages_are_there():
    make, serve, demo = BLOCKS["Browser"].splitlines()
    run(*shlex.split(make))
    folder = serve.partition("--directory ")[2].split()[0]
    assert Path(folder, "index.html").read_text().lower().startswith("<!doctype html>")
    assert "--port" in run(sys.executable, *shlex.split(demo)[1:], "--help")
