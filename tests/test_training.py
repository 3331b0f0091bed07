"""The training loop: resume is exact, processes agree, checkpoints survive kills, the log tells the truth."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import nn

from modeling.checkpoints.locate import locate
from modeling.modules.codebook import CodebookCare
from modeling.modules.quantizer import VectorQuantizer
from modeling.one_d_piece import OneDPiece
from modeling.pixel_vqgan import PixelVQGAN
from modeling.tasks.reconstruction import ReconstructionTask
from modeling.tasks.teacher import TeacherTask
from modeling.tasks.tokenizer import Stage1Task, evaluation_lengths
from tests.apple_gpu import AppleGPU
from tests.shard_data import make_shards
from tests.training_runs import differences, job_config, make_images, run_and_resume, run_job
from utils.checkpoint import METADATA_FILE, checkpoints, latest_checkpoint, prune, write_checkpoint, writing
from utils.config import load_config
from utils.errors import UserError
from utils.files import sha256_of
from utils.inference import frozen_arithmetic
from utils.log import RunLog
from utils.paths import ROOT
from utils.processes import INTERRUPTED, Processes
from utils.training import loop
from utils.training.loop import make_accelerator
from utils.training.optimizer import EMA, ema_decay, learning_rate, parameter_groups
from utils.training.report import add_up, worker_advice
from utils.training.run import Run

JOBS = ("teacher", "stage1", "stage2")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """All three jobs, six steps each, and again from their third step, in one process."""
    folder = tmp_path_factory.mktemp("trained")
    make_images(folder)
    for job in JOBS:
        run_and_resume(job, folder)
    return folder


@pytest.mark.parametrize("job", JOBS)
def test_three_steps_and_three_more_equal_six(trained, job):
    assert differences(trained / job, trained / f"{job}-resumed") == []


@pytest.mark.parametrize("job", JOBS)
def test_training_changes_the_weights_it_should(trained, job):
    tokenizer = {"encoder", "decoder", "quantize", "latent_tokens"}
    expected = {
        "teacher": {"encoder", "decoder", "quantize"},
        "stage1": tokenizer,
        "stage2": tokenizer | {"pixel_quantize", "pixel_decoder"},
    }
    assert changed_in(trained / job) == expected[job]


def test_the_published_stage_2_leaves_the_tokens_alone(trained, tmp_path):
    run_job("stage2", trained, tmp_path / "frozen", "model.vq_model.freeze_tokens=True")
    assert changed_in(tmp_path / "frozen") == {"decoder", "pixel_quantize", "pixel_decoder"}


def changed_in(folder):
    """Which parts of the model the last three of six steps have changed."""
    before, after = (load_file(folder / f"checkpoint-{step}/unwrapped_model/model.safetensors") for step in (3, 6))
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}


def test_a_run_leaves_log_previews_config_and_weights(trained):
    folder = trained / "stage2"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if "loss/model" in line]
    assert [line["step"] for line in training] == [2, 4, 6]
    assert {"images_per_second", "images_seen", "eta_hours", "grad_norm/model", "learning_rate/model"} <= set(
        training[-1]
    )
    assert {"codebook/usage", "codebook/perplexity", "codebook/dead_codes", "perceptual_loss"} - set(training[-1]) == {
        "perceptual_loss"  # its weight is 0 here
    }
    assert "loss/discriminator" not in training[0] and "loss/discriminator" in training[-1]
    evaluation = [line for line in lines if "eval/psnr@1" in line]
    assert [line["eval/images"] for line in evaluation] == [24]
    assert {"eval/psnr@2", "eval/psnr@4", "eval/ssim@4"} <= set(evaluation[0])
    assert [path.name for path in (folder / "previews").iterdir()] == ["preview-00000006.png"]
    assert OneDPiece.from_pretrained(folder).num_latent_tokens == 4
    assert json.loads((folder / "checkpoint-6" / METADATA_FILE).read_text())["global_step"] == 6


def test_the_config_of_a_run_repeats_it(trained, tmp_path):
    written = load_config(trained / "stage1" / "config.yaml")
    assert written == job_config("stage1", trained, trained / "stage1")


def test_two_processes_resume_exactly_too(tmp_path):
    make_images(tmp_path)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    program = [str(ROOT / "tests/training_runs.py"), str(tmp_path), *JOBS]
    done = subprocess.run([*launch, *program], capture_output=True, text=True, cwd=ROOT, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    for job in JOBS:
        assert differences(tmp_path / job, tmp_path / f"{job}-resumed") == []
    # Two processes of half the batch do what one does, without tail drop and augmentation.
    alike = [
        "model.type=titok",
        "model.vq_model.strict_length_assertion=True",
        "model.vq_model.length_draw=uniform",
        "dataset.preprocessing.random_flip=False",
    ]
    alike += ["training.codebook.restart_every=0", "training.codebook.warmup_steps=0", "training.codebook.kmeans=False"]
    alike += ["training.max_train_steps=5", "training.use_ema=False"]
    run_job("stage1", tmp_path, tmp_path / "one", *alike, "training.per_gpu_batch_size=8")
    script = [str(ROOT / "scripts/train_tokenizer.py"), f"config={tmp_path / 'two.yaml'}"]
    config = job_config("stage1", tmp_path, tmp_path / "two", *alike)
    OmegaConf.save(config, tmp_path / "two.yaml", resolve=True)
    done = subprocess.run([*launch, *script], capture_output=True, text=True, cwd=tmp_path, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = load_file(tmp_path / "one/model.safetensors"), load_file(tmp_path / "two/model.safetensors")
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5


def test_accumulated_micro_batches_equal_one_batch(trained, tmp_path):
    alike = [
        "model.type=titok",
        "model.vq_model.strict_length_assertion=True",
        "model.vq_model.length_draw=uniform",
        "dataset.preprocessing.random_flip=False",
    ]
    alike += ["training.codebook.restart_every=0", "training.codebook.warmup_steps=0", "training.codebook.kmeans=False"]
    run_job("stage1", trained, tmp_path / "whole", *alike, "training.per_gpu_batch_size=8")
    run_job("stage1", trained, tmp_path / "parts", *alike, "training.gradient_accumulation_steps=2")
    whole, parts = load_file(tmp_path / "whole/model.safetensors"), load_file(tmp_path / "parts/model.safetensors")
    assert max(float((whole[name] - parts[name]).abs().max()) for name in whole) < 1e-5


def test_a_dry_run_prints_and_writes_nothing(trained, tmp_path, capsys):
    run_job("stage2", trained, tmp_path / "dry", "dry_run=True", "experiment.init_weight=not/there")
    printed = capsys.readouterr().out
    assert "global batch   4 per process x 1 processes x 1 accumulated = 4 images" in printed
    assert "max_train_steps: 6" in printed and not (tmp_path / "dry").exists()


def test_stage_2_needs_stage_1(trained, tmp_path):
    with pytest.raises(UserError, match="experiment.init_weight"):
        run_job("stage2", trained, tmp_path / "none", "experiment.init_weight=")


def test_tokens_that_stage_2_trains_need_their_own_loss(trained, tmp_path):
    with pytest.raises(UserError, match="losses.quantizer_weight"):
        run_job("stage2", trained, tmp_path / "none", "losses.quantizer_weight=0")


def test_missing_evaluation_images_stop_the_run(trained, tmp_path):
    make_shards(tmp_path, [24])
    data = [f"dataset.params.{split}_shards_path_or_url={tmp_path}/s-000000.tar" for split in ("train", "eval")]
    data += ["dataset.type=shards", "training.max_train_steps=2"]
    with pytest.raises(UserError, match="expected 25 evaluation samples, got 24"):
        run_job("teacher", trained, tmp_path / "run", *data, "dataset.params.num_eval_examples=25")


def test_the_weights_are_there_before_the_last_evaluation_which_may_take_long(trained, tmp_path, monkeypatch, capsys):
    def interrupted(self, model, batch):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TeacherTask, "evaluate", interrupted)
        run_job("teacher", trained, tmp_path)
    assert differences(trained / "teacher", tmp_path) == []
    # The same command makes up for the evaluation, once.
    for _ in range(2):
        run_job("teacher", trained, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval/images" in line] == [6]
    assert "evaluation     24 images every 6 steps and at the end" in capsys.readouterr().out


def test_a_run_whose_time_is_up_in_its_last_step_leaves_its_weights(tmp_path, monkeypatch):
    make_images(tmp_path)
    update = loop.update

    def update_when_time_is_up(run, micro_batches):
        if run.step == run.total_steps - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(run, micro_batches)

    monkeypatch.setattr(loop, "update", update_when_time_is_up)
    run_job("teacher", tmp_path, tmp_path / "run", "training.max_train_steps=2", "experiment.eval_every=0")
    assert (tmp_path / "run/model.safetensors").is_file()


def test_an_evaluation_has_a_bar_with_a_total_and_takes_the_images_asked_for(trained, tmp_path, capsys):
    limit = ["dataset.params.max_eval_examples=5", "training.max_train_steps=2", "experiment.generate_every=0"]
    run_job("teacher", trained, tmp_path, *limit)
    assert "/5 [" in capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["eval/images"] for line in lines if "eval/images" in line] == [5]


def test_a_step_that_went_wrong_stops_the_run_before_it_is_saved(trained, tmp_path):
    for overrides, step, what in (
        (["losses.quantizer_weight=1e39"], 2, "loss/model"),  # as of the first quantised step
        (["training.stop_grad_norm=1e-9"], 1, "grad_norm/model"),
    ):
        folder = tmp_path / what.replace("/", "_")
        with pytest.raises(UserError, match=f"step {step} had .*{what}.*{folder}.*good checkpoint is not there yet"):
            run_job("stage1", trained, folder, *overrides, "experiment.save_every=2", "experiment.log_every=3")
        found = json.loads((folder / f"unsound_step-{step}.json").read_text())
        assert found["step"] == step and len(found["ranks"][0]["samples"]) == 4
        assert not checkpoints(folder) and not (folder / "metrics.jsonl").exists()


# Checkpoints


def write_number(number):
    def write(folder: Path):
        (folder / "part").mkdir()
        (folder / "part" / "number.txt").write_text(str(number))

    return write


def save(folder, step, write=None):
    write_checkpoint(folder, step, write or write_number(step), Processes("cpu"))


def test_a_kill_in_the_middle_of_saving_leaves_the_last_checkpoint(tmp_path):
    save(tmp_path, 1)
    program = f"""
