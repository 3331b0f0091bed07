"""A folder of images is trained on directly: the same global batches on any number of ranks."""

import errno
import os
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from data import DataError
from data.evaluation_images import NumberedImages
from data.file_formats import FILE_FORMATS, image_extension
from data.image_sets import open_images
from data.image_sources import FolderSource, list_images, open_source
from data.loaders import evaluation_loader, training_loader
from data.shard_files import Sample, write_shard
from data.tar_samples import FIELDS, image_of
from data.transforms import AS_PUBLISHED, AS_SHOWN, decode_image
from tests.shard_data import SIDE, is_as_shown, keys, lying_and_clear, make_config, png, same, take
from utils.processes import Processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for number in range(11):
        for split in ("train", "eval"):
            place = root / split / ("cat", "dog", "emu")[number % 3 if split == "train" else 2 * (number % 2)]
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number:02d}.png").write_bytes(png(number))
    (root / "train" / "cat" / "notes.txt").write_text("no image")
    (root / "train" / ".hidden").mkdir()
    (root / "train" / ".hidden" / "x.png").write_bytes(b"")
    return root


def config_of(folder, **params):
    return make_config(type="folder", train_folder=str(folder / "train"), eval_folder=str(folder / "eval"), **params)


def train(config, **options):
    return training_loader(config, **({"rank": 0, "world_size": 1, "batches_per_chunk": 5} | options))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_two_ranks_see_the_global_batches_of_one(folder, num_workers):
    one = take(train(config_of(folder, per_gpu_batch_size=6)), 8)
    config = config_of(folder, per_gpu_batch_size=3, num_workers_per_gpu=num_workers)
    two = [take(train(config, rank=rank, world_size=2), 8) for rank in range(2)]
    for batch, *parts in zip(one, *two, strict=True):
        assert batch["__key__"] == parts[0]["__key__"] + parts[1]["__key__"]
        assert batch["image"].equal(torch.cat([part["image"] for part in parts]))
        assert batch["class_id"].equal(torch.cat([part["class_id"] for part in parts]))


