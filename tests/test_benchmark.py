"""scripts/benchmark.py runs on the tiny model, and counts what it says."""

import json
import math
import sys
import time
from dataclasses import fields, replace

import pytest
import torch
from accelerate.state import AcceleratorState

from data import benchmark_loader
from modeling.modules import blocks
from modeling.modules.vit import VIT_SIZES
from modeling.tokenizers import build_tokenizer
from scripts import benchmark
from utils.benchmark import measure, report
from utils.benchmark.arguments import parse_arguments
from utils.benchmark.draw import draw, three_digits
from utils.benchmark.items import CONFIGS, allow_tf32, settings
from utils.benchmark.peers import Comparison, check_pair
from utils.cli import run
from utils.config import load_config
from utils.errors import UserError
from utils.figures import plotting
from utils.paths import ROOT


@pytest.fixture
def run_benchmark(tmp_path, monkeypatch, capsys):
    """Run the command on the tiny model, one image, one timing: (exit status, what it wrote, stdout, stderr)."""
    monkeypatch.setattr(measure, "CEILING_SIZES", {"cpu": (64, 1, 32, 16)})
    monkeypatch.setattr(measure, "SHORTEST", 0.0)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def run_benchmark(*arguments):
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

    return run_benchmark


def test_every_item_runs_on_the_tiny_model(run_benchmark):
    status, found, printed, error = run_benchmark("--only=all")
    assert status == 0, error
    assert [one["item"] for one in found["results"]] == [
        *("encode", "decode 8", "decode 32", "attention", "attention, fused"),
        *("linear layer, fp32", "convolution, fp32", "linear layer, bf16", "convolution, bf16"),
        *("stage-1 step", "stage-2 step", "generator, tokens", "generator, images"),
        *("sample", "guided, one pass", "guided, two", "draft, 8 tokens", "draft, 32 tokens"),
        *("reconstruct", "reconstruct, 1 by 1"),
        *("contribution", "contribution, 1 by 1", "loader", "pretokenize", "step", "checkpoint"),
        *("tokens to bytes", "bytes to tokens", "bytes to tokens, 1 by 1"),
        *("tokens to images", "tokens to images, 1 by 1"),
    ]
    assert set(found["ceilings_flops_per_second"]) == {"matmul", "convolution"}
    assert found["copied_bytes_per_second"] > 0
    for one in found["results"]:
        assert one["model"] == "tiny" and one["batch_size"] == one["processes"] == 1
        is_of_numpy = one["item"].startswith(("tokens to bytes", "bytes to tokens"))
        assert one["seconds"] > 0 and (one["peak_memory"] > 0 or is_of_numpy)
        assert one["item"] in printed
        if one["item"].startswith(("linear layer", "convolution")):
            assert one["images_per_second"] is None and one["flops"] > 0
        elif one["item"] == "checkpoint":
            assert one["images_per_second"] is None
            steps = load_config(ROOT / "configs/fashion/stage1.yaml").experiment.save_every
            (step,) = (other["seconds"] for other in found["results"] if other["item"] == "step")
            training = steps * step + one["seconds"]
            assert one["share_of_training"] == pytest.approx(one["seconds"] / training)
        else:
            assert one["images_per_second"] == pytest.approx(1 / one["seconds"])
            assert one["share_of_training"] is None
        if one["item"] in ("checkpoint", "loader") or is_of_numpy:
            assert one["flops"] == 0 and one["share_of_ceiling"] is None
        else:
            assert one["flops_per_second"] == pytest.approx(one["flops"] / one["seconds"])
            assert one["share_of_ceiling"] > 0


def test_a_few_items_are_measured_where_none_are_named_and_a_bar_counts_them(run_benchmark):
    status, found, _, error = run_benchmark("--lengths=8")
    assert status == 0
    assert [one["item"] for one in found["results"]] == ["encode", "decode 8", "stage-1 step", "sample"] + [
        "guided, one pass",
        "guided, two",
    ]
    assert "4/4" in error


def test_ways_to_do_the_same_do_the_same_work(run_benchmark):
    _, found, _, _ = run_benchmark("--only", "encode", "decode", "reconstruct", "contribution", "--batch_size=2")
    flops = {one["item"]: one["flops"] for one in found["results"]}
    assert flops["reconstruct"] == flops["reconstruct, 1 by 1"] == flops["encode"] + flops["decode 32"]
    # The image as it is, and each of the two in which a token is replaced.
    assert flops["contribution"] == flops["contribution, 1 by 1"] == 3 * flops["decode 32"] / 2


