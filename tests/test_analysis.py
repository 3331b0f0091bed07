"""Prefixes, entropies and what tokens tell about the class, against tables made by hand; grids that are not blank."""

import json
import sys
from collections import Counter
from contextlib import nullcontext

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from codec.files import load_codec
from modeling.identity import tokens_record
from modeling.one_d_piece import OneDPiece
from scripts import analyze_tokens, visualize_first_token_clustering
from tests.apple_gpu import AppleGPU
from tests.codec_images import CODEBOOK, NUM_TOKENS, save_codec
from tests.fill import fill
from tests.shard_data import SIDE, make_shards, shard_spec
from tests.test_contribution import config_of
from utils.errors import UserError
from utils.evaluation.reconstruction_files import RECORD, keys_text
from utils.token_statistics import (
    clusters,
    conditional_entropy,
    entropy,
    frequent_prefixes,
    mutual_information,
    nearest_prefixes,
    normalized_mutual_information,
    purity,
    same_class,
    with_prefix,
)
from utils.tokens import read_tokens, write_tokens

NUM_IMAGES = 40


def drawn(seed, shape, limit=4):
    return np.random.default_rng(seed).integers(0, limit, shape)


# Pure functions


@pytest.mark.parametrize("prefix", [(0,), (3,), (2, 1), (1, 1, 1), (0, 1, 2, 3)])
def test_prefix_search_equals_brute_force(prefix):
    tokens = drawn(0, (200, 4))
    expected = [index for index, row in enumerate(tokens.tolist()) if tuple(row[: len(prefix)]) == prefix]
    assert with_prefix(tokens, prefix).tolist() == expected


def test_frequent_prefixes_equal_a_count():
    tokens = drawn(1, (300, 3))
    for length in (1, 2):
        counts = Counter(tuple(row[:length]) for row in tokens.tolist())
        expected = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        assert frequent_prefixes(tokens, length) == expected
        assert frequent_prefixes(tokens, length, 3) == expected[:3]


def test_nearest_prefixes_share_most_codes_then_are_most_frequent():
    tokens = np.array([[1, 5, 0], [1, 6, 0], [1, 6, 1], [2, 7, 0], [2, 7, 0], [2, 7, 1]])
    assert nearest_prefixes(tokens, (1, 9), limit=5) == [((1, 6), 2), ((1, 5), 1)]
    assert nearest_prefixes(tokens, (9, 5), limit=1) == [((2, 7), 3)]
    assert nearest_prefixes(tokens, (2, 7, 9), limit=5) == [((2, 7, 0), 2), ((2, 7, 1), 1)]
    assert nearest_prefixes(tokens, (9,), limit=2) == [((1,), 3), ((2,), 3)]


def test_entropies_of_a_table():
    # x and y together: (0,0) 4 times, (0,1) 2, (1,0) 1, (1,1) 1.
    x = np.array([0, 0, 0, 0, 0, 0, 1, 1])
    y = np.array([0, 0, 0, 0, 1, 1, 0, 1])
    entropy_x = 0.75 * np.log2(4 / 3) + 0.25 * 2
    entropy_y = 5 / 8 * np.log2(8 / 5) + 3 / 8 * np.log2(8 / 3)
    assert entropy(x) == pytest.approx(entropy_x) and entropy(y) == pytest.approx(entropy_y)
    assert entropy(np.stack([x, y], axis=1)) == pytest.approx(1.75)  # 1/2, 1/4, 1/8, 1/8
    assert conditional_entropy(y, x) == pytest.approx(1.75 - entropy_x)
    assert mutual_information(x, y) == pytest.approx(entropy_x + entropy_y - 1.75)
    expected = (entropy_x + entropy_y - 1.75) / ((entropy_x + entropy_y) / 2)
    assert normalized_mutual_information(x, y) == pytest.approx(expected)


