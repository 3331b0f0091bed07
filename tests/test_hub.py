"""hubconf.py: what torch.hub gives, from this folder and without a network."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hubconf
from modeling.checkpoints import WeightsError
from modeling.maskgit import ImageBert
from modeling.one_d_piece import OneDPiece
from utils.paths import ROOT


def load(*arguments, **options):
    return torch.hub.load(str(ROOT), *arguments, source="local", **options)


@pytest.mark.parametrize(
    ("entry", "kind", "name"),
    [
        ("one_d_piece", OneDPiece, "one-d-piece_fashion"),
        ("one_d_piece", OneDPiece, "one-d-piece_emoji"),
        ("maskgit", ImageBert, "maskgit_fashion"),
        ("maskgit", ImageBert, "maskgit_emoji"),
    ],
)
def test_the_hub_gives_the_bundled_models(entry, kind, name):
    model, expected = load(entry, name), kind.from_pretrained(name)
    assert type(model) is kind and not model.training and model.config == expected.config
    state = expected.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("entry", "repository"),
    [("one_d_piece", "turing-motors/One-D-Piece-S-256"), ("maskgit", "turing-motors/MaskGIT_One-D-Piece-S-256")],
)
def test_a_size_means_the_published_model(monkeypatch, entry, repository):
    def on_hub(name, *arguments):
        raise WeightsError(f"asked for {name}")

    monkeypatch.setattr("modeling.checkpoints.locate._on_hub", on_hub)
    with pytest.raises(WeightsError, match=f"asked for {repository}$"):
        load(entry, "S-256")


def test_an_unknown_name_is_one_sentence():
    with pytest.raises(WeightsError, match="no checkpoint XXL: it is no file or folder here .*one-d-piece_fashion"):
        load("one_d_piece", "XXL")


@pytest.mark.parametrize(
    ("entry", "name", "complaint"),
    [
        ("one_d_piece", "maskgit_fashion", "maskgit_fashion is a generator; give a tokenizer"),
        ("one_d_piece", "pixel_vqgan_fashion", "pixel_vqgan_fashion is a teacher; give a tokenizer"),
        ("maskgit", "one-d-piece_fashion", "one-d-piece_fashion is a tokenizer; give a generator"),
        ("one_d_piece", "one-d-piece_fashon", "did you mean one-d-piece_fashion[?]"),
        ("one_d_piece", None, "no checkpoint given"),
    ],
)
def test_a_model_of_another_kind_is_one_sentence(entry, name, complaint):
    with pytest.raises(WeightsError, match=complaint):
        load(entry, name)


def test_every_entry_is_described():
    # What torch.hub.list shows, which takes no folder.
    entries = {name for name, value in vars(hubconf).items() if callable(value) and not name.startswith("_")}
    assert entries == {"one_d_piece", "maskgit"} and all("name:" in getattr(hubconf, name).__doc__ for name in entries)


def test_the_dependencies_are_what_the_models_import():
    code = f"""
import sys, torch
torch.hub.load({str(ROOT)!r}, "maskgit", source="local")
print(*(file for module in list(sys.modules.values()) if (file := getattr(module, "__file__", None))), sep="\\n")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    needed = set()
    for path in map(Path, done.stdout.splitlines()):
        if path.parts[: len(ROOT.parts) + 1] in ((*ROOT.parts, "modeling"), (*ROOT.parts, "utils")):
            needed |= set(top_level_imports(path))
    assert needed - set(sys.stdlib_module_names) - {"modeling", "utils"} == set(hubconf.dependencies)


def top_level_imports(path):
    for node in ast.parse(path.read_text()).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module]
        yield from (name.partition(".")[0] for name in names)


@pytest.mark.parametrize("content", ["", "VALUE = 1"])
def test_another_project_s_utils_is_named(tmp_path, content):
    (tmp_path / "utils.py").write_text(content)
    code = f'import utils, torch; torch.hub.load({str(ROOT)!r}, "one_d_piece", source="local")'
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: Python finds {tmp_path / 'utils.py'} instead of One-D-Piece's package utils")