def vit_flops(positions, size):
    """Of one image through the blocks: 12 W^2 weights a position, and two products of T x T x W in attention."""
    return size.num_layers * (24 * positions * size.width**2 + 4 * positions**2 * size.width)


def pixel_decoder_flops(grid, channels, multipliers, latent):
    """Of one image; a residual block has two 3 x 3 convolutions, an enlargement ends in one."""

    def conv(inputs, outputs, side, kernel=3):
        return 2 * inputs * outputs * kernel**2 * side**2

    widths = [channels * multiplier for multiplier in multipliers]
    total = conv(latent, widths[-1], grid) + 2 * 2 * conv(widths[-1], widths[-1], grid)
    inputs, side = widths[-1], grid
    for level in reversed(range(len(widths))):
        outputs = widths[level]
        total += conv(inputs, outputs, side) + 3 * conv(outputs, outputs, side)
        total += conv(outputs, outputs, side, kernel=1) if inputs != outputs else 0
        if level > 0:
            side *= 2
            total += conv(outputs, outputs, side)
        inputs = outputs
    return total + conv(channels, 3, side)


@pytest.mark.parametrize(("name", "size"), [("S", "small"), ("B", "base"), ("L", "large")])
def test_the_count_of_operations_of_the_published_models(name, size):
    """Encoding and decoding one image, against a count by hand of multiplications and additions."""
    config = load_config(ROOT / CONFIGS[name]["stage2"])
    size, tokens, grid, patch, codes = VIT_SIZES[size], 256, 16, 16, 1024
    with torch.device("meta"), torch.no_grad():  # so no arithmetic is done
        model = build_tokenizer(config).eval()
        encode = measure.count_flops(lambda: model.encoder(torch.zeros(1, 3, 256, 256), model.latent_tokens))
        z_quantized = torch.zeros(1, 12, 1, 256)
    with torch.no_grad():
        decode = measure.count_flops(lambda: model.decode(z_quantized))
    positions = 1 + grid**2 + tokens
    ends = 2 * grid**2 * 3 * patch**2 * size.width + 2 * tokens * 12 * size.width
    assert sum(encode.values()) == pytest.approx(vit_flops(positions, size) + ends, rel=0.02)
    heads = 2 * grid**2 * (2 * size.width**2 + 2 * size.width * codes + codes * 256)
    expected = vit_flops(positions, size) + heads + pixel_decoder_flops(grid, 128, (1, 1, 2, 2, 4), 256)
    assert sum(decode.values()) == pytest.approx(expected, rel=0.02)


def test_cost_is_measured_along_lengths_and_batch_sizes(run_benchmark, tmp_path):
    figure = tmp_path / "figures/growth.png"
    lengths = ("--lengths", "4", "16", "999")
    status, found, printed, error = run_benchmark(
        "--only", "encode", "decode", *lengths, "--batch_size", "1", "3", "--figure", figure
    )
    assert status == 0, error
    lengths = [None, 4, 16, 32]  # all of the tiny model's, where there are no more
    rows = [(one["batch_size"], one["length"]) for one in found["results"]]
    assert rows == [(batch, length) for batch in (1, 3) for length in lengths]
    flops = {row: one["flops"] for row, one in zip(rows, found["results"], strict=True)}
    assert all(flops[3, length] == 3 * flops[1, length] for length in lengths)
    assert flops[1, 4] < flops[1, 16] < flops[1, 32]
    assert "decode 16" in printed and figure.read_bytes().startswith(b"\x89PNG")


def test_processes_work_at_the_same_time_and_train_together(run_benchmark):
    items = ("--only", "decode", "stage1", "--lengths=8")
    _, alone, _, _ = run_benchmark(*items)
    status, together, _, error = run_benchmark(*items, "--processes=2")
    assert status == 0, error
    for one, two in zip(alone["results"], together["results"], strict=True):
        assert one["item"] == two["item"] and (one["processes"], two["processes"]) == (1, 2)
        assert two["flops"] == 2 * one["flops"] and two["peak_memory"] > 1.5 * one["peak_memory"]
        assert two["images_per_second"] == pytest.approx(2 / two["seconds"])
        assert two["share_of_ceiling"] > 0