def test_entropies_at_the_limits():
    x = np.arange(8)
    assert entropy(x) == 3 and entropy(np.zeros(5)) == 0
    assert conditional_entropy(x, x) == 0 and conditional_entropy(x, np.zeros(8)) == 3
    assert normalized_mutual_information(x, x[::-1] * 10) == pytest.approx(1)
    assert normalized_mutual_information(np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])) == 0
    assert normalized_mutual_information(np.zeros(4), np.zeros(4)) == 0


def test_clusters_are_the_sequences_with_one_prefix():
    tokens = np.array([[5, 1, 0], [5, 1, 7], [5, 2, 0], [4, 1, 0]])
    assert clusters(tokens, 1).tolist() == [1, 1, 1, 0]
    second = clusters(tokens, 2)
    assert second[0] == second[1] and len(set(second.tolist())) == 3


def test_purity_and_same_class_of_a_table():
    cluster = np.array([0, 0, 0, 1, 1, 2])
    labels = np.array([7, 7, 8, 9, 9, 7])
    assert purity(cluster, labels) == pytest.approx((2 + 2 + 1) / 6)
    assert same_class(cluster, labels) == pytest.approx((1 + 1) / (3 + 1))  # pairs: 3 in the first, 1 in the second
    assert purity(np.arange(6), labels) == 1 and np.isnan(same_class(np.arange(6), labels))


# The numbers: scripts/analyze_tokens.py


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """Tokens whose first code is the class and whose second copies it; images, a tokenizer, a configuration."""
    folder = make_shards(tmp_path_factory.mktemp("shards"), [NUM_IMAGES])
    config = config_of(folder)
    config["dataset"]["params"] |= {"eval_shards_path_or_url": shard_spec(folder, 1), "num_eval_examples": NUM_IMAGES}
    OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
    fill(OneDPiece(config), 0).save_pretrained(folder / "model")
    labels = np.arange(NUM_IMAGES) % 4
    tokens = np.stack([labels * 3, labels * 3, drawn(0, NUM_IMAGES, 16)], axis=1)
    np.savez(folder / "tokens.npz", tokens=tokens, keys=np.array([f"{index:05d}" for index in range(NUM_IMAGES)]))
    np.save(folder / "labels.npy", labels)
    return folder


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a script's main in this process; returns (exit status, stdout, stderr)."""
    from utils.cli import run

    def call(script, **flags):
        argv = [f"--{name}={value}" for name, value in flags.items()]
        monkeypatch.setattr(sys, "argv", [script.__name__, *argv])
        status = 0
        try:
            run(script.main)
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return call


def test_the_analysis_finds_what_was_put_into_the_tokens(call, setup, tmp_path):
    status, printed, _ = call(
        analyze_tokens,
        data=setup / "tokens.npz",
        labels=setup / "labels.npy",
        config=setup / "config.yaml",
        checkpoint=setup / "model",
        out=tmp_path,
    )
    assert status == 0 and "40 images" in printed
    result = json.loads((tmp_path / "analysis.json").read_text())
    first, second, third = result["positions"]
    assert first["entropy"] == pytest.approx(2) and first["codes_used"] == 4 and "entropy_given_before" not in first
    assert second["entropy_given_before"] == pytest.approx(0) and second["entropy_given_shuffled"] > 1
    assert third["entropy_given_before"] > 1
    assert [row["tokens"] for row in result["classes"]] == [1, 2]  # 4 and 8 are more than there are
    for row in result["classes"]:
        assert row["nmi"] == pytest.approx(1) and row["nmi_shuffled"] < 0.3
        assert row["purity"] == row["same_class"] == 1 and row["same_class_shuffled"] < 0.5
        assert row["probe_accuracy"] == 1 and row["probe_chance"] < 0.8
    assert result["codebook_size"] == 16 and 0 < result["usage"] <= 1
    assert np.asarray(Image.open(tmp_path / "analysis.png").convert("L")).std() > 5
    assert (tmp_path / "analysis.pdf").is_file()


