"""Checkpoints are found wherever they may be: folders, files, training outputs, the hub; errors are one sentence."""

import json
import os
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch
from huggingface_hub import constants, errors

from modeling.checkpoints import WeightsError, published
from modeling.checkpoints import locate as locating
from modeling.checkpoints.locate import locate, locate_configured
from modeling.checkpoints.published import BUNDLED
from modeling.one_d_piece import OneDPiece
from tests.checkpoint_data import Toy, same, toy
from utils.config import ConfigError, load_config
from utils.paths import ROOT

REPOSITORY = "turing-motors/One-D-Piece-S-256"


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """An empty hub cache and no hub."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cache(hub, repository, write):
    """A repository as huggingface_hub's cache keeps it, with the files that `write(folder)` makes."""
    folder = hub / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("0" * 40)
    write(snapshot)


def test_final_weights_win_over_checkpoints_and_the_newest_checkpoint_gives_its_ema(tmp_path):
    for step in (5, 10, 9):
        toy(seed=step).save_pretrained(tmp_path / f"checkpoint-{step}/ema_model")
        toy(seed=100 + step).save_pretrained(tmp_path / f"checkpoint-{step}/unwrapped_model")
    toy(seed=99).save_pretrained(tmp_path / ".checkpoint-11.part/ema_model")
    assert same(Toy.from_pretrained(tmp_path), toy(seed=10))
    assert same(Toy.from_pretrained(tmp_path / "checkpoint-5"), toy(seed=5))
    assert same(Toy.from_pretrained(tmp_path / "checkpoint-5/unwrapped_model"), toy(seed=105))
    toy(seed=1).save_pretrained(tmp_path)
    assert same(Toy.from_pretrained(tmp_path), toy(seed=1))


def test_without_ema_the_trained_weights_are_taken(tmp_path):
    toy(seed=4).save_pretrained(tmp_path / "checkpoint-4/unwrapped_model")
    assert same(Toy.from_pretrained(tmp_path), toy(seed=4))


def test_a_checkpoint_without_config_takes_that_of_its_run(tmp_path):
    toy(seed=4).save_pretrained(tmp_path / "checkpoint-4/ema_model")
    (tmp_path / "checkpoint-4/ema_model/config.json").unlink()
    (tmp_path / "config.yaml").write_text("model: {width: 3}\n")
    assert same(Toy.from_pretrained(tmp_path / "checkpoint-4"), toy(seed=4))


def test_a_step_number_is_a_checkpoint_of_the_output_folder(tmp_path):
    toy(seed=4).save_pretrained(tmp_path / "checkpoint-4/ema_model")
    assert same(Toy.from_pretrained(locate("4", output_dir=tmp_path)), toy(seed=4))
    with pytest.raises(WeightsError, match=r"no checkpoint of step 7 .* the steps there are: 4$"):
        locate("7", output_dir=tmp_path)
    with pytest.raises(WeightsError, match="needs the output folder of a run"):
        locate("7")


@pytest.mark.parametrize("name", ["weights.bin", "weights.pt", "weights.safetensors"])
def test_a_loose_file_takes_the_config_beside_it_or_the_given_one(tmp_path, name):
    save = safetensors.torch.save_file if name.endswith("safetensors") else torch.save
    save(toy().state_dict(), tmp_path / name)
    with pytest.raises(WeightsError, match=r"has no config.json beside it: give the configuration"):
        Toy.from_pretrained(tmp_path / name)
    assert same(Toy.from_pretrained(tmp_path / name, config={"model": {"width": 3}}), toy())
    (tmp_path / "config.json").write_text('{"model": {"width": 3}}')
    assert same(Toy.from_pretrained(str(tmp_path / name)), toy())


@pytest.mark.parametrize("source", ["no_such_name", "./no/folder", "folder/weights.bin", "/no/such/folder", "a/b/c"])
def test_what_is_nowhere_says_where_it_was_looked_for(source):
    with pytest.raises(
        WeightsError, match=f"no checkpoint {source}: it is no file or folder here .*one-d-piece_fashion"
    ):
        locate(source)


def test_an_empty_name_is_not_the_working_directory():
    with pytest.raises(WeightsError, match="no checkpoint given"):
        locate("")


def test_a_folder_without_weights_says_what_was_expected(tmp_path):
    with pytest.raises(WeightsError, match=r"no weights in .*: expected model.safetensors or pytorch_model.bin"):
        locate(tmp_path)


def test_a_damaged_config_is_named(tmp_path):
    toy().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model": ')
    with pytest.raises(WeightsError, match=r"config.json is not valid JSON"):
        Toy.from_pretrained(tmp_path)


