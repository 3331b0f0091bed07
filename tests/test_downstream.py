"""scripts/evaluate_downstream.py: scores of known predictions, the networks' plumbing, the command and its errors."""

import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import models

from data.annotations import read_boxes
from data.image_sets import open_images
from modeling.networks.downstream import (
    ClipEmbedding,
    Depth,
    TorchvisionClassifier,
    TorchvisionDetector,
    TorchvisionSegmenter,
    classifier,
)
from modeling.networks.frozen import ImageNetwork
from scripts import evaluate_downstream
from tests.evaluation_data import command, on_two_processes
from utils.errors import UserError
from utils.evaluation.agreement import Detection, PerImage, Segmentation, classification, depth, similarity
from utils.paths import ROOT
from utils.processes import Processes

NUM_IMAGES = 10


@pytest.fixture
def alone():
    return Processes("cpu")


# Scores


def test_classes_are_held_against_labels_and_against_the_original(alone):
    score = PerImage(classification)
    seen_in_originals, seen = torch.eye(4)[[0, 1, 2, 3]], torch.eye(4)[[0, 1, 3, 3]]
    score.update(seen, seen_in_originals, np.array([0, 2, 3, 1]))
    assert score.finish(alone) == {"agreement": 0.75, "accuracy": 0.5}
    with pytest.raises(UserError, match=r"classes of the network, 0..3, got 0..4"):
        score.update(seen, seen_in_originals, np.array([0, 2, 3, 4]))


def test_embeddings_are_compared_by_their_angle(alone):
    score = PerImage(similarity)
    score.update(torch.tensor([[2.0, 0], [0, 1], [1, 1]]), torch.tensor([[1.0, 0], [1, 0], [-3, -3]]))
    assert score.finish(alone) == {"clip_similarity": pytest.approx(0, abs=1e-6)}  # the mean of 1, 0 and -1


def test_the_rmse_of_depth_is_over_all_images(alone):
    score = PerImage(depth)
    for offset in (1.0, 7.0):
        score.update(torch.full((1, 2, 3), offset), torch.zeros(1, 2, 3))
    assert score.finish(alone) == {"depth_l1": 4, "depth_mse": 25, "depth_rmse": 5}


def test_intersection_over_union_is_over_all_images_and_leaves_void_pixels_out(alone):
    score = Segmentation(num_classes=4)
    predicted, reference = torch.tensor([[[0, 0, 1, 1]]]), torch.tensor([[[0, 0, 0, 0]]])
    score.update(predicted, reference, np.array([[[0, 1, 1, 255]]], dtype=np.uint8))
    score.update(torch.tensor([[[2, 2, 2, 2]]]), torch.tensor([[[2, 2, 2, 2]]]), np.full((1, 1, 4), 2))
    assert score.finish(alone) == {
        "miou": pytest.approx((1 / 2 + 1 / 2 + 1) / 3),  # class 3 occurs nowhere
        "miou_to_original": pytest.approx((2 / 4 + 0 + 1) / 3),
    }
    for wrong in (9, -1):
        with pytest.raises(UserError, match=f"0..3, or 255 .*, got {wrong}"):
            score.update(predicted, reference, np.full((1, 1, 4), wrong))