def test_the_analysis_needs_no_float64_on_the_device(call, setup, tmp_path):
    place = {"data": setup / "tokens.npz", "labels": setup / "labels.npy", "out": tmp_path}
    with AppleGPU():
        status, _, err = call(analyze_tokens, config=setup / "config.yaml", checkpoint=setup / "model", **place)
    assert status == 0, err


def test_without_labels_only_positions_are_told(call, setup, tmp_path):
    status, printed, _ = call(analyze_tokens, data=setup / "tokens.npz", out=tmp_path)
    assert status == 0 and "NMI" not in printed
    assert json.loads((tmp_path / "analysis.json").read_text())["classes"] == []


def test_labels_of_the_tokens_file_are_taken_where_no_others_are_given(call, setup, tmp_path):
    saved = read_tokens(setup / "tokens.npz")
    labels = np.where(np.arange(NUM_IMAGES) < 4, -1, np.arange(NUM_IMAGES) % 4)
    write_tokens(tmp_path / "tokens.npz", saved.tokens, saved.keys, labels=labels)
    status, printed, _ = call(analyze_tokens, data=tmp_path / "tokens.npz")
    result = json.loads((tmp_path / "analysis.json").read_text())
    assert status == 0 and "NMI" in printed and result["num_labelled"] == NUM_IMAGES - 4
    assert result["classes"][0]["nmi"] == pytest.approx(1)
    write_tokens(tmp_path / "tokens.npz", saved.tokens, saved.keys, labels=np.full(NUM_IMAGES, -1))
    status, printed, _ = call(analyze_tokens, data=tmp_path / "tokens.npz")
    assert status == 0 and "NMI" not in printed


def reconstructed(folder, keys, **arrays):
    """Files as scripts/reconstruct_tokenizer.py leaves them."""
    folder.mkdir()
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    (folder / RECORD).write_text(json.dumps({"keys": keys_text(keys)}))
    return folder


def test_labels_with_recorded_names_are_taken_by_name(call, setup, tmp_path, caplog):
    keys = read_tokens(setup / "tokens.npz").keys
    labels = np.load(setup / "labels.npy")
    order = np.random.default_rng(0).permutation(NUM_IMAGES)
    folder = reconstructed(tmp_path / "mixed", [f"{keys[index]}.png" for index in order], labels=labels[order])
    status, _, error = call(analyze_tokens, data=setup / "tokens.npz", labels=folder / "labels.npy", out=tmp_path)
    assert status == 0, error
    assert json.loads((tmp_path / "analysis.json").read_text())["classes"][0]["nmi"] == pytest.approx(1)
    assert not caplog.records
    folder = reconstructed(tmp_path / "others", [*keys[1:], "another"], labels=labels)
    status, _, error = call(analyze_tokens, data=setup / "tokens.npz", labels=folder / "labels.npy", out=tmp_path)
    assert status == 1 and "has no 00000, which was tokenized (1 are missing): give the one" in error


def test_labels_without_recorded_names_are_taken_in_order_and_it_is_said(call, setup, tmp_path, caplog):
    assert call(analyze_tokens, data=setup / "tokens.npz", labels=setup / "labels.npy", out=tmp_path)[0] == 0
    assert [record.getMessage() for record in caplog.records] == [
        f"{setup}/labels.npy: no names are recorded beside it, so its labels are taken in the tokens' order"
    ]


