"""Prefixes and cut files completed by a generator: what is known stays, what is invented repeats and is said to be."""

import json

import numpy as np
import pytest
from PIL import Image

from codec.completion import Completer
from codec.entropy import write_tokens
from codec.files import FITS, Settings, load_codec
from codec.rate import goal_of
from modeling.completion import bundled_generator_of, load_completion
from modeling.maskgit import ImageBert
from scripts import decompress, evaluate_completion
from tests.codec_images import CODEBOOK, NUM_TOKENS, photo, save_codec
from tests.fill import fill
from tests.generator_data import call, make_world, small_config
from utils.errors import UserError
from utils.files import sha256_of


def tiny_generator(codebook_size=CODEBOOK):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    generator = {**sizes, "image_seq_len": NUM_TOKENS, "condition_num_classes": 3, "randomize_temperature": 9.0}
    names = {"dataset": {"class_names": ["bag", "boot", "hat"]}}
    return fill(ImageBert({"model": {"vq_model": {"codebook_size": codebook_size}, "generator": generator}} | names), 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A codec, its generator, and a file of two of six tokens."""
    folder = tmp_path_factory.mktemp("completion")
    save_codec(folder / "tokenizer")
    tiny_generator().save_pretrained(folder / "generator")
    codec = load_codec(checkpoint=str(folder / "tokenizer"))
    tokens = np.array([15, 24, 7, 16, 6, 3])
    for name, length in (("two", 2), ("all", NUM_TOKENS)):
        (folder / f"{name}.1dp").write_bytes(write_tokens(tokens[:length], codec.models))
    return folder


@pytest.fixture
def shown(folder, tmp_path, monkeypatch, capsys):
    """What decompress.py makes of a file: pixels, and what it says."""

    def shown(name, *flags):
        place = ("--checkpoint", folder / "tokenizer", "--device", "cpu", "-o", tmp_path / "out.png", "--force")
        call(monkeypatch, decompress.main, folder / name, *place, *flags)
        return np.asarray(Image.open(tmp_path / "out.png")), capsys.readouterr().err

    return shown


def test_a_short_file_is_completed_and_it_is_said_that_the_rest_is_invented(folder, shown):
    own = ("--generator", folder / "generator")
    plain, said = shown("two.1dp")
    assert "invented" not in said
    faithful, said = shown("two.1dp", "--complete", "faithful", *own)
    assert "\n1 image is invented beyond the tokens that were read, by " in said
    assert said.endswith("generator, faithful, seed 42: not what was compressed\n")
    assert not np.array_equal(plain, faithful)
    assert np.array_equal(faithful, shown("two.1dp", "--complete", "faithful", "--seed", 7, *own)[0])
    vivid = {seed: shown("two.1dp", "--complete", "vivid", "--seed", seed, *own)[0] for seed in (1, 2)}
    assert not np.array_equal(vivid[1], vivid[2])
    assert np.array_equal(vivid[1], shown("two.1dp", "--complete", "vivid", "--seed", 1, *own)[0])


def test_the_class_of_what_is_shown_may_be_told(folder, shown, monkeypatch):
    told, generate = [], ImageBert.generate

    def recording(self, condition, *arguments, **settings):
        told.append(condition)
        return generate(self, condition, *arguments, **settings)

    monkeypatch.setattr(ImageBert, "generate", recording)
    for flags in ((), ("--label", "boot"), ("--label", "2")):
        shown("two.1dp", "--complete", "--generator", folder / "generator", *flags)
    assert told == [None, [1], [2]]


def test_a_whole_file_stays_as_it_is_and_the_first_tokens_of_one_are_completed_as_a_short_file(folder, shown):
    own = ("--complete", "--generator", folder / "generator")
    whole, said = shown("all.1dp", *own)
    assert np.array_equal(whole, shown("all.1dp")[0]) and "invented" not in said
    assert np.array_equal(shown("all.1dp", "--tokens", 2, *own)[0], shown("two.1dp", *own)[0])


def test_tiles_keep_the_tokens_that_they_have(folder):
    codec = load_codec(checkpoint=str(folder / "tokenizer"))
    settings = Settings(goal_of(psnr=12.0), FITS["tile"])
    (written,) = codec.compress([photo(40, 30)], settings)
    read = codec.read(written.data)
    assert len(read.certain) > 4
    completer = Completer("vivid", 0, generator=str(folder / "generator"))
    whole = completer(read, codec)
    for before, length, after in zip(read.tokens, read.certain, whole.tokens, strict=True):
        assert np.array_equal(after[:length], before[:length]) and after.min() >= 0
    assert codec.images([whole])[0].size == (40, 30)


def test_many_tiles_are_completed_some_at_a_time_and_come_out_the_same(folder, monkeypatch):
    codec = load_codec(checkpoint=str(folder / "tokenizer"))
    (written,) = codec.compress([photo(60, 40)], Settings(goal_of(tokens=1), FITS["tile"]))
    read = codec.read(written.data)
    assert len(read.certain) > 12
    sizes, generate = [], ImageBert.generate

    def recording(self, *arguments, **settings):
        sizes.append(len(settings["seeds"]))
        return generate(self, *arguments, **settings)

    monkeypatch.setattr(ImageBert, "generate", recording)
    completed = []
    for batch in (64, 5):
        monkeypatch.setattr("codec.completion.BATCH", batch, raising=False)
        completed.append(Completer("vivid", 0, generator=str(folder / "generator"))(read, codec).tokens)
    assert np.array_equal(*completed) and max(sizes[1:]) == 5 and sum(sizes) == 2 * len(read.certain)


def test_every_bundled_tokenizer_of_the_codec_has_its_generator():
    assert bundled_generator_of("one-d-piece_fashion") == "maskgit_fashion"
    assert bundled_generator_of("one-d-piece_emoji") == "maskgit_emoji"
    with pytest.raises(UserError, match="no bundled generator makes tokens of mine: name one .* as --generator"):
        bundled_generator_of("mine")


def test_a_generator_of_other_tokens_is_refused(folder, tmp_path):
    tiny_generator(codebook_size=8).save_pretrained(tmp_path / "other")
    codec = load_codec(checkpoint=str(folder / "tokenizer"))
    with pytest.raises(UserError, match="makes 6 tokens of 8 codes"):
        load_completion(codec.tokenizer, "mine", "vivid", tmp_path / "other")


def test_flags_of_completion_go_together(folder, shown):
    with pytest.raises(UserError, match="go with --complete"):
        shown("two.1dp", "--label", "boot")
    with pytest.raises(UserError, match="a payload without a header"):
        shown("two.1dp", "--complete", "--bare", "--tokens", 2)


def test_completed_images_are_scored_beside_their_prefixes(tmp_path, monkeypatch, capsys):
    world = make_world(tmp_path)
    fill(ImageBert(small_config(world)), 0).save_pretrained(world / "generator")
    models = (
        "--config",
        world / "generator.yaml",
        "--checkpoint",
        world / "tokenizer",
        "--generator",
        world / "generator",
    )
    place = ("--output_dir", tmp_path / "out", "--device", "cpu", "--features", "none")
    call(monkeypatch, evaluate_completion.main, *models, *place, "--lengths", "1,4", "--num_images", 6, "--labels")
    results = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert results["protocol"]["generator_sha256"] == sha256_of(world / "generator/model.safetensors")
    rows = results["rows"]
    assert [(row["tokens"], row["system"]) for row in rows] == [
        (length, system) for length in (1, 4) for system in ("prefix alone", "completed, faithful", "completed, vivid")
    ]
    assert len({row["psnr"] for row in rows}) == 6
    assert (tmp_path / "out" / "curves.png").is_file()
