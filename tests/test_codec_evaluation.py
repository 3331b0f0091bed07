"""What rate control and searched tokens come to: prefixes measured once, choices among them, and the command."""

import json
import shutil
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from codec.evaluation import Prefixes, Results, gains, measured
from codec.files import load_codec
from codec.length import LengthPredictor
from codec.rate import psnr_of
from data.evaluation_images import NumberedImages
from modeling.tokenizers import frozen_tokenizer
from scripts import evaluate_codec
from tests.codec_images import NUM_TOKENS, pixels, save_codec
from tests.evaluation_data import NUM_IMAGES, make_world, originals, small_config
from tests.generator_data import call
from utils.config import save_config
from utils.errors import UserError
from utils.evaluation.comparison import Originals
from utils.evaluation.session import Session
from utils.files import sha256_of

LENGTHS = np.arange(1, 5)
SIZES = np.array([[2, 3, 4, 5], [2, 4, 6, 9]])
PSNR = np.array([[18.0, 20, 19, 21], [14.0, 16, 18, 20]])


def results(psnr=PSNR, sizes=SIZES, effort=0, features=None):
    empty = np.zeros((len(psnr), 0))
    features = empty if features is None else features
    return Results(Prefixes(sizes, 10 ** (-psnr / 10), features, empty, empty, np.ones(len(psnr))), LENGTHS, effort)


def test_lengths_that_double_get_a_row_each():
    rows = results().of_lengths()
    assert [row["name"] for row in rows] == ["1 token, effort 0", "2 tokens, effort 0", "4 tokens, effort 0"]
    assert [row["bytes_per_image"] for row in rows] == [2, 3.5, 7]
    assert [row["psnr"] for row in rows] == pytest.approx([16, 18, 20.5])
    assert rows[1]["psnr_deviation"] == pytest.approx(2)


def test_a_psnr_that_is_asked_for_is_reached_with_the_fewest_bytes():
    row = results().of_psnr(18)
    assert (row["bytes_per_image"], row["tokens"], row["reached"]) == (4, 2, 1)
    assert results().of_psnr(20.5)["reached"] == 0.5


def test_a_budget_is_spent_where_it_helps():
    row = results().of_budget(4)
    assert row["bytes_per_image"] <= 4 and row["unspent_bytes"] == 8 - 2 * row["bytes_per_image"]
    assert row["tokens"] == 2  # not 4 of the first image


def test_a_budget_that_no_files_fit_into_is_known():
    assert [results().fits(size) for size in (1.9, 2, 2.5, 9)] == [False, True, True, True]


def test_guesses_that_are_right_are_decoded_once():
    weights = np.concatenate([np.eye(4), np.zeros((1, 4))]).astype(np.float16)
    predictor = LengthPredictor(LENGTHS, weights, np.zeros(4, np.float32), np.ones(4, np.float32))
    row = results(features=PSNR).of_guesses(17.9, predictor)
    assert (row["decodes"], row["more_bytes"], row["reached"]) == (1, 0, 1)
    low = results(features=PSNR - 3).of_guesses(17.9, predictor)
    high = results(features=PSNR + 3).of_guesses(17.9, predictor)
    assert low["more_bytes"] > 0
    assert high["decodes"] > 1 and high["reached"] == 1


def test_guesses_that_miss_are_decoded_at_every_length_and_take_the_best():
    weights = np.concatenate([np.eye(4), np.zeros((1, 4))]).astype(np.float16)
    predictor = LengthPredictor(LENGTHS, weights, np.zeros(4, np.float32), np.ones(4, np.float32))
    psnr = np.array([[18.0, 21, 19, 20], [14.0, 16, 18, 20]])  # the second prefix of the first is the best one
    for target, reached in ((20.5, 0.5), (30, 0)):
        row = results(psnr, features=psnr - 5).of_guesses(target, predictor)
        assert (row["decodes"], row["reached"], row["tokens"], row["more_bytes"]) == (1 + 4, reached, (2 + 4) / 2, 0)


def test_one_length_for_all_stands_between_two_lengths_of_about_as_many_bytes():
    beside = results().at_equal_bytes(4.25)
    assert beside["psnr"] == pytest.approx((18 + 18.5) / 2)


def test_gains_are_those_of_equal_tokens_and_of_equal_bytes():
    found = gains(results(PSNR + 1, SIZES * 2, effort=1), results())
    assert found["at_equal_tokens"] == pytest.approx([1, 1, 1, 1])
    assert found["more_bytes"] == pytest.approx([2, 3.5, 5, 7])
    assert found["at_equal_bytes"][0] < 1 - 1.5


def test_where_one_curve_has_no_so_many_bytes_nothing_is_said_to_be_gained():
    plain, better = results(), results(PSNR + 1, SIZES + 1, effort=1)
    found = gains(better, plain)
    assert found["at_equal_bytes"][3] is None and None not in found["at_equal_bytes"][:3]
    between = np.interp(np.log(7), np.log(better.mean_bytes), better.psnr.mean(axis=0))
    assert found["at_most_bytes"] == pytest.approx(between - 20.5)
    assert gains(plain, better)["at_equal_bytes"][0] is None and gains(plain, better)["at_most_bytes"] < 0


