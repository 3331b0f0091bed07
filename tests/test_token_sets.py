"""Token sets: what pretokenize.py writes, and the batches that training reads from it."""

import contextlib
import json
import shutil
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

import scripts.pretokenize
from data import DataError
from data.catalogue import Catalogue, CentreCrop, Variants, check_skipped
from data.image_folder import num_eval_examples
from data.labels import Labelled
from data.loaders import evaluation_loader, loaders
from data.pretokenizing import Split
from data.scored_sets import reference_images
from data.shard_files import Sample, write_manifest, write_shard
from data.tar_samples import fingerprint_of
from data.token_loader import check_token_sets, evaluation_tokens, training_tokens
from data.token_sets import TokenSet
from data.transforms import decode_image
from modeling.identity import identities, identity
from modeling.one_d_piece import OneDPiece
from modeling.tokenizers import encode_tokens
from tests.generator_data import NUM_TOKENS, call, make_world, on_two_processes, small_config, tokenizer_of
from tests.shard_data import SIDE, make_shards, png
from utils.config import load_config, save_config
from utils.errors import UserError

FILES = ("tokens.npy", "labels.npy", "keys.txt", "manifest.json")


def pretokenize(monkeypatch, folder, output, *arguments):
    config = ("--config", folder / "generator.yaml", "--output_dir", output, "--device", "cpu")
    call(monkeypatch, scripts.pretokenize.main, *config, *arguments)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Shards, tokenizers, and the token set of both splits in `tokens`."""
    folder = make_world(tmp_path_factory.mktemp("world"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        pretokenize(monkeypatch, folder, folder / "tokens")
    return folder


def contents(folder):
    return [(folder / name).read_bytes() for name in FILES]


def tokens_of(folder, images):
    return encode_tokens(tokenizer_of(folder), images.float() / 255)


def image(key):
    """(3, 8, 8) uint8, as the shards hold it."""
    return torch.from_numpy(np.array(decode_image(png(int(key))))).permute(2, 0, 1)


def test_the_set_holds_every_image_once_in_the_order_of_the_keys(world):
    train = TokenSet(world / "tokens/train")
    assert train.keys == [f"{number:05d}" for number in range(20)]
    assert train.labels.tolist() == [number % 10 for number in range(20)]
    assert train.tokens.shape == (20, 2, NUM_TOKENS) and train.tokens.dtype == np.uint16
    assert isinstance(train.tokens, np.memmap)
    assert len(np.unique(train.tokens)) > 10  # or the comparisons below would say nothing
    assert train.manifest["variants"] == ["centre", "centre, mirrored"]
    assert train.manifest["classes"] == [str(label) for label in range(10)]
    evaluation = TokenSet(world / "tokens/eval")
    assert evaluation.tokens.shape == (7, 1, NUM_TOKENS)
    assert not (world / "tokens/train/parts").exists()


@pytest.mark.long  # the compiler takes some seconds for each size of the batch
def test_compiled_and_in_other_batches_the_tokens_are_the_same(world, tmp_path, monkeypatch, capsys):
    pretokenize(monkeypatch, world, tmp_path, "--split", "eval", "--compile", "--batch_size", "auto")
    assert "batch size     " in capsys.readouterr().out
    assert contents(tmp_path / "eval") == contents(world / "tokens/eval")


def test_the_tokens_are_those_made_on_the_fly(world):
    train, evaluation = TokenSet(world / "tokens/train"), TokenSet(world / "tokens/eval")
    images = torch.stack([image(key) for key in train.keys])
    assert np.array_equal(train.tokens[:, 0], tokens_of(world, images).numpy())
    assert np.array_equal(train.tokens[:, 1], tokens_of(world, images.flip(-1)).numpy())
    for batch in evaluation_loader(small_config(world), rank=0, world_size=1):
        rows = [evaluation.keys.index(key) for key in batch["__key__"]]
        assert np.array_equal(evaluation.tokens[rows, 0], tokens_of(world, batch["image"]).numpy())
    on_the_fly, _ = loaders(small_config(world), rank=0, world_size=1)
    for batch in islice(on_the_fly(0), 4):
        tokens = tokens_of(world, batch["image"]).numpy()
        for key, row in zip(batch["__key__"], tokens, strict=True):
            assert any(np.array_equal(row, variant) for variant in train.tokens[int(key)])


def test_random_crops_follow_from_the_seed_and_the_key(world):
    config = small_config(world, "dataset.preprocessing.resize_shorter_edge=12")
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8))
    variants = Variants(config.dataset.preprocessing, num_crops=2, seed=5)
    assert variants.names == [
        *("centre", "centre, mirrored", "random 1", "random 1, mirrored", "random 2", "random 2, mirrored")
    ]
    pixels = variants(wide, "a")
    assert pixels.shape == (6, 3, 8, 8) and torch.equal(pixels, variants(wide, "a"))
    assert torch.equal(pixels[::2], pixels[1::2].flip(-1))
    assert not torch.equal(pixels[2], pixels[4]) and not torch.equal(pixels[2], variants(wide, "b")[2])
    config.dataset.preprocessing.random_flip = False
    assert Variants(config.dataset.preprocessing, num_crops=1, seed=5).names == ["centre", "random 1"]


def test_two_processes_write_what_one_writes(world, tmp_path):
    arguments = ("--config", world / "generator.yaml", "--output_dir", tmp_path, "--device", "cpu")
    on_two_processes("scripts/pretokenize.py", *arguments, "--split", "train")
    assert contents(tmp_path / "train") == contents(world / "tokens/train")


def test_a_killed_run_goes_on(world, tmp_path, monkeypatch):
    parts = []
    original = Split.tokenize

    def tokenize(split, part, *arguments):
        if len(parts) == 2:
            raise KeyboardInterrupt
        parts.append(part.name)
        return original(split, part, *arguments)

    monkeypatch.setattr(Split, "tokenize", tokenize)
    with pytest.raises(KeyboardInterrupt):
        pretokenize(monkeypatch, world, tmp_path, "--split", "train")
    with pytest.raises(DataError, match="only an unfinished one"):
        TokenSet(tmp_path / "train")
    with pytest.raises(UserError, match="identity was .* and is now"):
        pretokenize(monkeypatch, world, tmp_path, "--split", "train", "--checkpoint", world / "other")
    parts.clear()
    pretokenize(monkeypatch, world, tmp_path, "--split", "train")
    assert parts == ["s-000002.tar"]
    assert contents(tmp_path / "train") == contents(world / "tokens/train")


def test_a_finished_set_is_left_alone_and_never_mixed(world, monkeypatch, capsys):
    before = contents(world / "tokens/train")
    pretokenize(monkeypatch, world, world / "tokens")
    assert "is there already" in capsys.readouterr().out
    with pytest.raises(UserError, match="variants was .* and is now .*; give another --output_dir"):
        pretokenize(monkeypatch, world, world / "tokens", "--crops", 1)
    assert contents(world / "tokens/train") == before


def test_splits_whose_classes_have_other_ids_are_refused_before_any_work(world, tmp_path, monkeypatch):
    make_shards(tmp_path / "held_out", [5], classes="123456789")
    elsewhere = f"dataset.params.eval_shards_path_or_url={tmp_path}/held_out/s-000000.tar"
    with pytest.raises(DataError, match="class 0 must be the same in training and evaluation, and is '0' in .*'1' in"):
        pretokenize(monkeypatch, world, tmp_path / "tokens", elsewhere)
    assert not (tmp_path / "tokens").exists()
    pretokenize(monkeypatch, world, tmp_path / "tokens", elsewhere, "--split", "eval")


@pytest.fixture
def folder_world(tmp_path):
    """The training images of `world` in a folder of class folders."""
    folder = make_world(tmp_path)
    for number in range(20):
        path = folder / "images" / str(number % 10) / f"{number:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    place = f"dataset.params.train_folder={folder}/images"
    save_config(small_config(folder, "dataset.type=folder", place), folder / "generator.yaml")
    return folder


def test_a_folder_of_images_gives_the_same_tokens(world, folder_world, monkeypatch):
    folder = folder_world
    pretokenize(monkeypatch, folder, folder / "tokens", "--split", "train")
    made, expected = TokenSet(folder / "tokens/train"), TokenSet(world / "tokens/train")
    assert made.keys[:2] == ["0/00000.png", "0/00010.png"] and made.labels.tolist() == sorted(expected.labels)
    numbers = [int(key[2:7]) for key in made.keys]
    assert np.array_equal(made.tokens, expected.tokens[numbers])


def test_a_folder_that_is_named_goes_before_shards_that_are_inherited(folder_world):
    images, path = folder_world / "images", folder_world / "generator.yaml"
    changes = ["dataset.type=tokens", f"dataset.params.eval_folder={images}", "dataset.params.num_eval_examples=7"]
    config = load_config(path, changes)
    for split in ("train", "eval"):
        assert Catalogue(config, split, CentreCrop(config.dataset.preprocessing)).folder == images
    assert num_eval_examples(config) is None  # 7 is of the shards
    save_config(config, path)
    assert reference_images(str(path), (SIDE, SIDE), rank=0, world_size=1, batch_size=4).expected == 20
    config.dataset.params.eval_folder = None
    with pytest.raises(DataError, match="eval_folder must name a folder of images"):
        Catalogue(config, "eval", CentreCrop(config.dataset.preprocessing))


def add_an_image(images):
    (images / "0" / "more.png").write_bytes(png(20))


def replace_an_image(images):
    Image.new("RGB", (9, 9)).save(images / "0" / "00000.png")


def rename_a_class(images):
    (images / "9").rename(images / "ten")


@pytest.mark.parametrize("change", [add_an_image, replace_an_image, rename_a_class])
@pytest.mark.parametrize("finished", [True, False])
def test_tokens_of_a_folder_that_has_changed_are_not_taken_for_its_own(folder_world, monkeypatch, change, finished):
    folder = folder_world
    if not finished:
        monkeypatch.setattr(Split, "write", lambda *_: 1 / 0)
    with contextlib.nullcontext() if finished else pytest.raises(ZeroDivisionError):
        pretokenize(monkeypatch, folder, folder / "tokens", "--split", "train")
    change(folder / "images")
    with pytest.raises(UserError, match='source was "folder of 20 files, sha256 .*" and is now "folder of 2'):
        pretokenize(monkeypatch, folder, folder / "tokens", "--split", "train")


def test_tokens_of_shards_of_the_same_names_from_another_folder_are_refused(world, tmp_path, monkeypatch):
    shutil.copytree(world / "tokens", tmp_path / "tokens")
    shutil.copytree(world / "train", tmp_path / "train")
    elsewhere = f"dataset.params.train_shards_path_or_url={tmp_path}/train/s-{{000000..000002}}.tar"
    pretokenize(monkeypatch, world, tmp_path / "tokens", elsewhere, "--split", "train")  # the same ones
    with open(tmp_path / "train/s-000001.tar", "ab") as shard:
        shard.write(bytes(512))
    with pytest.raises(UserError, match='source was "3 shards, sha256 .*" and is now "3 shards'):
        pretokenize(monkeypatch, world, tmp_path / "tokens", elsewhere, "--split", "train")


def test_shards_of_one_size_are_told_apart_by_their_manifest(tmp_path):
    for name, seed in (("one", 0), ("other", 1)):
        samples = [Sample(f"{number}", png(number), number + seed) for number in range(2)]
        record = write_shard(tmp_path / name / "s-000000.tar", samples)
        write_manifest(tmp_path / name, {"classes": [], "splits": {"s": {"shards": {"s-000000.tar": record}}}})
    one, other = (tmp_path / name / "s-000000.tar" for name in ("one", "other"))
    assert one.stat().st_size == other.stat().st_size
    assert fingerprint_of([str(one)]) != fingerprint_of([str(other)])


def test_the_address_of_a_remote_shard_is_its_own_mark():
    one, other = (fingerprint_of([f"https://{host}/s-000000.tar"]) for host in ("one", "other"))
    assert one != other and "https" not in one


def test_broken_images_are_left_out_of_training_and_stop_evaluation(tmp_path, monkeypatch):
    folder = make_world(tmp_path)
    for split in ("train", "eval"):
        shard = folder / split / "s-000000.tar"
        shard.write_bytes(shard.read_bytes().replace(b"\x89PNG", b"\x89BAD", 1))
    none = "dataset.max_bad_fraction=0.0"
    with pytest.raises(DataError, match="more than dataset.max_bad_fraction=0.0 allows.*s-000000.tar, sample '00000':"):
        pretokenize(monkeypatch, folder, folder / "tokens", none, "--split", "train")
    pretokenize(monkeypatch, folder, folder / "tokens", "--split", "train")
    train = TokenSet(folder / "tokens/train")
    assert len(train) == 19
    (skipped,) = train.manifest["skipped"]
    assert skipped.startswith("broken image: s-000000.tar, sample '00000': ")
    with pytest.raises(DataError, match="s-000000.tar, sample '00000': .*evaluation needs every sample"):
        pretokenize(monkeypatch, folder, folder / "tokens", "--split", "eval")


def test_a_broken_image_of_a_folder_is_named(folder_world, monkeypatch):
    folder = folder_world
    (folder / "images/3/00013.png").write_bytes(b"no image")
    pretokenize(monkeypatch, folder, folder / "tokens", "--split", "train")
    (skipped,) = TokenSet(folder / "tokens/train").manifest["skipped"]
    assert "sample '3/00013.png': " in skipped


def test_so_many_images_may_be_broken_as_in_training():
    """A share of a thousand at least."""
    check_skipped(14, ["a"] * 10, 0.01)
    check_skipped(1989, ["a"] * 20, 0.01)
    check_skipped(1, ["a"] * 2000, None)
    check_skipped(0, [], 0.01)
    for num_images, num_skipped, most in ((14, 11, 0.01), (1979, 21, 0.01), (1, 1, 0.0), (0, 1, 0.01), (0, 1, None)):
        with pytest.raises(DataError, match="the first is a: repair the data"):
            check_skipped(num_images, ["a"] * num_skipped, most)


def test_training_batches_can_be_taken_up_anywhere_and_are_shared_by_ranks(world):
    config = small_config(world, "dataset.type=tokens")
    whole = list(islice(training_tokens(config, 0, rank=0, world_size=1), 10))
    assert sorted(key for batch in whole[:5] for key in batch["__key__"]) == TokenSet(world / "tokens/train").keys
    assert whole[0]["tokens"].shape == (4, NUM_TOKENS) and whole[0]["tokens"].dtype == torch.int64
    later = next(iter(training_tokens(config, 7, rank=0, world_size=1)))
    assert later["__key__"] == whole[7]["__key__"] and torch.equal(later["tokens"], whole[7]["tokens"])
    config.training.per_gpu_batch_size = 2
    halves = [next(iter(training_tokens(config, 3, rank=rank, world_size=2))) for rank in (0, 1)]
    assert torch.equal(torch.cat([half["tokens"] for half in halves]), whole[3]["tokens"])


def test_a_batch_has_its_images_tokens_and_draws_among_the_variants(world):
    train = TokenSet(world / "tokens/train")
    chosen = []
    for batch in islice(training_tokens(small_config(world), 0, rank=0, world_size=1), 50):
        for key, tokens, label in zip(batch["__key__"], batch["tokens"].numpy(), batch["class_id"], strict=True):
            row = train.keys.index(key)
            assert label == train.labels[row]
            chosen.append([np.array_equal(tokens, variant) for variant in train.tokens[row]])
    assert np.all(np.any(chosen, axis=1)) and 0.3 < np.mean(chosen, axis=0)[0] < 0.7


def test_evaluation_sees_every_image_once_over_the_ranks(world):
    config = small_config(world, "dataset.type=tokens")
    ranks = [list(evaluation_tokens(config, rank=rank, world_size=3)) for rank in range(3)]
    keys = sorted(key for batches in ranks for batch in batches for key in batch["__key__"])
    assert keys == TokenSet(world / "tokens/eval").keys
    assert evaluation_tokens(config, rank=0, world_size=3).expected == 7


def test_a_set_of_another_tokenizer_is_refused_naming_both(world):
    config = small_config(world, "dataset.type=tokens")
    ours, others = identities(tokenizer_of(world)), {"identity": "1234", "fingerprint": "1234"}
    check_token_sets(config, ours, "tokenizer")
    shown = ours["identity"][:12]
    with pytest.raises(DataError, match=rf"{world}/tokenizer \(identity {shown}\).* is mine \(identity 1234\)"):
        check_token_sets(config, others, "mine")
    config.dataset.type = "shards"
    check_token_sets(config, others, "mine")


def test_a_set_is_of_the_tokenizer_s_half_precision_copy_too_and_of_no_other_encoder(world, tmp_path):
    config, tokenizer = small_config(world, "dataset.type=tokens"), tokenizer_of(world)
    tokenizer.save_pretrained(tmp_path, dtype=torch.float16)
    check_token_sets(config, identities(OneDPiece.from_pretrained(tmp_path)), "copy")
    tokenizer.encoder.conv_out.bias.data += 0.01
    with pytest.raises(DataError, match="was made by another tokenizer"):
        check_token_sets(config, identities(tokenizer), "other")


@pytest.fixture
def old_world(world, tmp_path):
    """The token set as it was written before tokenizers had an identity."""
    shutil.copytree(world / "tokens", tmp_path / "tokens")
    fingerprint = identities(tokenizer_of(world))["fingerprint"]
    for path in tmp_path.glob("tokens/*/manifest.json"):
        manifest = json.loads(path.read_text())
        for part in (manifest["tokenizer"], manifest["plan"]):
            del part["identity"]
            part["fingerprint"] = fingerprint
        del manifest["plan"]["source"]
        path.write_text(json.dumps(manifest))
    return tmp_path


def test_an_older_set_is_checked_by_its_fingerprint(world, old_world):
    config = small_config(world, "dataset.type=tokens", f"dataset.params.token_set={old_world}/tokens")
    check_token_sets(config, identities(tokenizer_of(world)), "tokenizer")
    other = identities(OneDPiece.from_pretrained(world / "other"))
    with pytest.raises(DataError, match=rf"is mine \(fingerprint {other['fingerprint'][:12]}\)"):
        check_token_sets(config, other, "mine")


@pytest.mark.parametrize("name", ["tokens.npy", "labels.npy", "keys.txt"])
def test_a_finished_set_that_lacks_a_file_is_not_there_already(world, tmp_path, monkeypatch, name):
    shutil.copytree(world / "tokens", tmp_path / "tokens")
    (tmp_path / "tokens/eval" / name).unlink()
    with pytest.raises(DataError, match="tokens/eval is damaged .*: delete it and make it again"):
        pretokenize(monkeypatch, world, tmp_path / "tokens", "--split", "eval")


def test_an_older_finished_set_is_left_alone(world, old_world, monkeypatch, capsys):
    pretokenize(monkeypatch, world, old_world / "tokens")
    assert "is there already" in capsys.readouterr().out
    with pytest.raises(UserError, match="fingerprint was .* and is now"):
        pretokenize(monkeypatch, world, old_world / "tokens", "--checkpoint", world / "other")


@pytest.mark.parametrize("name", ["tokens.npy", "labels.npy", "keys.txt", "manifest.json"])
def test_a_damaged_set_is_an_error(world, tmp_path, name):
    for file in FILES:
        content = (world / "tokens/eval" / file).read_bytes()
        (tmp_path / file).write_bytes(content[: len(content) // 2] if file == name else content)
    with pytest.raises(DataError, match="make it again|cannot be read as one"):
        TokenSet(tmp_path)


def test_a_set_that_holds_objects_is_refused(world, tmp_path):
    for file in FILES:
        (tmp_path / file).write_bytes((world / "tokens/eval" / file).read_bytes())
    np.save(tmp_path / "labels.npy", np.array([print] * 7, dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="damaged"):
        TokenSet(tmp_path)


def test_a_missing_set_says_how_to_make_it(world):
    config = small_config(world, "dataset.type=tokens", "dataset.params.token_set=nowhere")
    training, evaluation = loaders(config, rank=0, world_size=1)
    assert evaluation is None
    with pytest.raises(DataError, match="no token set nowhere/train .*scripts/pretokenize.py"):
        training(0)
    config.dataset.params.token_set = None
    with pytest.raises(DataError, match="dataset.params.token_set must name"):
        loaders(config, rank=0, world_size=1)


@pytest.mark.parametrize("label, got", [(-1, "none"), (10, "10")])
def test_every_image_needs_a_label_of_a_class(label, got):
    batch = {"__key__": ["a", "b"], "class_id": torch.tensor([9, label])}
    with pytest.raises(DataError, match=rf"sample b must have a label in 0\.\.9, got {got}"):
        list(Labelled([batch], 10))


def test_the_manifest_is_plain_json(world):
    manifest = json.loads((world / "tokens/train/manifest.json").read_text())
    its = {"checkpoint": f"{world}/tokenizer", "identity": identity(tokenizer_of(world))}
    assert manifest["tokenizer"] == its
    assert manifest["num_images"] == 20 and manifest["skipped"] == []
