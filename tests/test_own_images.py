"""From a folder of one's own images, a class a subfolder, to samples of a generator: README's section on them."""

import contextlib
import json
import os
import sys

import numpy as np
import pytest
from PIL import Image

import scripts.evaluate_reconstruction
import scripts.inference_generator
import scripts.pretokenize
import scripts.train_generator
import scripts.train_teacher
import scripts.train_tokenizer
from data import DataError
from data.dataset_facts import describe_dataset
from data.image_folder import num_eval_examples
from data.loaders import evaluation_loader
from data.token_sets import write_token_set
from tests.shard_data import make_shards, shard_spec
from utils.config import load_config, save_config
from utils.paths import ROOT

CLASSES = ("cats", "dogs", "eels")
SHORT = ["training.max_train_steps=2", "training.per_gpu_batch_size=4", "training.codebook.warmup_steps=1"]
SHORT += ["dataset.params.num_workers_per_gpu=0", "training.mixed_precision=no"]


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A working directory with ./images and ./held_out, of three classes."""
    monkeypatch.chdir(tmp_path)
    draws = np.random.default_rng(0)
    for split, count in (("images", 6), ("held_out", 2)):
        for name in CLASSES:
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = draws.integers(0, 256, (40, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{number}.png")
    return tmp_path


def call(monkeypatch, main, *words):
    monkeypatch.setattr(sys, "argv", [main.__module__, *map(str, words)])
    main()


def config(name):
    return ROOT / f"configs/own/{name}.yaml"


def test_a_folder_counts_and_names_itself(folders):
    found = load_config(config("generator"))
    describe_dataset(found)
    assert found.experiment.max_train_examples == 18 and num_eval_examples(found) is None
    assert found.dataset.class_names == list(CLASSES) and found.model.generator.condition_num_classes == 3


def test_a_class_whose_folder_is_called_by_other_bytes_than_utf8_is_named_too(folders):
    os.rename(folders / "images/cats", os.path.join(os.fsencode(folders), b"images/caf\xe9"))
    found = load_config(config("generator"), ["dataset.params.eval_folder=null"])
    describe_dataset(found)
    save_config(found, folders / "config.yaml")
    assert load_config(folders / "config.yaml").dataset.class_names == ["caf?", "dogs", "eels"]


def test_what_is_wrong_with_the_folders_is_said_before_the_first_step(folders):
    for key in ("train_folder", "eval_folder"):
        with pytest.raises(DataError, match="nowhere"):
            describe_dataset(load_config(config("generator"), [f"dataset.params.{key}=nowhere"]))
    with pytest.raises(DataError, match="6 images of images/cats have none: put the images of each class"):
        describe_dataset(load_config(config("generator"), ["dataset.params.train_folder=images/cats"]))


def test_tokens_of_ones_own_images_bring_their_classes(folders):
    """Over the configuration of garments."""
    make_token_set(folders / "tokens/train", labels=[0, 1, 2, 0], classes=list(CLASSES))
    found = load_config(ROOT / "configs/fashion/generator.yaml", ["dataset.params.token_set=tokens"])
    describe_dataset(found)
    assert found.dataset.class_names == list(CLASSES) and found.model.generator.condition_num_classes == 3
    assert found.experiment.max_train_examples == 4


def test_tokens_without_classes_stop_a_generator_before_its_first_step(folders):
    make_token_set(folders / "tokens/train", labels=[0, -1, -1], classes=[])
    config = load_config(ROOT / "configs/fashion/generator.yaml", ["dataset.params.token_set=tokens"])
    with pytest.raises(DataError, match="2 of the 3 images of the token set tokens/train have none: put the images"):
        describe_dataset(config)


def make_token_set(folder, labels, classes):
    keys = [str(number) for number in range(len(labels))]
    part = {"tokens": np.zeros((len(labels), 1, 32), np.uint16), "labels": np.array(labels), "keys": np.array(keys)}
    about = {"tokenizer": {}, "codebook_size": 512, "num_tokens": 32, "variants": ["centre"], "classes": classes}
    folder.mkdir(parents=True)
    write_token_set(folder, lambda: [part], about)


def test_shards_of_ones_own_images_bring_their_counts_and_classes(folders):
    make_shards(folders / "shards", [3, 2])
    spec = shard_spec(folders / "shards", 2)
    words = [f"dataset.params.{split}_shards_path_or_url={spec}" for split in ("train", "eval")]
    found = load_config(ROOT / "configs/fashion/generator.yaml", ["dataset.type=shards", *words])
    describe_dataset(found)
    assert found.experiment.max_train_examples == 5
    assert found.dataset.class_names == [str(number) for number in range(10)]
    with pytest.raises(DataError, match="expected 10000 evaluation samples, got 5 .* of another data set"):
        evaluation_loader(found, rank=0, world_size=1)


@pytest.mark.parametrize("kind", ["shards", "tokens"])
@pytest.mark.parametrize(
    "training, evaluation, complaint",
    [
        ("abc", "bc", "class 0 must be the same in training and evaluation, and is 'a' in .* and 'b' in .*: put"),
        ("ab", "abc", "class 2 must be the same in training and evaluation, and is None in .* and 'c' in .*: put"),
        ("abc", "abc", None),
        ("abc", "ab", None),  # the ids are the same
        ("abc", "", None),
        ("", "abc", None),
    ],
)
def test_a_class_has_one_id_in_training_and_evaluation(folders, kind, training, evaluation, complaint):
    words = [f"dataset.type={kind}", "dataset.params.token_set=tokens"]
    for split, classes in (("train", training), ("eval", evaluation)):
        make_token_set(folders / "tokens" / split, labels=[0, 0], classes=list(classes))
        make_shards(folders / split, [2], classes=classes)
        words.append(f"dataset.params.{split}_shards_path_or_url={shard_spec(folders / split, 1)}")
    generator = ROOT / "configs/fashion/generator.yaml"
    with pytest.raises(DataError, match=complaint) if complaint else contextlib.nullcontext():
        describe_dataset(load_config(generator, words))
    describe_dataset(load_config(generator, [*words, "experiment.eval_every=0"]))
    describe_dataset(load_config(ROOT / "configs/fashion/stage1.yaml", ["dataset.type=shards", *words[2:]]))


def test_the_whole_way_from_images_to_samples(folders, monkeypatch, capsys):
    call(monkeypatch, scripts.train_teacher.main, f"config={config('teacher')}", *SHORT)
    for stage in ("stage1", "stage2"):
        call(monkeypatch, scripts.train_tokenizer.main, f"config={config(stage)}", *SHORT)
    small = [word for word in SHORT if "codebook" not in word]
    call(monkeypatch, scripts.train_generator.main, f"config={config('generator')}", *small)
    place = ("--config", config("generator"), "--output_dir", "own_tokens", "--device", "cpu")
    call(monkeypatch, scripts.pretokenize.main, *place, "dataset.params.num_workers_per_gpu=1")
    manifest = json.loads((folders / "own_tokens/train/manifest.json").read_text())
    assert manifest["num_images"] == 18 and manifest["classes"] == list(CLASSES)
    from_tokens = ["dataset.type=tokens", "experiment.output_dir=from_tokens"]
    call(monkeypatch, scripts.train_generator.main, f"config={config('generator')}", *small, *from_tokens)
    assert load_config("from_tokens/config.yaml").dataset.class_names == list(CLASSES)
    call(
        monkeypatch,
        scripts.inference_generator.main,
        "--checkpoint",
        "checkpoints/own_generator",
        "--output_dir",
        "out",
    )
    assert {path.name.split("_")[1] for path in (folders / "out").glob("[0-9]*.png")} == set(CLASSES)
    score = ("--config", config("stage2"), "--features", "none", "--lengths", "1,32", "--output_dir", "score")
    call(monkeypatch, scripts.evaluate_reconstruction.main, *score, "dataset.params.num_workers_per_gpu=0")
    record = json.loads((folders / "score/metrics.json").read_text())
    assert len(record["rows"]) == 2


def test_images_without_classes_are_said_when_pretokenizing(folders, monkeypatch, capsys):
    words = ["dataset.params.train_folder=images/cats", "dataset.params.num_workers_per_gpu=1"]
    place = ("--config", config("generator"), "--output_dir", "own_tokens", "--device", "cpu", "--split", "train")
    call(monkeypatch, scripts.pretokenize.main, *place, "--checkpoint", "one-d-piece_fashion", *words)
    first, *_, last = capsys.readouterr().out.splitlines()
    assert "images/cats has no subfolders, so its images have no classes" in first
    assert last == (
        "own_tokens/train: 6 images have no class, so a generator cannot be trained on them: put the images of each "
        "class into a subfolder of its name"
    )