def test_prefixes_have_the_sizes_and_errors_of_the_files(tmp_path):
    codec = load_codec(checkpoint=str(save_codec(tmp_path)))
    prefixes = measured(codec, pixels(3), effort=1)
    assert prefixes.sizes.shape == prefixes.errors.shape == (3, NUM_TOKENS)
    assert prefixes.ssim.shape == prefixes.perceptual.shape == (3, 4)  # of 1, 2, 4, 6 tokens
    assert (psnr_of(prefixes.errors) > 0).all() and (prefixes.perceptual > 0).all() and (prefixes.seconds > 0).all()
    assert measured(codec, pixels(3), effort=0, looks_closely=False).ssim.shape == (3, 0)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make_world(tmp_path_factory.mktemp("world"))
    save_config(small_config(folder), folder / "eval.yaml")
    return folder


def test_parts_of_another_decoder_or_of_other_images_are_not_taken(world, tmp_path, monkeypatch):
    tokenizer = frozen_tokenizer(world / "tokenizer")
    with torch.no_grad():
        next(tokenizer.decoder.parameters()).mul_(2)
    tokenizer.save_pretrained(tmp_path / "other")
    for shard in (world / "shards").glob("*.tar"):
        (tmp_path / shard.name.replace("s-", "t-")).symlink_to(shard)
    of_others = f"dataset.params.eval_shards_path_or_url={tmp_path}/t-{{000000..000002}}.tar"
    shutil.copytree(world / "shards", tmp_path / "changed")
    with open(tmp_path / "changed/s-000001.tar", "ab") as shard:
        shard.write(bytes(512))
    changed = of_others.replace("/t-", "/changed/s-")  # of the same names, and as many
    place = ("--num_images", 8, "--device", "cpu", "--output_dir", tmp_path / "out", "--psnr_only")
    for checkpoint, changes, differs in (
        (world / "tokenizer", [], None),
        (tmp_path / "other", [], "weights was"),
        (world / "tokenizer", [of_others], "image_names was"),
        (world / "tokenizer", [changed], 'source was "3 shards'),
    ):
        arguments = ("--config", world / "eval.yaml", "--checkpoint", checkpoint, *place, *changes)
        with nullcontext() if differs is None else pytest.raises(UserError, match=differs):
            call(monkeypatch, evaluate_codec.main, *arguments)


def test_the_command_measures_and_goes_on_where_it_was(world, tmp_path, monkeypatch, capsys):
    arguments = ["--config", world / "eval.yaml", "--checkpoint", world / "tokenizer", "--efforts", 0, 1]
    arguments += ["--num_images", 12, "--psnr", 10, "--device", "cpu", "--output_dir", tmp_path, "--psnr_only"]
    monkeypatch.setattr(sys, "argv", ["evaluate_codec.py", *map(str, arguments)])
    for _ in range(2):  # the second time all parts are there
        evaluate_codec.main()
        report = json.loads((tmp_path / "metrics.json").read_text())
        assert {row["system"] for row in report["rows"]} == {
            f"effort {effort}, {how}" for effort in (0, 1) for how in ("one length", "PSNR asked for", "budget")
        }
        assert report["efforts"]["1"]["at_equal_tokens"][-1] > 0 == report["efforts"]["0"]["at_equal_tokens"][-1]
    record = report["protocol"]
    assert record["originals"]["seen"] == 12 and record["checkpoint"].endswith("tokenizer")
    assert record["checkpoint_sha256"] == sha256_of(world / "tokenizer/model.safetensors")
    assert (tmp_path / "curves.png").is_file()
    printed = capsys.readouterr().out
    assert "effort 1 beside effort 0: " in printed and "effort 0 beside" not in printed


def test_a_tokenizer_that_needs_all_its_tokens_is_measured_at_those(world, tmp_path, monkeypatch, capsys):
    arguments = ("--config", world / "eval.yaml", "--checkpoint", world / "tokenizer", "--num_images", 4)
    place = ("--device", "cpu", "--output_dir", tmp_path, "model.vq_model.strict_length_assertion=True")
    call(monkeypatch, evaluate_codec.main, *arguments, "--budget", 4, *place)
    report = json.loads((tmp_path / "metrics.json").read_text())
    (row,) = [row for row in report["rows"] if row["system"] == "effort 0, one length"]
    assert row["name"] == "8 tokens, effort 0" and row["ssim"] <= 1
    size = row["bytes_per_image"]  # of fixed bits
    assert {row["bytes_per_image"] for row in report["rows"]} == {size}
    assert f"images take {size:.2f} bytes at least, so no budget of 3, 4, 5" in capsys.readouterr().out


def test_the_images_that_were_measured_are_known_by_their_pixels(world, tmp_path):
    keys, pixels, _ = originals(world)
    with Session("cpu", tmp_path) as session:
        images = NumberedImages(small_config(world), pixels.shape[1], session.processes)
        record = evaluate_codec.originals_of(session, images, np.arange(NUM_IMAGES), batch_size=8)
        same = Originals(session.processes)
        same.add(torch.from_numpy(pixels).permute(0, 3, 1, 2), keys)
        assert record == same.record(NUM_IMAGES)


def test_values_that_are_changed_on_the_command_line_are_those_of_the_tokenizer_too(world, tmp_path, monkeypatch):
    flags = ("--config", world / "eval.yaml", "--num_images", 1, "--device", "cpu", "--psnr_only")
    place = ("--output_dir", tmp_path / "out", f"experiment.output_dir={tmp_path}/untrained")
    with pytest.raises(UserError, match="no weights for this configuration: .*/untrained"):
        call(monkeypatch, evaluate_codec.main, *flags, *place)