def test_bits_tell_the_images_whose_tokens_the_entropy_model_seldom_saw(monkeypatch, capsys, tmp_path):
    save_codec(tmp_path / "tokenizer")
    tokens = np.random.default_rng(0).integers(0, CODEBOOK, (20, NUM_TOKENS))
    labels = np.arange(20) % 2
    write_tokens(tmp_path / "tokens.npz", tokens, [f"image-{index}" for index in range(20)], labels=labels)
    flags = (
        "--data",
        tmp_path / "tokens.npz",
        "--checkpoint",
        tmp_path / "tokenizer",
        "--bits",
        "--output_dir",
        tmp_path,
    )
    monkeypatch.setattr(sys, "argv", ["analyze_tokens.py", *map(str, flags)])
    analyze_tokens.main()
    printed = capsys.readouterr().out
    everything, first, second = json.loads((tmp_path / "analysis.json").read_text())["bits"]
    assert everything["num_images"] == 20 and first["num_images"] == second["num_images"] == 10
    assert everything["mean"] == pytest.approx((first["mean"] + second["mean"]) / 2)
    codec = load_codec(checkpoint=str(tmp_path / "tokenizer"))
    bits = codec.models.best().prefix_bits(tokens)[:, -1]
    assert everything["mean"] == pytest.approx(bits.mean())
    assert f"strangest: image-{bits.argmax()}, " in printed
    assert (tmp_path / "bits.png").is_file()
    monkeypatch.setattr(sys, "argv", [word for word in sys.argv if word != "--bits"])
    analyze_tokens.main()
    assert not (tmp_path / "bits.png").exists()  # of tokens that may be others by now


def test_tokens_are_not_looked_at_with_another_tokenizer_of_their_size(monkeypatch, tmp_path):
    for seed, name in enumerate(("mine", "other")):
        save_codec(tmp_path / name, seed)
    mine = load_codec(checkpoint=str(tmp_path / "mine")).tokenizer
    tokens = np.random.default_rng(0).integers(0, CODEBOOK, (20, NUM_TOKENS))
    about = tokens_record(mine, str(tmp_path / "mine"))
    write_tokens(tmp_path / "tokens.npz", tokens, list(map(str, range(20))), labels=np.arange(20) % 2, **about)
    for bits in ((), ("--bits",)):
        for name in ("mine", "other"):
            flags = "--data", tmp_path / "tokens.npz", "--checkpoint", tmp_path / name, *bits
            monkeypatch.setattr(sys, "argv", ["analyze_tokens.py", *map(str, flags)])
            with (
                nullcontext() if name == "mine" else pytest.raises(UserError, match="mine, and .* is another tokenizer")
            ):
                analyze_tokens.main()
    write_tokens(tmp_path / "tokens.npz", tokens, list(map(str, range(20))), tokenizer="of an older file")
    analyze_tokens.main()


def test_input_that_does_not_fit_is_refused(call, setup, tmp_path):
    np.save(tmp_path / "few.npy", np.zeros(3, dtype=int))
    np.save(tmp_path / "one.npy", np.zeros(NUM_IMAGES, dtype=int))
    np.savez(tmp_path / "tokens.npz", tokens=np.full((NUM_IMAGES, 3), 99), keys=np.arange(NUM_IMAGES))
    for flags, message in (
        ({"data": tmp_path / "nowhere.npz"}, "must hold `tokens` and `keys`"),
        ({"data": tmp_path / "few.npy"}, "must hold `tokens` and `keys`"),
        ({"labels": tmp_path / "few.npy"}, "must hold 40 integers"),
        ({"labels": setup / "config.yaml"}, "must hold class ids"),
        ({"labels": tmp_path / "one.npy"}, "must tell two classes or more apart"),
        ({"data": tmp_path / "tokens.npz", "checkpoint": setup / "model"}, "makes 3 tokens in 0..15"),
    ):
        status, _, error = call(analyze_tokens, **{"data": setup / "tokens.npz", "out": tmp_path} | flags)
        assert status == 1 and error.startswith("error: ") and error.count("\n") == 1 and message in error, error


# The grids: scripts/visualize_first_token_clustering.py


@pytest.fixture
def array_file(tmp_path):
    """images.npy of flat images, the i-th of brightness 100 + i."""
    images = np.broadcast_to(np.arange(100, 100 + NUM_IMAGES, dtype=np.uint8)[:, None, None, None], (40, 8, 8, 3))
    np.save(tmp_path / "images.npy", images)
    return tmp_path / "images.npy"


