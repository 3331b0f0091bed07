"""Fitting entropy models: tables, the network in floats, its integers, and the command."""

import json
import time
import tracemalloc

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import scripts.fit_entropy_model
from codec.bitstream import Mode
from codec.entropy import FILE, entropy_models_of, load_entropy_models, save_entropy_models
from codec.fitting import SUBJECT, fitted_tables, log_tables, rounded, shared_tables
from codec.length import FILE as LENGTH_FILE
from codec.length import load_length_predictor
from data import DataError
from data.token_sets import write_token_set
from modeling.causal_network import CausalTokenNetwork
from modeling.identity import identity
from modeling.one_d_piece import OneDPiece
from modeling.tasks.entropy import bits_of
from modeling.tokenizers import encode_tokens, frozen_tokenizer
from tests.codec_data import TOKENIZER, likely_tokens, random_models
from tests.fill import fill
from tests.generator_data import NUM_CODES, NUM_TOKENS, call, make_world, tokenizer_of
from utils.config import load_config
from utils.errors import UserError
from utils.paths import ROOT

SIZES = {"num_tokens": NUM_TOKENS, "codebook_size": NUM_CODES, "token_size": 4, "width": 16}


@pytest.fixture(scope="module")
def tokens():
    """(6000, 8) tokens that depend on those before them."""
    return likely_tokens(random_models(**SIZES).by_mode[Mode.NETWORK], 6000)


def network_of(**sizes):
    settings = {"blocks": 1, "window": 0, "reach": 0} | SIZES | sizes
    network = CausalTokenNetwork(OmegaConf.create({"model": {"entropy": settings}}))
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (*network.parameters(), network.codes, network.tables):
            parameter.copy_(torch.randn(parameter.shape, generator=draws) * 0.3)
    return network


# ----------------------------------------------------------------------------------------------------------- the parts


def test_tables_have_the_shares_of_the_tokens(tokens):
    tables = fitted_tables([tokens[:3000], tokens[3000:]], NUM_TOKENS, NUM_CODES)
    for position in (0, 5):
        found = tables.frequencies(tokens[:1, :position])[0] / 2**tables.total_bits
        counted = np.bincount(tokens[:, position], minlength=NUM_CODES) / len(tokens)
        assert abs(found - counted).max() < 0.02
    ideal = np.mean([entropy(tokens[:, position]) for position in range(NUM_TOKENS)])
    assert tables.prefix_bits(tokens)[:, -1].mean() / NUM_TOKENS == pytest.approx(ideal, abs=0.02)


def entropy(tokens):
    shares = np.bincount(tokens) / len(tokens)
    return -(shares[shares > 0] * np.log2(shares[shares > 0])).sum()


def test_a_code_that_never_came_has_a_share_too():
    tables = fitted_tables([np.zeros((100, 3), np.int64)], 3, 1024)
    assert tables.frequencies(np.zeros((1, 2), np.int64)).min() >= 1


def test_many_positions_share_their_tables_and_the_first_ones_do_not():
    assert shared_tables(32).tolist() == list(range(32))
    shared = shared_tables(256)
    assert shared[:17].tolist() == list(range(17)) and shared.max() == 31
    assert np.bincount(shared)[16:].tolist() == [15] * 16


@pytest.mark.parametrize("shape", [{"window": 0}, {"window": 3, "reach": 2, "blocks": 2}, {"window": 20, "reach": 4}])
def test_the_network_of_floats_and_of_integers_say_the_same(shape, tokens):
    network = network_of(**shape)
    tables = fitted_tables([tokens], NUM_TOKENS, NUM_CODES)
    network.tables.copy_(log_tables(tables))
    some = torch.from_numpy(tokens[:500])
    integers = rounded(network, tables, some)
    with torch.no_grad():
        in_floats = bits_of(network(some), some).numpy()
    in_integers = np.diff(integers.prefix_bits(tokens[:500]), axis=1, prepend=0)
    apart = abs(in_floats - in_integers)[in_floats < 9]  # no share is under one of 2 ** 14
    assert apart.max() < 0.6 and apart.mean() < 0.06


@pytest.mark.parametrize("window", [0, 3])
def test_a_token_is_predicted_from_those_before_it_alone(window):
    network = network_of(window=window, reach=2)
    rows = torch.randint(NUM_CODES, (4, NUM_TOKENS))
    before = network(rows)
    for position in range(NUM_TOKENS):
        changed = rows.clone()
        changed[:, position] = (changed[:, position] + 1) % NUM_CODES
        same = (network(changed) == before).all(dim=2).all(dim=0)
        assert same[: position + 1].all()
        assert position == NUM_TOKENS - 1 or not same[position + 1]