def boxes(*corners, scores=None):
    return {
        "boxes": torch.tensor(corners, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.ones(len(corners), dtype=torch.long),
        "scores": torch.tensor(scores or [0.9] * len(corners)),
    }


def test_found_objects_give_a_precision_of_1_and_shifted_ones_less(alone):
    square = (10, 10, 50, 50)
    same, shifted = Detection("install it"), Detection("install it")
    truth = [{name: boxes(square)[name] for name in ("boxes", "labels")}]
    unsure = boxes(square, (0, 0, 5, 5), scores=[0.9, 0.2])  # what the original hardly shows need not be found
    same.update([boxes(square)], [unsure], truth)
    shifted.update([boxes((18, 10, 58, 50))], [unsure], truth)  # IoU 2/3: counts at 0.5, 0.55, 0.6 and 0.65
    names = ("map", "map_50", "map_to_original", "map_50_to_original")
    assert same.finish(alone) == dict.fromkeys(names, pytest.approx(1))
    assert shifted.finish(alone) == dict(zip(names, [pytest.approx(0.4), pytest.approx(1)] * 2, strict=True))


def test_where_originals_show_no_object_there_is_no_precision(alone, caplog):
    score, square = Detection("install it"), (10, 10, 50, 50)
    score.update([boxes(square)], [boxes(square, scores=[0.2])])
    assert score.finish(alone) == {}
    assert "there is no map_to_original and map_50_to_original" in caplog.text


def test_detection_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr("torchmetrics.detection.mean_ap._PYCOCOTOOLS_AVAILABLE", False)
    monkeypatch.setattr("torchmetrics.detection.mean_ap._FASTER_COCO_EVAL_AVAILABLE", False)
    with pytest.raises(UserError, match="needs the package pycocotools: install it so"):
        Detection("install it so")


# Networks


@pytest.fixture
def hub_dir(tmp_path, monkeypatch):
    """torch.hub's cache, with untrained weights under torchvision's names: the plumbing needs no trained ones."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def put(name, **options):
        torch.manual_seed(0)
        file = models.get_model_weights(name).DEFAULT.url.rsplit("/", 1)[-1]
        torch.save(models.get_model(name, weights=None, **options).state_dict(), folder / file)

    return put


@pytest.fixture(scope="module")
def images():
    """(2, 3, 96, 96) uint8."""
    photos = [Image.open(ROOT / f"assets/photos/{name}.png").convert("RGB") for name in ("chelsea", "coffee")]
    return torch.from_numpy(np.stack([np.array(photo.resize((96, 96))) for photo in photos])).permute(0, 3, 1, 2)


def test_torchvision_models_look_at_8_bit_images(hub_dir, images):
    hub_dir("squeezenet1_1")
    hub_dir("lraspp_mobilenet_v3_large", weights_backbone=None)
    network = TorchvisionClassifier("squeezenet1_1")
    assert network(images).shape == (2, 1000)
    assert len(network.weights_sha256) == 64 and "resize_size=[256]" in network.preparation
    segmenter = TorchvisionSegmenter("lraspp_mobilenet_v3_large")
    classes = segmenter(images)
    assert segmenter.num_classes == 21
    assert classes.shape == (2, 96, 96) and not classes.is_floating_point()


def test_detectors_give_boxes_in_pixels_of_the_images(hub_dir, images):
    hub_dir("ssdlite320_mobilenet_v3_large", weights_backbone=None)
    found = TorchvisionDetector("ssdlite320_mobilenet_v3_large")(images)
    assert len(found) == 2 and all({"boxes", "labels", "scores"} <= set(item) for item in found)
    assert all(len(item["boxes"]) and 0 <= item["boxes"].min() and item["boxes"].max() <= 96 for item in found)


def test_models_and_weights_that_cannot_be_had_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", unreachable)
    monkeypatch.setitem(sys.modules, "transformers", None)
    for load, message in (
        (lambda: classifier("convnext_base"), "could not be downloaded .*put convnext_base-6075fbad.pth into"),
        (lambda: classifier("resnet"), "classification model of torchvision, got resnet: alexnet, "),
        (lambda: TorchvisionDetector("alexnet"), "detection model of torchvision, got alexnet: fasterrcnn"),
        (lambda: classifier("timm:none_such"), "timm model none_such could not be loaded"),
        (lambda: ClipEmbedding("openai/clip"), "needs the package transformers, .*: pip install .*downstream"),
    ):
        with pytest.raises(UserError, match=message) as raised:
            load()
        assert "\n" not in str(raised.value)


def unreachable(*arguments, **options):
    raise OSError("Network is unreachable")


class TinyModel(torch.nn.Linear):
    """Stands for a transformers model: its output is a function of the mean colour."""

    def __init__(self):
        super().__init__(3, 6)

    def forward(self, pixel_values):
        x = super().forward(pixel_values.mean(dim=(2, 3)))
        return SimpleNamespace(image_embeds=x, predicted_depth=x.view(-1, 2, 3))


@pytest.mark.parametrize(("network", "shape"), [(ClipEmbedding, (2, 6)), (Depth, (2, 2, 3))])
def test_transformers_models_are_loaded_whole_or_not_at_all(monkeypatch, images, network, shape):
    missing = set()

    def prepare(images, return_tensors):
        return {"pixel_values": torch.stack(images) / 255}

    def load(name, dtype, output_loading_info):
        if name == "nowhere":
            raise OSError("nowhere is not on the hub\nand more")
        return TinyModel(), {"missing_keys": missing}

    library = SimpleNamespace(
        AutoImageProcessor=SimpleNamespace(from_pretrained=lambda name: prepare),
        logging=SimpleNamespace(set_verbosity_error=lambda: None),
    )
    setattr(library, network.architecture, SimpleNamespace(from_pretrained=load))
    monkeypatch.setitem(sys.modules, "transformers", library)
    assert network("somewhere")(images).shape == shape
    with pytest.raises(UserError, match=r"could not be loaded as .* \(nowhere is not on the hub\): .*--model FOLDER"):
        network("nowhere")
    missing.add("head.weight")
    with pytest.raises(UserError, match="lacks 1 tensors, the first is head.weight"):
        network("somewhere")


# The command


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """`original.npy`, `dark.npy` and `labels.npy`, of ten small photographs."""
    folder = tmp_path_factory.mktemp("sets")
    photos = sorted((ROOT / "assets/photos").glob("*.png"))[:NUM_IMAGES]
    images = np.stack([np.array(Image.open(path).convert("RGB").resize((64, 64))) for path in photos])
    np.save(folder / "original.npy", images)
    np.save(folder / "dark.npy", images // 8)
    np.save(folder / "labels.npy", np.arange(NUM_IMAGES))
    return folder


@pytest.fixture
def evaluate(sets, tmp_path, monkeypatch, capsys):
    """Run the command in this process: (exit status, stdout, stderr, metrics.json or None)."""

    def evaluate(task, *arguments, targets=("dark.npy",)):
        pair = ("--original", sets / "original.npy", "--target", *(sets / name for name in targets))
        place = ("--output_dir", tmp_path, "--device", "cpu")
        flags = ("--task", task, *pair, *place, *arguments)
        result = command(monkeypatch, capsys, evaluate_downstream.main, *flags)
        file = tmp_path / task / "metrics.json"
        return *result, json.loads(file.read_text()) if file.exists() else None

    return evaluate


LITE0 = ("--model", "efficientnet_lite0", "--batch_size", 4)


def test_classification_offline_on_one_and_two_processes(sets, evaluate, tmp_path):
    flags = (*LITE0, "--truth", sets / "labels.npy")
    status, out, _, results = evaluate("classification", *flags, targets=("original.npy", "dark.npy"))
    assert status == 0 and f"{NUM_IMAGES} images scored by efficientnet_lite0" in out
    original, same, dark = results["rows"]
    assert original["name"] == "original" and same["name"] == str(sets / "original.npy")
    assert same["agreement"] == original["agreement"] == 1 > dark["agreement"]
    assert same["accuracy"] == original["accuracy"]
    record = results["protocol"]
    assert record["originals"]["expected"] == record["originals"]["seen"] == NUM_IMAGES
    assert len(record["truth"]["sha256"]) == len(record["network"]["weights_sha256"]) == 64
    on_two_processes(
        "scripts/evaluate_downstream.py", "--task", "classification", "--original", sets / "original.npy",
        "--target", sets / "original.npy", sets / "dark.npy", *flags, "--device", "cpu",
        "--output_dir", tmp_path / "two",
    )  # fmt: skip
    two = json.loads((tmp_path / "two/classification/metrics.json").read_text())
    assert two["rows"] == results["rows"] and two["protocol"]["originals"] == record["originals"]


class Sees(ImageNetwork):
    """A network that is one function of the images."""

    preparation, weights_sha256, num_classes = "none", "none", 4

    def __init__(self, look):
        super().__init__()
        self.look = look


@pytest.mark.parametrize(
    ("task", "look", "perfect"),
    [
        ("clip", lambda images: images.flatten(1).float(), {"clip_similarity": 1}),
        ("depth", lambda images: images[:, 0].float(), {"depth_l1": 0, "depth_rmse": 0}),
        ("segmentation", lambda images: images[:, 0] // 64, {"miou_to_original": 1}),
        (
            "detection",
            lambda images: [boxes((0, 0, 9, float(image.max()) / 8)) for image in images],
            {"map_to_original": 1},
        ),
    ],
)
def test_each_task_holds_what_a_network_sees_against_the_originals(evaluate, monkeypatch, task, look, perfect):
    injected = evaluate_downstream.TASKS[task]._replace(load=lambda model: Sees(look))
    monkeypatch.setitem(evaluate_downstream.TASKS, task, injected)
    status, out, _, results = evaluate(task, targets=("original.npy", "dark.npy"))
    assert status == 0
    same, worse = results["rows"]
    for name, value in perfect.items():
        assert same[name] == pytest.approx(value, abs=1e-6) != worse[name]
    assert results["protocol"]["network"]["model"] == injected.model and injected.model in out


def test_coco_annotations_are_read_in_the_order_of_their_images(sets, tmp_path):
    images = open_images(sets / "original.npy")
    entries = [{"id": 100 - index} for index in range(NUM_IMAGES)]
    item = {"image_id": 99, "bbox": [1, 2, 10, 20], "category_id": 7, "iscrowd": 1}
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps({"images": entries, "annotations": [item]}))
    first, second, *_ = read_boxes(path, images)
    assert first["boxes"].shape == (0, 4)
    assert {name: value.tolist() for name, value in second.items()} == {
        "boxes": [[1, 2, 11, 22]],
        "labels": [7],
        "iscrowd": [1],
    }
    path.write_text(json.dumps({"images": entries[1:], "annotations": []}))
    with pytest.raises(UserError, match="expected 10 images in .*boxes.json, as in .*original.npy, got 9"):
        read_boxes(path, images)
    path.write_text("{}")
    with pytest.raises(UserError, match="expected COCO annotations"):
        read_boxes(path, images)


def test_what_cannot_be_scored_is_refused(sets, evaluate, tmp_path):
    np.save(tmp_path / "few.npy", np.load(sets / "original.npy")[:3])
    for task, flags, targets, message in (
        ("classification", LITE0, (tmp_path / "few.npy",), "as many images in both, got 10 .* and 3 in"),
        ("classification", [*LITE0, "--truth", sets / "dark.npy"], ("dark.npy",), "must hold class ids \\(10,\\)"),
        ("classification", [*LITE0, "--weights", "x.pth"], ("dark.npy",), "--weights is for --model timm:NAME"),
        ("depth", ["--truth", sets / "labels.npy"], ("dark.npy",), "--truth is not for --task depth"),
    ):
        status, _, err, results = evaluate(task, *flags, targets=targets)
        assert (status, results) == (1, None)
        assert re.search(message, err), err
