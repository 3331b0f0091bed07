"""scripts/reconstruct_tokenizer.py: complete, in order, the same for any number of processes; its errors."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from modeling.tokenizers import load_tokenizer
from scripts import reconstruct_tokenizer
from tests.evaluation_data import NUM_IMAGES, NUM_TOKENS, command, make_world, on_two_processes, originals
from utils.evaluation.reconstruction_files import ReconstructionFiles, recorded_keys
from utils.images import to_array
from utils.result_folder import LIST, ResultFolder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def reconstruct(world, tmp_path, monkeypatch, capsys):
    """Run the command in this process: (exit status, stdout, stderr, output folder)."""

    def reconstruct(*arguments, output="out"):
        place = ("--config", world / "config.yaml", "--device", "cpu", "--output_dir", tmp_path / output)
        return *command(monkeypatch, capsys, reconstruct_tokenizer.main, *place, *arguments), tmp_path / output

    return reconstruct


def test_images_tokens_and_labels_are_complete_and_sorted_by_key(world, reconstruct):
    status, out, _, folder = reconstruct("--tokens", "--labels", "--save_raw")
    assert status == 0
    keys, pixels, labels = originals(world)
    model, _ = load_tokenizer(world / "config.yaml")
    with torch.no_grad():
        z_quantized, encoded = model.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255)
        decoded = model.decode(z_quantized)
    images = np.load(folder / "images.npy", mmap_mode="r")
    assert images.shape == (NUM_IMAGES, 32, 32, 3) and images.dtype == np.uint8
    assert np.abs(images.astype(int) - to_array(decoded)).max() <= 1
    raw = np.load(folder / "raw.npy")
    np.testing.assert_allclose(raw, decoded.permute(0, 2, 3, 1), atol=1e-3)
    assert np.array_equal(images, np.round(raw.clip(0, 1) * 255))
    tokens = np.load(folder / "tokens.npz")
    assert tokens["keys"].tolist() == keys
    assert np.array_equal(tokens["tokens"], encoded["min_encoding_indices"][:, 0])
    assert np.array_equal(np.load(folder / "labels.npy"), labels)
    assert f"wrote {folder / 'images.npy'}" in out and out.strip().endswith(f"{NUM_IMAGES} images")
    record = json.loads((folder / "reconstruction.json").read_text())
    assert record["images"] == {"expected": NUM_IMAGES, "written": NUM_IMAGES, "skipped": 0}
    assert record["lengths"] == [NUM_TOKENS] and len(record["checkpoint_sha256"]) == 64
    assert (record["tokenizer_precision"], record["compiled"], record["batch_size"]) == ("fp32", False, 8)
    assert [path.name for path in folder.rglob(".*")] == [LIST]


def test_several_lengths_are_what_each_gives_alone(reconstruct):
    _, _, _, both = reconstruct("--lengths", "2,5")
    for length in (2, 5):
        _, _, _, alone = reconstruct(f"--length={length}", output=f"alone{length}")
        assert (both / f"length_{length}/images.npy").read_bytes() == (alone / "images.npy").read_bytes()


def test_two_processes_write_the_same_files(world, reconstruct, tmp_path):
    flags = ("--lengths", "1,8", "--tokens", "--labels", "--png")
    reconstruct(*flags)
    on_two_processes(
        "scripts/reconstruct_tokenizer.py", "--config", world / "config.yaml", "--device", "cpu", "--output_dir",
        tmp_path / "two", *flags,
    )  # fmt: skip
    files = sorted(path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("[!.]*") if path.is_file())
    assert len(files) == 2 + 2 + 2 * NUM_IMAGES + 1
    for file in files:
        if file.suffix != ".json":
            assert (tmp_path / "two" / file).read_bytes() == (tmp_path / "out" / file).read_bytes(), file


def test_in_double_precision_the_batch_size_does_not_matter(reconstruct):
    reconstruct("--precision", "fp64", "--tokens", "--batch_size", 1, output="one")
    _, _, _, folder = reconstruct("--precision", "fp64", "--tokens", "--batch_size", 16)
    for name in ("images.npy", "tokens.npz"):
        assert (folder / name).read_bytes() == (folder.parent / "one" / name).read_bytes()


def test_half_precision_is_for_decoding_alone(reconstruct):
    _, _, _, whole = reconstruct("--tokens", output="whole")
    _, _, _, half = reconstruct("--tokens", "--precision", "bf16")
    assert (half / "tokens.npz").read_bytes() == (whole / "tokens.npz").read_bytes()
    images = [np.load(folder / "images.npy").astype(int) for folder in (whole, half)]
    assert 0 < np.abs(images[0] - images[1]).mean() < 8
    assert json.loads((half / "reconstruction.json").read_text())["tokenizer_precision"] == "bf16"


def test_two_processes_find_one_batch_size(world, reconstruct, tmp_path):
    place = ("--config", world / "config.yaml", "--device", "cpu", "--output_dir", tmp_path / "two")
    on_two_processes("scripts/reconstruct_tokenizer.py", *place, "--batch_size", "auto")
    found = json.loads((tmp_path / "two/reconstruction.json").read_text())["batch_size"]
    _, _, _, folder = reconstruct("--batch_size", found)
    assert (folder / "images.npy").read_bytes() == (tmp_path / "two/images.npy").read_bytes()


def test_what_is_for_a_tokenizer_is_refused_without_one(reconstruct):
    for flags in (["--batch_size", "auto"], ["--precision", "bf16"], ["--compile"]):
        status, _, err, _ = reconstruct("--original", *flags)
        assert status == 1 and err.startswith("error: --precision, --compile and --batch_size auto are for a tokenizer")


def test_png_files_are_the_array_numbered(reconstruct):
    _, _, _, folder = reconstruct("--png", "--length=3")
    images = np.load(folder / "images.npy")
    files = sorted((folder / "png").glob("*.png"))
    assert [file.name for file in files] == [f"{index:06d}.png" for index in range(NUM_IMAGES)]
    assert all(np.array_equal(np.asarray(Image.open(file)), image) for file, image in zip(files, images, strict=True))
    reconstruct("--png", "--num_images", 2)
    assert len(list((folder / "png").glob("*.png"))) == 2  # none of the longer run before stays


def test_files_of_another_run_do_not_stay_beside_the_new_record(reconstruct):
    _, _, _, folder = reconstruct("--lengths", "2,5", "--tokens", "--labels", "--png")
    (folder / "length_2/mine.txt").write_text("mine")
    (folder / "length_7").mkdir()
    np.save(folder / "length_7/images.npy", np.zeros(3))
    with ResultFolder(folder, clears=False) as results:
        (results / "analysis.json").write_text("{}")
    _, out, _, _ = reconstruct("--lengths", "5,8", "--tokens")
    assert f"will be removed from {folder}, such as length_2/png/000000.png" in out
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("[!.]*") if path.is_file()}
    assert files == {
        *("reconstruction.json", "tokens.npz", "length_5/images.npy", "length_8/images.npy"),
        *("length_2/mine.txt", "length_7/images.npy", "analysis.json"),  # of others
    }
    _, out, _, _ = reconstruct("--lengths", "5,8", "--tokens")
    assert "will be removed" not in out


def test_images_that_were_replaced_do_not_keep_the_names_of_those_before(reconstruct, monkeypatch):
    """A run that ends between its arrays and its record, which is written last."""
    _, _, _, folder = reconstruct("--png", "--num_images", 2)
    assert recorded_keys(folder / "images.npy", 2) is not None
    with monkeypatch.context() as patch:
        patch.setattr(ReconstructionFiles, "_write_share", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert reconstruct("--png", "--num_images", 2, "--length=2")[0] == 130
    assert recorded_keys(folder / "images.npy", 2) is None
    assert reconstruct("--png", "--num_images", 2, "--length=2")[0] == 0
    assert recorded_keys(folder / "images.npy", 2) is not None


def test_a_folder_called_as_one_of_several_lengths_has_its_own_names(reconstruct):
    _, _, _, folder = reconstruct("--lengths", "2,5", "--num_images", 2)
    names = recorded_keys(folder / "length_2/images.npy", 2)
    assert names is not None
    _, _, _, own = reconstruct("--original", "--num_images", 3, output="out/length_7")
    assert len(recorded_keys(own / "images.npy", 3)) == 3 and recorded_keys(own / "images.npy", 2) is None
    assert recorded_keys(folder / "length_2/images.npy", 2) == names


def test_tokens_alone_need_no_images(reconstruct):
    status, _, _, folder = reconstruct("--tokens", "--without_image")
    assert status == 0
    assert {path.name for path in folder.iterdir()} == {"tokens.npz", "reconstruction.json", LIST}


def test_originals_need_no_checkpoint_and_are_untouched(world, reconstruct):
    status, _, _, folder = reconstruct("--original", "experiment.output_dir=nowhere")
    assert status == 0
    assert np.array_equal(np.load(folder / "images.npy"), originals(world)[1])


@pytest.mark.parametrize(
    ("name", "good", "bad"), [("jpg", "95", "5"), ("webp", "95", "5"), ("jp2", "2", "60")], ids=["jpg", "webp", "jp2"]
)
def test_formats_round_trip_the_originals(world, reconstruct, name, good, bad):
    errors = []
    for rate in (good, bad):
        status, out, _, folder = reconstruct(f"--{name}", f"--{name}_compression_rate", rate, output=rate)
        assert status == 0 and f"bytes per image as {name}, headers included" in out
        errors.append(np.abs(np.load(folder / "images.npy").astype(int) - originals(world)[1]).mean())
    assert 0 < errors[0] < errors[1]


@pytest.mark.parametrize("flags", [["--tokens", "--png"], ["--original"], ["--jpg"]])
def test_a_dry_run_takes_one_batch_and_writes_nothing(reconstruct, flags):
    status, out, _, folder = reconstruct(*flags, "--dry_run", "--batch_size", 4)
    assert status == 0 and "a dry run: 4 images done, one batch a process; nothing was written" in out
    assert not folder.exists()


def test_a_dry_run_leaves_finished_results_as_they_are(reconstruct):
    _, _, _, folder = reconstruct("--tokens")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    status, _, _, _ = reconstruct("--lengths", "2,5", "--dry_run")
    assert status == 0 and {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_missing_checkpoint_is_an_error(reconstruct, tmp_path):
    nowhere = f"experiment.output_dir={tmp_path / 'nowhere'}"
    for flags in (["--checkpoint", tmp_path / "none"], ["--checkpoint", 77], [nowhere]):
        status, _, err, folder = reconstruct(*flags)
        assert status == 1 and err.startswith(("error: no checkpoint", "error: no weights"))
        assert not (folder / "images.npy").exists()


@pytest.mark.parametrize("length", [0, NUM_TOKENS + 1, -1])
def test_a_length_that_the_model_lacks_is_an_error(reconstruct, length):
    status, _, err, folder = reconstruct(f"--length={length}")
    assert status == 1 and f"length must be in 1..{NUM_TOKENS}, got {length}" in err
    assert not list(folder.rglob("*images*"))


def test_flags_that_exclude_each_other_are_errors(reconstruct):
    for flags in (["--without_image"], ["--without_image", "--tokens", "--png"], ["--original", "--length=3"]):
        status, _, err, _ = reconstruct(*flags)
        assert status == 1 and err.startswith("error: --")
    status, _, err, _ = reconstruct("--jpg", "--jpg_compression_rate", 101)
    assert status == 1 and "in 0..100, got 101" in err


def test_a_wrong_count_is_an_error(reconstruct):
    status, _, err, folder = reconstruct("dataset.params.num_eval_examples=41")
    assert status == 1 and "expected 41 evaluation samples, got 40" in err
    assert not (folder / "images.npy").exists()