def tiles(path):
    """The brightnesses of the images on a sheet, which has no other large grey areas."""
    values, counts = np.unique(np.asarray(Image.open(path).convert("L")), return_counts=True)
    return {int(value) for value, count in zip(values, counts, strict=True) if count > 5000 and value < 250}


def test_a_grid_shows_the_images_with_the_prefix(call, setup, array_file, tmp_path):
    status, printed, _ = call(
        visualize_first_token_clustering,
        data=setup / "tokens.npz",
        prefix="3,3",
        images=array_file,
        out=tmp_path / "grid.png",
        grid_size="3,4",
    )
    assert status == 0 and "first tokens 3,3: 10 of 40 images" in printed
    assert tiles(tmp_path / "grid.png") == {101 + 4 * index for index in range(10)}


def test_images_with_recorded_names_are_taken_by_name(call, setup, array_file, tmp_path):
    keys, images = read_tokens(setup / "tokens.npz").keys, np.load(array_file)
    folder = reconstructed(tmp_path / "mixed", keys[::-1], images=images[::-1])
    (folder / "png").mkdir()
    for number, image in enumerate(images[::-1]):
        Image.fromarray(image).save(folder / f"png/{number:06d}.png")
    flags = {"data": setup / "tokens.npz", "prefix": "3,3", "out": tmp_path / "grid.png"}
    for name in ("images.npy", "png"):
        assert call(visualize_first_token_clustering, images=folder / name, **flags)[0] == 0
        assert tiles(tmp_path / "grid.png") == {101 + 4 * index for index in range(10)}
    folder = reconstructed(tmp_path / "others", [*keys[1:], "another"], images=images)
    status, _, error = call(visualize_first_token_clustering, images=folder / "images.npy", **flags)
    assert status == 1 and "has no 00000, which was tokenized" in error


def test_of_many_the_seed_draws_and_the_grid_has_its_size(call, setup, array_file, tmp_path):
    shown = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        flags = {"data": setup / "tokens.npz", "prefix": 0, "images": array_file, "grid_size": "2,3", "seed": seed}
        status, printed, _ = call(visualize_first_token_clustering, out=tmp_path / f"{name}.png", **flags)
        assert status == 0 and "10 of 40 images, 6 shown" in printed
        shown.append(tiles(tmp_path / f"{name}.png"))
    assert shown[0] == shown[1] != shown[2] and len(shown[0]) == 6
    assert shown[0] <= {100 + 4 * index for index in range(10)}
    width, height = Image.open(tmp_path / "a.png").size
    assert 3 * 96 < width < 3 * 96 + 150 and 2 * 96 < height < 2 * 96 + 80


def test_without_a_prefix_the_most_frequent_are_listed_and_drawn(call, setup, array_file, caplog):
    status, printed, _ = call(visualize_first_token_clustering, data=setup / "tokens.npz", images=array_file)
    assert [record.getMessage() for record in caplog.records] == [
        f"{array_file}: no names are recorded beside it, so its images are taken in the tokens' order"
    ]
    assert status == 0 and "4 different first codes" in printed and "4 different first pairs" in printed
    folder = setup / "first_tokens"
    grids = {f"first_tokens_{code}.png" for code in (0, 3, 6, 9)}
    assert {path.name for path in folder.glob("*.png")} == grids | {"most_frequent.png"}
    assert tiles(folder / "first_tokens_9.png") == {103 + 4 * index for index in range(10)}
    assert tiles(folder / "most_frequent.png") == {100 + index for index in range(NUM_IMAGES)}