# --------------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokens):
    """Two tokenizers, two sets of tokens that the first one might have made, and one of the other."""
    folder = make_world(tmp_path_factory.mktemp("world"))
    write_tokens(folder / "fitting", tokens, folder / "tokenizer")
    write_tokens(folder / "reversed", tokens[::-1], folder / "tokenizer")
    write_tokens(folder / "of_other", tokens, folder / "other")
    return folder


def write_tokens(folder, tokens, tokenizer):
    manifest = {
        "tokenizer": {"checkpoint": tokenizer.name, "identity": identity(frozen_tokenizer(tokenizer))},
        "codebook_size": NUM_CODES,
        "num_tokens": NUM_TOKENS,
        "variants": ["centre"],
    }
    for split, rows in (("train", tokens[:5000]), ("eval", tokens[5000:])):
        labels, keys = np.zeros(len(rows), np.int64), np.array([f"{number:05d}" for number in range(len(rows))])
        part = {"tokens": rows[:, None].astype(np.uint16), "labels": labels, "keys": keys}
        write_token_set(folder / split, lambda part=part: [part], manifest)


def fit(monkeypatch, world, *arguments, tokenizer="tokenizer", token_set="fitting"):
    places = ("--token_set", world / token_set, "--tokenizer", world / tokenizer)
    call(monkeypatch, scripts.fit_entropy_model.main, *places, *arguments)


def test_one_command_fits_stores_and_measures(world, tmp_path, monkeypatch, capsys):
    fit(monkeypatch, world, "--output_dir", tmp_path, "training.max_train_steps=300", "model.entropy.width=32")
    models = entropy_models_of(world / "tokenizer", bytes.fromhex(identity(tokenizer_of(world))), NUM_TOKENS, NUM_CODES)
    assert sorted(models.by_mode) == list(Mode)
    report = json.loads((tmp_path / "entropy.json").read_text())
    bits = {name: np.mean(mode["bits"]) for name, mode in report["modes"].items()}
    assert bits["network"] < bits["tables"] - 0.3 < bits["fixed"] - 0.3
    assert report["lengths"] == [1, 2, 4, 8] and report["num_images"] == 1000
    assert (tmp_path / "entropy.png").is_file() and (tmp_path / "entropy.pdf").is_file()
    assert "bits of each token, mean of 1,000 images" in capsys.readouterr().out

    with pytest.raises(UserError, match="is there already: give --force to replace it"):
        fit(monkeypatch, world, "--output_dir", tmp_path)


def test_the_same_command_fits_the_length_predictor_to_images(world, tmp_path, monkeypatch, capsys):
    arguments = ("--tokenizer", world / "tokenizer", "--output", tmp_path / FILE)
    images = ("--images", world / "generator.yaml", "--num_images", 20)
    call(monkeypatch, scripts.fit_entropy_model.main, *arguments, *images)
    predictor = load_length_predictor(tmp_path / LENGTH_FILE, bytes.fromhex(identity(tokenizer_of(world))))
    assert predictor.lengths.tolist() == [1, 2, 3, 4, 6, 8] and predictor.weights.dtype == np.float16
    assert "on images held out" in capsys.readouterr().out and not (tmp_path / FILE).exists()
    with pytest.raises(UserError, match="length.safetensors is there already"):
        call(monkeypatch, scripts.fit_entropy_model.main, *arguments, *images)
    with pytest.raises(UserError, match="nothing to fit to: give --token_set"):
        call(monkeypatch, scripts.fit_entropy_model.main, *arguments)


def test_images_of_another_size_fit_no_length_predictor(world, tmp_path, monkeypatch, capsys):
    arguments = ("--tokenizer", world / "tokenizer", "--output", tmp_path / FILE, "--images", world / "generator.yaml")
    with pytest.raises(UserError, match=r"generator.yaml crops images to 32 pixels, and the tokenizer .* takes 8: "):
        call(monkeypatch, scripts.fit_entropy_model.main, *arguments, "dataset.preprocessing.crop_size=32")
    with pytest.raises(SystemExit, match="2"):
        call(monkeypatch, scripts.fit_entropy_model.main, *arguments, "--num_images", "0")
    assert "--num_images: expected a whole number of 1 or more, got 0" in capsys.readouterr().err


def test_tokens_of_another_tokenizer_are_refused(world, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="was made by another tokenizer"):
        fit(monkeypatch, world, "--output_dir", tmp_path, tokenizer="other")


