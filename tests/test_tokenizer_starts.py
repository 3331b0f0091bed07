"""What the stages of a tokenizer start from: each other's weights, and the teacher's."""

import pytest
import torch

from modeling.checkpoints import WeightsError
from modeling.one_d_piece import OneDPiece
from modeling.pixel_vqgan import load_teacher
from modeling.tasks.tokenizer import stage1_start, stage2_start, tokenizer_task
from tests.checkpoint_data import same, teacher, tokenizer_config
from utils.config import load_config
from utils.errors import UserError
from utils.paths import ROOT


@pytest.mark.parametrize("is_stage2", [False, True])
def test_a_tokenizer_of_either_stage_starts_stage_1(tmp_path, is_stage2):
    source, model = (OneDPiece(tokenizer_config(finetune_decoder=stage2)) for stage2 in (is_stage2, False))
    source.save_pretrained(tmp_path / "tokenizer")
    stage1_start(model, tmp_path / "tokenizer")
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.state_dict().items())


def test_stage_1_and_the_teacher_make_a_stage_2_start(tmp_path):
    stage1, source = OneDPiece(tokenizer_config(finetune_decoder=False)), teacher()
    stage1.save_pretrained(tmp_path / "stage1")
    torch.save(source.state_dict(), tmp_path / "teacher.bin")
    model = OneDPiece(tokenizer_config())
    stage2_start(model, tmp_path / "stage1", tmp_path / "teacher.bin")
    got = model.state_dict()
    assert all(torch.equal(got[name], value) for name, value in stage1.state_dict().items())
    assert torch.equal(got["pixel_quantize.embedding.weight"], source.state_dict()["quantize.embedding.weight"])
    assert torch.equal(got["pixel_decoder.conv_out.weight"], source.state_dict()["decoder.conv_out.weight"])


def test_a_finished_tokenizer_starts_stage_2_without_a_teacher(tmp_path):
    source, model = OneDPiece(tokenizer_config()), OneDPiece(tokenizer_config())
    source.save_pretrained(tmp_path / "stage2")
    stage2_start(model, tmp_path / "stage2", tmp_path / "there is no teacher")
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.state_dict().items())


def test_one_stage_starts_from_nothing_and_frozen_tokens_do_not(tmp_path):
    config = load_config(ROOT / "configs/fashion/one_stage.yaml", ["losses.perceptual_weight=0.0"])
    task = tokenizer_task(config)
    task.start()
    assert float(task.model.pixel_quantize.embedding.weight.detach().std()) == pytest.approx(1, abs=0.05)
    _, loss, _ = next(task.losses({"image": torch.rand(2, 3, 32, 32), "class_id": torch.zeros(2)}, 1001))
    loss.backward()
    # Codes that nothing chose have no gradient; every other part of the model has some.
    assert [name for name, value in task.model.named_parameters() if value.grad is None] == []
    config.model.vq_model.freeze_tokens = True
    with pytest.raises(UserError, match="scratch would freeze tokens"):
        tokenizer_task(config).start()


def test_a_teacher_of_other_sizes_is_refused(tmp_path):
    OneDPiece(tokenizer_config(finetune_decoder=False)).save_pretrained(tmp_path / "stage1")
    teacher().save_pretrained(tmp_path / "teacher")
    config = tokenizer_config()
    config["model"]["pixel_vqgan"]["latent_channels"] = 16
    with pytest.raises(WeightsError, match=r"stage1 with the teacher .*teacher do not fit .*pixel_quantize"):
        stage2_start(OneDPiece(config), tmp_path / "stage1", tmp_path / "teacher")
    with pytest.raises(WeightsError, match="do not fit this PixelVQGAN"):
        load_teacher(config, tmp_path / "teacher")


@pytest.mark.parametrize(("key", "value"), [("first_codes", 2), ("is_legacy", False), ("use_l2_norm", False)])
def test_weights_that_mean_other_tokens_are_refused(tmp_path, key, value):
    """No shape tells them apart."""
    source = tokenizer_config(finetune_decoder=False)
    source["model"]["vq_model"][key] = value
    OneDPiece(source).save_pretrained(tmp_path / "stage1")
    teacher().save_pretrained(tmp_path / "teacher")
    for stage2 in (False, True):
        config = tokenizer_config(finetune_decoder=stage2)
        places = (tmp_path / "teacher",) * stage2
        start = stage2_start if stage2 else stage1_start
        with pytest.raises(
            WeightsError, match=f"stage1.* was trained with model.vq_model.{key}={value}, and here it is"
        ):
            start(OneDPiece(config), tmp_path / "stage1", *places)
        with pytest.raises(WeightsError, match=f"give model.vq_model.{key}={value}"):
            OneDPiece.from_pretrained(tmp_path / "stage1", config=tokenizer_config(finetune_decoder=False))
        config["model"]["vq_model"][key] = value
        start(OneDPiece(config), tmp_path / "stage1", *places)


def test_a_teacher_of_other_groups_is_refused(tmp_path):
    OneDPiece(tokenizer_config(finetune_decoder=False)).save_pretrained(tmp_path / "stage1")
    teacher().save_pretrained(tmp_path / "teacher")
    config = tokenizer_config()
    config["model"]["pixel_vqgan"]["norm_groups"] = 1
    with pytest.raises(
        WeightsError, match=r"teacher was trained with model.pixel_vqgan.norm_groups=\d+, and here it is 1"
    ):
        load_teacher(config, tmp_path / "teacher")
    torch.save(OneDPiece(tokenizer_config(finetune_decoder=False)).state_dict(), tmp_path / "stage1.bin")
    with pytest.raises(WeightsError, match=r"teacher was trained with model.pixel_vqgan.norm_groups"):
        stage2_start(OneDPiece(config), tmp_path / "stage1.bin", tmp_path / "teacher")


def test_a_teacher_is_frozen(tmp_path):
    source = teacher()
    source.save_pretrained(tmp_path / "teacher")
    loaded = load_teacher(tokenizer_config(), tmp_path / "teacher")
    assert same(loaded, source)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