def test_images_of_the_other_commands_are_found_by_key(call, setup, array_file, tmp_path):
    """Beside a generator's tokens, also of before it wrote keys; in the folder that was tokenized."""
    images, tokens = np.load(array_file), read_tokens(setup / "tokens.npz").tokens
    folder = tmp_path / "samples"
    (folder / "class").mkdir(parents=True)
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"7_ankle-boot_{index:03d}.png")
        Image.fromarray(image).save(folder / f"class/{index}.png")
    flags = {"data": folder / "tokens.npz", "prefix": 6, "out": tmp_path / "grid.png"}
    write_tokens(folder / "tokens.npz", tokens, [f"7_ankle-boot_{index:03d}" for index in range(NUM_IMAGES)])
    assert call(visualize_first_token_clustering, **flags)[0] == 0
    assert tiles(tmp_path / "grid.png") == {102 + 4 * index for index in range(10)}
    np.savez(folder / "tokens.npz", tokens=tokens, labels=np.full(NUM_IMAGES, 7), samples=np.arange(NUM_IMAGES)[::-1])
    assert call(visualize_first_token_clustering, **flags)[0] == 0
    assert tiles(tmp_path / "grid.png") == {139 - (2 + 4 * index) for index in range(10)}
    write_tokens(tmp_path / "tokens.npz", tokens, [f"class_{index}" for index in range(NUM_IMAGES)])
    flags["data"] = tmp_path / "tokens.npz"
    assert call(visualize_first_token_clustering, images=folder, **flags)[0] == 0
    assert tiles(tmp_path / "grid.png") == {102 + 4 * index for index in range(10)}


def test_images_may_come_from_a_folder_or_a_configuration(call, setup, array_file, tmp_path):
    images = np.load(array_file)
    numbered, by_key = tmp_path / "numbered", tmp_path / "by_key"
    for folder in (numbered, by_key):
        folder.mkdir()
        for index, image in enumerate(images):
            Image.fromarray(image).save(folder / (f"{index:06d}.png" if folder is numbered else f"{index:05d}.png"))
    flags = {"data": setup / "tokens.npz", "prefix": 6}
    for name, place in (("img_dir", numbered), ("images", by_key)):
        call(visualize_first_token_clustering, out=tmp_path / "grid.png", **flags, **{name: place})
        assert tiles(tmp_path / "grid.png") == {102 + 4 * index for index in range(10)}
    call(visualize_first_token_clustering, out=tmp_path / "out", **flags, images=setup / "config.yaml")
    sheet = np.asarray(Image.open(tmp_path / "out/first_tokens_6.png"))
    first = sheet[-SIDE * 12 :, 8 : 8 + SIDE * 12]
    assert first.std() > 20  # noise images, not blank


def test_what_cannot_be_drawn_is_explained(call, setup, array_file, tmp_path):
    np.save(tmp_path / "few.npy", np.zeros((3, 8, 8, 3), dtype=np.uint8))
    (tmp_path / "folder").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "folder/00001.png")
    for flags, message in (
        ({"prefix": 5}, "no image's tokens begin with 5; the nearest that exist are 0 (10 images)"),
        ({"prefix": "3,4"}, "no image's tokens begin with 3,4; the nearest that exist are 3,3 (10 images)"),
        ({"prefix": "x"}, "--prefix takes codes such as 774"),
        ({"prefix": "0,0,0,0"}, "--prefix must have at most 3 codes"),
        ({"prefix": 0, "grid_size": "0,5"}, "--grid_size takes rows and columns"),
        ({"prefix": 0, "images": tmp_path / "few.npy"}, "must hold the 40 images of the tokens"),
        ({"prefix": 0, "images": tmp_path / "folder"}, "has no 00000"),
        ({"prefix": 0, "images": tmp_path / "nothing"}, "--images must be a .npy file, a folder or a configuration"),
        ({"out": tmp_path / "grid.png"}, "--output_dir must be a folder when no --prefix is given"),
    ):
        flags = {"data": setup / "tokens.npz", "images": array_file, "out": tmp_path / "out"} | flags
        status, _, error = call(visualize_first_token_clustering, **flags)
        assert status == 1 and error.startswith("error: ") and error.count("\n") == 1 and message in error, error
    status, _, error = call(visualize_first_token_clustering, data=setup / "tokens.npz", prefix=0)
    assert status == 1 and "give the images as --images" in error
