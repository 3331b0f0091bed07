"""From a folder of one's own images, a class a subfolder, to samples of a generator: README's section on them."""

import json
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
from data.image_folder import describe_folder
from utils.config import load_config
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
    describe_folder(found)
    assert found.experiment.max_train_examples == 18 and found.dataset.params.num_eval_examples is None
    assert found.dataset.class_names == list(CLASSES) and found.model.generator.condition_num_classes == 3


def test_what_is_wrong_with_the_folders_is_said_before_the_first_step(folders):
    for key in ("train_folder", "eval_folder"):
        with pytest.raises(DataError, match="nowhere"):
            describe_folder(load_config(config("generator"), [f"dataset.params.{key}=nowhere"]))
    with pytest.raises(DataError, match="has no subfolders: put the images of each class into a subfolder"):
        describe_folder(load_config(config("generator"), ["dataset.params.train_folder=images/cats"]))


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
