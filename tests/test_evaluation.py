"""The measures behind every published number: distances of sets, codebooks, sets of images, formats, records."""

import hashlib
import json
import math
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from data import DataError
from data.image_sets import open_images, paired, read_statistics
from data.scored_sets import load_reference
from modeling.contribution import Contributions
from modeling.networks.frechet import InceptionFeatures, set_features
from modeling.networks.perceptual import LPIPS, perceptual_measure
from tests.apple_gpu import AppleGPU
from utils.errors import UserError
from utils.evaluation.comparison import Comparison, against
from utils.evaluation.format_budgets import bytes_at_psnr, lines_at_psnr, without_repeats, write_images
from utils.evaluation.image_formats import FORMATS, available, best_within, candidates, decode, header_bytes
from utils.evaluation.metrics import ms_ssim, mse, psnr, psnr_of_mse, ssim, to_uint8
from utils.evaluation.placeholders import placeholder
from utils.evaluation.protocol import protocol
from utils.evaluation.reconstruction_files import keys_text
from utils.evaluation.report import plot_curves, plot_grid, read_results, remarks, table, write_results
from utils.evaluation.sorted_rows import SortedRows, sorted_places
from utils.evaluation.statistics import (
    Gaussian,
    Means,
    Moments,
    code_statistics,
    frechet_distance,
    inception_score,
    precision_recall,
)
from utils.processes import Processes
from utils.result_folder import ResultFolder


@pytest.fixture
def alone():
    return Processes("cpu")


def gaussian_of(features, alone, batch=7):
    moments = Moments(features.shape[1])
    for part in features.split(batch):
        moments.update(part)
    return moments.finish(alone)


def gaussian(mean, deviation):
    mean = torch.tensor(mean, dtype=torch.float64)
    return Gaussian(mean, torch.diag(torch.tensor(deviation, dtype=torch.float64).square()))


# Frechet distance


def test_known_gaussians_give_the_closed_form():
    one, other = gaussian([0.0, 1.0, 2.0], [1.0, 2.0, 3.0]), gaussian([1.0, 1.0, 0.0], [2.0, 2.0, 0.5])
    want = 1 + 4 + (1 - 2) ** 2 + (3 - 0.5) ** 2  # |m1 - m2|^2 + sum (s1 - s2)^2 where both are diagonal
    assert frechet_distance(one, other) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("count", [5, 200])
def test_a_set_is_at_distance_0_of_itself_even_with_fewer_images_than_features(count, alone):
    features = torch.randn(count, 32, generator=torch.Generator().manual_seed(0)) * 3 + 1
    itself = gaussian_of(features, alone)
    assert frechet_distance(itself, itself) < 1e-9


def test_moments_are_the_sample_mean_and_covariance_for_any_batches(alone):
    features = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    for batch in (1, 7, 50):
        found = gaussian_of(features, alone, batch)
        np.testing.assert_allclose(found.mean, features.double().mean(dim=0), atol=1e-14)
        np.testing.assert_allclose(found.covariance, np.cov(features.double().T), atol=1e-14)


def test_the_distance_is_that_of_torchmetrics(alone):
    from torchmetrics.image.fid import FrechetInceptionDistance

    class AsTheyAre(torch.nn.Module):
        num_features = 8

        def forward(self, features):
            return features

    draws = torch.Generator().manual_seed(2)
    one, other = torch.randn(90, 8, generator=draws), torch.randn(70, 8, generator=draws) * 2 + 0.5
    metric = FrechetInceptionDistance(feature=AsTheyAre())
    metric.update(one, real=True)
    metric.update(other, real=False)
    got = frechet_distance(gaussian_of(one, alone), gaussian_of(other, alone))
    assert got == pytest.approx(float(metric.compute()), rel=1e-5)


def test_statistics_of_two_networks_are_refused():
    with pytest.raises(UserError, match="3 and of 2 features"):
        frechet_distance(gaussian([0.0] * 3, [1.0] * 3), gaussian([0.0] * 2, [1.0] * 2))


def test_one_image_is_no_set(alone):
    with pytest.raises(UserError, match="at least 2 images in each, got 1"):
        gaussian_of(torch.randn(1, 3), alone)


# Inception Score, precision and recall