def test_every_epoch_holds_every_image_once_in_a_new_order(folder):
    batches = keys(take(train(config_of(folder)), 11))  # 44 = 4 epochs of 11
    epochs = [batches[first : first + 11] for first in range(0, 44, 11)]
    assert all(len(set(epoch)) == 11 for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_restart_at_any_batch_gives_the_batches_that_would_have_come(folder, num_workers):
    config = config_of(folder, num_workers_per_gpu=num_workers)
    whole = take(train(config), 8)
    for start in range(8):
        assert same(take(train(config, start_batch=start), 8 - start), whole[start:]), start


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_sees_every_image_once(folder, num_workers):
    config = config_of(folder, num_workers_per_gpu=num_workers)
    loaders = [evaluation_loader(config, rank=rank, world_size=2) for rank in range(2)]
    batches = [list(loader) for loader in loaders]
    assert [[len(batch["__key__"]) for batch in mine] for mine in batches] == [[4, 2], [4, 1]]
    assert sorted(keys(sum(batches, []))) == sorted(
        f"{('cat', 'emu')[number % 2]}/{number:02d}.png" for number in range(11)
    )
    assert loaders[0].expected == 11


def test_a_folders_images_are_what_a_viewer_shows_in_training_evaluation_and_pretokenizing(tmp_path):
    for split in ("train", "eval"):
        lying_and_clear(tmp_path / split)
    config = config_of(tmp_path)
    config.dataset.preprocessing |= {"crop_size": SIDE, "random_flip": False}
    (batch,) = take(train(config), 1)
    images = dict(zip(batch["__key__"], batch["image"], strict=True))
    assert is_as_shown([images["a.jpg"], images["b.png"]])
    loader = evaluation_loader(config, rank=0, world_size=1)
    assert is_as_shown(next(iter(loader))["image"]) and AS_SHOWN in loader.preparation
    numbered = NumberedImages(config, SIDE, Processes("cpu"))
    ((_, pixels),) = numbered.batches(np.arange(2), 2)
    assert is_as_shown(pixels) and AS_SHOWN in numbered.preparation
    assert is_as_shown(open_images(tmp_path / "eval").read(0, 2).transpose(0, 3, 1, 2))


def test_shards_stay_as_published_and_say_so(tmp_path):
    lying_and_clear(tmp_path)
    samples = [Sample(path.stem, path.read_bytes(), None) for path in sorted(tmp_path.iterdir())]
    write_shard(tmp_path / "s.tar", samples)
    config = make_config(eval_shards_path_or_url=str(tmp_path / "s.tar"))
    config.dataset.preprocessing.crop_size = SIDE
    loader = evaluation_loader(config, rank=0, world_size=1)
    lying, clear = next(iter(loader))["image"]
    assert lying[:, 0].min() < 50 < 200 < lying[:, 0].max() and clear.max() == 0
    numbered = NumberedImages(config, SIDE, Processes("cpu"))
    assert loader.preparation == numbered.preparation and AS_PUBLISHED in loader.preparation


def test_class_ids_are_those_of_the_training_folder(folder):
    batch = take(evaluation_loader(config_of(folder), rank=0, world_size=1, batch_size=11), 1)[0]
    assert set(zip([key[:3] for key in batch["__key__"]], batch["class_id"].tolist(), strict=True)) == {
        ("cat", 0),
        ("emu", 2),
    }


def test_a_subfolder_without_an_image_is_an_error_and_no_class(tmp_path):
    for name in ("train/cat", "train/emu", "val/emu"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.png").write_bytes(png(0))
    (tmp_path / "train/dog").mkdir()
    (tmp_path / "train/dog/notes.txt").write_text("no image")
    message = r"each subfolder of .*/train is a class, and dog holds no image \(1 of 3 are so\): put its images there"
    with pytest.raises(DataError, match=message):
        FolderSource(tmp_path / "train")
    with pytest.raises(DataError, match=message):
        open_source(str(tmp_path), "train")
    assert open_source(str(tmp_path), "val").class_ids == [2]  # a split may lack a class of training


def test_a_flat_folder_has_no_labels(tmp_path):
    (tmp_path / "a.PNG").write_bytes(png(0))
    batch = take(train(make_config(type="folder", train_folder=str(tmp_path))), 1)[0]
    assert batch["class_id"].tolist() == [-1] * 4 and set(batch["__key__"]) == {"a.PNG"}


def test_a_broken_image_is_replaced_and_counted_in_training(folder, tmp_path):
    for number in range(20):
        (tmp_path / f"{number:02d}.png").write_bytes(b"\x89PNG broken" if number == 7 else png(number))
    config = make_config(type="folder", train_folder=str(tmp_path), eval_folder=str(tmp_path), num_workers_per_gpu=2)
    loader = train(config)
    batches = take(loader, 10)
    assert "07.png" not in keys(batches) and len(keys(batches)) == 40
    assert loader.bad_reasons == {"broken image": 2}
    assert same(take(train(config, start_batch=3), 7), batches[3:])
    with pytest.raises(DataError, match="broken image: .*, sample '07.png': .*; evaluation needs every sample"):
        list(evaluation_loader(config, rank=0, world_size=1))
    config.dataset.params.eval_skip_broken = True
    loader = evaluation_loader(config, rank=0, world_size=1)
    assert len(keys(list(loader))) == 19 and loader.num_bad == 1


def test_a_folder_of_broken_images_is_an_error(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(
        DataError, match="neither an image nor 16 in its place can be used; the first was broken image: .*'a.png'"
    ):
        take(train(make_config(type="folder", train_folder=str(tmp_path))), 1)


def test_a_wrong_folder_is_an_error(tmp_path):
    with pytest.raises(DataError, match="train_folder must name a folder of images when dataset.type is folder"):
        train(make_config(type="folder"))
    with pytest.raises(DataError, match="absent must be a folder of images, and it is not there"):
        train(make_config(type="folder", train_folder=str(tmp_path / "absent")))
    with pytest.raises(DataError, match="holds no images .*, .png, .*, .tiff., neither"):
        train(make_config(type="folder", train_folder=str(tmp_path)))
    (tmp_path / "cat").mkdir()
    for name in ("a.png", "cat/b.png"):
        (tmp_path / name).write_bytes(png(0))
    with pytest.raises(DataError, match=r"holds images \(a.png, ...\) beside subfolders with images"):
        train(make_config(type="folder", train_folder=str(tmp_path)))


@pytest.mark.parametrize("ending", [ending for kind in FILE_FORMATS for ending in kind.extensions])
def test_every_format_that_is_decoded_is_found_stored_and_read_again(tmp_path, ending):
    """In a folder, in shards made of it, and by its first bytes, whatever case its ending has."""
    folder = tmp_path / "images/class"
    folder.mkdir(parents=True)
    kind = next(kind for kind in FILE_FORMATS if ending in kind.extensions)
    Image.new("RGB", (8, 8), (9, 9, 9)).save(folder / f"one.{ending.upper()}", kind.name)
    (folder / "two.txt").write_text("no image")
    assert list_images(tmp_path / "images") == [f"class/one.{ending.upper()}"]
    assert len(FolderSource(tmp_path / "images")) == 1
    data = (folder / f"one.{ending.upper()}").read_bytes()
    assert image_extension(data) == kind.extensions[0]
    write_shard(tmp_path / "s.tar", [Sample("0", data, 0)])
    with tarfile.open(tmp_path / "s.tar") as tar:
        name = tar.getnames()[0]
    assert name == f"0.{kind.extensions[0]}" and name.partition(".")[2] in FIELDS
    assert image_of({name.partition(".")[2]: data}) == data and decode_image(data).size == (8, 8)


def test_a_subfolder_that_cannot_be_read_is_an_error_and_not_left_out(folder, monkeypatch):
    listed = os.scandir

    def refuse_dogs(path):
        if os.path.basename(path) == "dog":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", refuse_dogs)
    with pytest.raises(DataError, match=r"the folder .*/train/dog cannot be read \(Permission denied\)"):
        FolderSource(folder / "train")


def test_a_disk_s_lost_and_found_is_neither_read_nor_a_class(tmp_path, monkeypatch):
    listed = os.scandir

    def refuse_lost(path):
        assert os.path.basename(path) != "lost+found"
        return listed(path)

    for name in ("cat", "dog", "lost+found"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(png(1))
    monkeypatch.setattr(os, "scandir", refuse_lost)
    assert FolderSource(tmp_path).classes == ["cat", "dog"]


def test_other_bytes_are_no_image():
    assert [image_extension(data) for data in (b"", b"B", b"RIFF1234WAVE", b"%PDF-1.7", b"GIF88a")] == [None] * 5


def test_files_that_are_left_out_are_counted_wherever_a_folder_is_read(tmp_path, caplog):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for name in ("b.txt", "c.psd", ".hidden"):
        (tmp_path / name).write_bytes(b"")
    for read in (FolderSource, open_images):
        caplog.clear()
        read(tmp_path)
        assert [record.getMessage() for record in caplog.records] == [
            f"{tmp_path}: 1 images; left out 2, such as b.txt"
        ]