def test_a_training_is_gone_on_with_for_the_same_tokenizer_and_tokens_alone(world, tmp_path, monkeypatch, capsys):
    place = ("--output_dir", tmp_path / "out", "training.max_train_steps=2", "model.entropy.width=16", "--force")
    files = [tmp_path / name / FILE for name in ("first", "again", "wrong")]
    fit(monkeypatch, world, *place, "--output", files[0])
    capsys.readouterr()
    fit(monkeypatch, world, *place, "--output", files[1])
    assert files[0].read_bytes() == files[1].read_bytes()
    for others, what in (
        ({"token_set": "reversed"}, "token set"),
        ({"token_set": "of_other", "tokenizer": "other"}, "tokenizer"),
    ):
        with pytest.raises(UserError, match=f"training holds the training of another {what} .* give another --output"):
            fit(monkeypatch, world, *place, "--output", files[2], **others)
    (tmp_path / "out/training" / SUBJECT).unlink()  # as before there was one
    with pytest.raises(UserError, match=r"of another tokenizer \(unknown, and this is"):
        fit(monkeypatch, world, *place, "--output", files[2])
    assert not files[2].exists()


def test_a_training_that_failed_to_begin_keeps_nobody_out(world, tmp_path, monkeypatch):
    place = ("--output_dir", tmp_path / "out", "--output", tmp_path / FILE)
    place = (*place, "training.max_train_steps=2", "model.entropy.width=16")
    with pytest.raises(UserError, match="must be no, fp16 or bf16"):
        fit(monkeypatch, world, *place, "training.mixed_precision=float16")
    fit(monkeypatch, world, *place, tokenizer="other", token_set="of_other")
    assert (tmp_path / FILE).is_file()


# --------------------------------------------------------------------------------------------- 256 tokens of 12 bits


@pytest.mark.long  # an encoder of 23 million parameters reads photographs
def test_256_tokens_of_12_bits_are_exact_and_fit_into_a_megabyte(tmp_path):
    """A random S-256, as trained weights are not at hand: it shows that all is exact, and no gain."""
    config = load_config(ROOT / "configs/eval/one-d-piece_s256.yaml")
    tokenizer = fill(OneDPiece(config), 0).eval()
    photographs = [np.asarray(Image.open(path)) for path in sorted((ROOT / "assets/photos").glob("*.png"))]
    images = torch.from_numpy(np.stack(photographs)).permute(0, 3, 1, 2) / 255
    tokens = encode_tokens(tokenizer, images)
    assert tokens.shape == (10, 256) and len(tokens.unique()) > 100
    settings = load_config(
        ROOT / "configs/entropy_256.yaml",
        [
            *("experiment.output_dir=x", "dataset.params.token_set=x", "experiment.tokenizer_checkpoint=x"),
            *("model.entropy.num_tokens=256", "model.entropy.codebook_size=4096", "model.entropy.token_size=12"),
        ],
    )
    network = CausalTokenNetwork(settings)
    tables = fitted_tables([tokens.numpy()], 256, 4096)
    network.codes.copy_(tokenizer.quantize.lookup(torch.arange(4096)))
    network.tables.copy_(log_tables(tables))
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(20):
        optimizer.zero_grad()
        bits_of(network(tokens), tokens).mean().backward()
        optimizer.step()
    save_entropy_models(tmp_path / FILE, TOKENIZER, rounded(network, tables, tokens))
    assert (tmp_path / FILE).stat().st_size < 1_000_000

    models = load_entropy_models(tmp_path / FILE)
    tracemalloc.start()
    for model in models.by_mode.values():
        payloads, start = [model.encode(row) for row in tokens.numpy()], time.process_time()
        found = np.stack([model.decode(payload, 256)[0] for payload in payloads])
        milliseconds = 100 * (time.process_time() - start)
        assert np.array_equal(found, tokens.numpy())
        print(
            f"{model.mode.name}: {np.mean([*map(len, payloads)]):.1f} bytes, decoded in {milliseconds:.1f} ms an image"
        )
        for row, payload in zip(tokens.numpy(), payloads, strict=True):
            found, certain = model.decode(payload[: len(payload) // 2], 256, is_whole=False)
            assert certain > 50 and np.array_equal(found[:certain], row[:certain])
    megabytes = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    print(f"{(tmp_path / FILE).stat().st_size} bytes stored, {megabytes:.1f} MB beyond the model to write and read")
    assert megabytes < 20
