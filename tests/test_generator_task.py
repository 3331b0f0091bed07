"""Training of a generator: the loss, evaluation that does not depend on batches, exact resume."""

import json
import shutil
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

import scripts.pretokenize
import scripts.train_generator
from data.loaders import evaluation_loader
from data.token_loader import evaluation_tokens
from modeling.checkpoints import WeightsError
from modeling.checkpoints.locate import locate
from modeling.generators import class_names, load_generator, load_its_tokenizer
from modeling.identity import identity
from modeling.losses import masked_token_loss
from modeling.maskgit import ImageBert
from modeling.modules.masking import random_mask
from modeling.tasks.generator import GeneratorTask
from modeling.tokenizers import encode_tokens
from tests.generator_data import NUM_CODES, NUM_TOKENS, call, make_world, small_config, tokenizer_of
from tests.training_runs import differences
from utils.config import load_config, save_config, to_plain
from utils.errors import UserError

KINDS = ("shards", "tokens")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Six steps of training on each kind of data into FOLDER/KIND, and the last three again into KIND-resumed."""
    folder = make_world(tmp_path_factory.mktemp("world"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        arguments = ("--config", folder / "generator.yaml", "--output_dir", folder / "tokens", "--device", "cpu")
        call(monkeypatch, scripts.pretokenize.main, *arguments)
        for kind in KINDS:
            train(monkeypatch, folder, f"dataset.type={kind}", f"experiment.output_dir={folder}/{kind}")
            shutil.copytree(folder / kind / "checkpoint-3", folder / f"{kind}-resumed" / "checkpoint-3")
            train(monkeypatch, folder, f"dataset.type={kind}", f"experiment.output_dir={folder}/{kind}-resumed")
    return folder


def train(monkeypatch, folder, *overrides):
    call(monkeypatch, scripts.train_generator.main, f"config={folder}/generator.yaml", *overrides)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def started_task(folder, *overrides):
    torch.manual_seed(0)
    task = GeneratorTask(small_config(folder, *overrides))
    task.start()
    return task


def image_batch(folder):
    batch = next(iter(evaluation_loader(small_config(folder), rank=0, world_size=1)))
    return batch | {"image": batch["image"].float() / 255}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_equals_an_undisturbed_one(world, kind):
    assert differences(world / kind, world / f"{kind}-resumed") == []


def test_a_run_leaves_previews_evaluation_and_its_ema_weights(world):
    folder = world / "tokens"
    lines = metrics(world / "tokens")
    assert {f"masked_accuracy/band_{band}" for band in range(1, 9)} <= lines[0].keys()
    assert {"loss/model", "masked_accuracy", "images_per_second"} <= lines[0].keys()
    assert lines[-1]["eval/images"] == 7 and 0 < lines[-1]["eval/loss"] < 10
    assert (folder / "previews/preview-00000006.png").is_file()
    assert locate(folder / "checkpoint-3").weights == folder / "checkpoint-3/ema_model/model.safetensors"
    final, ema = (
        load_file(folder / name) for name in ("model.safetensors", "checkpoint-6/ema_model/model.safetensors")
    )
    assert all(torch.equal(final[name], ema[name]) for name in ema)


def test_a_checkpoint_gives_its_ema_weights_before_training_ends(world, tmp_path):
    shutil.copytree(world / "tokens/checkpoint-3", tmp_path / "checkpoint-3")
    assert locate(tmp_path).weights == tmp_path / "checkpoint-3/ema_model/model.safetensors"


def test_evaluation_is_the_same_from_images_and_from_tokens(world):
    scores = [metrics(world / kind)[-1]["eval/images"] for kind in KINDS]
    assert scores == [7, 7]
    task = started_task(world)
    task.model.eval()
    from_images, from_tokens = {}, {}
    with torch.no_grad():
        for batch in evaluation_loader(small_config(world), rank=0, world_size=1):
            values = task.evaluate(task.model, batch | {"image": batch["image"].float() / 255})
            from_images |= dict(zip(batch["__key__"], values["loss"], strict=True))
        for rank in (0, 1):
            for batch in evaluation_tokens(small_config(world), rank=rank, world_size=2):
                values = task.evaluate(task.model, batch)
                assert values["masked_accuracy"].shape == values["loss"].shape == (len(batch["__key__"]),)
                from_tokens |= dict(zip(batch["__key__"], values["loss"], strict=True))
    assert from_images.keys() == from_tokens.keys()
    for key, loss in from_images.items():
        assert torch.isclose(loss, from_tokens[key], rtol=1e-5)


def test_the_loss_is_that_of_the_tokens_that_were_hidden(world):
    task, batch = started_task(world), image_batch(world)
    task.model.eval()  # no dropout
    torch.manual_seed(1)
    ((player, loss, logs),) = task.losses(batch, 0)
    tokens = encode_tokens(task.tokenizer, batch["image"])
    torch.manual_seed(1)
    shown, hidden = random_mask(tokens, NUM_CODES)
    logits = task.model(shown, batch["class_id"], 0.1)
    expected, accuracy = masked_token_loss(logits, tokens, hidden)
    assert player == "model" and torch.equal(loss, expected) and torch.equal(logs["loss/model"], loss)
    assert torch.equal(logs["masked_accuracy"], accuracy["masked_accuracy"])
    given = task.losses({"tokens": tokens, "class_id": batch["class_id"]}, 0)
    torch.manual_seed(1)
    assert torch.equal(next(given)[1], expected)


def test_the_loss_by_hand():
    """Two tokens of two codes: one hidden (weight 1), one shown (weight 0.1), labels smoothed by 0.1."""
    logits = torch.tensor([[[2.0, 0.0], [0.0, 1.0]]])
    loss, _ = masked_token_loss(logits, torch.tensor([[0, 0]]), torch.tensor([[True, False]]))
    log_shares = logits.log_softmax(dim=-1)[0]
    losses = [-(0.95 * row[0] + 0.05 * row[1]) for row in log_shares]
    assert float(loss) == pytest.approx(float((losses[0] + 0.1 * losses[1]) / 1.1), rel=1e-6)


def test_the_loss_settings_and_the_class_dropout_are_the_configs(world):
    overrides = ["losses.label_smoothing=0.3", "losses.loss_weight_unmasked_token=0.0"]
    task = started_task(world, *overrides, "model.generator.class_label_dropout=1.0")
    task.model.eval()
    batch = image_batch(world)
    torch.manual_seed(1)
    ((_, loss, _),) = task.losses(batch, 0)
    tokens = encode_tokens(task.tokenizer, batch["image"])
    torch.manual_seed(1)
    shown, hidden = random_mask(tokens, NUM_CODES)
    logits = task.model(shown, torch.zeros_like(batch["class_id"]), 1.0)  # whatever the class
    assert torch.equal(loss, masked_token_loss(logits, tokens, hidden, 0.3, 0.0)[0])


def test_the_preview_is_a_column_a_class_and_the_same_every_time(world):
    task, batch = started_task(world), image_batch(world)
    task.model.eval()
    first, again = task.preview(task.model, batch), task.preview(task.model, batch)
    assert list(first) == class_names(task.config) and list(first)[3] == "Dress"
    assert all(column.shape == (2, 3, 8, 8) and torch.equal(column, again[name]) for name, column in first.items())


def test_only_the_generator_is_trained(world):
    task = started_task(world)
    assert isinstance(task.modules["model"], ImageBert) and list(task.modules) == ["model"]
    assert not any(parameter.requires_grad for parameter in task.tokenizer.parameters())
    assert not task.tokenizer.training


def test_a_dry_run_needs_neither_tokenizer_nor_data(tmp_path, monkeypatch, capsys):
    save_config(small_config(tmp_path, "dataset.type=tokens"), tmp_path / "generator.yaml")
    train(monkeypatch, tmp_path, "dry_run=true")
    assert "parameters trained" in capsys.readouterr().out and not (tmp_path / "run").exists()


def test_training_refuses_tokens_of_another_tokenizer(world, monkeypatch):
    with pytest.raises(UserError, match=f"{world}/tokenizer .*and the tokenizer is {world}/other"):
        train(monkeypatch, world, "dataset.type=tokens", f"experiment.tokenizer_checkpoint={world}/other")


def test_a_tokenizer_of_other_sizes_is_refused(world):
    with pytest.raises(UserError, match=rf"makes {NUM_TOKENS} tokens of 32 codes, .* has {NUM_TOKENS} tokens of 64"):
        started_task(world, "model.vq_model.codebook_size=32")


def test_a_trained_generator_knows_its_tokenizer_again(world, tmp_path):
    generator, located = load_generator(checkpoint=world / "tokens")
    tokenizer = tokenizer_of(world)
    assert located.config["experiment"]["tokenizer_identity"] == identity(tokenizer)
    tokenizer.save_pretrained(tmp_path / "half", dtype=torch.float16)
    load_its_tokenizer(generator, located, tmp_path / "half")
    tokenizer.save_pretrained(tmp_path / "bfloat16", dtype=torch.bfloat16)
    tokenizer.encoder.conv_out.bias.data += 0.01
    tokenizer.save_pretrained(tmp_path / "encoder")
    for other in (tmp_path / "bfloat16", tmp_path / "encoder", world / "other"):
        with pytest.raises(WeightsError, match=f"the tokenizer {other} is not the one"):
            load_its_tokenizer(generator, located, other)


def test_a_run_does_not_go_on_with_the_tokens_of_another_tokenizer(world, tmp_path):
    shutil.copytree(world / "shards/checkpoint-3", tmp_path / "checkpoint-3")
    shutil.copy(world / "shards/config.yaml", tmp_path)
    here, other = f"experiment.output_dir={tmp_path}", f"experiment.tokenizer_checkpoint={world}/other"
    started_task(world, here, "dataset.type=shards")
    with pytest.raises(UserError, match=f"holds a generator of another tokenizer's tokens .* and {world}/other is"):
        started_task(world, here, "dataset.type=shards", other)
    started_task(world, here, "dataset.type=shards", other, "experiment.resume=False")


def test_a_generator_trained_before_identities_is_checked_by_its_mean_code(world):
    generator, located = load_generator(checkpoint=world / "tokens")
    codes = tokenizer_of(world).quantize.embedding.weight.detach()
    experiment = located.config["experiment"]
    del experiment["tokenizer_identity"]
    experiment["tokenizer_mean_code"] = [round(value, 6) for value in codes.mean(dim=0).tolist()]
    load_its_tokenizer(generator, located)
    with pytest.raises(WeightsError, match=f"the tokenizer {world}/other is not the one"):
        load_its_tokenizer(generator, located, world / "other")
    del experiment["tokenizer_mean_code"]
    load_its_tokenizer(generator, located, world / "other")  # a published one does not say


def test_a_run_begun_before_identities_trains_on(world, tmp_path):
    config = to_plain(small_config(world, "experiment.generate_every=0"))
    del config["experiment"]["tokenizer_identity"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    task = GeneratorTask(load_config(tmp_path / "config.yaml"))
    task.start()
    assert task.model.config.experiment.tokenizer_identity == identity(task.tokenizer)


def test_a_stage_1_tokenizer_serves_without_previews(world, tmp_path):
    tokenizer = tokenizer_of(world)
    config = small_config(world, "model.vq_model.finetune_decoder=false")
    stage1 = type(tokenizer)(config)
    wanted = stage1.state_dict().keys()
    stage1.load_state_dict({name: value for name, value in tokenizer.state_dict().items() if name in wanted})
    stage1.save_pretrained(tmp_path / "stage1")
    place = f"experiment.tokenizer_checkpoint={tmp_path}/stage1"
    seen = []
    task = GeneratorTask(small_config(world, place, "experiment.generate_every=0"), lambda *facts: seen.append(facts))
    task.start()
    assert seen[0][1] == f"{tmp_path}/stage1"
    with pytest.raises(UserError, match="take its stage 2, or set experiment.generate_every=0"):
        started_task(world, place)


def test_images_without_a_label_stop_the_training(tmp_path, monkeypatch):
    folder = make_world(tmp_path)
    save_config(
        small_config(folder, "model.generator.condition_num_classes=5", "dataset.class_names=[]"), folder / "g.yaml"
    )
    (folder / "train/manifest.json").unlink()  # which would name ten classes
    monkeypatch.setattr(sys, "argv", ["command", f"config={folder}/g.yaml"])
    with pytest.raises(UserError, match=r"must have a label in 0\.\.4"):
        scripts.train_generator.main()


def test_class_names_are_all_or_none(tmp_path):
    config = small_config(tmp_path, "dataset.class_names=[]")
    assert class_names(config) == [str(label) for label in range(10)]
    with pytest.raises(UserError, match="must name all 10 classes .* or none, got 2"):
        class_names(small_config(tmp_path, "dataset.class_names=[a,b]"))
