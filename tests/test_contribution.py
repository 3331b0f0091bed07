"""What each token contributes: exact on a decoder with known weights, and the same however the work is cut up."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from modeling.contribution import (
    Contributions,
    contributions,
    mean_of_one_token,
    other_codes,
    prefix_changes,
    replacement_changes,
)
from modeling.one_d_piece import OneDPiece
from scripts import generate_token_contribution_data, visualize_token_contribution
from tests.apple_gpu import AppleGPU
from tests.evaluation_data import command
from tests.fill import fill
from tests.shard_data import make_shards, shard_spec
from utils.cli import run
from utils.errors import UserError
from utils.evaluation.contribution_figures import area_of_half, draw_maps
from utils.figures import plotting
from utils.parts import Parts
from utils.paths import ROOT

SIDE, NUM_TOKENS, CODEBOOK = 8, 3, 16
SHARDS = [4, 3]  # images in each


class ToyDecoder:
    """Token i adds code * WEIGHTS[i] to one pixel of its own, in all channels; the last token adds nothing."""

    WEIGHTS = (0.125, 0.0625, 0.0)
    codebook_size = 4
    num_latent_tokens = 3
    latent_tokens = torch.zeros(3, 1)

    def decode_tokens(self, tokens):
        images = torch.zeros(len(tokens), 3, 2, 2)
        for index in range(tokens.shape[1]):
            images[:, :, index // 2, index % 2] = tokens[:, index, None] * self.WEIGHTS[index]
        return images


def toy_contributions(tokens, codes, batch_size=64, group=64):
    total = Contributions(3, 2)
    for some, others in zip(tokens.split(group), codes.split(group), strict=True):
        for places, change in replacement_changes(ToyDecoder(), some, others, batch_size):
            total.update(places, change)
        total.count += len(some)
    return contributions(total.arrays())


def test_contributions_of_known_weights_are_exact():
    tokens = torch.tensor([[0, 3, 1], [2, 0, 0]])
    codes = torch.tensor([[[1], [1], [2]], [[3], [3], [3]]])  # changes of 1, 2, 1 and 1, 3, 3 codes
    result = toy_contributions(tokens, codes)
    l1, l2 = result["length_to_diff_l1"], result["length_to_diff_l2"]
    assert l1.shape == l2.shape == (3, 2, 2) and l1.dtype == np.float64
    assert l1[0, 0, 0] == 3 * 0.125 and l1[1, 0, 1] == 3 * (2 + 3) / 2 * 0.0625
    assert l2[0, 0, 0] == 3 * 0.125**2 and l2[1, 0, 1] == 3 * (4 + 9) / 2 * 0.0625**2
    assert np.count_nonzero(l1) == np.count_nonzero(l2) == 2  # nowhere else, and nothing by the last token
    assert result["mean_l1"].tolist() == l1.mean(axis=(1, 2)).tolist() and result["mean_l1"][2] == 0
    means = np.array([2, 3]) * 3 * 0.0625 / 4
    assert result["standard_error_l1"][1] == pytest.approx(means.std(ddof=1) / np.sqrt(2), rel=1e-12)
    assert result["standard_error_l1"][0] == 0  # both images change alike
    assert int(result["count"]) == 2


def test_several_replacements_are_averaged():
    tokens = torch.zeros(1, 3, dtype=torch.long)
    one_and_three = torch.tensor([1, 3]).expand(1, 3, 2)
    result = toy_contributions(tokens, one_and_three)
    assert result["length_to_diff_l1"][0, 0, 0] == 3 * 2 * 0.125
    assert result["length_to_diff_l2"][0, 0, 0] == 3 * 5 * 0.125**2
    assert np.isnan(result["standard_error_l1"]).all()  # of one image


@pytest.mark.parametrize(("batch_size", "group"), [(1, 1), (2, 3), (6, 2), (7, 5), (1000, 7)])
def test_batches_do_not_change_contributions(batch_size, group):
    tokens = torch.randint(4, (7, 3), generator=torch.Generator().manual_seed(0))
    codes = other_codes(tokens, [str(index) for index in range(7)], codebook_size=4, num_draws=2, seed=0)
    expected, found = toy_contributions(tokens, codes), toy_contributions(tokens, codes, batch_size, group)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-12, atol=1e-15)


def test_other_codes_are_other_uniform_and_the_images_own():
    tokens = torch.randint(5, (400, 3), generator=torch.Generator().manual_seed(0))
    keys = [f"image {index}" for index in range(400)]
    codes = other_codes(tokens, keys, codebook_size=5, num_draws=4, seed=1)
    steps = (codes - tokens[..., None]) % 5
    assert codes.shape == (400, 3, 4) and 0 <= codes.min() and codes.max() == 4
    shares = steps.flatten().bincount(minlength=5) / steps.numel()
    assert shares[0] == 0 and (shares[1:] - 0.25).abs().max() < 0.03
    assert torch.equal(other_codes(tokens[7:9], keys[7:9], codebook_size=5, num_draws=4, seed=1), codes[7:9])
    assert not torch.equal(other_codes(tokens, keys, codebook_size=5, num_draws=4, seed=2), codes)


def test_prefix_mode_measures_what_a_token_adds():
    tokens = torch.tensor([[1, 2, 3], [3, 0, 1]])
    no_tokens = mean_of_one_token(ToyDecoder(), torch.tensor([0, 1, 0, 1]), batch_size=1)
    assert no_tokens[0].tolist() == [[2 * 0.125, 0], [0, 0]]
    changes = dict(enumerate(prefix_changes(ToyDecoder(), tokens, no_tokens)))
    assert [changes[index][0] for index in range(3)] == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert changes[0][1].shape == (2, 1, 1, 3, 2, 2)
    assert changes[0][1][:, 0, 0, 0, 0, 0].tolist() == [-0.125, 0.125]
    assert changes[1][1][:, 0, 0, 0, 0, 1].tolist() == [2 * 0.0625, 0]
    assert not changes[2][1].any()


# The command


def config_of(folder):
    return {
        "experiment": {"output_dir": str(folder / "no-run"), "init_weight": ""},
        "model": {
            "type": "one_d_piece",
            "vq_model": {
                "codebook_size": CODEBOOK,
                "token_size": 4,
                "vit_enc_model_size": "tiny",
                "vit_dec_model_size": "tiny",
                "vit_enc_patch_size": 4,
                "vit_dec_patch_size": 4,
                "num_latent_tokens": NUM_TOKENS,
            },
            "pixel_vqgan": {
                "channels": 32,
                "channel_multipliers": [1, 1, 1],
                "num_res_blocks": 1,
                "latent_channels": 8,
                "codebook_size": 16,
            },
        },
        "dataset": {
            "type": "shards",
            "params": {
                "eval_shards_path_or_url": shard_spec(folder, len(SHARDS)),
                "num_workers_per_gpu": 0,
                "num_eval_examples": sum(SHARDS),
            },
            "preprocessing": {"resize_shorter_edge": SIDE, "crop_size": SIDE},
        },
    }


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """Two shards of images, a tokenizer with random weights, and their configuration."""
    folder = make_shards(tmp_path_factory.mktemp("shards"), SHARDS)
    config = config_of(folder)
    OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
    fill(OneDPiece(config), 0).save_pretrained(folder / "model")
    return folder


@pytest.fixture
def measure(setup, tmp_path, monkeypatch, capsys):
    """Run the command in this process; returns (exit status, stdout, stderr, what it wrote)."""

    def measure(out="out", *arguments, **flags):
        flags = {"config": setup / "config.yaml", "checkpoint": setup / "model", "device": "cpu"} | flags
        flags["output_dir"] = tmp_path / out
        argv = [f"--{name}={value}" for name, value in flags.items()]
        monkeypatch.setattr(sys, "argv", ["generate_token_contribution_data.py", *argv, *arguments])
        status = 0
        try:
            run(generate_token_contribution_data.main)
        except SystemExit as stop:
            status = stop.code
        path = tmp_path / out / "diffs.npz"
        return status, *capsys.readouterr(), dict(np.load(path, allow_pickle=False)) if path.is_file() else None

    return measure


def assert_same(found, expected, rtol=0.0):
    for name in expected.keys() - {"protocol"}:
        np.testing.assert_allclose(found[name], expected[name], rtol=rtol, atol=rtol and 1e-7)


def test_the_file_holds_the_published_arrays_the_errors_and_the_protocol(measure):
    status, printed, _, result = measure()
    assert status == 0 and "7 images: the first 1 of 3 tokens carry" in printed
    for norm in ("l1", "l2"):
        assert result[f"length_to_diff_{norm}"].shape == (NUM_TOKENS, SIDE, SIDE)
        np.testing.assert_allclose(result[f"mean_{norm}"], result[f"length_to_diff_{norm}"].mean(axis=(1, 2)))
        assert (result[f"mean_{norm}"] > 0).all() and (result[f"standard_error_{norm}"] > 0).all()
    assert int(result["count"]) == sum(SHARDS)
    protocol = json.loads(str(result["protocol"]))
    assert protocol["plan"]["mode"] == "replace" and protocol["originals"]["seen"] == sum(SHARDS)
    assert {"checkpoint_sha256", "versions", "command", "rounding"} <= protocol.keys()


def test_any_count_and_batch_give_the_same_means(measure):
    _, _, _, expected = measure("expected")
    for out, flags in {"a": {"batch_size": 1}, "b": {"batch_size": 5, "save_every": 2}, "c": {"save_every": 4}}.items():
        status, _, _, result = measure(out, **flags)
        assert status == 0
        assert_same(result, expected, rtol=1e-4)  # decoded in other batches, in float32


def test_half_precision_and_a_batch_size_of_its_own_measure_nearly_the_same(measure):
    _, _, _, expected = measure("expected")
    status, printed, _, result = measure("half", precision="bf16", batch_size="auto")
    assert status == 0 and "batch size     " in printed
    plan = json.loads(str(result["protocol"]))["plan"]
    assert (plan["precision"], plan["compiled"]) == ("bf16", False)
    np.testing.assert_allclose(result["mean_l1"], expected["mean_l1"], rtol=0.3)


def test_contributions_need_no_float64_on_the_device(measure):
    for mode in ("replace", "prefix"):
        with AppleGPU():
            status, _, _, result = measure(mode, mode=mode)
        assert status == 0 and np.isfinite(result["mean_l1"]).all()


def test_a_subset_is_drawn_by_the_seed(measure):
    results = [measure(f"{seed}-{copy}", num_images=4, seed=seed)[-1] for seed, copy in ((1, 1), (1, 2), (2, 1))]
    assert all(int(result["count"]) == 4 for result in results)
    assert_same(results[0], results[1])
    assert not np.array_equal(results[0]["mean_l1"], results[2]["mean_l1"])


def test_a_run_that_was_killed_goes_on(measure, monkeypatch, tmp_path):
    _, _, _, expected = measure("expected", save_every=2)

    class Killed(Exception):
        pass

    def write_two_and_die(self, part, **arrays):
        if part == 2:
            raise Killed
        write(self, part, **arrays)

    write = Parts.write
    monkeypatch.setattr(Parts, "write", write_two_and_die)
    with pytest.raises(Killed):
        measure(save_every=2)
    assert sorted(path.name for path in (tmp_path / "out/parts").iterdir()) == ["000000.npz", "000001.npz", "plan.json"]
    done = []
    monkeypatch.setattr(Parts, "write", lambda self, part, **arrays: (done.append(part), write(self, part, **arrays)))
    status, _, error, _ = measure(save_every=2, seed=1)
    assert status == 1 and "holds results of other settings: seed was 42 and is now 1" in error
    status, _, _, result = measure(save_every=2)
    assert status == 0 and done == [2, 3] and not (tmp_path / "out/parts").exists()
    assert_same(result, expected)
    assert "is there already" in measure(save_every=2)[1]
    assert "other settings: mode was" in measure(save_every=2, mode="prefix")[2]
    assert "other settings: precision was" in measure(save_every=2, precision="bf16")[2]


def test_contributions_of_other_images_of_the_same_names_are_not_taken(measure, setup, tmp_path):
    shutil.copytree(setup, tmp_path / "changed")
    with open(next((tmp_path / "changed").glob("*.tar")), "ab") as shard:
        shard.write(bytes(512))
    elsewhere = f"dataset.params.eval_shards_path_or_url={shard_spec(tmp_path / 'changed', len(SHARDS))}"
    measure()
    status, _, error, _ = measure("out", elsewhere)
    assert status == 1 and 'source was "2 shards, sha256' in error
    with np.load(tmp_path / "out/diffs.npz") as file:
        arrays = dict(file)
    protocol = json.loads(str(arrays["protocol"]))
    del protocol["plan"]["source"]  # as before images were noted
    np.savez(tmp_path / "out/diffs.npz", **arrays | {"protocol": np.array(json.dumps(protocol))})
    assert "is there already" in measure()[1]


def test_two_processes_equal_one(measure, setup, tmp_path):
    # Prefix mode: there the processes also share the count of first codes.
    _, _, _, expected = measure("one", save_every=2, mode="prefix")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *(ROOT / "scripts/generate_token_contribution_data.py", "--config", setup / "config.yaml", "--mode=prefix"),
        *("--checkpoint", setup / "model", "--output_dir", tmp_path / "two", "--save_every=2", "--device=cpu"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(list(map(str, command)), check=True, env=environment, capture_output=True, timeout=1200)
    assert_same(dict(np.load(tmp_path / "two/diffs.npz")), expected, rtol=1e-6)


def test_a_dry_run_writes_nothing(measure, tmp_path):
    status, printed, _, result = measure("dry", "--dry_run")
    assert status == 0 and "7 images done" in printed and result is None and not (tmp_path / "dry").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_images": 8}, "--num_images must be at most 7"),
        ({"num_images": 0}, "--num_images must be 1 or more, got 0"),
        ({"replacements": 2, "mode": "prefix"}, "nothing is random in --mode prefix"),
        ({"config": "nowhere.yaml"}, "nowhere.yaml"),
        ({"checkpoint": "nowhere/at/all"}, "no checkpoint nowhere/at/all"),
    ],
)
def test_bad_input_is_explained_in_one_sentence(measure, flags, message):
    status, _, error, _ = measure(**flags)
    assert status == 1 and error.startswith("error: ") and error.count("\n") == 1 and message in error, error


@pytest.mark.parametrize(
    "arrays", [None, {}, {"protocol": "mine"}, {"protocol": '["plan"]'}, {"protocol": '{"plan": []}'}]
)
def test_another_file_of_the_name_is_explained_in_one_sentence(setup, monkeypatch, capsys, tmp_path, arrays):
    with open(tmp_path / "diffs.npz", "wb") as file:
        file.write(b"mine") if arrays is None else np.savez(file, **arrays)
    place = ("--config", setup / "config.yaml", "--checkpoint", setup / "model", "--device", "cpu")
    main = generate_token_contribution_data.main
    status, _, error = command(monkeypatch, capsys, main, *place, "--output_dir", tmp_path)
    assert status == 1 and f"{tmp_path} holds diffs.npz, and no command of ours has left that there: name" in error


def test_missing_images_are_an_error(measure):
    status, _, error, _ = measure("out", "dataset.params.num_eval_examples=8")
    assert status == 1 and "expected 8 evaluation samples, got 7" in error


# The figures


@pytest.fixture
def draw(monkeypatch, capsys):
    def draw(**flags):
        argv = [f"--{name}={value}" for name, value in flags.items()]
        monkeypatch.setattr(sys, "argv", ["visualize_token_contribution.py", *argv])
        status = 0
        try:
            run(visualize_token_contribution.main)
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return draw


def write_data(folder, num_tokens):
    maps = np.random.default_rng(0).random((num_tokens, 4, 4)) * 0.5 ** np.arange(num_tokens)[:, None, None]
    means = maps.mean(axis=(1, 2))
    arrays = {"length_to_diff": maps, "mean": means, "standard_error": means / 10}
    both = {f"{name}_{norm}": value for name, value in arrays.items() for norm in ("l1", "l2")}
    folder.mkdir()
    np.savez(folder / "diffs.npz", **both, count=7, protocol=json.dumps({"plan": {"mode": "replace"}}))
    return means


def test_figures_are_not_blank_and_have_their_size(draw, tmp_path):
    means = write_data(tmp_path / "data", 8)
    status, printed, _ = draw(input=tmp_path / "data")
    assert status == 0
    # Pixels: inches as the code says, 150 to the inch.
    sizes = {"heatmaps_l1": (1080, 450), "heatmaps_l2": (1080, 450), "contributions": (1500, 600)}
    for name, size in (sizes | {"contribution_row": (1500, 480)}).items():
        image = Image.open(tmp_path / "data" / f"{name}.png").convert("RGB")
        assert image.size == size, name
        assert np.asarray(image).std() > 10, f"{name} is blank"
        assert (tmp_path / "data" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    shares = json.loads((tmp_path / "data/summary.json").read_text())["share_of_first_l1"]
    assert shares["2"] == pytest.approx(means[:2].sum() / means.sum()) and shares["8"] == pytest.approx(1)
    assert f"{shares['2']:.1%}" in printed


def test_the_summary_of_one_image_which_has_no_standard_errors_is_json(draw, tmp_path):
    write_data(tmp_path / "data", 2)
    with np.load(tmp_path / "data/diffs.npz") as stored:
        unknown = {name: np.full(2, np.nan) for name in ("standard_error_l1", "standard_error_l2")}
        np.savez(tmp_path / "data/diffs.npz", **{**stored, **unknown})
    assert draw(input=tmp_path / "data")[0] == 0
    text = (tmp_path / "data/summary.json").read_text()
    summary = json.loads(text, parse_constant=lambda word: pytest.fail(f"JSON has no {word}"))
    assert summary["standard_error_l1"] == ["nan", "nan"]


@pytest.mark.parametrize(("num_maps", "rows", "columns"), [(1, 1, 1), (6, 2, 4), (256, 16, 16)])
def test_the_grid_fits_any_number_of_maps(num_maps, rows, columns):
    maps = np.random.default_rng(0).random((256, 4, 4))
    figure = draw_maps(maps, np.arange(1, num_maps + 1), "title")
    axes = [axis for axis in figure.axes if axis.get_images()]
    assert [axis.get_title() for axis in axes] == [str(token) for token in range(1, num_maps + 1)]
    assert axes[0].get_subplotspec().get_gridspec().get_geometry() == (rows, columns)
    scales = {(axis.get_images()[0].norm.vmin, axis.get_images()[0].norm.vmax) for axis in axes}
    assert len(scales) == 1  # one scale for all maps
    plotting().close(figure)


@pytest.mark.parametrize("tokens", ["0", "9", "1-", "a", "", "3-1", "1-9"])
def test_tokens_out_of_range_are_refused(draw, tmp_path, tokens):
    write_data(tmp_path / "data", 8)
    status, _, error = draw(input=tmp_path / "data", tokens=tokens)
    assert status == 1 and error.startswith("error: --tokens ") and error.count("\n") == 1


def test_data_that_are_none_are_refused(draw, tmp_path):
    (tmp_path / "diffs.npz").write_bytes(b"nothing")
    for place in (tmp_path, tmp_path / "nowhere"):
        status, _, error = draw(input=place)
        assert status == 1 and "must be the data of scripts/generate_token_contribution_data.py" in error


def test_no_change_anywhere_can_be_drawn():
    figure = draw_maps(np.zeros((2, 4, 4)), np.array([1, 2]), "nothing")
    figure.canvas.draw()


def test_the_area_that_holds_half_of_the_change():
    even, one, three = np.full((4, 4), 0.5), np.zeros((4, 4)), np.zeros((4, 4))
    one[2, 1] = 7
    three[0, :3] = 1
    areas = area_of_half(np.stack([even, one, three]))
    assert areas.tolist() == [8 / 16, 1 / 16, 2 / 16]


def test_parse_tokens():
    assert visualize_token_contribution.parse_tokens("3,1-2,2", 5).tolist() == [1, 2, 3]
    assert visualize_token_contribution.parse_tokens(None, 3).tolist() == [1, 2, 3]
    with pytest.raises(UserError):
        visualize_token_contribution.parse_tokens("1,,2", 5)
