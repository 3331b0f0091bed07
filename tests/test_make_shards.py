"""The scripts that make shards: original bytes, the same result for any number of processes, restarts, manifests."""

import gzip
import io
import os
import pickle
import runpy
import struct
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from data import DataError, image_sources, make_fashion_mnist, make_shards
from data.batches import check_count
from data.image_sources import FolderSource, HubSource, HubStream, open_source, split_source
from data.loaders import evaluation_loader
from data.shard_files import MANIFEST, read_manifest, write_shard
from data.transforms import decode_image, to_tensor
from tests.shard_data import is_as_shown, lying_and_clear, make_config, png
from utils.files import sha256_of
from utils.paths import ROOT


def test_own_images_are_stored_as_a_viewer_shows_them_and_others_byte_for_byte(tmp_path):
    lying_and_clear(tmp_path / "images")
    (tmp_path / "images/c.png").write_bytes(png(1))
    (tmp_path / "images/d.jpg").write_bytes(b"\xff\xd8\xff broken")
    own = members(made_of(open_source(str(tmp_path / "images"), "train"), tmp_path / "own"))
    assert is_as_shown([to_tensor(decode_image(own[f"0000000{number}.png"])) for number in (0, 1)])
    as_stored = members(made_of(FolderSource(tmp_path / "images"), tmp_path / "as_stored"))
    stored = {path.name: path.read_bytes() for path in (tmp_path / "images").iterdir()}
    assert sorted(as_stored.values()) == sorted(stored.values())
    assert {name for name in own if own[name] != as_stored.get(name)} == {"00000000.png", "00000001.png"}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Ten images of three classes, in three formats."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(10):
        place = folder / ("ant", "bee", "cow")[number % 3]
        place.mkdir(exist_ok=True)
        data = png(number)
        if number % 4 == 1:
            file = io.BytesIO()
            Image.open(io.BytesIO(data)).save(file, ("JPEG", "WEBP")[number % 2])
            data = file.getvalue()
        (place / f"image.{number}.PNG").write_bytes(data)
    (folder / "bee" / "page.jpg").write_bytes(b"<html>not found</html>")
    return folder


def make(source, folder, **options):
    defaults = {"prefix": "train", "max_samples_per_shard": 4, "num_workers": 0, "seed": 1}
    return make_shards.make_shards(source, folder, **(defaults | options))