@pytest.mark.parametrize(
    ("along", "flops", "rate", "memory"),
    [("length", 30, 10 / 3, 1), ("batch_size", 20, 10, 2), ("processes", 20, 20, 2)],
)
def test_a_figure_shows_how_cost_would_grow_by_the_work_alone(along, flops, rate, memory):
    values = {field.name: 1 for field in fields(measure.Measurement)}
    values |= {"item": "decode 1", "flops": 10, "images_per_second": 10.0, "peak_memory": 2**20}
    first = measure.Measurement(**values)
    second = replace(first, **{along: 2}, flops=flops, images_per_second=7.0, peak_memory=5 * 2**20)
    second = replace(second, item=f"decode {second.length}")
    figure = draw([first, second], along, title="")
    for axis, measured, ideal in zip(figure.axes, ([10, 7], [1, 5]), ([10, rate], [1, memory]), strict=True):
        lines = [list(line.get_ydata()) for line in axis.lines]
        assert lines == [measured, pytest.approx(ideal)]
    plotting().close(figure)


def test_a_profile_names_the_operators(run_benchmark):
    status, _, printed, error = run_benchmark("--only=encode", "--profile")
    assert status == 0, error
    assert "Self CPU %" in printed and printed.count("::") == measure.NUM_OPERATORS


def test_the_ceiling_is_by_a_library_that_has_the_precision(run_benchmark, monkeypatch):
    monkeypatch.setattr(blocks, "ONEDNN_DTYPES", ())
    status, _, printed, error = run_benchmark("--only=encode", "--precision=bf16")
    assert status == 0, error
    assert "matmul (torch)" in printed


def test_the_ceiling_of_convolutions_is_in_the_faster_layout(run_benchmark, monkeypatch):
    layouts = []

    def conv2d(images, kernel, padding):
        layouts.append(images.is_contiguous())
        return torch.conv2d(images, kernel, padding=padding)

    # A minute for each of one layout: more than a busy machine adds to one of the other.
    monkeypatch.setitem(measure.CLOCKS, "wall", lambda: time.perf_counter() + 60 * layouts.count(True))
    monkeypatch.setattr(measure.F, "conv2d", conv2d)
    _, _, printed, _ = run_benchmark("--only=attention")
    assert set(layouts) == {True, False} and "convolution (channels last)" in printed


def test_an_item_too_large_for_the_memory_leaves_the_others(run_benchmark, monkeypatch):
    def greedy(setting):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setitem(benchmark.ITEMS, "encode", greedy)
    status, found, printed, error = run_benchmark("--only", "encode", "decode", "--lengths=8")
    assert status == 0, error
    assert [one["item"] for one in found["results"]] == ["decode 8"]
    assert "encode: a batch of 1 does not fit into memory" in printed


@pytest.mark.parametrize(("precision", "trains_in_tf32"), [("fp32", False), ("tf32", True), ("bf16", True)])
def test_half_precision_leaves_training_the_tf32_of_its_configuration(
    run_benchmark, monkeypatch, precision, trains_in_tf32
):
    """The perceptual distance, and a generator's tokenizer, compute in float32 under autocast."""
    allowed = {}

    def note(work, setting):
        allowed[work.name] = torch.backends.cuda.matmul.allow_tf32
        return timer(work, setting)

    timer = measure.Timer
    monkeypatch.setattr(measure, "Timer", note)
    AcceleratorState._reset_state()
    try:
        status, _, _, error = run_benchmark("--only", "encode", "stage1", "attention", f"--precision={precision}")
    finally:
        AcceleratorState._reset_state()
        allow_tf32(False)
    assert status == 0, error
    assert allowed["stage-1 step"] == trains_in_tf32
    assert allowed["encode"] == allowed["attention"] == (precision == "tf32")


@pytest.mark.parametrize(("flags", "expected"), [([], False), (["--compile"], True), (["--no-compile"], False)])
def test_on_a_cpu_compiling_is_to_be_asked_for(monkeypatch, flags, expected):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--device=cpu", *flags])
    assert settings(parse_arguments("", benchmark.ITEMS))[0].compile == expected


