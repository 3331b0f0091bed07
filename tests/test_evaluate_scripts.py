"""The commands that evaluate: their numbers, on one process and two, and their errors."""

import csv
import json
import os
import re
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from data.shard_files import Sample, write_shard
from data.tar_samples import read_shard
from modeling.checkpoints.published import BUNDLED
from modeling.generation_scores import Source
from modeling.identity import identity
from modeling.tokenizers import BUNDLED_TOKENIZER, frozen_tokenizer
from scripts import (
    evaluate_baselines,
    evaluate_generation,
    evaluate_image_formats,
    evaluate_reconstruction,
    reconstruct_tokenizer,
)
from tests.apple_gpu import AppleGPU
from tests.evaluation_data import NUM_IMAGES, command, make_world, on_two_processes, originals
from utils.config import load_config
from utils.errors import UserError
from utils.evaluation.baselines import fit_patch_vq, patch_grid
from utils.evaluation.generation import report
from utils.evaluation.sweep import Sweep
from utils.files import sha256_of
from utils.paths import ROOT
from utils.sampling_record import read_record

FEATURES = ("--features", "efficientnet_lite0", "--device", "cpu")
MEASURES = ("psnr", "ssim", "perceptual_efficientnet_lite0", "fd_efficientnet_lite0")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Shards, models, and `original.npy`, `original.npz`, `original/` with the images in them."""
    folder = make_world(tmp_path_factory.mktemp("world"))
    _, images, _ = originals(folder)
    np.save(folder / "original.npy", images)
    np.savez(folder / "original.npz", arr_0=images)
    (folder / "original").mkdir()
    for index, pixels in enumerate(images):
        Image.fromarray(pixels).save(folder / "original" / f"{index:06d}.png")
    return folder


@pytest.fixture
def evaluate(tmp_path, monkeypatch, capsys):
    """Run a command in this process: (exit status, stdout, stderr, metrics.json or None)."""

    def evaluate(script, *arguments, output="out", name="metrics.json"):
        where = ("--output_dir", tmp_path / output)
        result = command(monkeypatch, capsys, script.main, *FEATURES, *where, *arguments)
        file = tmp_path / output / name
        return *result, json.loads(file.read_text()) if os.path.exists(file) else None  # whatever its length

    return evaluate


# Reconstruction


def test_a_tokenizer_is_scored_at_each_length_with_its_protocol(world, evaluate, tmp_path):
    status, out, _, results = evaluate(evaluate_reconstruction, "--config", world / "config.yaml", "--lengths", "1,8")
    assert status == 0
    assert [(row["tokens"], row["bytes_per_image"], row["bits_per_pixel"]) for row in results["rows"]] == [
        (1, 1, 6 / 1024),
        (8, 6, 48 / 1024),
    ]
    assert all(np.isfinite(row[name]) for row in results["rows"] for name in MEASURES)
    assert "fid" not in results["rows"][0] and "FD-EfficientNet-Lite0" in out
    codebook = results["codebook"]
    assert 0 < codebook["usage"] <= 1 and len(codebook["per_position"]["perplexity"]) == 8
    record = results["protocol"]
    assert record["originals"]["expected"] == record["originals"]["seen"] == NUM_IMAGES
    assert record["lengths"] == [1, 8] and "bicubic" in record["preparation"]
    assert len(record["checkpoint_sha256"]) == len(record["feature_network"]["weights_sha256"]) == 64
    assert f"{NUM_IMAGES} images scored" in out
    assert (tmp_path / "out" / "curves.png").is_file()


def test_a_teacher_is_scored_at_all_of_its_codes(evaluate):
    shards = sorted((ROOT / "assets/fashion_mnist_test").glob("*.tar.gz"))
    config = ("--config", ROOT / "configs/fashion/teacher.yaml", "--checkpoint", "pixel_vqgan_fashion")
    images = (f"dataset.params.eval_shards_path_or_url={shards[0]}", "dataset.params.num_eval_examples=null")
    status, _, error, results = evaluate(evaluate_reconstruction, *config, *images, "--num_images", 8)
    assert status == 0, error
    (row,) = results["rows"]
    assert (row["tokens"], row["bytes_per_image"]) == (64, 72) and 22 < row["psnr"] < 29
    assert results["protocol"]["checkpoint"] == "pixel_vqgan_fashion"
    status, _, error, _ = evaluate(evaluate_reconstruction, *config, *images, "--num_images", 8, "--lengths", "8")
    assert status == 1 and "a teacher decodes all of its 64 codes, got a length of 8" in error


def test_two_processes_give_the_numbers_of_one(world, evaluate, tmp_path):
    flags = ("--config", world / "config.yaml", "--lengths", "2,8")
    one = evaluate(evaluate_reconstruction, *flags)[-1]
    on_two_processes("scripts/evaluate_reconstruction.py", *FEATURES, *flags, "--output_dir", tmp_path / "two")
    two = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert two["protocol"]["processes"] == 2
    assert two["protocol"]["originals"] == one["protocol"]["originals"]
    assert two["codebook"] == one["codebook"]
    for row, other in zip(one["rows"], two["rows"], strict=True):
        for name in MEASURES:
            assert row[name] == pytest.approx(other[name], rel=1e-3)


def test_what_reconstruct_writes_scores_as_the_tokenizer_itself(world, evaluate, tmp_path, monkeypatch, capsys):
    config = ("--config", world / "config.yaml")
    place = ("--device", "cpu", "--length=4", "--output_dir", tmp_path / "images")
    assert command(monkeypatch, capsys, reconstruct_tokenizer.main, *config, *place)[0] == 0
    of_tokenizer = evaluate(evaluate_reconstruction, *config, "--lengths", 4)[-1]
    pair = ("--original", world / "original.npy", "--target", tmp_path / "images" / "images.npy")
    of_arrays = evaluate(evaluate_reconstruction, *pair)[-1]
    assert of_arrays["protocol"]["originals"]["sha256"] == of_tokenizer["protocol"]["originals"]["sha256"]
    for name in MEASURES:
        assert of_arrays["rows"][0][name] == pytest.approx(of_tokenizer["rows"][0][name], rel=1e-3)


def test_arrays_archives_and_folders_of_the_same_images_give_the_same_numbers(world, evaluate, tmp_path):
    blurred = np.load(world / "original.npy") // 2
    np.save(tmp_path / "target.npy", blurred)
    (tmp_path / "target").mkdir()
    for index, pixels in enumerate(blurred):
        Image.fromarray(pixels).save(tmp_path / "target" / f"{index:06d}.png")
    rows = []
    for original, target in (("original.npy", "target.npy"), ("original.npz", "target"), ("original", "target")):
        pair = ("--original", world / original, "--target", tmp_path / target)
        rows.append(evaluate(evaluate_reconstruction, *pair)[-1]["rows"][0])
    assert rows[0] == rows[1] == rows[2]


def test_a_set_is_at_distance_0_of_itself(world, evaluate):
    pair = ("--original", world / "original.npy", "--target", world / "original.npz")
    status, _, _, results = evaluate(evaluate_reconstruction, *pair)
    assert status == 0
    row = results["rows"][0]
    assert row["fd_efficientnet_lite0"] < 1e-6 and row["perceptual_efficientnet_lite0"] == 0
    assert row["ssim"] == pytest.approx(1) and row["psnr"] == "inf"


def test_perfect_images_and_few_images_are_told_of_at_the_numbers(world, evaluate, tmp_path):
    target = np.load(world / "original.npy")
    target[1:] //= 2
    np.save(tmp_path / "target.npy", target)
    pair = ("--original", world / "original.npy", "--target", tmp_path / "target.npy")
    status, out, _, results = evaluate(evaluate_reconstruction, *pair)
    assert status == 0
    row = results["rows"][0]
    assert 5 < row["psnr"] < 40 and row["psnr_infinite"] == 1
    assert 5 < row["psnr_of_mse"] < row["psnr"]
    perfect, few = results["notes"]
    assert "up to 1 images came back without an error" in perfect and perfect in out
    assert f"of {NUM_IMAGES} images: fewer than its 1,280 features" in few and few in out


def test_other_results_are_shown_beside_if_they_are_of_the_same_images(world, evaluate, tmp_path):
    flags = ("--config", world / "config.yaml", "--lengths", "1,8", "--features", "none")
    fit = ("--num_components", 4, "--num_codes", 6)
    status, out, _, baselines = evaluate(
        evaluate_baselines, "--config", world / "config.yaml", *fit, output="base", name="baselines.json"
    )
    assert status == 0
    pca, kmeans, vq = baselines["rows"]
    assert pca["psnr"] > 12 and kmeans["psnr"] > 10 and vq["psnr"] > 18  # fitted on what they are scored on
    assert vq["name"] == "VQ of 8 x 16 pixels, 8 codes of 64"
    assert [row["bytes_per_image"] for row in baselines["rows"]] == [8, 1, 6]  # 6: as the 8 tokens of 64 codes
    assert baselines["protocol"]["fitted_on"] == NUM_IMAGES
    status, out, _, _ = evaluate(evaluate_reconstruction, *flags, "--beside", tmp_path / "base" / "baselines.json")
    assert status == 0 and all(row["name"] in out for row in baselines["rows"])
    fit += ("--features", "none")
    again = evaluate(evaluate_baselines, "--config", world / "config.yaml", *fit, name="baselines.json")[-1]
    assert [row["psnr"] for row in again["rows"]] == [row["psnr"] for row in baselines["rows"]]


@pytest.mark.parametrize("script", [evaluate_reconstruction, evaluate_image_formats])
def test_results_are_kept_where_those_to_show_beside_are_of_other_images(world, evaluate, tmp_path, script):
    other = {"rows": [{"name": "other", "psnr": 20.0}], "protocol": {"originals": {"sha256": "0" * 64}}}
    (tmp_path / "other.json").write_text(json.dumps(other))
    flags = ("--config", world / "config.yaml", "--num_images", 2, "--features", "none")
    flags += ("--lengths", "1,8") if script is evaluate_reconstruction else ("--formats", "jpeg", "--budgets", 2000)
    status, out, err, results = evaluate(script, *flags, "--beside", tmp_path / "other.json")
    assert status == 1 and "other.json was made with other images" in err
    assert results["rows"][0]["psnr"] > 0 and "2 images scored" in out and (tmp_path / "out/curves.png").is_file()


@pytest.mark.parametrize(("flag", "smallest"), [("--seed", 0), ("--num_components", 1), ("--num_codes", 1)])
def test_numbers_that_no_baseline_can_have_are_refused_before_the_work(world, evaluate, flag, smallest):
    status, _, err, _ = evaluate(evaluate_baselines, "--config", world / "config.yaml", flag, smallest - 1)
    assert status == 1 and err == f"error: {flag} must be {smallest} or more, got {smallest - 1}\n"


def test_patches_as_near_to_squares_as_can_be_come_back_exactly_where_there_are_few():
    assert [patch_grid(count, 32) for count in (1, 8, 16, 32)] == [(1, 1), (4, 2), (4, 4), (8, 4)]
    generator = np.random.default_rng(0)
    patches = generator.integers(256, size=(6, 3, 4, 8))
    levels = np.stack([tiled(patches[generator.integers(6, size=(8, 4))]) for _ in range(20)]).reshape(20, -1)
    images = (levels / 255).astype(np.float32)
    vq = fit_patch_vq(images, 32, (8, 4), 6, seed=0)
    assert vq.bits == pytest.approx(32 * np.log2(6))
    assert np.array_equal((vq.restore(images) * 255).round(), levels)


def tiled(patches):
    """An image (3, H, W) of patches (rows, columns, 3, h, w)."""
    return np.concatenate([np.concatenate(list(row), axis=2) for row in patches], axis=1)


def test_baselines_that_cannot_be_fitted_are_refused(world, evaluate):
    for override, message in (
        ("model.vq_model.num_latent_tokens=24", "32 x 32 pixels cannot be cut into 24 equal patches"),
        ("model.vq_model.codebook_size=400", "400 codes need as many training images or patches, got 320"),
    ):
        fit = ("--num_components", 4, "--num_codes", 6, "--features", "none", override)
        status, _, err, _ = evaluate(evaluate_baselines, "--config", world / "config.yaml", *fit)
        assert status == 1 and message in err, err
    status, _, err, _ = evaluate(evaluate_baselines, "--config", ROOT / "configs/fashion/teacher.yaml")
    assert status == 1 and "must be a tokenizer's" in err, err


def test_wrong_counts_and_broken_shards_stop_the_run(world, evaluate, tmp_path):
    config = ("--config", world / "config.yaml", "--features", "none")
    status, _, err, results = evaluate(evaluate_reconstruction, *config, "dataset.params.num_eval_examples=39")
    assert (status, results) == (1, None)
    assert "expected 39 evaluation samples, got 40" in err

    shutil.copytree(world / "shards", tmp_path / "shards")
    shard = tmp_path / "shards" / "s-000001.tar"
    shard.write_bytes(shard.read_bytes()[:9000])
    place = f"dataset.params.eval_shards_path_or_url={tmp_path}/shards/s-{{000000..000002}}.tar"
    status, _, err, results = evaluate(evaluate_reconstruction, *config, place)
    assert (status, results) == (1, None)
    assert re.search(r"s-000001.tar: ends early or is damaged in or after \d{4}\.(png|cls) ", err), err


def test_a_broken_image_is_named_by_shard_and_key(world, evaluate, tmp_path):
    shutil.copytree(world / "shards", tmp_path / "shards")
    shard = tmp_path / "shards" / "s-000002.tar"
    data = bytearray(shard.read_bytes())
    where = data.rindex(b"\x89PNG")
    data[where : where + 200] = bytes(200)
    shard.write_bytes(data)
    place = f"dataset.params.eval_shards_path_or_url={tmp_path}/shards/s-{{000000..000002}}.tar"
    flags = ("--config", world / "config.yaml", "--features", "none", place)
    status, _, err, _ = evaluate(evaluate_reconstruction, *flags)
    assert status == 1
    assert "s-000002.tar, sample '0033'" in err


def test_results_that_cannot_be_written_are_one_sentence_before_the_work(world, evaluate, tmp_path):
    (tmp_path / "file").touch()
    pair = ("--original", world / "original.npy", "--target", world / "original.npz")
    for output, message in (("file", "a file is where a folder is needed"), ("n" * 300, "give a shorter name")):
        status, out, err, _ = evaluate(evaluate_reconstruction, *pair, output=output)
        assert status == 1 and err.startswith("error: ") and err.count("\n") == 1 and message in err, err
        assert "PSNR" not in out


def test_formats_and_baselines_need_no_network(world, monkeypatch, capsys, tmp_path):
    def unreachable(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    common = ("--config", world / "config.yaml", "--device", "cpu", "--output_dir", tmp_path / "out")
    for main, *flags in (
        (evaluate_image_formats.main, "--formats", "jpeg", "--budgets", "999"),
        (evaluate_baselines.main, "--num_components", 4, "--num_codes", 6),
    ):
        status, out, err = command(monkeypatch, capsys, main, *common, *flags)
        assert status == 0 and "FD-EfficientNet-Lite0" in out, err


def test_the_unequal_and_the_unreadable_are_refused(world, evaluate, tmp_path):
    np.save(tmp_path / "few.npy", np.load(world / "original.npy")[:9])
    pair = ("--original", world / "original.npy", "--target", tmp_path / "few.npy")
    status, _, err, _ = evaluate(evaluate_reconstruction, *pair)
    assert status == 1 and "as many images in both, got 40" in err
    status, _, err, _ = evaluate(evaluate_image_formats, "--beside", world / "config.yaml", "training.seed=1")
    assert status == 2 and "there is no file training.seed=1 (values a.b=c stand before --beside)" in err
    for flags in ([], ["--config", "a.yaml", "--target", "b.npy"], ["--original", "a.npy"]):
        status, _, err, _ = evaluate(evaluate_reconstruction, *flags)
        assert status == 1 and err.startswith("error: give")
    status, _, err, _ = evaluate(evaluate_reconstruction, "--config", world / "config.yaml", "--lengths", "1,x")
    assert status == 1 and "whole numbers such as 1,4,16, got 1,x" in err


def test_lengths_that_no_prefix_has_are_all_named_before_anything_is_loaded(world, evaluate, monkeypatch):
    def load(*arguments, **options):
        pytest.fail("the networks were loaded")

    monkeypatch.setattr(evaluate_reconstruction, "Judges", load)
    status, _, err, _ = evaluate(evaluate_reconstruction, "--config", world / "config.yaml", "--lengths", "0,4,64")
    assert status == 1 and "--lengths must be in 1..8, got 0, 64" in err
    status, _, err, _ = evaluate(evaluate_reconstruction, "--config", world / "config.yaml", "--lengths", "9")
    assert status == 1 and "--lengths must be in 1..8, got 9" in err


def test_weights_of_no_network_are_refused(world, evaluate):
    flags = ("--config", world / "config.yaml", "--features", "none", "--weights", "a.pth")
    status, _, err, _ = evaluate(evaluate_reconstruction, *flags)
    assert status == 1 and "--weights are of the network of --features, and that is none: leave out one of them" in err


def test_scores_need_no_float64_on_the_device(world, evaluate):
    with AppleGPU():
        status, _, err, results = evaluate(evaluate_reconstruction, "--config", world / "config.yaml", "--lengths", "8")
    assert status == 0 and np.isfinite(results["rows"][0]["fd_efficientnet_lite0"]), err


# Images that are some of all


def test_every_command_takes_the_same_few_images_of_a_configuration(world, evaluate, monkeypatch, capsys, tmp_path):
    config, few = ("--config", world / "config.yaml"), ("--num_images", 9)
    fast = ("--features", "none", "--lengths", "8")
    records = [
        evaluate(evaluate_reconstruction, *config, *fast, *few)[-1]["protocol"],
        evaluate(evaluate_reconstruction, *config, *fast, "dataset.params.max_eval_examples=9")[-1]["protocol"],
        evaluate(evaluate_image_formats, *config, *few, "--formats", "jpeg", "--budgets", "999", "--features", "none")[
            -1
        ]["protocol"],
    ]
    place = ("--device", "cpu", "--output_dir", tmp_path / "few", "--original")
    assert command(monkeypatch, capsys, reconstruct_tokenizer.main, *config, *place, *few)[0] == 0
    pair = ("--original", tmp_path / "few/images.npy", "--target", tmp_path / "few/images.npy", "--features", "none")
    records.append(evaluate(evaluate_reconstruction, *pair)[-1]["protocol"])
    assert {record["originals"]["seen"] for record in records} == {9}
    assert len({record["originals"]["sha256"] for record in records}) == 1
    status, _, err, _ = evaluate(evaluate_reconstruction, *config, "--features", "none", "--num_images", 41)
    assert status == 1 and "--num_images must be at most 40" in err


def test_a_few_of_two_sets_are_pairs(world, evaluate):
    pair = ("--original", world / "original.npy", "--target", world / "original", "--features", "none")
    row = evaluate(evaluate_reconstruction, *pair, "--num_images", 5)[-1]["rows"][0]
    assert row["psnr"] == "inf" and row["psnr_infinite"] == 5


# Generation


def test_samples_are_scored_against_arrays_shards_and_configurations_alike(world, evaluate):
    references = (world / "original.npy", world / "config.yaml", f"{world}/shards/s-{{000000..000002}}.tar")
    rows = []
    for reference in references:
        status, out, _, results = evaluate(
            evaluate_generation, "--samples", world / "original", "--reference", reference
        )
        assert status == 0
        rows.append(results["rows"][0])
        samples, images = results["protocol"]["samples"], results["protocol"]["reference"]
        assert samples["seen"] == images["seen"] == NUM_IMAGES
        assert samples["sha256"] == images["sha256"]  # of a folder, an array and shards of the same images
    for row in rows:
        assert row["fd_efficientnet_lite0"] < 1e-4
        assert (row["precision"], row["recall"]) == (1, 1)


def test_too_few_samples_for_precision_and_recall_keep_their_distance(world, evaluate, tmp_path):
    samples = ("--samples", world / "original", "--reference", world / "original.npy")
    status, out, err, results = evaluate(evaluate_generation, *samples, "--num_images", 3)
    assert status == 0, err
    row = results["rows"][0]
    assert row["fd_efficientnet_lite0"] > 0 and "precision" not in row and "recall" not in row
    note = "note: no precision and recall: at least 4 images are needed, got 3"
    assert note in out and note in results["notes"]
    np.save(tmp_path / "one.npy", np.load(world / "original.npy")[:1])
    alone = ("--samples", tmp_path / "one.npy", "--reference", tmp_path / "nowhere")
    status, _, err, _ = evaluate(evaluate_generation, *alone)
    assert status == 1 and "one.npy must hold 2 images or more to be scored as a set, got 1" in err


@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize("name", ["small.npy", "wide.npy", "small"])
def test_samples_of_another_size_than_the_reference_are_refused(world, evaluate, tmp_path, name, sampled):
    images = np.load(world / "original.npy")
    np.save(tmp_path / "small.npy", images[:, :16, :16])
    np.save(tmp_path / "wide.npy", np.concatenate([images, images], axis=2))
    (tmp_path / "small").mkdir()
    for index, image in enumerate(images[:, :16, :16]):
        Image.fromarray(image).save(tmp_path / f"small/{index}.png")
    samples = ("--checkpoint", world / "generator", "--num_images", 12)
    samples = samples if sampled else ("--samples", world / "original")
    status, _, err, _ = evaluate(evaluate_generation, *samples, "--reference", tmp_path / name)
    size = "32 x 64" if name == "wide.npy" else "16 x 16"
    assert status == 1 and f"the samples have 32 x 32 pixels, and the images of {tmp_path / name} {size} pixels:" in err


def test_a_generator_is_sampled_and_scored_over_a_grid(world, evaluate, tmp_path):
    flags = ("--checkpoint", world / "generator", "--reference", world / "config.yaml", "--num_images", 12)
    sweep = ("--sweep", "guidance_scale=1,2", "randomize_temperature=3,9")
    status, out, _, results = evaluate(evaluate_generation, *flags, *sweep)
    assert status == 0
    assert [(row["guidance_scale"], row["randomize_temperature"]) for row in results["rows"]] == [
        (1, 3),
        (1, 9),
        (2, 3),
        (2, 9),
    ]
    assert "lowest FD-EfficientNet-Lite0" in out and (tmp_path / "out" / "sweep.png").is_file()
    samples = ("--samples", world / "original", "--reference", world / "original.npy")
    status, out, _, _ = evaluate(evaluate_generation, *samples)
    assert status == 0 and f"1 of the run before will be removed from {tmp_path}/out, such as sweep.png" in out
    assert not (tmp_path / "out" / "sweep.png").exists()


def test_samplers_are_compared_over_their_passes_and_a_killed_sweep_goes_on(world, evaluate, tmp_path, monkeypatch):
    flags = ("--checkpoint", world / "generator", "--reference", world / "config.yaml", "--num_images", 12)
    sweep = ("--sweep", "sampler=confidence,choose", "num_sample_steps=1,2", "seed=42,43")
    measured, sampled = [], Source.images

    def dying(*arguments):
        measured.append(arguments[-1]["seed"])
        if len(measured) == 3:
            raise UserError("killed")
        return sampled(*arguments)

    monkeypatch.setattr(Source, "images", dying)
    assert evaluate(evaluate_generation, *flags, *sweep)[0] == 1
    with monkeypatch.context() as patch:
        patch.setattr("data.scored_sets.load_reference", None)  # before the reference is looked at, for minutes
        status, _, err, _ = evaluate(evaluate_generation, *flags, *sweep, "--top_p", "0.9")
    assert status == 1 and "holds results of other settings" in err
    other = ("--checkpoint", world / "generator", "--reference", world / "original.npy", "--num_images", 12)
    status, _, err, _ = evaluate(evaluate_generation, *other, *sweep)
    assert status == 1 and "holds results of other settings: reference was" in err
    with monkeypatch.context() as patch:
        patch.setattr("modeling.networks.frechet.sha256_of", lambda path: "0" * 64)
        status, _, err, _ = evaluate(evaluate_generation, *flags, *sweep)
    assert status == 1 and "features_sha256 was" in err and f'is now "{"0" * 64}"' in err
    points = (tmp_path / "out/sweep_points.json").read_text()
    (tmp_path / "out/sweep_points.json").write_text(points.replace('"device": "cpu"', '"device": "cuda"'))
    status, _, err, _ = evaluate(evaluate_generation, *flags, *sweep)
    assert status == 1 and 'device was "cuda" and is now "cpu"' in err
    (tmp_path / "out/sweep_points.json").write_text(points)
    status, _, _, results = evaluate(evaluate_generation, *flags, *sweep)
    assert status == 0 and measured == [42, 43, 42, 42, 43, 42, 43, 42, 43]
    rows = {(row["sampler"], row["passes"], row["seed"]): row for row in results["rows"]}
    assert len(rows) == 8 and rows["choose", 2, 43]["system"] == "sampler choose"
    assert (tmp_path / "out" / "curves.png").is_file() and not (tmp_path / "out" / "sweep_points.json").exists()

    monkeypatch.undo()
    alone = ("--sampler", "choose", "--sweep", "num_sample_steps=1,2", "--seed", "43", "--name", "another")
    beside = ("--beside", tmp_path / "out" / "metrics.json")
    status, out, _, results = evaluate(evaluate_generation, *flags, *alone, *beside, output="alone")
    assert status == 0 and "sampler confidence, num_sample_steps 2, seed 42" in out
    for row in results["rows"]:
        assert row["system"] == "another"
        assert row["fd_efficientnet_lite0"] == rows["choose", row["passes"], 43]["fd_efficientnet_lite0"]


def test_a_sweep_of_drafts_of_one_length_is_drawn_over_what_it_changes():
    told = {}
    session = SimpleNamespace(processes=SimpleNamespace(is_main=False), report=lambda *_, **given: told.update(given))
    network = SimpleNamespace(key="fd_mine", title="FD-MINE")
    for name, figures in (("guidance_scale", ["sweep.png"]), ("num_tokens", ["curves.png"])):
        rows = [{"name": f"{name} {value}", "passes": 2, name: value, "fd_mine": value} for value in (1, 2)]
        rows = [row | {"tokens": row.get("num_tokens", 4)} for row in rows]
        report(session, rows, [], {"samples": {"seen": 12}}, network, Sweep([f"{name}=1,2"]))
        assert list(told["figures"]) == figures
        assert told["notes"] == (["lowest FD-MINE: 1 at guidance_scale 1"] if name == "guidance_scale" else [])


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"plan": {}, "rows": 1}'])
def test_another_program_s_sweep_points_are_explained_in_one_sentence(world, evaluate, tmp_path, monkeypatch, text):
    monkeypatch.setattr("data.scored_sets.load_reference", None)  # before the reference is looked at, for minutes
    (tmp_path / "out").mkdir()
    (tmp_path / "out/sweep_points.json").write_text(text)
    flags = ("--checkpoint", world / "generator", "--reference", world / "config.yaml", "--num_images", 12)
    status, _, err, _ = evaluate(evaluate_generation, *flags)
    assert status == 1 and "out holds sweep_points.json, and no command of ours has left that there: name" in err


def test_images_of_the_first_tokens_of_the_same_samples_stand_beside_reconstructions(world, evaluate, tmp_path):
    beside = ("--config", world / "config.yaml", "--lengths", "1,8")
    reconstructed = evaluate(evaluate_reconstruction, *beside, output="beside")[-1]
    flags = ("--checkpoint", world / "generator", "--reference", world / "config.yaml", "--num_images", 12)
    whole = evaluate(evaluate_generation, *flags, output="whole")[-1]["rows"][0]
    lengths = ("--lengths", "1,4,8", "--beside", tmp_path / "beside" / "metrics.json")
    status, out, _, results = evaluate(evaluate_generation, *flags, *lengths)
    assert status == 0
    assert [row["tokens"] for row in results["rows"]] == results["protocol"]["lengths"] == [1, 4, 8]
    one, _, full = results["rows"]
    measures = ("fd_efficientnet_lite0", "precision", "recall")
    assert [full[name] for name in measures] == [whole[name] for name in measures]
    assert one["fd_efficientnet_lite0"] != full["fd_efficientnet_lite0"]
    assert "| 8 sampled tokens |" in out and "PSNR" not in out
    assert f"{reconstructed['rows'][0]['fd_efficientnet_lite0']:.4g}" in out
    assert (tmp_path / "out" / "curves.png").is_file()


def test_samples_in_half_precision_are_scored_and_said_to_be(world, evaluate):
    flags = ("--checkpoint", world / "generator", "--reference", world / "config.yaml", "--num_images", 12)
    results = {
        precision: evaluate(evaluate_generation, *flags, "--lengths", "1,8", "--precision", precision)[-1]
        for precision in ("fp32", "bf16")
    }
    for precision, result in results.items():
        assert result["protocol"]["sampler_precision"] == precision
    for single, half in zip(*(result["rows"] for result in results.values()), strict=True):
        assert single["fd_efficientnet_lite0"] != half["fd_efficientnet_lite0"] > 0


@pytest.mark.long
def test_generation_on_two_processes_is_that_of_one(world, evaluate, tmp_path):
    flags = ("--checkpoint", world / "generator", "--reference", world / "config.yaml", "--num_images", 12)
    want = evaluate(evaluate_generation, *flags, "--guidance_scale", 2, "--randomize_temperature", 9)[-1]["rows"][0]
    on_two_processes(
        "scripts/evaluate_generation.py", *FEATURES, *flags, "--guidance_scale", 2, "--randomize_temperature", 9,
        "--output_dir", tmp_path / "two",
    )  # fmt: skip
    row = json.loads((tmp_path / "two" / "metrics.json").read_text())["rows"][0]
    for name in ("fd_efficientnet_lite0", "precision", "recall"):
        assert row[name] == pytest.approx(want[name], rel=1e-3)


def test_generation_says_what_is_wrong(world, evaluate):
    reference = ("--reference", world / "config.yaml")
    samples = ("--samples", world / "original.npz")
    for flags, message in (
        ([*samples, *reference, "--num_images", 50], "--num_images must be at most 40, .*, got 50"),
        ([*samples, *reference, "--sweep", "guidance_scale=1"], "leave out --config, --checkpoint, --sweep"),
        ([*samples, *reference, "--lengths", "1"], "leave out .* and --lengths"),
        ([*samples, *reference, "--precision", "bf16"], "--precision and --compile are for a generator"),
        ([*reference, "--lengths", "1", "--sweep", "guidance_scale=1"], "leave out either them or --lengths"),
        ([*reference, "--checkpoint", world / "generator", "--lengths", "1,9"], "must be in 1..8, got 9"),
        (
            [*reference, "--checkpoint", world / "generator", "--sweep", "guidance=1"],
            "got guidance; did you mean guidance_",
        ),
        ([*reference, "--checkpoint", "none", "--sweep", "x=1"], "sampler, got x; they are guidance_scale, .*, seed"),
        ([*reference, "--checkpoint", world / "generator", "--sweep", "1,2"], "NAME=VALUE"),
        ([*samples, "--reference", world / "nothing"], "expected a .npy or .npz file or a folder"),
        ([*samples, *reference, "--features", "none"], "leaves nothing to measure"),
    ):
        status, _, err, results = evaluate(evaluate_generation, *flags)
        assert (status, results) == (1, None)
        assert re.search(message, err), err


RECIPES = ROOT / "configs/samplers/fashion.yaml"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--samples", "a.npz", "--guidance_scale", 2), "leave out .* what says how to sample"),
        (("--samples", "a.npz", "--recipes", RECIPES), "leave out .* what says how to sample"),
        (("--samples", "a.npz", "--tokenizer_checkpoint", "mine"), "leave out --tokenizer_checkpoint"),
        (("--samples", "a.npz", "--seed", 0), "leave out .* --seed"),
        (("--samples", "a.npz", "--like", "b.npz"), "leave out .* --like"),
        (("--samples", "a.npz", "--name", "mine"), "leave out .* --name"),
        (("--lengths", "1", "--name", "mine"), "--name is of one sampler: leave it out with --recipes, .* --lengths"),
        (("--recipes", RECIPES, "--name", "mine"), "--name is of one sampler: leave it out with --recipes"),
        (("--lengths", "1", "--recipes", RECIPES), "--recipes and .*: leave out either them or --lengths"),
    ],
)
def test_flags_of_generation_that_would_do_nothing_are_refused(monkeypatch, flags, message):
    monkeypatch.setattr(sys, "argv", ["evaluate_generation.py", "--reference", "b.npz", *map(str, flags)])
    with pytest.raises(UserError, match=message):
        evaluate_generation.parse_arguments()


def test_a_sweep_takes_all_of_its_flags_and_no_setting_twice(monkeypatch):
    flags = ["--reference", "b.npz", "--sweep", "guidance_scale=2,4", "--sweep", "seed=1,2"]
    monkeypatch.setattr(sys, "argv", ["evaluate_generation.py", *flags])
    assert evaluate_generation.parse_arguments().sweep.values == {"guidance_scale": [2, 4], "seed": [1, 2]}
    with pytest.raises(UserError, match="takes each setting once, got seed twice: list its values, seed=A,B"):
        Sweep(["seed=1", "seed=2"])


def test_results_of_recipes_are_no_settings_to_sample_with_again(tmp_path):
    samples = {"seed": 1, "sampler": {"guidance_scale": 3.0}}
    for name, value in (("recipes", {"mine": {"guidance_scale": 5.0}}), ("sweep", {"guidance_scale": [3.0, 5.0]})):
        (tmp_path / "metrics.json").write_text(json.dumps({"protocol": {"samples": samples, name: value}}))
        with pytest.raises(UserError, match="holds results of several settings"):
            read_record(tmp_path / "metrics.json")
    (tmp_path / "metrics.json").write_text(json.dumps({"protocol": {"samples": samples, "recipes": None}}))
    assert read_record(tmp_path / "metrics.json") == samples


@pytest.mark.parametrize(
    ("recipe", "sweep", "message"),
    [
        ("{guidance_scal: 2}", "top_p=1", "the recipe mine takes settings of the sampler, got guidance_scal; did you"),
        ("{seed: 2}", "top_p=1", "the recipe mine takes settings of the sampler, got seed; they are guidance_scale"),
        ("{top_p: 2}", "order=front", "top_p must be in 0..1, got 2"),
        ("{sampler: chose}", "order=front", "sampler must be one of confidence, choose, remasking, got chose"),
        ("{top_p: 1}", "top_p=1,2", "top_p must be in 0..1, got 2"),
    ],
)
def test_settings_of_recipes_and_sweeps_are_checked_before_any_image(world, evaluate, tmp_path, recipe, sweep, message):
    (tmp_path / "recipes.yaml").write_text(f"mine: {recipe}")
    flags = ("--checkpoint", world / "generator", "--reference", tmp_path / "nowhere")  # found later
    flags = (*flags, "--recipes", tmp_path / "recipes.yaml", "--sweep", sweep)
    status, _, err, _ = evaluate(evaluate_generation, *flags)
    assert status == 1 and message in err and err.count("\n") == 1


# Image formats


def test_formats_stay_within_their_budgets_and_are_compared_at_equal_bytes(world, evaluate):
    flags = ("--config", world / "config.yaml", "--budgets", "20,100,400", "--free_headers", "--features", "none")
    status, out, _, results = evaluate(evaluate_image_formats, *flags, "--formats", "webp", "jpeg")
    assert status == 0 and "WebP: header 42 bytes (grey)" in out
    rows = {(row["system"], row["budget"]): row for row in results["rows"]}
    assert len(rows) == 2 * 3 * 3
    for (_, budget), row in rows.items():
        assert ("psnr" in row) == (row["fits"] == 1)
        assert row.get("bytes_per_image", 0) <= budget
    assert rows["JPEG", 20]["fits"] == 0  # its header alone is larger
    assert rows["WebP, scaled down", 100]["psnr"] > 15
    assert rows["WebP, scaled down, header free", 20]["file_bytes"] > 20 >= rows["WebP", 20]["fits"]
    for system in ("WebP, scaled down", "JPEG, scaled down, header free"):
        scores = [rows[system, budget]["psnr"] for budget in (100, 400)]
        assert scores[0] < scores[1]


def test_what_another_run_has_left_of_other_formats_does_not_stay(world, evaluate, tmp_path):
    flags = ("--config", world / "config.yaml", "--features", "none", "--num_images", 2, "--budgets", "2000")
    evaluate(evaluate_image_formats, *flags, "--formats", "webp")
    (tmp_path / "out/bench_mine.json").write_text("mine")
    status, out, _, _ = evaluate(evaluate_image_formats, *flags, "--formats", "jpeg")
    assert status == 0 and f"will be removed from {tmp_path}/out, such as bench_webp.json" in out
    files = {path.name for path in (tmp_path / "out").glob("bench_*.json")}
    assert files == {"bench_jpeg.json", "bench_jpeg_scaled_down.json", "bench_mine.json"}
    (tmp_path / "own").mkdir()
    (tmp_path / "own/images.csv").write_text("mine")
    status, out, err, _ = evaluate(evaluate_image_formats, *flags, "--formats", "jpeg", output="own")
    assert status == 1 and "own holds images.csv, and no command of ours has left it there" in err
    assert "JPEG" not in out  # before any image


def test_compressed_files_are_one_of_the_formats_and_every_file_is_listed(world, evaluate, tmp_path):
    flags = ("--config", world / "config.yaml", "--features", "none", "--num_images", 4, "--psnr", "5,99")
    flags = (*flags, "--formats", "webp", "--budgets", "10,400,800", "--codec", world / "tokenizer", "--free_headers")
    status, out, _, results = evaluate(evaluate_image_formats, *flags)
    assert status == 0 and "One-D-Piece (.1dp): header 8 bytes (grey), 8 (colour)" in out
    rows = {(row["system"], row["budget"]): row for row in results["rows"]}
    ours = rows["One-D-Piece (.1dp)", 400]
    assert ours["fits"] == 1 and 9 <= ours["bytes_per_image"] < 40 and "psnr" in ours
    assert rows["One-D-Piece (.1dp), header free", 400]["bytes_per_image"] == ours["bytes_per_image"] - 8
    assert "| One-D-Piece (.1dp), 400 bytes" in out and "| One-D-Piece (.1dp), 800 bytes" not in out
    record = results["protocol"]["codec"]
    assert record["checkpoint_sha256"] == sha256_of(world / "tokenizer/model.safetensors")
    assert record["tokenizer"] == identity(frozen_tokenizer(world / "tokenizer")) and len(record["entropy_model"]) == 64
    assert (record["efforts"], record["fit"]) == ([0], "crop")
    assert f"| One-D-Piece (.1dp) | <= {rows['One-D-Piece (.1dp)', 10]['bytes_per_image']:.1f} |  |" in out

    with open(tmp_path / "out/images.csv", newline="") as file:
        found = list(csv.DictReader(file))
    files = [row for row in found if row["system"] == "One-D-Piece (.1dp)" and row["budget"] == "400"]
    assert len({row["image"] for row in files}) == len(files) == 4
    assert np.mean([int(row["bytes"]) for row in files]) == ours["bytes_per_image"]
    assert np.mean([float(row["psnr"]) for row in files]) == pytest.approx(ours["psnr"], abs=1e-3)
    assert all(float(row["encoding_time"]) > 0 and float(row["decoding_time"]) > 0 for row in files)
    system = json.loads((tmp_path / "out/bench_one_d_piece_1dp.json").read_text())
    assert system["results"]["psnr-rgb"][-1] == ours["psnr"]
    assert {len(values) for values in system["results"].values()} == {len(system["results"]["bpp"])}


@pytest.mark.long
def test_formats_on_two_processes_are_those_of_one(world, evaluate, tmp_path):
    flags = ("--config", world / "config.yaml", "--budgets", "60,300", "--formats", "webp", "--features", "none")
    one = evaluate(evaluate_image_formats, *flags)[-1]
    on_two_processes("scripts/evaluate_image_formats.py", "--device", "cpu", *flags, "--output_dir", tmp_path / "two")
    two = json.loads((tmp_path / "two" / "metrics.json").read_text())
    for row, other in zip(one["rows"], two["rows"], strict=True):
        assert row.keys() == other.keys()
        for name in row.keys() - {"name", "system"}:
            assert row[name] == pytest.approx(other[name], rel=1e-6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--effort", 2), "--effort and --fit go with --codec"),
        (("--fit", "tile"), "--effort and --fit go with --codec"),
        (("--psnr", "20dB"), "--psnr takes numbers such as 18,20.5,22, got 20dB"),
    ],
)
def test_flags_of_formats_are_checked_before_the_work(monkeypatch, flags, message):
    monkeypatch.setattr(sys, "argv", ["evaluate_image_formats.py", *map(str, flags)])
    with pytest.raises(UserError, match=message):
        evaluate_image_formats.parse_arguments()


def test_default_budgets_are_those_of_the_tokenizer(world):
    budgets = evaluate_image_formats.budgets_of(load_config(ROOT / "configs/fashion/eval.yaml"))
    assert budgets == [2, 3, 5, 10, 20, 40, 80, 160, 320, 640]


# The bundled model


@pytest.mark.long
@pytest.mark.skipif(not (BUNDLED[BUNDLED_TOKENIZER] / "config.json").is_file(), reason="no model is bundled yet")
def test_the_bundled_model_scores_alike_on_one_and_two_processes(evaluate, tmp_path):
    """300 committed test images, end to end."""
    shard = ROOT / "assets/fashion_mnist_test/fashion-test-000000.tar.gz"
    images = [pixels for _, pixels in zip(range(300), images_of(shard), strict=False)]
    (tmp_path / "shards").mkdir()
    for index in range(3):
        samples = [Sample(f"{number:04d}", images[number], 0) for number in range(index * 100, (index + 1) * 100)]
        write_shard(tmp_path / "shards" / f"s-{index}.tar", samples)
    flags = (
        "--config", ROOT / "configs/fashion/eval.yaml", "--checkpoint", BUNDLED_TOKENIZER, "--lengths", "1,32",
        f"dataset.params.eval_shards_path_or_url={tmp_path}/shards/s-{{0..2}}.tar",
        "dataset.params.num_eval_examples=300", "dataset.params.num_workers_per_gpu=0",
    )  # fmt: skip
    status, _, _, one = evaluate(evaluate_reconstruction, *flags)
    assert status == 0
    scores = [row["psnr"] for row in one["rows"]]
    assert scores == sorted(scores) and scores[0] > 13 and scores[-1] > 18
    on_two_processes("scripts/evaluate_reconstruction.py", *FEATURES, *flags, "--output_dir", tmp_path / "two")
    two = json.loads((tmp_path / "two" / "metrics.json").read_text())
    for row, other in zip(one["rows"], two["rows"], strict=True):
        for name in MEASURES:
            assert row[name] == pytest.approx(other[name], rel=1e-3)


def images_of(shard):
    return (sample["png"] for sample in read_shard(str(shard)))