def made_of(source, folder) -> Path:
    make(source, folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def members(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(folder.glob("*.tar*")):
        with tarfile.open(path) as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar}
    return found


def command(monkeypatch, script: str, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(str(ROOT / "data" / script), run_name="__main__")


def test_the_files_own_bytes_and_labels_are_stored(images, tmp_path):
    split = make(FolderSource(images), tmp_path)
    stored = members(tmp_path)
    files = [path for path in sorted(images.rglob("*")) if path.suffix == ".PNG"]
    assert sorted(data for name, data in stored.items() if not name.endswith(".cls")) == sorted(
        path.read_bytes() for path in files
    )
    assert sorted(int(data) for name, data in stored.items() if name.endswith(".cls")) == [0] * 4 + [1] * 3 + [2] * 3
    assert {name.split(".", 1)[1] for name in stored} == {"png", "webp", "cls"}
    assert split["num_samples"] == 10 and split["num_skipped"] == 1
    assert [name for record in split["shards"].values() for name in record["skipped"]] == ["bee/page.jpg"]


def test_the_manifest_counts_and_checks_the_shards(images, tmp_path):
    make(FolderSource(images), tmp_path)
    manifest = read_manifest(tmp_path)
    assert manifest["classes"] == ["ant", "bee", "cow"]
    shards = manifest["splits"]["train"]["shards"]
    assert list(shards) == [f"train-{index:06d}.tar" for index in range(3)]
    for name, record in shards.items():
        with tarfile.open(tmp_path / name) as tar:
            assert record["num_samples"] == len([member for member in tar if member.name.endswith(".cls")])
        assert record["sha256"] == sha256_of(tmp_path / name)
        assert record["num_bytes"] == (tmp_path / name).stat().st_size


def test_the_result_is_the_same_for_any_number_of_processes_and_another_for_another_seed(images, tmp_path):
    for name, options in {"one": {}, "two": {"num_workers": 2}, "seed": {"seed": 2}}.items():
        make(FolderSource(images), tmp_path / name, **options)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert contents(tmp_path / "one") != contents(tmp_path / "seed")


def test_a_restart_keeps_finished_shards_and_makes_the_rest(images, tmp_path, monkeypatch):
    make(FolderSource(images), tmp_path / "whole")

    class Interrupted(FolderSource):
        def read(self, index):
            if len(list((tmp_path / "cut").glob("train-*.tar"))) == 1:
                raise KeyboardInterrupt
            return super().read(index)

    with pytest.raises(KeyboardInterrupt):
        make(Interrupted(images), tmp_path / "cut")
    assert len(list((tmp_path / "cut").glob("train-*.tar"))) == 1
    (tmp_path / "cut" / "train-000001.tar").write_bytes(b"whole, but not in the manifest")
    written = []
    monkeypatch.setattr(
        make_shards, "write_shard", lambda path, samples: written.append(path.name) or write_shard(path, samples)
    )
    make(FolderSource(images), tmp_path / "cut")
    assert written == ["train-000001.tar", "train-000002.tar"]
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    make(FolderSource(images), tmp_path / "cut")
    assert len(written) == 2


def test_another_plan_in_the_same_folder_is_an_error(images, tmp_path):
    make(FolderSource(images), tmp_path)
    with pytest.raises(DataError, match="already holds train shards that were made with another seed: remove them"):
        make(FolderSource(images), tmp_path, seed=2)
    make(FolderSource(images / "ant"), tmp_path / "flat")
    with pytest.raises(DataError, match="made with another source, max_samples_per_shard"):
        make(FolderSource(images / "cow"), tmp_path / "flat", max_samples_per_shard=3)
    with pytest.raises(DataError, match="already holds shards with 3 other classes than the 0 of this source"):
        make(FolderSource(images / "ant"), tmp_path, prefix="val")
    with pytest.raises(DataError, match="number of samples per shard must be at least 1, got 0"):
        make(FolderSource(images), tmp_path, max_samples_per_shard=0)
    with pytest.raises(DataError, match="the seed must be at least 0, got -1"):
        make(FolderSource(images), tmp_path, seed=-1)


def test_a_manifest_that_is_something_else_is_an_error(tmp_path):
    for text in ("{", "[]", '{"classes": [], "splits": {"a": {"shards": {"b": {"num_samples": "3"}}}}}'):
        (tmp_path / MANIFEST).write_text(text)
        with pytest.raises(DataError, match="manifest.json must be a manifest written by data/make_shards.py"):
            read_manifest(tmp_path)


def test_a_tiff_that_no_command_shows_is_left_out_and_counted(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for name, value in (("good", 0.5), ("bad", np.nan)):
        Image.fromarray(np.full((8, 8), value, np.float32)).save(folder / f"{name}.tif")
    arguments = ["--source", str(folder), "--output_dir", str(tmp_path / "shards"), "--num_workers", "1"]
    command(monkeypatch, "make_shards.py", *arguments)
    printed = capsys.readouterr().out
    assert "1 sample in 1 shard: " in printed and "1 left out" in printed and "bad.tif" in printed


def test_the_command_makes_shards_that_the_loader_reads(images, tmp_path, monkeypatch, capsys):
    arguments = ["--source", str(images), "--output_dir", str(tmp_path / "a" / "b"), "--num_workers", "1"]
    command(monkeypatch, "make_shards.py", *arguments, "--max_samples_per_shard", "3", "--prefix", "zoo")
    printed = capsys.readouterr().out
    assert "10 samples in 4 shards" in printed and "1 left out" in printed and "bee/page.jpg" in printed
    config = make_config(eval_shards_path_or_url=f"{tmp_path}/a/b/zoo-{{000000..000003}}.tar")
    loader = evaluation_loader(config, rank=0, world_size=1)
    assert sorted(c for batch in loader for c in batch["class_id"].tolist()) == [0] * 4 + [1] * 3 + [2] * 3
    check_count(loader.num_seen, loader.expected)


def test_a_source_that_is_nothing_is_one_sentence(monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit) as exit_status:
        command(monkeypatch, "make_shards.py", "--source", "./absent", "--output_dir", str(tmp_path))
    assert exit_status.value.code == 1
    assert capsys.readouterr().err.startswith("error: --source ./absent is neither a folder (from ")
    with pytest.raises(DataError, match="--streaming is for data sets of the hub"):
        open_source(str(tmp_path), "train", streaming=True)


def test_a_class_called_as_the_split_is_not_taken_for_all(tmp_path):
    for name in ("car", "plane", "train"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(png(1))
    with pytest.raises(DataError, match="holds train/ beside car/, and train may be the split or a class"):
        open_source(str(tmp_path), "train")
    assert open_source(str(tmp_path), "val").classes == ["car", "plane", "train"]
    assert len(open_source(str(tmp_path / "train"), "train")) == 1
    (tmp_path / "val").mkdir()
    assert len(open_source(str(tmp_path), "train")) == 1


def test_names_that_are_no_utf8_are_kept_in_the_manifest(tmp_path):
    for name in (b"caf\xe9", b"tea"):
        os.makedirs(os.path.join(os.fsencode(tmp_path), b"images", name))
    names = [b"tea/1.png", b"caf\xe9/gar\xe7on.png", b"tea/na\xefve.png"]
    for name, data in zip(names, (png(1), png(2), b"no image"), strict=True):
        with open(os.path.join(os.fsencode(tmp_path), b"images", name), "wb") as file:
            file.write(data)
    folder = made_of(open_source(str(tmp_path / "images"), "train"), tmp_path / "shards")
    manifest, before = read_manifest(folder), contents(folder)
    assert manifest["classes"] == ["caf\udce9", "tea"]
    assert manifest["splits"]["train"]["shards"]["train-000000.tar"]["skipped"] == ["tea/na\udcefve.png"]
    assert contents(made_of(open_source(str(tmp_path / "images"), "train"), folder)) == before


@pytest.fixture
def imagenet(tmp_path):
    """An ImageNet of three classes and flat validation images."""
    root = tmp_path / "imagenet"
    for index, name in enumerate(["n01", "n02", "n03"]):
        for number in range(2):
            place = root / "train" / name
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{name}_{number}.JPEG").write_bytes(png(10 * index + number))
    (root / "val").mkdir()
    for number in range(3):
        (root / "val" / f"ILSVRC2012_val_0000000{number + 1}.JPEG").write_bytes(png(100 + number))
    return root


def test_imagenet_is_converted_with_the_published_flags(imagenet, tmp_path, monkeypatch):
    (imagenet / "LOC_val_solution.csv").write_text(
        "ImageId,PredictionString\n"
        "ILSVRC2012_val_00000002,n03 1 2 3 4 \n"
        "ILSVRC2012_val_00000001,n02 1 2 3 4 \n"
        "ILSVRC2012_val_00000003,n03 0 0 9 9\n"
    )
    arguments = ["--output_dir", str(tmp_path / "out"), "--source", str(imagenet), "--num_workers", "1"]
    sizes = ["--max_train_samples_per_shard", "4", "--max_val_samples_per_shard", "2"]
    command(monkeypatch, "convert_imagenet_to_wds.py", *arguments, *sizes)
    assert sorted(contents(tmp_path / "out")) == [
        "imagenet-train-000000.tar",
        "imagenet-train-000001.tar",
        "imagenet-val-000000.tar",
        "imagenet-val-000001.tar",
        "manifest.json",
    ]
    config = make_config(eval_shards_path_or_url=f"{tmp_path}/out/imagenet-val-{{000000..000001}}.tar")
    loader = evaluation_loader(config, rank=0, world_size=1)
    labels = {key: c for batch in loader for key, c in zip(batch["__key__"], batch["class_id"].tolist(), strict=True)}
    assert labels == {"00000000": 1, "00000001": 2, "00000002": 2} and loader.expected == 3


def test_validation_labels_come_from_the_devkit_by_its_own_numbers(imagenet):
    from scipy.io import savemat

    devkit = imagenet / "ILSVRC2012_devkit_t12" / "data"
    devkit.mkdir(parents=True)
    synsets = np.array([(1, "n03"), (2, "n01"), (3, "n02")], dtype=[("ILSVRC2012_ID", object), ("WNID", object)])
    savemat(devkit / "meta.mat", {"synsets": synsets})
    (devkit / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n3\n2\n")
    source = split_source(imagenet, "val")
    assert source.class_ids == [2, 1, 0] and source.classes == ["n01", "n02", "n03"]
    (devkit / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n3\n")
    with pytest.raises(DataError, match="has 2 labels for 3 validation images"):
        split_source(imagenet, "val")


def test_validation_images_without_labels_are_an_error(imagenet):
    with pytest.raises(
        DataError, match="val has no class folders, and neither LOC_val_solution.csv nor ILSVRC2012_devkit"
    ):
        split_source(imagenet, "val")
    (imagenet / "LOC_val_solution.csv").write_text("ImageId,PredictionString\nILSVRC2012_val_00000001,n02 1 2 3 4\n")
    with pytest.raises(DataError, match="the image ILSVRC2012_val_00000002 of .* has no label in the file of labels"):
        split_source(imagenet, "val")


def test_validation_class_folders_keep_the_ids_of_training(imagenet):
    for path in list((imagenet / "val").iterdir()):
        (imagenet / "val" / "n03").mkdir(exist_ok=True)
        path.rename(imagenet / "val" / "n03" / path.name)
    assert split_source(imagenet, "val").class_ids == [2, 2, 2]
    (imagenet / "val" / "n03").rename(imagenet / "val" / "n99")
    with pytest.raises(DataError, match="has the class n99, which is not one of the 3 training classes"):
        split_source(imagenet, "val")


@pytest.mark.parametrize("name", ["bag", "n02100583"])
def test_of_a_split_ones_own_classes_are_stored_as_a_viewer_shows_them(tmp_path, name):
    lying_and_clear(tmp_path / "train" / name)
    source = open_source(str(tmp_path), "train")
    shown = [to_tensor(decode_image(source.read(index)[0])).numpy() for index in range(2)]
    assert is_as_shown(shown) is (name == "bag")  # ImageNet's files stay as they are


@pytest.fixture
def hub(monkeypatch):
    """A data set of the hub, without the hub."""
    from datasets import ClassLabel, Dataset, Features, Image, Value

    rows = {
        "image": [{"bytes": png(number), "path": None} for number in range(7)],
        "label": [0, 1, 1, 0, 1, -1, 0],
        "name": [str(number) for number in range(7)],
    }
    features = Features({"image": Image(), "label": ClassLabel(names=["no", "yes"]), "name": Value("string")})
    dataset = Dataset.from_dict(rows, features=features)
    monkeypatch.setattr(
        image_sources, "_load_from_hub", lambda *_, streaming: dataset.to_iterable_dataset() if streaming else dataset
    )
    return rows


def test_a_hub_data_set_is_stored_undecoded(hub, tmp_path):
    source = open_source("owner/name", "train")
    assert isinstance(source, HubSource) and source.classes == ["no", "yes"]
    make(source, tmp_path / "one")
    make(pickle.loads(pickle.dumps(source)), tmp_path / "two")  # as the processes get it that write shards
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    stored = members(tmp_path / "one")
    assert [stored[f"{number:08d}.png"] for number in range(7)] == [row["bytes"] for row in hub["image"]]
    assert stored["00000001.cls"] == b"1" and "00000005.cls" not in stored  # a withheld label


@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_of_the_hub_without_an_image_is_left_out_and_counted(hub, monkeypatch, streaming):
    dataset = open_source("owner/name", "train").dataset
    dataset = dataset.map(lambda row, index: {"image": None if index == 2 else row["image"]}, with_indices=True)
    columns = image_sources.Columns(dataset.features, "owner/name")
    rows = dataset.to_iterable_dataset() if streaming else dataset
    read = [columns.read(row) for row in columns.undecoded(rows)]
    assert [image for image, _ in read] == [png(0), png(1), b"", *map(png, range(3, 7))] and read[2][1] == 1
    assert not make_shards._is_usable(read[2][0])


def test_a_streamed_data_set_is_stored_in_its_order_and_continues(hub, tmp_path):
    stream = open_source("owner/name", "train", streaming=True)
    assert isinstance(stream, HubStream)
    options = {"prefix": "train", "max_samples_per_shard": 3}
    make_shards.make_shards_in_order(stream, tmp_path, **options)
    whole = contents(tmp_path)
    assert list(members(tmp_path))[::2][:3] == ["00000000.png", "00000001.png", "00000002.png"]
    (tmp_path / "train-000001.tar").unlink()
    (tmp_path / "train-000002.tar").unlink()
    split = make_shards.make_shards_in_order(open_source("owner/name", "train", streaming=True), tmp_path, **options)
    assert contents(tmp_path) == whole and split["num_samples"] == 7


def test_an_unreachable_hub_is_one_sentence(monkeypatch):
    import datasets

    def refuse(*_, **__):
        raise ConnectionError("Couldn't reach 'ILSVRC/imagenet-1k' on the Hub\n(offline)")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    message = r"data set ILSVRC/imagenet-1k \(split train\) could not be loaded .* on the Hub \(offline\); check the "
    with pytest.raises(DataError, match=message):
        open_source("ILSVRC/imagenet-1k", "train")


def write_idx(path: Path, values: np.ndarray) -> None:
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    data = header + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture
def idx_dir(tmp_path):
    folder = tmp_path / "idx"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, count, ending in (("train", 30, ".gz"), ("t10k", 20, "")):
        write_idx(folder / f"{split}-images-idx3-ubyte{ending}", rng.integers(0, 256, (count, 28, 28)))
        write_idx(folder / f"{split}-labels-idx1-ubyte{ending}", np.arange(count) % 10)
    return folder


def test_fashion_mnist_is_padded_to_32_pixels_with_three_equal_channels(idx_dir, tmp_path, monkeypatch):
    arguments = ["--idx_dir", str(idx_dir), "--output_dir", str(tmp_path / "out"), "--num_workers", "1"]
    command(monkeypatch, "make_fashion_mnist.py", *arguments)
    assert sorted(contents(tmp_path / "out")) == [
        "fashion-test-000000.tar",
        "fashion-train-000000.tar",
        "manifest.json",
    ]
    assert read_manifest(tmp_path / "out")["classes"][9] == "Ankle boot"
    with tarfile.open(tmp_path / "out" / "fashion-train-000000.tar") as tar:
        stored = {member.name: tar.extractfile(member).read() for member in tar}
    source = make_fashion_mnist.read_split(idx_dir, "train")
    for number in range(30):
        pixels = np.array(Image.open(io.BytesIO(stored[f"{number:08d}.png"])))
        assert pixels.shape == (32, 32, 3) and (pixels == pixels[:, :, :1]).all()
        assert (pixels[2:-2, 2:-2, 0] == source.pixels[number]).all()
        assert pixels[:2].sum() == pixels[-2:].sum() == pixels[:, :2].sum() == pixels[:, -2:].sum() == 0
        assert stored[f"{number:08d}.cls"] == str(number % 10).encode()


def test_the_sample_holds_the_first_images_of_each_class(idx_dir, tmp_path, monkeypatch):
    arguments = ["--idx_dir", str(idx_dir), "--output_dir", str(tmp_path / "out"), "--sample", "1"]
    command(monkeypatch, "make_fashion_mnist.py", *arguments)
    stored = members(tmp_path / "out")
    assert [int(stored[name]) for name in sorted(stored) if name.endswith("cls")] == list(range(10))


def test_idx_files_that_are_not_there_or_broken_are_errors(idx_dir, tmp_path):
    with pytest.raises(DataError, match="must hold train-images-idx3-ubyte.gz or train-images-idx3-ubyte, and holds n"):
        make_fashion_mnist.read_split(tmp_path, "train")
    images = idx_dir / "train-images-idx3-ubyte.gz"
    whole = images.read_bytes()
    for data in (
        whole[:1000],
        b"",
        gzip.compress(b"\0\0\x08\x03" + b"\0" * 7),
        gzip.compress(gzip.decompress(whole)[:-1]),
    ):
        images.write_bytes(data)
        with pytest.raises(DataError, match="train-images-idx3-ubyte.gz must be a complete IDX file"):
            make_fashion_mnist.read_split(idx_dir, "train")
    write_idx(images, np.zeros((30, 32, 32)))
    with pytest.raises(DataError, match=r"n images of 28 x 28 .* got arrays of \(30, 32, 32\)"):
        make_fashion_mnist.read_split(idx_dir, "train")


def test_the_committed_sample_is_whole_small_and_balanced():
    folder = ROOT / "assets" / "fashion_mnist_test"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1_000_000
    manifest = read_manifest(folder)
    for name, record in manifest["splits"]["fashion-test"]["shards"].items():
        assert sha256_of(folder / name) == record["sha256"]
    labels = [int(data) for name, data in members(folder).items() if name.endswith(".cls")]
    assert np.bincount(labels).tolist() == [100] * 10


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "data").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_configs_read_what_the_scripts_write(path):
    params = OmegaConf.load(path).dataset.params
    specs = params.train_shards_path_or_url, params.eval_shards_path_or_url
    if path.stem == "fashion":
        assert specs == (
            "./fashion_mnist/fashion-train-{000000..000011}.tar",
            "./fashion_mnist/fashion-test-{000000..000009}.tar",
        )
    if path.stem == "imagenet":
        assert specs[0].endswith("imagenet-train-{000000..000320}.tar") and 320 * 4000 < 1281167 <= 321 * 4000
        assert specs[1].endswith("imagenet-val-{000000..000049}.tar")