def test_the_inception_score_is_the_number_of_classes_for_sure_and_even_predictions():
    logits = 100 * torch.eye(4).repeat(250, 1)
    mean, deviation = inception_score(logits)
    assert mean == pytest.approx(4, rel=0.02)
    assert inception_score(torch.zeros(20, 4))[0] == pytest.approx(1)
    with pytest.raises(UserError, match="at least 10 images, got 9"):
        inception_score(logits[:9])


def test_precision_and_recall_tell_the_two_errors_apart():
    draws = torch.Generator().manual_seed(0)
    near, far = torch.randn(60, 4, generator=draws), torch.randn(60, 4, generator=draws) + 100
    assert precision_recall(near, near) == (1, 1)
    assert precision_recall(near, far) == (0, 0)
    precision, recall = precision_recall(near, torch.cat([near, far]))
    assert precision == 1 and recall == pytest.approx(0.5)
    with pytest.raises(UserError, match="more than 3 images"):
        precision_recall(near[:3], near)


class TinyInception:
    """A colour's mean as features and as logits."""

    key, title, dimension, num_logits = "fid", "FID", 3, 3

    def __call__(self, images):
        colours = images.float().mean(dim=(2, 3))
        return colours, colours


@pytest.mark.parametrize(
    ("count", "measures", "missing"),
    [
        (1, {"psnr"}, ["FID: at least 2 images are needed, got 1", "Inception Score: at least 10 images are needed"]),
        (9, {"psnr", "fid"}, ["Inception Score: at least 10 images are needed, got 9"]),
        (10, {"psnr", "fid", "inception_score", "inception_score_std"}, []),
    ],
)
def test_too_few_images_for_a_measure_keep_the_others_and_are_told_of(count, measures, missing, alone):
    comparison = Comparison({"psnr": against(psnr)}, TinyInception(), alone)
    images = torch.randint(256, (count, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    comparison.update(images, {"half": images // 2}, list(map(str, range(count))))
    row = comparison.finish(["half"])["half"]
    assert row.keys() == measures
    network = {"distance": "FID", "dimension": 3}
    notes = remarks({"rows": [row], "protocol": {"originals": comparison.record(count), "feature_network": network}})
    notes = [note for note in notes if note.startswith("note: no ")]
    assert len(notes) == len(missing) and all(map(str.__contains__, notes, missing))


# Per-image measures


def test_pixels_are_rounded_not_cut():
    values = torch.tensor([-0.2, 0.0, 0.4 / 255, 0.6 / 255, 100.5001 / 255, 254.6 / 255, 1.0, 3.0])
    assert to_uint8(values).tolist() == [0, 0, 0, 1, 101, 255, 255, 255]


def test_measures_give_one_number_an_image():
    images = torch.rand(3, 3, 176, 180, generator=torch.Generator().manual_seed(0))
    other = (images + torch.tensor([0.0, 0.02, 0.2])[:, None, None, None]).clamp(0, 1)
    for measure in (psnr, ssim, ms_ssim):
        values = measure(other, images)
        assert values.shape == (3,)
        assert values[0] > values[1] > values[2]
        assert measure(other[:1], images[:1]).shape == (1,)
    assert psnr(images, images)[0] == math.inf


@pytest.mark.parametrize("size", [(32, 32), (40, 256)])
def test_psnr_and_ssim_are_those_of_torchmetrics(size):
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, *size, generator=generator)
    images[3] = 0.5  # flat: its variance is 0
    noise = torch.tensor([0.0, 0.01, 0.3, 0.1])[:, None, None, None]
    other = images + noise * torch.randn(images.shape, generator=generator)  # beyond 0 and 1 too
    how = {"data_range": (0.0, 1.0), "reduction": "none"}
    assert torch.allclose(ssim(other, images), structural_similarity_index_measure(other, images, **how), atol=1e-6)
    expected = peak_signal_noise_ratio(other, images, dim=(1, 2, 3), **how)
    assert torch.allclose(psnr(other, images), expected, rtol=0, atol=2e-5)


def test_measures_are_float32_also_where_training_evaluates_under_autocast():
    images = torch.rand(2, 3, 176, 176, generator=torch.Generator().manual_seed(0))
    for measure in (psnr, ssim, ms_ssim):
        expected = measure(0.9 * images, images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(measure(0.9 * images, images), expected)


def test_means_are_over_images_not_batches(alone):
    means = Means()
    means.update({"psnr": torch.tensor([1.0, 2.0, 3.0])})
    means.update({"psnr": torch.tensor([10.0])})
    assert means.finish(alone) == {"psnr": 4.0}


def test_a_perfect_image_does_not_make_the_mean_psnr_of_a_set_infinite(alone):
    means = Means()
    means.update({"psnr": torch.tensor([20.0, math.inf, 30.0])})
    assert means.finish(alone) == {"psnr": 25.0, "psnr_infinite": 1}
    means = Means()
    means.update({"psnr": torch.tensor([math.inf])})
    assert means.finish(alone) == {"psnr": math.inf, "psnr_infinite": 1}


def test_an_empty_set_has_no_mean(alone):
    with pytest.raises(UserError, match="there was no image to score"):
        Means().finish(alone)


def test_the_psnr_of_a_mean_error_is_that_of_all_pixels():
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    other = (images + torch.tensor([0.0, 0.02, 0.2])[:, None, None, None]).clamp(0, 1)
    error = mse(other, images)
    assert error[0] == 0 and psnr_of_mse(0.0) == math.inf
    assert psnr_of_mse(float(error[1])) == pytest.approx(float(psnr(other, images)[1]), abs=1e-4)
    everything = psnr(other.flatten().view(1, 1, 1, -1), images.flatten().view(1, 1, 1, -1))
    assert psnr_of_mse(float(error.mean())) == pytest.approx(float(everything), abs=1e-4)


def test_sums_leave_an_accelerator_before_they_become_float64(alone):
    rows = torch.arange(6.0).view(2, 3)
    means, moments, changes = Means(), Moments(3), Contributions(num_tokens=1, image_size=2)
    with AppleGPU():
        means.update({"psnr": rows[:, 0]})
        moments.update(rows)
        changes.update(slice(0, 1), torch.ones(1, 1, 1, 3, 2, 2))
    assert means.finish(alone) == {"psnr": 1.5}
    assert moments.finish(alone).mean.tolist() == [1.5, 2.5, 3.5]


# Codebook


def test_codebook_statistics_of_counts():
    counts = torch.zeros(2, 8, dtype=torch.long)
    counts[0, 3] = 40  # always the same code
    counts[1, :4] = 10  # four codes, equally often
    found = code_statistics(counts)
    assert found["per_position"]["entropy_bits"] == pytest.approx([0, 2])
    assert found["per_position"]["perplexity"] == pytest.approx([1, 4])
    assert found["per_position"]["usage"] == [1 / 8, 4 / 8]
    shares = [10 / 80, 10 / 80, 10 / 80, 50 / 80]
    assert found["usage"] == 0.5
    assert found["entropy_bits"] == pytest.approx(-sum(share * math.log2(share) for share in shares))
    assert found["perplexity"] == pytest.approx(2 ** found["entropy_bits"])


# Sets of images


@pytest.fixture
def images(tmp_path):
    """The same ten images as .npy, .npz and a folder."""
    array = np.random.default_rng(0).integers(0, 256, (10, 12, 16, 3), dtype=np.uint8)
    np.save(tmp_path / "a.npy", array)
    np.savez_compressed(tmp_path / "a.npz", arr_0=array)
    (tmp_path / "folder").mkdir()
    for index, pixels in enumerate(array):
        Image.fromarray(pixels).save(tmp_path / "folder" / f"{index:03d}.png")
    return tmp_path, array


def write_folder(folder, images):
    folder.mkdir()
    for name, pixels in images.items():
        Image.fromarray(pixels).save(folder / f"{name}.png")


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "folder"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_each_image_comes_once_over_the_ranks(images, name, world_size):
    folder, array = images
    found = {}
    for rank in range(world_size):
        for keys, batch in open_images(folder / name).batches(batch_size=3, rank=rank, world_size=world_size):
            for key, image in zip(keys, batch, strict=True):
                assert int(key) not in found
                found[int(key)] = image.permute(1, 2, 0).numpy()
    assert len(found) == 10
    assert all(np.array_equal(found[index], pixels) for index, pixels in enumerate(array))


def test_sets_that_do_not_pair_are_refused(images):
    folder, array = images
    np.save(folder / "nine.npy", array[:9])
    np.save(folder / "small.npy", array[:, :8])
    (folder / "folder2").mkdir()
    for index in range(10):
        Image.fromarray(array[index]).save(folder / "folder2" / f"x{index}.png")
    write_folder(folder / "named", dict(zip(["bag", "coat", *"cdefghij"], array, strict=True)))
    for one, other, message in (
        ("a.npy", "nine.npy", "as many images in both, got 10 .* and 9"),
        ("a.npy", "small.npy", "of one size, got 12 x 16 .* and 8 x 16"),
        ("folder", "folder2", r"same names in both folders, got 000\.png .* has x0\.png"),
        ("a.npy", "named", r"names such as bag\.png, and an array has places only"),
    ):
        with pytest.raises(DataError, match=message):
            paired([open_images(folder / one), open_images(folder / other)])


def all_images(images):
    return np.concatenate([batch.permute(0, 2, 3, 1).numpy() for _, batch in images.batches(batch_size=4)])


def test_numbers_are_places_in_natural_order_beside_an_array(images):
    folder, array = images
    write_folder(folder / "numbered", {f"frame_{index}": pixels for index, pixels in enumerate(array, 1)})
    pair = paired([open_images(folder / "a.npy"), open_images(folder / "numbered")])
    assert all(np.array_equal(all_images(one), array) for one in pair)
    (folder / "numbered" / "frame_10.png").rename(folder / "numbered" / "frame_11.png")
    with pytest.raises(DataError, match=r"names such as frame_1\.png"):
        paired([open_images(folder / "a.npy"), open_images(folder / "numbered")])


def test_numbers_of_two_folders_must_be_the_same_even_beside_an_array(images):
    folder, array = images
    write_folder(folder / "from_1", {str(index): pixels for index, pixels in enumerate(array, 1)})
    write_folder(folder / "from_0", {str(index): pixels for index, pixels in enumerate(array)})
    for names in (["from_1", "from_0"], ["a.npy", "from_1", "from_0"]):
        with pytest.raises(DataError, match="expected the same names in both folders"):
            paired([open_images(folder / name) for name in names])


def test_an_array_of_ours_is_paired_by_the_keys_that_stand_beside_it(images):
    folder, array = images
    names = [str(index) for index in range(1, 11)]
    write_folder(folder / "user", dict(zip(names, array, strict=True)))
    order = sorted(range(10), key=names.__getitem__)  # 1, 10, 2: as our commands sort keys
    keys = keys_text([f"{names[index]}.png" for index in order])
    for place in ("ours", "ours/length_8"):
        (folder / place).mkdir()
        np.save(folder / place / "images.npy", array[order])
    (folder / "ours" / "reconstruction.json").write_text(json.dumps({"keys": keys}))
    for sets in (["user", "ours/images.npy"], ["ours/length_8/images.npy", "user", "ours/images.npy"]):
        found = [all_images(one) for one in paired([open_images(folder / name) for name in sets])]
        assert all(np.array_equal(one, found[0]) for one in found)

    (folder / "other").mkdir()
    np.save(folder / "other" / "images.npy", array)
    (folder / "other" / "reconstruction.json").write_text(json.dumps({"keys": keys_text(list("abcdefghij"))}))
    write_folder(folder / "named", dict(zip("bcdefghijk", array, strict=True)))
    for name in ("ours/images.npy", "named"):
        with pytest.raises(DataError, match="expected the same names in both, got"):
            paired([open_images(folder / name), open_images(folder / "other" / "images.npy")])
    assert len(paired([open_images(folder / "other" / "images.npy"), open_images(folder / "folder")])) == 2


def test_sheets_of_ours_are_no_images_of_a_folder(images):
    folder, array = images
    results = ResultFolder(folder / "results")
    for name in ("a_1.png", "b_1.png", "contact_sheet.png"):
        Image.fromarray(array[0]).save(results / name)
    Image.fromarray(array[0]).save(folder / "results" / "grid.png")  # somebody else's: it is not in the list
    assert [open_images(folder / "results").key(index) for index in range(3)] == ["a_1", "b_1", "grid"]
    (folder / "folder" / "metrics.json").touch()
    Image.fromarray(array[0]).save(folder / "folder" / "curves.png")
    assert len(open_images(folder / "folder")) == 10


def test_what_is_no_set_of_images_is_refused(images):
    folder, array = images
    np.save(folder / "floats.npy", array / 255)
    (folder / "cut.npy").write_bytes((folder / "a.npy").read_bytes()[:-5])
    np.savez(folder / "other.npz", images=array)
    Image.fromarray(array[0][:5]).save(folder / "folder" / "zz.png")
    with pytest.raises(DataError, match="of uint8, got .* of float64"):
        open_images(folder / "floats.npy")
    with pytest.raises(DataError, match="ends before image 10 of 10"):
        list(open_images(folder / "cut.npy").batches(batch_size=4))
    np.save(folder / "empty.npy", array[:0])
    with pytest.raises(DataError, match="empty.npy holds no images"):
        open_images(folder / "empty.npy")
    with pytest.raises(DataError, match="as arr_0, got .*images"):
        open_images(folder / "other.npz")
    with pytest.raises(DataError, match=r"got 5 x 16 in .*zz\.png"):
        list(open_images(folder / "folder").batches(batch_size=4))
    with pytest.raises(DataError, match="expected a .npy or .npz file or a folder"):
        open_images(folder / "nothing")


def test_reference_statistics_of_the_adm_evaluator_are_read(tmp_path):
    np.savez(tmp_path / "reference.npz", mu=np.zeros(4), sigma=np.eye(4, dtype=np.float32))
    found = read_statistics(tmp_path / "reference.npz")
    assert found.mean.dtype == found.covariance.dtype == np.float64 and not found.has_images
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    assert read_statistics(tmp_path / "images.npz") is None
    np.savez(tmp_path / "odd.npz", mu=np.zeros(4), sigma=np.eye(3))
    with pytest.raises(DataError, match=r"sigma \(D, D\)"):
        read_statistics(tmp_path / "odd.npz")
    np.savez(tmp_path / "nan.npz", mu=np.zeros(4), sigma=np.diag([1, 1, np.nan, 1]))
    with pytest.raises(DataError, match="nan.npz must hold numbers, and mu or sigma has NaN"):
        read_statistics(tmp_path / "nan.npz")


def test_the_record_of_reference_statistics_tells_their_file(tmp_path):
    network, session = SimpleNamespace(key="fid"), SimpleNamespace(share=lambda batch_size: {})
    path, found = tmp_path / "reference.npz", []
    for scale in (1, 2):
        np.savez(path, mu=np.zeros(4), sigma=scale * np.eye(4))
        found.append(load_reference(str(path), (8, 8), network, 4, session).record["statistics_sha256"])
        assert found[-1] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found[0] != found[1]


# Rows sorted by key


def test_rows_come_out_in_the_order_of_their_keys(tmp_path, alone):
    rows = SortedRows(tmp_path, "images.npy", (2, 3), np.uint8, alone)
    array = np.arange(24, dtype=np.uint8).reshape(4, 2, 3)
    rows.append(array[:3])
    rows.append(array[3:])
    rows.close()
    names, places = sorted_places(["d", "b", "c", "a"], alone, "the set")
    rows.write(tmp_path / "images.npy", places)
    rows.remove()
    assert names == ["a", "b", "c", "d"]
    assert np.array_equal(np.load(tmp_path / "images.npy", mmap_mode="r"), array[[3, 1, 2, 0]])
    assert [path.name for path in tmp_path.iterdir()] == ["images.npy"]


def test_a_key_that_comes_twice_is_refused(alone):
    with pytest.raises(UserError, match="the set has 1 keys that come more than once, the first is 'a'"):
        sorted_places(["a", "b", "a"], alone, "the set")


# Image formats


@pytest.fixture(scope="module")
def photo():
    from utils.paths import ROOT

    with Image.open(ROOT / "assets/photos/chelsea.png") as image:
        return np.array(image.convert("RGB").resize((48, 48), Image.Resampling.LANCZOS))


@pytest.mark.parametrize("name", FORMATS)
def test_the_best_file_within_a_budget_never_exceeds_it_and_gets_better_with_it(name, photo):
    found = list(candidates(available(name), photo, (1.0, 0.5, 0.25), limit=1500))
    errors = []
    for budget in (20, 400, 700, 1000, 1500):
        best = best_within(found, budget)
        assert best is None or best.num_bytes <= budget
        errors.append(math.inf if best is None else best.error)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 600 and errors[0] == math.inf


@pytest.mark.parametrize("name", FORMATS)
def test_sizes_and_errors_are_those_of_real_files(name, photo):
    found = next(candidates(available(name), photo, (1.0,), limit=10_000))
    file = FORMATS[name].encode(photo, FORMATS[name].settings[0])
    assert found.num_bytes == len(file)
    assert np.array_equal(found.pixels, decode(file))
    assert found.error == pytest.approx(np.square(decode(file).astype(float) - photo).mean(), rel=1e-5)
    assert 0 < header_bytes(FORMATS[name], grey=False, side=min(photo.shape[:2])) == found.header <= len(file)


@pytest.mark.parametrize("side", [4, 8, 16, 24, 32, 64])
def test_the_header_of_jpeg_2000_describes_every_level_of_the_stored_side(side):
    noise = np.repeat(np.random.default_rng(0).integers(0, 256, (side, side, 1), dtype=np.uint8), 3, axis=2)
    found = next(candidates(available("jpeg2000"), noise, (1.0,), limit=10_000))
    head = FORMATS["jpeg2000"].encode(noise, FORMATS["jpeg2000"].settings[0]).index(b"\xff\x93")  # the data begin
    assert head < found.header <= head + 10  # with two markers and an empty packet for each level
    assert found.counted_bytes(free_header=True) == found.num_bytes - found.header
    assert best_within([found], found.num_bytes - found.header, free_header=True) is found
    assert best_within([found], found.num_bytes - found.header - 1, free_header=True) is None


def test_headers_of_the_other_formats_are_those_of_the_smallest_images():
    for name in ("jpeg", "webp", "avif"):
        assert header_bytes(FORMATS[name], True, 8) == header_bytes(FORMATS[name], True, 32)


def test_grey_images_are_stored_as_grey(photo):
    grey = np.repeat(photo[..., :1], 3, axis=2)
    assert header_bytes(FORMATS["jpeg"], True, 32) < header_bytes(FORMATS["jpeg"], False, 32)
    for image_format in FORMATS.values():
        restored = decode(image_format.encode(grey, image_format.settings[-1]))
        assert restored.shape == grey.shape
        assert np.abs(restored.astype(int) - grey).mean() < 10


def test_settings_go_from_small_files_to_good_images(photo):
    for name, image_format in FORMATS.items():
        sizes = [len(image_format.encode(photo, setting)) for setting in image_format.settings]
        assert sizes[0] < sizes[-1] / 2, name


def test_thumbhash_is_one_file_of_a_few_bytes(photo):
    pytest.importorskip("thumbhash", reason="pip install --no-deps thumbhash-python")
    (file,) = candidates(placeholder("thumbhash"), photo, (1.0,), limit=100)
    assert 18 <= file.num_bytes <= 26 and file.pixels.shape == photo.shape
    assert file.error < variance(photo)


def test_blurhash_has_as_many_waves_across_and_down_as_bytes_allow(photo):
    pytest.importorskip("blurhash")
    found = list(candidates(placeholder("blurhash"), photo, (1.0,), limit=40))
    assert sorted({file.num_bytes for file in found}) == [6, 8, 10, 12, 14, 16, 20, 22, 24, 28, 34, 36]
    assert sum(file.num_bytes == 28 for file in found) == 2  # 3 x 4 and 4 x 3
    assert all(file.pixels.shape == photo.shape for file in found)
    assert best_within(found, 28).error < variance(photo) < best_within(found, 6).error


def variance(pixels):
    """The error of one colour."""
    return np.square(pixels.astype(float) - pixels.mean(axis=(0, 1))).mean()


@pytest.mark.parametrize("name, package", [("thumbhash", "--no-deps thumbhash-python"), ("blurhash", "blurhash")])
def test_a_placeholder_without_its_package_says_how_to_get_it(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f"{name} needs a package that is not there: pip install {package}$"):
        placeholder(name)


def budget_row(system, budget, num_bytes=None, psnr=None):
    scores = {} if psnr is None else {"bytes_per_image": num_bytes, "psnr": psnr}
    return {"name": f"{system}, {budget}", "system": system, "budget": budget, "fits": 1.0 if scores else 0.5} | scores


def test_bytes_at_equal_quality_lie_between_the_budgets_that_hold_every_image():
    rows = [budget_row("A", 10), budget_row("A", 20, 16, 20.0), budget_row("A", 70, 64, 24.0), budget_row("B", 10)]
    found = bytes_at_psnr(rows, [19, 20, 22, 25])
    assert found == {"A": {19: "<= 16.0", 20: "16.0", 22: "32.0", 25: ""}}
    head, rule, *body = lines_at_psnr(found)[1:-1]
    assert head == "| bytes at a mean PSNR of | 19 dB | 20 dB | 22 dB | 25 dB |"
    assert rule == "| :-- | --: | --: | --: | --: |"
    assert body == ["| A | <= 16.0 | 16.0 | 32.0 |  |"]
    assert lines_at_psnr(bytes_at_psnr(rows, [])) == []


def test_a_budget_that_changes_no_file_is_not_shown():
    files = [(10,), (20, 16, 20.0), (30, 16, 20.0), (40, 31, 21.0)]
    rows = [budget_row("A", *file) for file in files]
    assert [row["budget"] for row in without_repeats(rows)] == [20, 40]


def test_an_unknown_format_is_named():
    with pytest.raises(UserError, match="one of jpeg, .*, got png"):
        available("png")


# Networks


def test_weights_that_cannot_be_had_are_one_sentence(monkeypatch, tmp_path):
    def unreachable(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(UserError, match="Inception weights of the FID .*no route.*--weights.*efficientnet_lite0"):
        set_features("inception")
    with pytest.raises(UserError, match="alex weights of LPIPS .*no route.*efficientnet_lite0"):
        perceptual_measure("lpips_alex")
    with pytest.raises(UserError, match="timm:NAME, got vgg"):
        set_features("vgg")
    with pytest.raises(UserError, match="--weights is not for efficientnet_lite0"):
        set_features("efficientnet_lite0", "file.pth")
    with pytest.raises(UserError, match="one of efficientnet_lite0, .*, got l2"):
        perceptual_measure("l2")


def test_inception_takes_a_weights_file_and_refuses_code(monkeypatch, tmp_path):
    import torch_fidelity.feature_extractor_inceptionv3 as port

    with monkeypatch.context() as patch:
        patch.setattr(port, "load_state_dict_from_url", lambda *arguments, **options: {})
        patch.setattr(port.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = port.FeatureExtractorInceptionV3("fid", ["2048"])
    torch.save(network.state_dict(), tmp_path / "inception.pth")
    features = InceptionFeatures(tmp_path / "inception.pth")
    vectors, logits = features(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8))
    assert vectors.shape == (2, features.dimension) and logits.shape == (2, features.num_logits)
    assert (features.key, len(features.weights_sha256)) == ("fid", 64)
    torch.save({"hook": print}, tmp_path / "code.pth")
    with pytest.raises(UserError, match="holds more than tensors"):
        InceptionFeatures(tmp_path / "code.pth")
    torch.save({"fc.bias": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="does not hold the Inception weights"):
        InceptionFeatures(tmp_path / "other.pth")


def test_timm_models_take_a_weights_file(tmp_path):
    import timm

    name = "vit_tiny_patch16_224"
    torch.save(timm.create_model(name).state_dict(), tmp_path / "vit.pth")
    features = set_features(f"timm:{name}", tmp_path / "vit.pth")
    vectors, logits = features(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert vectors.shape == (1, 192) and logits is None
    assert features.title == f"FD-{name}" and features.key == f"fd_{name}"


def test_dinov2_is_used_at_224_pixels_and_takes_the_file_that_is_published_for_518(tmp_path, monkeypatch):
    import timm

    name = "vit_small_patch14_dinov2.lvd142m"
    monkeypatch.setattr("modeling.networks.frechet.DINOV2", name)
    network = timm.create_model(name, pretrained=False)
    torch.nn.init.normal_(network.pos_embed)
    torch.save(network.state_dict(), tmp_path / "dino.pth")
    features = set_features("dinov2", tmp_path / "dino.pth")
    assert features.size == 224 and features.network.pos_embed.shape == (1, 1 + 16 * 16, 384)
    assert torch.equal(features.network.pos_embed[:, 0], network.pos_embed[:, 0])
    assert features(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))[0].shape == (1, 384)


def test_lpips_is_zero_for_equal_images_and_needs_64_pixels(monkeypatch):
    import torchvision

    monkeypatch.setattr("modeling.networks.perceptual.download", lambda *arguments: None)
    alexnet = torchvision.models.alexnet
    monkeypatch.setattr(torchvision.models, "alexnet", lambda weights=None: alexnet())
    measure = LPIPS("alex")
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert measure.per_image(images, images).tolist() == [0, 0]
    assert measure.per_image(images.flip(0), images).min() > 0
    with pytest.raises(UserError, match="at least 64 pixels"):
        measure.per_image(images[..., :32, :32], images[..., :32, :32])


# Records


def test_the_record_says_how_a_number_came_about(alone):
    record = protocol(alone, length=8)
    assert record["length"] == 8 and record["processes"] == 1
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(record) >= {"commit", "command", "rounding", "precision", "device"}


def test_results_are_strict_json_and_only_shown_beside_their_own_images(tmp_path):
    rows = [{"name": "a", "bytes_per_image": 2, "psnr": math.inf, "fid": 1.5}]
    unscored = {"name": "b", "fits": 0.0}
    results = {"rows": [*rows, unscored], "protocol": {"originals": {"sha256": "ab"}}}
    write_results(tmp_path / "new" / "metrics.json", results)
    text = (tmp_path / "new" / "metrics.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["rows"][0]["psnr"] == "inf"
    assert read_results(tmp_path / "new" / "metrics.json", "ab") == rows
    with pytest.raises(UserError, match="other images"):
        read_results(tmp_path / "new" / "metrics.json", "cd")
    with pytest.raises(UserError, match="expected results of an evaluation"):
        read_results(tmp_path / "missing.json", "ab")


def test_results_of_files_whose_names_are_no_utf8_are_written(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    write_results(tmp_path / "metrics.json", {"command": name})
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"command": name}
    write_images(tmp_path / "images.csv", [(name, "WebP", 40, 38, 20.0, 0.1, 0.1)])
    assert b"\ncaf\xe9.png,WebP," in (tmp_path / "images.csv").read_bytes()


def test_the_table_leaves_blank_what_a_row_lacks():
    lines = table([{"name": "a", "psnr": 20.123456}, {"name": "bb", "psnr": 3.0, "fd_new": 1.0}]).splitlines()
    assert lines[0].split("|")[2:4] == [" PSNR, dB ↑ ", " FD-new ↓ "]
    assert [cell.strip() for cell in lines[2].split("|")[1:4]] == ["a", "20.12", ""]
    assert len({len(line) for line in lines}) == 1


def test_a_curve_is_the_mean_of_its_seeds_within_a_band_from_the_least_to_the_most(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr("utils.evaluation.report.save_figure", lambda figure, *_args, **_options: drawn.append(figure))
    points = [(8, 5.0), (4, 1.0), (4, 3.0), (4, 8.0)]
    plot_curves(
        tmp_path / "curves.png", [{"system": "a", "passes": x, "fid": y} for x, y in points], "t", over="passes"
    )
    axis = drawn[0].axes[0]
    assert axis.lines[0].get_xydata().tolist() == [[4, 4.0], [8, 5.0]]
    band = axis.collections[0].get_paths()[0].vertices.tolist()
    assert {tuple(point) for point in band} == {(4, 1.0), (4, 8.0), (8, 5.0)}


def test_curves_and_grids_are_images(tmp_path):
    rows = [{"name": str(n), "system": "ours", "bytes_per_image": n, "psnr": n / 2, "fid": 9.0} for n in (1, 2, 4)]
    rows.append({"name": "x", "system": "another", "bytes_per_image": 3, "psnr": 1.0})
    plot_curves(tmp_path / "curves.png", rows, "t")
    grid = [{"name": "", "a": a, "b": b, "fid": a * b} for a in (1.0, 2.0) for b in (3.0, 4.0, 5.0)]
    plot_grid(tmp_path / "grid.png", grid, ["a", "b"], "fid")
    plot_grid(tmp_path / "line.png", grid[:3], ["b"], "fid")
    for name in ("curves", "grid", "line"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.width > 300