def test_plain_is_eager(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--device=cpu", "--compile"])
    assert settings(parse_arguments("", benchmark.ITEMS))[0].compile
    sys.argv.append("--plain")
    assert not settings(parse_arguments("", benchmark.ITEMS))[0].compile


def test_an_accelerator_is_not_timed_by_the_processors_clock(run_benchmark):
    status, _, _, error = run_benchmark("--only=encode", "--device=meta", "--clock=cpu")
    assert status == 1 and error.startswith("error: --clock cpu cannot time what meta does: ")


@pytest.mark.parametrize(("rate", "text"), [(0.07567, "0.0757"), (85.04, "85"), (999.4, "999"), (12345.6, "12,346")])
def test_rates_are_written_without_exponents(rate, text):
    assert three_digits(rate) == text


def test_memory_is_counted_at_its_peak():
    def turn():
        first = torch.ones(1000)
        second = first + 1
        del first
        return (second * 2).sum()

    assert measure.peak_memory(turn, torch.device("cpu")) == pytest.approx(2 * 4000, abs=100)


@pytest.mark.long
@pytest.mark.parametrize("other", ["HEAD", "plain"])
def test_two_ways_are_timed_in_turn(run_benchmark, other):
    status, found, printed, error = run_benchmark("--only=encode", "--against", other)
    assert status == 0, error
    (one,) = found["results"]
    assert one["ratio"] == pytest.approx(one["seconds_there"] / one["seconds"])
    assert one["flops"] == one["flops_there"] > 0 and one["peak_memory"] > 0
    assert math.isclose(one["peak_memory"], one["peak_memory_there"], rel_tol=0.5)
    assert found["against"] == other and f"{one['ratio']:.2f}" in printed


def test_what_was_compared_is_recorded_although_a_later_item_fails(run_benchmark, monkeypatch):
    def compare(*_):
        yield Comparison("tiny", "encode", 1, 0.1, 0.2, 2.0, 1, 1, 1, 1)
        raise UserError("no memory for the next")

    monkeypatch.setattr(report, "compare", compare)
    status, found, _, error = run_benchmark("--only=encode", "--against=plain")
    assert status == 1 and "no memory for the next" in error
    assert [one["item"] for one in found["results"]] == ["encode"] and found["precision"] == "fp32"


def test_an_unknown_revision_is_explained(run_benchmark):
    status, _, _, error = run_benchmark("--only=encode", "--against=no-such-revision")
    assert status == 1 and "got no-such-revision: " in error


def test_only_the_same_items_of_two_revisions_are_compared():
    encode = {"model": "tiny", "item": "encode", "counts": {"work": 1}}
    check_pair(encode, encode)
    for other, message in (
        (encode | {"item": "decode 8"}, "got tiny encode here and tiny decode 8 there"),
        (None, "got tiny encode here and the end there"),
        ({"model": "tiny", "item": "encode"}, "take a later one"),
    ):
        with pytest.raises(UserError, match=message):
            check_pair(encode, other)


def test_training_costs_three_times_what_is_trained(run_benchmark):
    """Forward once, backward twice, beside the teacher's encoder, which only goes forward."""
    _, found, _, _ = run_benchmark("--only", "encode", "decode", "stage1")
    flops = {one["item"]: one["flops"] for one in found["results"]}
    assert flops["stage-1 step"] > 3 * flops["encode"]
    assert flops["decode 8"] < flops["decode 32"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch_size", "0"), "error: --batch_size must be 1 or more, got 0\n"),
        (("--batch_size", "2", "-1"), "error: --batch_size must be 1 or more, got -1\n"),
        (("--lengths", "8", "0"), "error: --lengths must be 1 or more, got 0\n"),
        (("--processes", "0"), "error: --processes must be 1 or more, got 0\n"),
        (("--repeats", "0"), "error: --repeats must be 1 or more, got 0\n"),
        (("--against=plain", "--batch_size", "1", "2"), "error: --against compares one process here with one there: "),
        (("--against=plain", "--processes", "2"), "error: --against compares one process here with one there: "),
        (("--against=plain", "--figure=a.png"), "error: --against compares one process here with one there: "),
        (("--figure=a.png", "--lengths=8"), "error: --figure needs something that varies, got one of each: "),
        (("--figure=a.png", "--only=encode"), "error: --figure needs something that varies, got one of each: "),
    ],
)
def test_what_cannot_be_measured_is_explained(run_benchmark, arguments, message):
    status, _, _, error = run_benchmark(*arguments)
    assert status == 1 and error.startswith(message) and error.count("\n") == 1


@pytest.mark.parametrize("item", ["reconstruct", "loader", "pretokenize"])
def test_images_that_are_not_there_are_explained(run_benchmark, monkeypatch, tmp_path, item):
    monkeypatch.setattr(benchmark_loader, "ASSETS", tmp_path)
    status, found, _, error = run_benchmark("--only", item)
    assert status == 1 and found is None
    sentence = error.rpartition("\r")[2]  # after the bar
    assert sentence.startswith(f"error: {tmp_path}/fashion must hold the bundled images, ") and error.count("\n") == 1


def test_help_comes_with_an_example(run_benchmark):
    status, _, printed, _ = run_benchmark("--help")
    assert status == 0 and "python3 scripts/benchmark.py --model S L" in printed
