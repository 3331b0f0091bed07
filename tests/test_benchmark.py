"""scripts/benchmark.py runs on the tiny model, and counts what it says."""

import json
import sys

import pytest

from modeling.modules.vit import VIT_SIZES
from scripts import benchmark
from utils.cli import ROOT, run
from utils.config import load_config


@pytest.fixture
def measure(tmp_path, monkeypatch, capsys):
    """Run the command on the tiny model, one picture, one timing: (exit status, what it wrote, stdout, stderr)."""
    monkeypatch.setattr(benchmark, "CEILING_SIZES", {"cpu": (64, 1, 32, 16)})
    monkeypatch.setattr(benchmark, "SHORTEST", 0.0)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def measure(*arguments):
        file = tmp_path / "found/speed.json"
        flags = {"device": "cpu", "batch_size": 1, "repeats": 1, "json": file}
        given = [f"--{name}={value}" for name, value in flags.items() if f"--{name}" not in arguments]
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *given, *map(str, arguments)])
        status = 0
        try:
            run(benchmark.main)
        except SystemExit as stop:
            status = stop.code
        return status, json.loads(file.read_text()) if file.is_file() else None, *capsys.readouterr()

    return measure


def test_every_item_runs_on_the_tiny_model(measure):
    status, found, printed, error = measure()
    assert status == 0, error
    assert [one["item"] for one in found["results"]] == [
        *("encode", "decode 8", "decode 32", "attention", "attention, fused"),
        *("stage-1 step", "stage-2 step", "generator, tokens", "generator, images"),
        *("sample", "guided, one pass", "guided, two", "reconstruct", "reconstruct, 1 by 1"),
        *("contribution", "contribution, 1 by 1", "loader", "pretokenize", "step", "checkpoint"),
    ]
    assert set(found["ceilings_flops_per_second"]) == {"matmul", "convolution"}
    for one in found["results"]:
        assert one["model"] == "tiny" and one["batch_size"] == 1 and one["seconds"] > 0
        assert one["item"] in printed
        if one["item"] == "checkpoint":
            assert one["images_per_second"] is None
            steps = load_config(ROOT / "configs/fashion/stage1.yaml").experiment.save_every
            training = steps * found["results"][-2]["seconds"] + one["seconds"]
            assert one["share_of_training"] == pytest.approx(one["seconds"] / training)
        else:
            assert one["images_per_second"] == pytest.approx(1 / one["seconds"])
            assert one["share_of_training"] is None
        if one["item"] in ("checkpoint", "loader"):
            assert one["flops"] == 0 and one["share_of_ceiling"] is None
        else:
            assert one["flops_per_second"] == pytest.approx(one["flops"] / one["seconds"])
            assert one["share_of_ceiling"] > 0


def test_ways_to_do_the_same_do_the_same_work(measure):
    _, found, _, _ = measure("--only", "encode", "decode", "reconstruct", "contribution", "--batch_size=2")
    flops = {one["item"]: one["flops"] for one in found["results"]}
    assert flops["reconstruct"] == flops["reconstruct, 1 by 1"] == flops["encode"] + flops["decode 32"]
    # The picture as it is, and each of the two in which a token is replaced.
    assert flops["contribution"] == flops["contribution, 1 by 1"] == 3 * flops["decode 32"] / 2


def test_the_count_of_operations_is_the_models(measure):
    """Multiplications and additions of the encoder, by hand."""
    _, found, _, _ = measure("--only", "encode", "--batch_size", "2")
    config = load_config(ROOT / "configs/fashion/stage2.yaml")
    size, model = VIT_SIZES["tiny"], config.model.vq_model
    patch, tokens = model.vit_enc_patch_size, model.num_latent_tokens
    patches = (config.dataset.preprocessing.crop_size // patch) ** 2
    positions = 1 + patches + tokens
    block = 24 * positions * size.width**2 + 4 * positions**2 * size.width
    embed = 2 * patches * 3 * patch**2 * size.width
    quantize = 2 * tokens * model.token_size * (size.width + model.codebook_size)
    expected = 2 * (embed + size.num_layers * block + quantize)
    assert found["results"][0]["flops"] == pytest.approx(expected, rel=0.001)


def test_training_costs_three_times_what_is_trained(measure):
    """Forward once, backward twice, beside the teacher's encoder, which only goes forward."""
    _, found, _, _ = measure("--only", "encode", "decode", "stage1")
    flops = {one["item"]: one["flops"] for one in found["results"]}
    assert flops["stage-1 step"] > 3 * flops["encode"]
    assert flops["decode 8"] < flops["decode 32"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch_size", "0"), "error: --batch_size must be 1 or more, got 0\n"),
        (("--repeats", "0"), "error: --repeats must be 1 or more, got 0\n"),
    ],
)
def test_bad_numbers_are_explained(measure, arguments, message):
    status, _, _, error = measure(*arguments)
    assert status == 1 and error == message


def test_help_comes_with_an_example(measure):
    status, _, printed, _ = measure("--help")
    assert status == 0 and "python3 scripts/benchmark.py --model S L" in printed