import os, signal
from pathlib import Path
from utils.checkpoint import write_checkpoint
from utils.processes import INTERRUPTED, Processes
def write(folder):
    (folder / "half.txt").write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)
write_checkpoint(Path({str(tmp_path)!r}), 2, write, Processes("cpu"))
"""
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == -9
    assert latest_checkpoint(tmp_path)[0] == 1
    save(tmp_path, 2)
    assert latest_checkpoint(tmp_path)[0] == 2 and not list(tmp_path.glob(".*"))


def test_a_checkpoint_of_other_sizes_is_one_sentence(trained, tmp_path):
    shutil.copytree(trained / "teacher/checkpoint-3", tmp_path / "checkpoint-3")
    with pytest.raises(UserError, match="checkpoint-3 does not fit this configuration .*size mismatch.*output_dir"):
        run_job("teacher", trained, tmp_path, "model.pixel_vqgan.latent_channels=4")


@pytest.mark.parametrize("damage", ["cut", "changed", "removed", "metadata"])
def test_resume_passes_over_damaged_checkpoints_and_says_so(tmp_path, damage):
    save(tmp_path, 1)
    save(tmp_path, 20)
    file = tmp_path / "checkpoint-20/part/number.txt"
    if damage == "cut":
        file.write_text("2")
    elif damage == "changed":
        file.write_text("21")
    elif damage == "removed":
        file.unlink()
    else:
        (tmp_path / "checkpoint-20" / METADATA_FILE).write_text("{")
    said = []
    assert latest_checkpoint(tmp_path, said.append) == (1, tmp_path / "checkpoint-1")
    assert len(said) == 1 and "checkpoint-20" in said[0]


def test_pruning_keeps_the_newest_and_the_round_ones(tmp_path):
    for step in (5, 10, 15, 20, 25):
        save(tmp_path, step)
    prune(tmp_path, last_step=25, keep_last=2, keep_every=10)
    assert [step for step, _ in checkpoints(tmp_path)] == [10, 20, 25]
    # After a broken one was passed over, the newest is not the one with the largest number.
    prune(tmp_path, last_step=20, keep_last=0, keep_every=0)
    assert [step for step, _ in checkpoints(tmp_path)] == [20, 25]


def test_the_log_forgets_steps_that_will_be_done_again(tmp_path):
    config = OmegaConf.create({"training": {}, "experiment": {"project": "p", "name": "n"}})
    log = RunLog(tmp_path, config)
    for step in (1, 2, 3):
        log.write(step, {"loss": 1.0 / step, "bad": float("nan")})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    RunLog(tmp_path, config, resume_step=2).write(3, {"loss": 0.5})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3] and lines[-1]["loss"] == 0.5 and lines[0]["bad"] is None


def test_a_requeued_run_goes_on_in_its_run_of_wandb(tmp_path, monkeypatch):
    class Wandb:
        Error, started = RuntimeError, []

        def init(self, id, resume, **settings):
            self.started.append(id)
            assert resume == "allow"
            return SimpleNamespace(id=id or f"new{len(self.started)}")

    monkeypatch.setitem(sys.modules, "wandb", Wandb())
    experiment = {"project": "p", "name": "n"}
    config = OmegaConf.create({"training": {"enable_wandb": True}, "experiment": experiment})
    for resume_step in (0, 3, 6, 0):
        RunLog(tmp_path, config, resume_step)
    assert Wandb.started == [None, "new1", "new1", None]  # from scratch is another run
    assert (tmp_path / "wandb_id.txt").read_text() == "new4\n"


def test_a_full_disk_leaves_no_half_line_in_the_log(tmp_path):
    log = RunLog(tmp_path, OmegaConf.create({"training": {}}))
    log.write(1, {"loss": 1.0})
    written = log.path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(written) + 10, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot write to .*File too large.* no checkpoint yet"), writing(tmp_path):
            log.write(2, {"loss": 0.5})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert log.path.read_bytes() == written


def test_resume_wants_one_whole_checkpoint_where_there_are_any(trained, tmp_path):
    (tmp_path / "run/checkpoint-3").mkdir(parents=True)
    with pytest.raises(UserError, match="no checkpoint in .*run is whole"):
        run_job("teacher", trained, tmp_path / "run")


def test_a_run_does_not_end_before_the_step_that_it_continues(trained, tmp_path):
    shutil.copytree(trained / "teacher/checkpoint-3", tmp_path / "checkpoint-3")
    with pytest.raises(UserError, match="checkpoint-3 is farther than training.max_train_steps 2: raise that, or"):
        run_job("teacher", trained, tmp_path, "training.max_train_steps=2")
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["checkpoint-3"]


def test_a_run_that_ended_before_its_adversary_came_goes_on_past_that(trained, tmp_path, capsys):
    start = ["losses.discriminator_start=4", "experiment.generate_every=0", "experiment.log_every=1"]
    run_job("teacher", trained, tmp_path, *start, "training.max_train_steps=3")
    assert not (tmp_path / "checkpoint-3/model_1.safetensors").exists()
    run_job("teacher", trained, tmp_path, *start)
    said = f"new            the discriminator, which {tmp_path}/checkpoint-3 lacks: it begins at step 4"
    assert said in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss/discriminator" in line] == [5, 6]
    shutil.rmtree(tmp_path / "checkpoint-6")
    with pytest.raises(UserError, match="checkpoint-3 does not fit this configuration"):  # it would come too late
        run_job("teacher", trained, tmp_path, "losses.discriminator_start=2")


def test_an_adversary_comes_to_a_run_that_had_no_state_of_its_own(trained, tmp_path):
    quiet = ["experiment.generate_every=0", "experiment.eval_every=0", "model.vq_model.freeze_tokens=True"]
    run_job("stage2", trained, tmp_path, *quiet, "training.max_train_steps=1", "training.codebook.warmup_steps=0")
    assert not list(tmp_path.glob("checkpoint-1/task_state_*"))
    run_job("stage2", trained, tmp_path, *quiet, "training.max_train_steps=3")  # the discriminator starts at step 2
    assert list(tmp_path.glob("checkpoint-3/task_state_*"))


def test_a_run_that_goes_on_after_its_end_means_its_newest_checkpoint(trained, tmp_path, monkeypatch, capsys):
    run_job("stage1", trained, tmp_path, "training.max_train_steps=2", "experiment.generate_every=0")
    assert locate(tmp_path).weights == tmp_path / "model.safetensors"
    update = loop.update

    def update_until_killed(run, micro_batches):
        if run.step == 3:
            raise KeyboardInterrupt
        return update(run, micro_batches)

    monkeypatch.setattr(loop, "update", update_until_killed)
    with pytest.raises(KeyboardInterrupt):
        run_job("stage1", trained, tmp_path)
    assert locate(tmp_path).weights.parents[1].name == "checkpoint-3"
    assert f"removed        {tmp_path / 'model.safetensors'}: the run had ended" in capsys.readouterr().out
    monkeypatch.undo()
    run_job("stage1", trained, tmp_path)
    assert locate(tmp_path).weights == tmp_path / "model.safetensors"


def test_a_run_that_is_not_to_continue_wants_a_folder_without_checkpoints(trained, tmp_path, monkeypatch, capsys):
    shutil.copytree(trained / "teacher/checkpoint-3", tmp_path / "old/checkpoint-3")
    afresh = ["experiment.resume=False", "experiment.eval_every=0", "experiment.generate_every=0"]
    with pytest.raises(UserError, match="experiment.resume is False, and .*old holds checkpoints: delete what"):
        run_job("teacher", trained, tmp_path / "old", *afresh)
    # Nor is its job queued again when its time is up: the same command would not go on.
    update = loop.update

    def update_when_time_is_up(run, micro_batches):
        os.kill(os.getpid(), signal.SIGTERM)
        return update(run, micro_batches)

    monkeypatch.setattr(loop, "update", update_when_time_is_up)
    with pytest.raises(SystemExit) as ended:
        run_job("teacher", trained, tmp_path / "new", *afresh)
    assert ended.value.code == INTERRUPTED
    assert "run it again without experiment.resume=False to continue" in capsys.readouterr().out


def test_what_a_checkpoint_lacks_is_one_sentence(trained, tmp_path):
    small = ["training.max_train_steps=3", "experiment.eval_every=0", "experiment.generate_every=0"]
    run_job("teacher", trained, tmp_path, "training.use_ema=False", *small)
    small[0] = "training.max_train_steps=4"
    with pytest.raises(UserError, match="checkpoint-3 does not fit this configuration .*ema_model"):
        run_job("teacher", trained, tmp_path, *small)


@pytest.mark.parametrize(
    "job, key, other",
    [
        ("stage1", "model.vq_model.pretrained_tokenizer_weight", "teacher"),
        ("stage2", "model.vq_model.pretrained_tokenizer_weight", "teacher"),
        ("stage2", "experiment.init_weight", "stage1"),
    ],
)
def test_a_run_does_not_go_on_with_other_weights_than_it_began_with(trained, tmp_path, job, key, other):
    shutil.copytree(trained / job / "checkpoint-3", tmp_path / "checkpoint-3")
    changed = f"{key}={trained}/{other}/checkpoint-3/ema_model"
    named = key if job == "stage1" else "experiment.init_weight, or of the teacher,"
    with pytest.raises(UserError, match=f"checkpoint-3 does not fit .*the weights of {named} were .*, and are .* now"):
        run_job(job, trained, tmp_path, changed)
    few = ["training.max_train_steps=4", "experiment.eval_every=0", "experiment.generate_every=0"]
    run_job(job, trained, tmp_path, *few)


def test_a_checkpoint_that_does_not_say_what_it_began_with_is_continued(trained, tmp_path):
    """As they were up to 083ff17."""
    shutil.copytree(trained / "stage1/checkpoint-3", tmp_path / "checkpoint-3")
    world, metadata = tmp_path / "checkpoint-3/world.json", tmp_path / "checkpoint-3" / METADATA_FILE
    facts, listed = json.loads(world.read_text()), json.loads(metadata.read_text())
    assert len(facts.pop("sources")) == 1
    world.write_text(json.dumps(facts))
    listed["files"]["world.json"] = [world.stat().st_size, sha256_of(world)]
    metadata.write_text(json.dumps(listed))
    changed = f"model.vq_model.pretrained_tokenizer_weight={trained}/teacher/checkpoint-3/ema_model"
    few = ["training.max_train_steps=4", "experiment.eval_every=0", "experiment.generate_every=0"]
    run_job("stage1", trained, tmp_path, changed, *few)


def test_another_number_of_images_in_a_step_is_said_and_counted(trained, tmp_path, capsys):
    shutil.copytree(trained / "teacher/checkpoint-3", tmp_path / "run/checkpoint-3")
    run_job("teacher", trained, tmp_path / "run", "training.per_gpu_batch_size=2")
    assert "the global batch was 4 images and is 2 now" in capsys.readouterr().out
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line).get("images_seen") for line in lines][-2] == 3 * 4 + 3 * 2


def test_changed_settings_of_the_optimizer_count(trained, tmp_path, monkeypatch):
    shutil.copytree(trained / "teacher/checkpoint-3", tmp_path / "checkpoint-3")
    shutil.copy(trained / "teacher/config.yaml", tmp_path)
    changed = ["optimizer.params.weight_decay=0.5", "optimizer.params.beta1=0.25", "training.max_train_steps=4"]
    used, step = [], torch.optim.AdamW.step

    def watched(optimizer, *arguments, **options):
        used.extend((group["betas"], group["weight_decay"]) for group in optimizer.param_groups)
        return step(optimizer, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    run_job("teacher", trained, tmp_path, *changed, "experiment.eval_every=0")
    beta2 = load_config(tmp_path / "config.yaml").optimizer.params.beta2
    assert set(used) == {((0.25, beta2), 0.5), ((0.25, beta2), 0.0)}


@pytest.fixture
def run_on_shards(tmp_path, monkeypatch):
    """A function: train the teacher on shards up to a step, and return the keys of each of its batches."""
    make_shards(tmp_path, [40])
    take, batches = loop.take, []

    def take_and_list(run, iterator):
        micro_batches = take(run, iterator)
        batches.extend(tuple(batch["__key__"]) for batch in micro_batches)
        return micro_batches

    def run(num_steps, *overrides):
        batches.clear()
        few = [f"training.max_train_steps={num_steps}", "experiment.eval_every=0", "experiment.generate_every=0"]
        data = ["dataset.type=shards", f"dataset.params.train_shards_path_or_url={tmp_path}/s-000000.tar"]
        run_job("teacher", tmp_path, tmp_path / "run", *few, *data, "experiment.save_every=100", *overrides)
        world = tmp_path / f"run/checkpoint-{num_steps}/world.json"
        return list(batches), json.loads(world.read_text())["reseeded_at"]

    monkeypatch.setattr(loop, "take", take_and_list)
    return run


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(
    "key, was, now",
    [
        ("dataset.params.num_workers_per_gpu", 1, 2),
        ("experiment.save_every", 2, 3),
        ("training.gradient_accumulation_steps", 2, 1),
        ("training.per_gpu_batch_size", 4, 2),
    ],
)
def test_no_batch_comes_again_when_what_it_was_drawn_by_changes(run_on_shards, capsys, key, was, now):
    before, reseeded_at = run_on_shards(4, f"{key}={was}")
    assert reseeded_at == 0 and "fresh seed" not in capsys.readouterr().out
    after, reseeded_at = run_on_shards(9, f"{key}={now}")
    assert (
        reseeded_at == 4 and f"({key} {was} -> {now}): training continues with a fresh seed" in capsys.readouterr().out
    )
    size = min(len(after[0]), len(before[0]))
    first, later = (
        {keys[place : place + size] for keys in batches for place in range(0, len(keys), size)}
        for batches in (before, after)
    )
    assert not first & later
    _, reseeded_at = run_on_shards(10, f"{key}={now}")
    assert reseeded_at == 4 and "fresh seed" not in capsys.readouterr().out


def test_a_run_on_shards_that_changes_nothing_goes_on_with_the_same_batches(run_on_shards, tmp_path, capsys):
    whole, _ = run_on_shards(6)
    shutil.rmtree(tmp_path / "run")
    first, _ = run_on_shards(4)
    second, reseeded_at = run_on_shards(6, "dataset.params.num_workers_per_gpu=1")  # as without workers
    assert first + second == whole and reseeded_at == 0 and "fresh seed" not in capsys.readouterr().out


def test_a_changed_configuration_is_told_and_the_old_one_kept(trained, tmp_path, capsys):
    shutil.copytree(trained / "teacher/checkpoint-3", tmp_path / "checkpoint-3")
    shutil.copy(trained / "teacher/config.yaml", tmp_path)
    before = (tmp_path / "config.yaml").read_bytes()
    short = ["training.max_train_steps=3", "experiment.eval_every=0"]
    run_job("teacher", trained, tmp_path, *short, "training.seed=7", "optimizer.params.learning_rate=0.5")
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("changed  "))
    for change in (
        "optimizer.params.learning_rate: 0.001 -> 0.5",
        "training.seed: 42 -> 7",
        "kept as config-until-step-3",
    ):
        assert change in said
    assert (tmp_path / "config-until-step-3.yaml").read_bytes() == before
    assert load_config(tmp_path / "config.yaml").training.seed == 7
    # The same again changes nothing; another change at the same step keeps both.
    run_job("teacher", trained, tmp_path, *short, "training.seed=7", "optimizer.params.learning_rate=0.5")
    assert "changed  " not in capsys.readouterr().out
    run_job("teacher", trained, tmp_path, *short, "training.seed=8", "optimizer.params.learning_rate=0.5")
    assert {path.name for path in tmp_path.glob("config-*")} == {
        "config-until-step-3.yaml",
        "config-until-step-3-2.yaml",
    }


@pytest.mark.parametrize(
    "share, num_workers, num_cores, advice",
    [
        (0.1, 1, 8, None),
        (0.5, 0, 8, "num_workers_per_gpu=1 (now 0;"),
        (0.75, 2, 12, "num_workers_per_gpu=8 (now 2; 12 cores per process)"),
        (0.75, 2, 4, "num_workers_per_gpu=4 (now 2;"),
        (0.75, 4, 4, "4 workers already keep 4 cores"),
    ],
)
def test_who_waits_for_data_hears_how_many_workers_it_takes(share, num_workers, num_cores, advice):
    said = worker_advice(share, num_workers, num_cores)
    assert said is None if advice is None else advice in said


def test_a_run_that_waits_for_its_data_says_so_once(trained, tmp_path, capsys, monkeypatch):
    take = loop.take

    def slowly(run, batches):
        run.data_seconds += 100.0
        return take(run, batches)

    monkeypatch.setattr(loop, "take", slowly)
    run_job("teacher", trained, tmp_path / "run", "experiment.log_every=1")
    assert capsys.readouterr().out.count("waiting for data") == 1


def test_a_processor_without_bfloat16_trains_in_float32_and_says_so(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("utils.training.loop.cpu_has_bfloat16", lambda: False)
    accelerator = make_accelerator(job_config("teacher", trained, tmp_path, "training.mixed_precision=bf16"))
    if accelerator.device.type == "cpu":
        assert accelerator.mixed_precision == "no"
        assert "emulates bfloat16" in capsys.readouterr().out


def test_compiling_reaches_the_frozen_teacher_too(trained, tmp_path):
    config = job_config("stage1", trained, tmp_path, "training.compile=True")
    task = Stage1Task(config)
    task.start()
    Run(task, config, Accelerator(cpu=True))
    # Set by torch.nn.Module.compile, which compiles at the first call.
    assert all(level._compiled_call_impl is not None for level in task.teacher.encoder.down)


@pytest.mark.parametrize(("precision", "half"), [("fp32", False), ("bf16", True)])
def test_the_frozen_teacher_computes_in_float32_unless_asked_otherwise(trained, tmp_path, monkeypatch, precision, half):
    """Whatever precision is trained in: in bfloat16, 3 % of its codes would be others."""
    task = Stage1Task(job_config("stage1", trained, tmp_path, f"training.frozen_precision={precision}"))
    task.start()
    encode, seen = task.teacher.encode, []
    monkeypatch.setattr(task.teacher, "encode", lambda x: seen.append(torch.is_autocast_enabled("cpu")) or encode(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        next(task.losses({"image": torch.rand(2, 3, task.model.image_size, task.model.image_size)}, step=0))
    assert seen == [half]


def test_a_precision_that_there_is_not_is_refused():
    with pytest.raises(UserError, match="training.frozen_precision must be fp32 or bf16, got half"):
        frozen_arithmetic("half", torch.device("cpu"))


# Schedules


def test_the_learning_rate_is_the_published_one():
    golden = np.load(ROOT / "tests/golden/lr_schedule.npz")
    published = {
        "stage1": (10_000, 1_000_000, 1e-4, 1e-5),
        "stage2": (5_000, 500_000, 1e-4, 1e-5),
        "stage2_disc": (5_000, 480_000, 1e-4, 1e-5),
        "generator": (10_000, 500_000, 2e-4, 1e-5),
    }
    for name, (warmup, total, peak, end) in published.items():
        steps = [0, 1, 100, warmup - 1, warmup, warmup + 1, 20_000, total // 4, total // 2, total - 1, total]
        got = [learning_rate(step, peak=peak, end=end, warmup_steps=warmup, total_steps=total) for step in steps]
        assert np.allclose(1e4 * np.array(got), golden[name], rtol=1e-9)
    assert learning_rate(600, peak=1.0, end=0.1, warmup_steps=5, total_steps=500) == 0.1


def test_the_average_copies_first_and_then_follows_the_law():
    model = nn.Linear(1, 1, bias=False)
    ema = EMA(model)
    expected = None
    for update in range(5):
        nn.init.constant_(model.weight, float(update + 1))
        ema.update(model, update)
        decay = 0.0 if update == 0 else (1 + update) / (10 + update)
        expected = float(update + 1) if expected is None else decay * expected + (1 - decay) * (update + 1)
        assert float(ema.model.weight) == pytest.approx(expected, rel=1e-6)
    assert ema_decay(100_000) == 0.999


def test_the_average_copies_what_is_not_trained_at_every_update():
    model = nn.BatchNorm1d(2)
    model.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
    ema = EMA(model)
    for update in range(3):
        model.frozen.fill_(update)
        model.running_mean.fill_(update)
        model.num_batches_tracked.fill_(update)
        ema.update(model, update)
        assert ema.model.frozen.tolist() == ema.model.running_mean.tolist() == [update, update]
        assert int(ema.model.num_batches_tracked) == update


def test_what_is_not_decayed():
    model = nn.Module()
    model.pos_embed = nn.Parameter(torch.zeros(1, 2, 3))
    model.latent_tokens = nn.Parameter(torch.zeros(2, 3))
    model.linear = nn.Linear(3, 3)
    model.norm_out = nn.Linear(3, 3)
    model.embedding = nn.Embedding(4, 3)
    decayed, plain = parameter_groups([model], 0.1)
    assert decayed["weight_decay"] == 0.1 and [p.shape for p in decayed["params"]] == [(1, 2, 3), (3, 3)]
    assert plain["weight_decay"] == 0.0 and len(plain["params"]) == 5


def test_evaluation_lengths_double_up_to_all_tokens():
    class Model:
        num_latent_tokens, strict_length_assertion = 12, False

    config = OmegaConf.create({"experiment": {"eval_lengths": []}})
    assert evaluation_lengths(config, Model) == [1, 2, 4, 8, 12]
    config.experiment.eval_lengths = [3]
    assert evaluation_lengths(config, Model) == [3]
    for wrong in (13, 1.5, "a"):
        config.experiment.eval_lengths = [3, wrong]
        with pytest.raises(UserError, match=f"experiment.eval_lengths must be in 1..12, got {wrong}"):
            evaluation_lengths(config, Model)


def test_the_adversary_waits_for_its_start_and_gets_nothing_of_the_models_loss(trained):
    config = job_config("stage2", trained, trained / "unused", "losses.discriminator_start=2")
    from modeling.tasks.tokenizer import Stage2Task

    task: ReconstructionTask = Stage2Task(config)
    batch = {"image": torch.rand(2, 3, 16, 16)}
    assert [player for player, _, _ in task.losses(batch, step=1)] == ["model"]
    turns = task.losses(batch, step=2)
    player, loss, logs = next(turns)
    loss.backward()
    assert player == "model" and "adversarial_loss" in logs
    assert all(parameter.grad is None for parameter in task.discriminator.parameters())
    player, loss, _ = next(turns)
    loss.backward()
    assert player == "discriminator" and task.discriminator.to_logits[2].weight.grad.abs().sum() > 0
    assert task.first_step("discriminator") == 2


def run_in_bfloat16(monkeypatch, job, folder, output_dir, *overrides):
    """Two steps under autocast, whatever the processor has."""
    monkeypatch.setattr("utils.training.loop.cpu_has_bfloat16", lambda: True)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        run_job(job, folder, output_dir, "training.mixed_precision=bf16", "training.max_train_steps=2", *overrides)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_codes_and_evaluations_are_computed_outside_autocast(trained, tmp_path, monkeypatch):
    seen = {}

    def watch(owner, name):
        compute = getattr(owner, name)

        def watched(*args):
            seen.setdefault(name, set()).add(torch.is_autocast_enabled("cpu"))
            return compute(*args)

        monkeypatch.setattr(owner, name, watched)

    watch(PixelVQGAN, "encode")
    watch(Stage1Task, "evaluate")
    run_in_bfloat16(monkeypatch, "stage1", trained, tmp_path, "experiment.generate_every=0")
    assert seen["encode"] == seen["evaluate"] == {False}


def test_a_model_without_an_average_is_evaluated_in_float32_too(trained, tmp_path, monkeypatch):
    seen = set()
    evaluate = TeacherTask.evaluate

    def watched(self, model, batch):
        layer = model.decoder.conv_in
        hook = layer.register_forward_hook(lambda layer, inputs, output: seen.add(output.dtype))
        scores = evaluate(self, model, batch)
        hook.remove()
        return scores

    monkeypatch.setattr(TeacherTask, "evaluate", watched)
    run_in_bfloat16(monkeypatch, "teacher", trained, tmp_path, "training.use_ema=False")
    assert seen == {torch.float32}


def test_no_preview_is_made_of_no_images(trained, tmp_path):
    settings = ["training.max_train_steps=2", "experiment.generate_every=1", "training.num_generated_images=0"]
    run_job("teacher", trained, tmp_path, *settings)
    assert not (tmp_path / "previews").exists()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("training.codebook.kmeans=True training.codebook.warmup_steps=0", "kmeans places the codes after warmup_step"),
        ("training.codebook.warmup_steps=6", r"warmup_steps \(6\) must be fewer than training.max_train_steps \(6\)"),
        ("training.mixed_precision=float16", "must be no, fp16 or bf16, got float16"),
    ],
)
def test_a_training_that_would_be_none_is_refused(trained, tmp_path, change, complaint):
    with pytest.raises(UserError, match=complaint):
        run_job("teacher", trained, tmp_path, *change.split())


def test_choices_among_the_codes_before_k_means_do_not_keep_those_after_it():
    quantizer = VectorQuantizer(codebook_size=8, token_size=2).train()
    care = CodebookCare(quantizer, 1000, warmup_steps=10, kmeans=True, restart_every=100)
    for step in (0, 10):
        care.begin(step)
        assert not care.state["used"].any()
        quantizer(torch.randn(64, 2, 1, 1))
        assert care.state["used"].sum() == 64


def test_codes_stay_where_a_resumed_run_is_the_first_to_restart_them():
    """It has seen no outputs yet that they could move to."""
    quantizer = VectorQuantizer(codebook_size=8, token_size=2)
    care = CodebookCare(quantizer, 1000, warmup_steps=0, kmeans=False, restart_every=100)
    before = quantizer.embedding.weight.detach().clone()
    care.begin(step=300)
    assert torch.equal(quantizer.embedding.weight, before)


# Other systems


@pytest.mark.parametrize("job", JOBS)
def test_an_apple_gpu_which_has_no_float64_trains_and_evaluates(trained, tmp_path, job):
    with AppleGPU():
        run_job(job, trained, tmp_path / "run", "training.max_train_steps=2")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert any("eval/images" in line for line in lines) and any("loss/model" in line for line in lines)


def test_a_system_without_what_only_linux_has_can_train_and_has_every_command():
    """macOS has no sched_getaffinity; Windows has neither SIGUSR1, SIGHUP, EX_TEMPFAIL, killpg, resource nor fcntl."""
    program = """
import os, signal, sys
import psutil  # which needs others there
del os.sched_getaffinity, os.EX_TEMPFAIL, os.killpg, signal.SIGUSR1, signal.SIGHUP
sys.modules |= {"resource": None, "fcntl": None}
import importlib, pathlib
for path in [*pathlib.Path("scripts").glob("*.py"), *pathlib.Path("data").glob("make_*.py")]:
    importlib.import_module(f"{path.parent.name}.{path.stem}")
import data.loaders, utils.training.ablation, utils.training.loop
from utils import processes
print(processes.num_cores() > 0, processes.NOTICES == (signal.SIGTERM,))
with processes.Processes("cpu").noticing_signals():
    pass
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "True True\n", done.stderr


def test_scores_are_in_the_order_of_their_lengths():
    sums = dict.fromkeys(("psnr@16", "ssim@8", "psnr@1", "psnr@8"), 1.0)
    assert list(add_up([(sums, {"images": 2})])) == ["psnr@1", "psnr@8", "psnr@16", "ssim@8", "images"]
