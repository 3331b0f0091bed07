"""Checkpoints: found wherever they may be, read without running code, loaded strictly, explained when they fail."""

import json
import os
import pickle
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch
from huggingface_hub import constants, errors
from omegaconf import OmegaConf
from torch import nn

from modeling.checkpoints import WeightsError, published
from modeling.checkpoints import locate as locating
from modeling.checkpoints.locate import locate
from modeling.checkpoints.pretrained import Pretrained
from modeling.checkpoints.published import BUNDLED
from modeling.checkpoints.state import load_strict, read_state_dict
from modeling.one_d_piece import OneDPiece
from modeling.pixel_vqgan import PixelVQGAN, load_teacher
from modeling.tasks.tokenizer import stage1_start, stage2_start
from modeling.titok import TiTok
from utils.config import load_config
from utils.paths import ROOT

REPOSITORY = "turing-motors/One-D-Piece-S-256"


class Toy(Pretrained, nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = OmegaConf.create(config)
        self.inner = nn.Linear(self.config.model.width, 2)

    def forward(self, x):
        return self.inner(x)


class CodeRunner:
    """A pickled one creates a file when it is loaded carelessly."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def toy(width=3, seed=0):
    torch.manual_seed(seed)
    return Toy({"model": {"width": width}})


def tokenizer_config(**vq_model):
    return {
        "model": {
            "type": "one_d_piece",
            "vq_model": {
                "codebook_size": 32,
                "token_size": 4,
                "vit_enc_model_size": "tiny",
                "vit_dec_model_size": "tiny",
                "vit_enc_patch_size": 4,
                "vit_dec_patch_size": 4,
                "num_latent_tokens": 4,
                "finetune_decoder": True,
                **vq_model,
            },
            "pixel_vqgan": {
                "channels": 32,
                "channel_multipliers": [1, 1, 1],
                "num_res_blocks": 1,
                "latent_channels": 8,
                "codebook_size": 16,
            },
        },
        "dataset": {"preprocessing": {"crop_size": 16}},
    }


def teacher():
    config = tokenizer_config()
    config["model"]["type"] = "pixel_vqgan"
    return PixelVQGAN(config)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


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


# Saving and loading back


def test_a_saved_model_comes_back_with_identical_outputs(tmp_path):
    model = OneDPiece(tokenizer_config()).eval()
    model.save_pretrained(tmp_path / "deep/model")
    again = OneDPiece.from_pretrained(tmp_path / "deep/model")
    pixels = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(model(pixels)[0], again(pixels)[0])
    assert not again.training
    assert sorted(path.name for path in (tmp_path / "deep/model").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["model"]


def test_the_saved_config_is_resolved(tmp_path):
    Toy({"size": 5, "model": {"width": "${size}"}}).save_pretrained(tmp_path / "m")
    assert json.loads((tmp_path / "m/config.json").read_text()) == {"size": 5, "model": {"width": 5}}


def test_the_card_names_licence_and_class(tmp_path):
    toy().save_pretrained(tmp_path / "m", card="Trained on *toys*.")
    card = (tmp_path / "m/README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    assert "pipeline_tag: image-to-image" in card
    assert "- image-tokenization" in card
    assert "Trained on *toys*." in card
    assert 'Toy.from_pretrained("m")' in card


def test_saving_into_a_training_output_keeps_its_other_files(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}")
    toy(seed=1).save_pretrained(tmp_path)
    toy(seed=2).save_pretrained(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == "{}"
    assert same(Toy.from_pretrained(tmp_path), toy(seed=2))


def test_a_save_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        toy().save_pretrained(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_weights_stored_in_half_precision_load_into_float32(tmp_path):
    model = toy()
    model.save_pretrained(tmp_path / "m", dtype=torch.float16)
    assert safetensors.torch.load_file(tmp_path / "m/model.safetensors")["inner.weight"].dtype == torch.float16
    again = Toy.from_pretrained(tmp_path / "m")
    assert again.inner.weight.dtype == torch.float32
    assert torch.equal(again.inner.weight, model.inner.weight.half().float())


def test_views_and_tied_weights_are_saved(tmp_path):
    model = toy(width=2)
    model.inner.weight.data = model.inner.weight.data.T
    model.tied = nn.Linear(2, 2)
    model.tied.weight = model.inner.weight
    model.save_pretrained(tmp_path / "m")
    stored = safetensors.torch.load_file(tmp_path / "m/model.safetensors")
    assert torch.equal(stored["tied.weight"], model.inner.weight)


def test_a_compiled_part_is_saved_under_its_own_name(tmp_path):
    model = toy()
    model.inner = torch.compile(model.inner)
    model.save_pretrained(tmp_path / "m")
    assert same(Toy.from_pretrained(tmp_path / "m"), toy())


# Finding


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


def test_a_loose_file_without_config_hears_which_config_fits(tmp_path):
    config = load_config(ROOT / "configs/fashion/eval.yaml")
    torch.save(OneDPiece(config).state_dict(), tmp_path / "weights.bin")
    with pytest.raises(WeightsError, match="it fits configs/fashion/eval.yaml"):
        OneDPiece.from_pretrained(tmp_path / "weights.bin")


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


# The hub


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
from modeling.checkpoints.locate import locate
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


# Reading


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrap", [lambda runner: {"w": torch.ones(2), "x": runner}, lambda runner: runner])
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(tmp_path, wrap, legacy):
    target = tmp_path / "ran"
    path = tmp_path / "evil.bin"
    torch.save(wrap(CodeRunner(target)), path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(WeightsError, match=r"holds more than tensors \((posix|nt).system\) and was refused"):
        read_state_dict(path)
    assert not target.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_plain_pickle_is_refused_and_runs_nothing(tmp_path, protocol):
    path = tmp_path / "evil.bin"
    path.write_bytes(pickle.dumps({"w": CodeRunner(tmp_path / "ran")}, protocol=protocol))
    with pytest.raises(WeightsError, match=r"holds more than tensors.*refused"):
        read_state_dict(path)
    assert not (tmp_path / "ran").exists()


def test_an_evil_pickle_is_refused_by_every_way_in(tmp_path):
    folder = tmp_path / "checkpoint-3/ema_model"
    folder.mkdir(parents=True)
    torch.save({"w": CodeRunner(tmp_path / "ran")}, folder / "pytorch_model.bin")
    config = {"model": {"width": 3}}
    for source in (folder / "pytorch_model.bin", folder, tmp_path / "checkpoint-3", tmp_path):
        with pytest.raises(WeightsError, match="refused"):
            Toy.from_pretrained(source, config=config)
    with pytest.raises(WeightsError, match="refused"):
        stage2_start(toy(), folder, folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["w.bin", "w.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_named(tmp_path, name, share):
    state = {"a": torch.randn(100, 10), "b": torch.randn(7)}
    path = tmp_path / name
    (safetensors.torch.save_file if name.endswith("safetensors") else torch.save)(state, path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(WeightsError, match=f"{name} .*(truncated|damaged).*fetch it again"):
        read_state_dict(path)


def test_a_web_page_in_place_of_weights_is_refused(tmp_path):
    for name in ("w.bin", "w.safetensors"):
        (tmp_path / name).write_text("<!DOCTYPE html><html>Not found</html>")
        with pytest.raises(WeightsError, match=name):
            read_state_dict(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"w": torch.ones(1), "step": 3}, "'step' is int"),
        ([torch.ones(1)], "got list"),
        ({}, "got an empty one"),
        (torch.ones(1), "got Tensor"),
    ],
)
def test_what_is_no_state_dict_is_refused(tmp_path, content, words):
    torch.save(content, tmp_path / "w.bin")
    with pytest.raises(WeightsError, match=words):
        read_state_dict(tmp_path / "w.bin")


def test_containers_and_wrappers_are_removed(tmp_path):
    state = {f"module._orig_mod.{name}": value for name, value in toy().state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "w.bin")
    assert list(read_state_dict(tmp_path / "w.bin")) == ["inner.weight", "inner.bias"]


# Fitting


def test_missing_unexpected_and_misshapen_names_are_listed():
    state = {"inner.weight": torch.zeros(2, 9), "a": torch.zeros(1), "b": torch.zeros(1), "c": torch.zeros(1)}
    state["d"] = torch.zeros(1)
    with pytest.raises(WeightsError) as caught:
        load_strict(toy(), state, "here")
    assert str(caught.value) == (
        "the weights of here do not fit this Toy, nor any configuration of this project: 1 missing (inner.bias); "
        "4 unexpected (a, b, c and 1 more); 1 misshapen (inner.weight (2, 9) for (2, 3))"
    )


def test_nothing_is_loaded_when_something_does_not_fit():
    model = toy()
    with pytest.raises(WeightsError):
        load_strict(model, {"inner.weight": torch.zeros(2, 3)}, "here")
    assert same(model, toy())


def test_old_position_ids_are_ignored():
    model = toy(seed=1)
    load_strict(model, {**toy().state_dict(), "embeddings.position_ids": torch.arange(4)}, "here")
    assert same(model, toy())


def test_weights_of_another_size_hear_which_config_fits():
    other = OneDPiece(load_config(ROOT / "configs/fashion/eval.yaml")).state_dict()
    with pytest.raises(
        WeightsError, match=r"they fit configs/fashion/eval.yaml \(give that configuration\): .*misshapen"
    ):
        load_strict(OneDPiece(tokenizer_config()), other, "here")


def test_stages_are_told_apart(tmp_path):
    stage1 = OneDPiece(tokenizer_config(finetune_decoder=False))
    stage2 = OneDPiece(tokenizer_config(finetune_decoder=True))
    with pytest.raises(WeightsError, match="they are stage-1 weights .start stage 2"):
        load_strict(stage2, stage1.state_dict(), "here")
    with pytest.raises(WeightsError, match="they are stage-2 weights .*finetune_decoder: True"):
        load_strict(stage1, stage2.state_dict(), "here")


def test_a_checkpoint_of_another_class_names_its_own(tmp_path):
    OneDPiece(tokenizer_config()).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(WeightsError, match=r"holds a OneDPiece, not a PixelVQGAN: load it with modeling.one_d_piece"):
        PixelVQGAN.from_pretrained(tmp_path / "tokenizer")
    assert type(TiTok.from_pretrained(tmp_path / "tokenizer")) is TiTok


def test_titok_weights_become_a_one_d_piece_only_by_a_config(tmp_path):
    config = tokenizer_config()
    config["model"]["type"] = "titok"
    TiTok(config).save_pretrained(tmp_path / "m")
    with pytest.raises(WeightsError, match="holds a TiTok, not a OneDPiece"):
        OneDPiece.from_pretrained(tmp_path / "m")
    OneDPiece.from_pretrained(tmp_path / "m", config=tokenizer_config())


# Starts


@pytest.mark.parametrize("is_stage2", [False, True])
def test_a_tokenizer_of_either_stage_starts_stage_1(tmp_path, is_stage2):
    source, model = (OneDPiece(tokenizer_config(finetune_decoder=stage2)) for stage2 in (is_stage2, False))
    source.save_pretrained(tmp_path / "tokenizer")
    stage1_start(model, tmp_path / "tokenizer")
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.state_dict().items())


def test_stage_1_and_the_teacher_make_a_stage_2_start(tmp_path):
    stage1, source = OneDPiece(tokenizer_config(finetune_decoder=False)), teacher()
    stage1.save_pretrained(tmp_path / "stage1")
    torch.save(source.state_dict(), tmp_path / "teacher.bin")
    model = OneDPiece(tokenizer_config())
    stage2_start(model, tmp_path / "stage1", tmp_path / "teacher.bin")
    got = model.state_dict()
    assert all(torch.equal(got[name], value) for name, value in stage1.state_dict().items())
    assert torch.equal(got["pixel_quantize.embedding.weight"], source.state_dict()["quantize.embedding.weight"])
    assert torch.equal(got["pixel_decoder.conv_out.weight"], source.state_dict()["decoder.conv_out.weight"])


def test_a_finished_tokenizer_starts_stage_2_without_a_teacher(tmp_path):
    source, model = OneDPiece(tokenizer_config()), OneDPiece(tokenizer_config())
    source.save_pretrained(tmp_path / "stage2")
    stage2_start(model, tmp_path / "stage2", tmp_path / "there is no teacher")
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_teacher_of_other_sizes_is_refused(tmp_path):
    OneDPiece(tokenizer_config(finetune_decoder=False)).save_pretrained(tmp_path / "stage1")
    teacher().save_pretrained(tmp_path / "teacher")
    config = tokenizer_config()
    config["model"]["pixel_vqgan"]["latent_channels"] = 16
    with pytest.raises(WeightsError, match=r"stage1 with the teacher .*teacher do not fit .*pixel_quantize"):
        stage2_start(OneDPiece(config), tmp_path / "stage1", tmp_path / "teacher")
    with pytest.raises(WeightsError, match="do not fit this PixelVQGAN"):
        load_teacher(config, tmp_path / "teacher")


def test_a_teacher_is_frozen(tmp_path):
    source = teacher()
    source.save_pretrained(tmp_path / "teacher")
    loaded = load_teacher(tokenizer_config(), tmp_path / "teacher")
    assert same(loaded, source)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_importing_any_part_of_modeling_registers_every_model():
    code = "from modeling.checkpoints.registry import MODELS; print(sorted(kind.__name__ for kind in MODELS.values()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "['ImageBert', 'OneDPiece', 'PixelVQGAN', 'TiTok', 'UViTBert']"


def test_a_training_output_that_is_not_there_is_not_looked_up_on_the_hub(monkeypatch):
    monkeypatch.setattr("modeling.checkpoints.locate._on_hub", lambda *arguments: pytest.fail("asked the hub"))
    with pytest.raises(WeightsError, match="no training output checkpoints/nothing here"):
        locate("checkpoints/nothing")


def test_saved_weights_are_as_readable_as_the_configuration(tmp_path):
    model = PixelVQGAN({"model": {"pixel_vqgan": {"channels": 32, "channel_multipliers": [1], "codebook_size": 4}}})
    model.save_pretrained(tmp_path / "model")
    modes = {(tmp_path / "model" / name).stat().st_mode & 0o777 for name in ("config.json", "model.safetensors")}
    assert len(modes) == 1
