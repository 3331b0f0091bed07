"""Tensors of a checkpoint are read without running code and fitted strictly; what does not fit is explained."""

import pickle

import pytest
import safetensors.torch
import torch

from modeling.checkpoints import WeightsError
from modeling.checkpoints.state import check_finite, load_strict, read_state_dict
from modeling.one_d_piece import OneDPiece
from modeling.tasks.tokenizer import stage2_start
from tests.checkpoint_data import CodeRunner, Toy, same, tokenizer_config, toy
from utils.config import load_config
from utils.paths import ROOT


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrap", [lambda runner: {"w": torch.ones(2), "x": runner}, lambda runner: runner])
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(tmp_path, wrap, legacy):
    target = tmp_path / "ran"
    path = tmp_path / "evil.bin"
    torch.save(wrap(CodeRunner(target)), path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(WeightsError, match=r"holds more than tensors \((posix|nt).system\) and was refused"):
        read_state_dict(path)
    assert not target.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_plain_pickle_is_refused_and_runs_nothing(tmp_path, protocol):
    path = tmp_path / "evil.bin"
    path.write_bytes(pickle.dumps({"w": CodeRunner(tmp_path / "ran")}, protocol=protocol))
    with pytest.raises(WeightsError, match=r"holds more than tensors.*refused"):
        read_state_dict(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["w.bin", "w.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_named(tmp_path, name, share):
    state = {"a": torch.randn(100, 10), "b": torch.randn(7)}
    path = tmp_path / name
    (safetensors.torch.save_file if name.endswith("safetensors") else torch.save)(state, path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(WeightsError, match=f"{name} .*(truncated|damaged).*fetch it again"):
        read_state_dict(path)


def test_a_web_page_in_place_of_weights_is_refused(tmp_path):
    for name in ("w.bin", "w.safetensors"):
        (tmp_path / name).write_text("<!DOCTYPE html><html>Not found</html>")
        with pytest.raises(WeightsError, match=name):
            read_state_dict(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"w": torch.ones(1), "step": 3}, "'step' is int"),
        ([torch.ones(1)], "got list"),
        ({}, "got an empty one"),
        (torch.ones(1), "got Tensor"),
    ],
)
def test_what_is_no_state_dict_is_refused(tmp_path, content, words):
    torch.save(content, tmp_path / "w.bin")
    with pytest.raises(WeightsError, match=words):
        read_state_dict(tmp_path / "w.bin")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_no_numbers_are_found_in_every_precision(dtype, bad):
    values = torch.linspace(-1, 1, 40)
    check_finite({"w": values.to(dtype), "empty": torch.zeros(0, dtype=dtype), "count": torch.tensor(3)}, "here")
    values[17] = bad
    with pytest.raises(WeightsError, match="w of here holds 1 values of 40 that are no numbers"):
        check_finite({"w": values.to(dtype)}, "here")


def test_what_float32_cannot_hold_is_no_number_for_a_model():
    with pytest.raises(WeightsError, match="w of here holds 1 values of 2 that are no numbers"):
        check_finite({"w": torch.tensor([1.0, 1e39], dtype=torch.float64)}, "here")


def test_containers_and_wrappers_are_removed(tmp_path):
    state = {f"module._orig_mod.{name}": value for name, value in toy().state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "w.bin")
    assert list(read_state_dict(tmp_path / "w.bin")) == ["inner.weight", "inner.bias"]


def test_an_evil_pickle_is_refused_by_every_way_in(tmp_path):
    folder = tmp_path / "checkpoint-3/ema_model"
    folder.mkdir(parents=True)
    torch.save({"w": CodeRunner(tmp_path / "ran")}, folder / "pytorch_model.bin")
    config = {"model": {"width": 3}}
    for source in (folder / "pytorch_model.bin", folder, tmp_path / "checkpoint-3", tmp_path):
        with pytest.raises(WeightsError, match="refused"):
            Toy.from_pretrained(source, config=config)
    with pytest.raises(WeightsError, match="refused"):
        stage2_start(toy(), folder, folder)
    assert not (tmp_path / "ran").exists()


def test_missing_unexpected_and_misshapen_names_are_listed():
    state = {"inner.weight": torch.zeros(2, 9), "a": torch.zeros(1), "b": torch.zeros(1), "c": torch.zeros(1)}
    state["d"] = torch.zeros(1)
    with pytest.raises(WeightsError) as caught:
        load_strict(toy(), state, "here")
    assert str(caught.value) == (
        "the weights of here do not fit this Toy, nor any configuration of this project: 1 missing (inner.bias); "
        "4 unexpected (a, b, c and 1 more); 1 misshapen (inner.weight (2, 9) for (2, 3))"
    )


def test_nothing_is_loaded_when_something_does_not_fit():
    model = toy()
    with pytest.raises(WeightsError):
        load_strict(model, {"inner.weight": torch.zeros(2, 3)}, "here")
    assert same(model, toy())


def test_old_position_ids_are_ignored():
    model = toy(seed=1)
    load_strict(model, {**toy().state_dict(), "embeddings.position_ids": torch.arange(4)}, "here")
    assert same(model, toy())


def test_weights_of_another_size_hear_which_config_fits():
    other = OneDPiece(load_config(ROOT / "configs/fashion/eval.yaml")).state_dict()
    with pytest.raises(
        WeightsError, match=r"they fit configs/fashion/eval.yaml \(give that configuration\): .*misshapen"
    ):
        load_strict(OneDPiece(tokenizer_config()), other, "here")


def test_stages_are_told_apart(tmp_path):
    stage1 = OneDPiece(tokenizer_config(finetune_decoder=False))
    stage2 = OneDPiece(tokenizer_config(finetune_decoder=True))
    with pytest.raises(WeightsError, match="they are stage-1 weights .start stage 2"):
        load_strict(stage2, stage1.state_dict(), "here")
    with pytest.raises(WeightsError, match="they are stage-2 weights .*finetune_decoder: True"):
        load_strict(stage1, stage2.state_dict(), "here")
