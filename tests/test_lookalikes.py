"""Small look-alikes of every published repository load by name from an offline cache of the hub, and from a folder."""

import json
import re

import pytest
import safetensors.torch
import torch
from omegaconf import OmegaConf

from modeling.checkpoints import locate as locating
from modeling.checkpoints.published import PUBLISHED, TITOK_FILES, TITOK_REPOSITORY
from modeling.checkpoints.registry import model_class
from modeling.generators import load_generator
from modeling.modules.vit import VIT_SIZES, ViTSize
from modeling.tokenizers import load_tokenizer
from tests.checkpoint_data import same
from tests.test_checkpoints_locate import cache, offline  # noqa: F401
from utils.config import load_config, save_config, to_plain
from utils.paths import ROOT

TABLE = dict(re.findall(r"\| `([\w-]+/[\w-]+)` \| `(configs/eval/.*?)` \|", (ROOT / "README.md").read_text()))
TITOK_GENERATORS = {
    f"yucornetto/generator_titok_{size}_imagenet": f"configs/training/generator/maskgit_titok_{size}.yaml"
    for size in ("s128", "b64", "l32")
}
REPOSITORIES = TABLE | PUBLISHED | TITOK_GENERATORS
SMALL = {
    "model.pixel_vqgan.channels": 32,
    "model.pixel_vqgan.codebook_size": 16,
    "model.pixel_vqgan.latent_channels": 8,
    "model.generator.hidden_size": 32,
    "model.generator.num_hidden_layers": 2,
    "model.generator.num_attention_heads": 2,
    "model.generator.intermediate_size": 64,
}


def test_the_tables_rows_are_six():
    assert len(TABLE) == 6


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The published configurations made small: {what their weights are called: a file}."""
    files, folder = {}, tmp_path_factory.mktemp("small")
    for number, (name, file) in enumerate((REPOSITORIES | TITOK_FILES).items()):
        config = load_config(ROOT / file)
        for key, value in SMALL.items():
            if OmegaConf.select(config, key.rpartition(".")[0]) is not None:
                OmegaConf.update(config, key, value)
        files[name] = folder / f"{number}.yaml"
        save_config(config, files[name])
    return files


@pytest.fixture
def small(monkeypatch, files):
    """Networks of some thousand weights under the published names, with these files for configurations."""
    for number, size in enumerate(("small", "base", "large"), start=1):
        monkeypatch.setitem(VIT_SIZES, size, ViTSize(width=32 * number, num_layers=1, num_heads=2))
    for table in (PUBLISHED, TITOK_FILES):
        for name in table:
            monkeypatch.setitem(table, name, str(files[name]))
    return files


def build(path):
    config = load_config(path)
    torch.manual_seed(0)
    return model_class(config)(config).eval()


def writer(name, model, is_pickle):
    """Writes a repository as it is published: the weights, and of TiTok's own also one configuration of all."""

    def write(folder):
        state = {key: value.contiguous() for key, value in model.state_dict().items()}
        if is_pickle:
            torch.save(state, folder / "pytorch_model.bin")
        else:
            safetensors.torch.save_file(state, folder / "model.safetensors")
        if name.startswith("yucornetto/"):
            config = to_plain(model.config)
            del config["model"]["type"]
            config["model"].setdefault("generator", {"hidden_size": 32, "num_attention_heads": 2})
            kept = {key: config[key] for key in ("model", "dataset")}
            (folder / "config.json").write_text(json.dumps(kept))

    return write


def loaded(model, config=None, checkpoint=None):
    load = load_generator if hasattr(model, "generate") else load_tokenizer
    return load(config, checkpoint)[0]


@pytest.mark.parametrize("is_pickle", [False, True])
@pytest.mark.parametrize("name", REPOSITORIES)
def test_a_published_repository_loads_by_its_name_and_from_a_folder(small, offline, tmp_path, name, is_pickle):  # noqa: F811
    model = build(small[name])
    write = writer(name, model, is_pickle)
    cache(offline, name, write)
    assert same(loaded(model, checkpoint=name), model)
    folder = tmp_path / "here" / name.rpartition("/")[2]
    folder.mkdir(parents=True)
    write(folder)
    assert same(loaded(model, checkpoint=folder), model)
    assert same(loaded(model, config=small[name], checkpoint=folder), model)
    if name in PUBLISHED:
        assert same(loaded(model, config=small[name]), model)  # the configuration alone means the published model


@pytest.mark.parametrize("name", TITOK_FILES)
def test_a_published_file_of_titok_loads_by_its_name_and_from_a_folder(small, offline, tmp_path, name):  # noqa: F811
    model = build(small[name])
    cache(offline, TITOK_REPOSITORY, lambda folder: torch.save(model.state_dict(), folder / name))
    torch.save(model.state_dict(), tmp_path / name)
    for source in (name, tmp_path / name):
        found = locating.locate(source)
        assert same(type(model).from_pretrained(found), model)
        if "vqgan" not in name:
            assert same(loaded(model, checkpoint=source), model)
