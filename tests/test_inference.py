"""How commands run their networks: --precision, --compile and --batch_size auto mean the same in all of them."""

import argparse
import json
import types

import pytest
import torch

from scripts import evaluate_reconstruction
from tests.evaluation_data import command, make_world
from tests.test_speed import tiny_tokenizer
from utils import inference
from utils.inference import (
    add_batch_size_argument,
    add_speed_arguments,
    choose_batch_size,
    largest_batch,
    parse_batch_size,
    prepared,
)

CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch):
    """A machine of any speed and memory; returns the function that works through a batch on it."""
    state = types.SimpleNamespace(now=0.0, held=0, tried=[])
    monkeypatch.setattr(inference.time, "perf_counter", lambda: state.now)
    monkeypatch.setattr(inference.psutil, "Process", lambda: types.SimpleNamespace(memory_info=lambda: memory(0)))
    monkeypatch.setattr(inference.psutil, "virtual_memory", lambda: memory(100))
    monkeypatch.setattr(inference, "_peak_memory", lambda: state.held)

    def memory(size):
        return types.SimpleNamespace(rss=size, available=size - state.held)

    def machine(seconds, most=10**9, bytes_per_image=0):
        def turn(size):
            if size > most:
                raise torch.OutOfMemoryError
            state.tried.append(size)
            state.now += seconds(size)
            state.held = max(state.held, size * bytes_per_image)

        turn.tried = state.tried
        return turn

    return machine


def test_a_batch_is_doubled_while_it_fits_and_images_per_second_grow(machine):
    constant, linear = (lambda size: 1.0), (lambda size: size)
    assert largest_batch(machine(constant, most=8), CPU) == 8
    assert largest_batch(machine(lambda size: max(size, 16)), CPU) == 16
    assert largest_batch(machine(linear), CPU) == 1
    assert largest_batch(machine(constant), CPU, most=10) == 8
    assert largest_batch(machine(constant), CPU) == inference.LARGEST_BATCH


def test_a_batch_takes_half_of_the_free_memory_at_most(machine):
    turn = machine(lambda size: 1.0, bytes_per_image=6)
    assert largest_batch(turn, CPU) == 8
    assert max(turn.tried) == 8  # 16 would have needed 96 of 100 bytes, and was not tried


def test_what_does_not_fit_alone_is_an_error(machine):
    with pytest.raises(torch.OutOfMemoryError):
        largest_batch(machine(lambda size: 1.0, most=0), CPU)


def test_a_given_batch_size_is_taken_untried(machine):
    turn = machine(lambda size: 1.0)
    assert choose_batch_size(24, turn, CPU) == 24 and not turn.tried


def test_the_chosen_batch_size_is_printed(machine, capsys):
    assert choose_batch_size("auto", machine(lambda size: 1.0, most=8), CPU) == 8
    assert capsys.readouterr().out.startswith("batch size     8: ")


@pytest.mark.parametrize("text", ["0", "-1", "many", "1.5", "Auto"])
def test_other_batch_sizes_are_errors(text, capsys):
    parser = argparse.ArgumentParser()
    add_batch_size_argument(parser, "images at a time", default=16)
    with pytest.raises(SystemExit):
        parser.parse_args(["--batch_size", text])
    message = f"argument --batch_size: expected a whole number of 1 or more, or auto, got {text}"
    assert capsys.readouterr().err.strip().endswith(message)
    assert parser.parse_args(["--batch_size", "auto"]).batch_size == "auto"
    assert parser.parse_args(["--batch_size", "7"]).batch_size == parse_batch_size("7") == 7


def asked(*arguments):
    parser = argparse.ArgumentParser()
    add_speed_arguments(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_for_decoding_and_close_to_fp32(precision):
    model, images = tiny_tokenizer(), torch.rand(2, 3, 32, 32)
    arithmetic = prepared(asked("--precision", precision), model)
    with torch.no_grad():
        z_quantized, _ = model.encode(images)
        with arithmetic():
            decoded = model.decode(z_quantized)
        expected = model.decode(z_quantized)
    assert expected.dtype == torch.float32 and decoded.dtype == inference.HALF[precision]
    assert 0 < (decoded - expected).abs().mean() < 0.1 * expected.abs().mean()  # of weights that nobody trained


def test_tf32_is_allowed_in_its_context_alone():
    arithmetic = prepared(asked("--precision", "tf32"), tiny_tokenizer())
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    with arithmetic():
        assert torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("there", [True, False])
def test_a_processor_without_bfloat16_is_said_to_emulate_it(there, monkeypatch, capsys):
    monkeypatch.setattr(inference, "cpu_has_bfloat16", lambda: there)
    prepared(asked("--precision", "bf16"), tiny_tokenizer())
    warning = "warning: --precision bf16 is emulated here and slower than fp32 (this cpu has no arithmetic for it)\n"
    assert capsys.readouterr().err == ("" if there else warning)


def test_evaluation_records_how_the_tokenizer_computed(tmp_path, monkeypatch, capsys):
    config = make_world(tmp_path) / "config.yaml"

    def evaluate(*flags):
        place = ("--config", config, "--device", "cpu", "--output_dir", tmp_path / "out", "--features", "none")
        status, _, error = command(monkeypatch, capsys, evaluate_reconstruction.main, *place, "--lengths", "8", *flags)
        assert status == 0, error
        results = json.loads((tmp_path / "out/metrics.json").read_text())
        chosen = [results["protocol"][name] for name in ("tokenizer_precision", "compiled", "batch_size")]
        return chosen, results["rows"][0]["psnr"], results["codebook"]

    chosen, psnr, codebook = evaluate()
    assert chosen == ["fp32", False, 8]
    monkeypatch.setattr(inference, "LARGEST_BATCH", 2)
    chosen, psnr_of_half, codebook_of_half = evaluate("--precision", "bf16", "--batch_size", "auto")
    assert chosen in (["bf16", False, 1], ["bf16", False, 2])
    assert psnr_of_half != psnr and psnr_of_half == pytest.approx(psnr, abs=0.05)
    assert codebook_of_half == codebook  # of the same tokens


def test_where_the_system_has_no_resource_module_psutil_tells_the_most_memory(monkeypatch):
    monkeypatch.setattr(inference, "resource", None)
    held = types.SimpleNamespace(memory_info=lambda: types.SimpleNamespace(peak_wset=7))
    monkeypatch.setattr(inference.psutil, "Process", lambda: held)
    assert inference._peak_memory() == 7