def test_a_configuration_that_is_no_models_is_one_sentence():
    with pytest.raises(ConfigError, match="no experiment.output_dir, which is read here: give one of a whole model"):
        locate_configured(load_config(ROOT / "configs/data/emoji.yaml"))


def test_every_published_checkpoint_has_a_configuration():
    for path in [*published.PUBLISHED.values(), *published.TITOK_FILES.values()]:
        assert "model" in load_config(ROOT / path)


def test_a_published_loose_file_gets_its_configuration_by_name(tmp_path):
    torch.save({}, tmp_path / "tokenizer_titok_l32.bin")
    assert locate(tmp_path / "tokenizer_titok_l32.bin").config["model"]["vq_model"]["num_latent_tokens"] == 32


def test_a_bundled_model_is_called_by_its_name_and_another_by_its_path(tmp_path):
    assert locate("one-d-piece_fashion").name == locate(BUNDLED["one-d-piece_fashion"]).name == "one-d-piece_fashion"
    toy().save_pretrained(tmp_path)
    assert locate(tmp_path).name == str(tmp_path)


def test_a_training_output_that_is_not_there_is_not_looked_up_on_the_hub(monkeypatch):
    monkeypatch.setattr("modeling.checkpoints.locate._on_hub", lambda *arguments: pytest.fail("asked the hub"))
    with pytest.raises(WeightsError, match="no training output checkpoints/nothing here"):
        locate("checkpoints/nothing")


def test_a_cached_repository_is_used_offline(offline):
    cache(offline, "owner/toy", toy().save_pretrained)
    assert same(Toy.from_pretrained("owner/toy"), toy())


def test_a_cached_published_repository_gets_its_config_from_this_project(offline):
    cache(offline, REPOSITORY, lambda folder: torch.save(toy().state_dict(), folder / "pytorch_model.bin"))
    located = locate(REPOSITORY)
    assert located.weights.name == "pytorch_model.bin"
    assert located.config["model"]["vq_model"]["vit_enc_model_size"] == "small"


def test_a_cached_titok_file_is_found_by_its_name(offline):
    name = "maskgit-vqgan-imagenet-f16-256.bin"
    cache(offline, "fun-research/TiTok", lambda folder: torch.save(toy().state_dict(), folder / name))
    located = locate(name)
    assert (located.weights.name, located.config["model"]["type"]) == (name, "pixel_vqgan")


def test_a_whole_training_config_as_config_json_is_read_leniently(offline):
    def write(folder):
        toy().save_pretrained(folder)
        config = {"experiment": {"unknown": 1}, "model": {"width": 3, "other": [1, 2]}, "losses": {"x": None}}
        (folder / "config.json").write_text(json.dumps(config))

    cache(offline, "owner/toy", write)
    assert Toy.from_pretrained("owner/toy").config.experiment.unknown == 1


def test_offline_without_a_cached_copy_is_one_sentence(offline):
    with pytest.raises(
        WeightsError, match=f"{REPOSITORY} could not be fetched from the hub .*offline.*not in its cache"
    ):
        OneDPiece.from_pretrained(REPOSITORY)


def test_the_offline_variable_is_honoured_in_a_fresh_process(tmp_path):
    cache(tmp_path / "hub", "owner/toy", toy().save_pretrained)
    code = """
from modeling.checkpoints.locate import locate, locate_configured
from modeling.checkpoints import WeightsError
print(locate("owner/toy").config)
try:
    locate("owner/other")
except WeightsError as error:
    print(error)
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    config, error = done.stdout.splitlines()
    assert config == "{'model': {'width': 3}}"
    assert "of owner/other could not be fetched from the hub" in error


def test_an_unreachable_hub_fails_quickly(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    api = locating.HfApi(endpoint="http://127.0.0.1:9")
    monkeypatch.setattr(locating, "HfApi", lambda: api)
    start = time.monotonic()
    with pytest.raises(WeightsError, match="could not be fetched from the hub .*connect to the network"):
        locate(REPOSITORY)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("failure", "words"),
    [(errors.RepositoryNotFoundError, "no such repository"), (errors.GatedRepoError, "gated: accept its terms")],
)
def test_a_repository_that_is_closed_or_missing_says_so(monkeypatch, failure, words):
    class Api:
        def model_info(self, *args, **kwargs):
            raise failure.__new__(failure)

    monkeypatch.setattr(locating, "HfApi", Api)
    with pytest.raises(WeightsError, match=words):
        locate("owner/name")
