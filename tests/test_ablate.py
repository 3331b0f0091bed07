"""The ablation: its commands in their order, done once, and its tables."""

import contextlib
import importlib
import json

import pytest
import yaml

from scripts import ablate
from tests.evaluation_data import command
from tests.training_runs import job_config, make_images, run_job
from utils.config import load_config, save_config
from utils.errors import UserError
from utils.paths import ROOT
from utils.processes import Processes
from utils.training import ablation
from utils.training.ablation_results import bytes_at, entropy_tables, generation_of, generation_table, spread, tables


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Images, a teacher, the configurations of a small stage 1 and stage 2, and a list of two arms."""
    folder = tmp_path_factory.mktemp("ablation")
    make_images(folder)
    run_job("teacher", folder, folder / "teacher", "training.max_train_steps=2")
    for job in ("stage1", "stage2"):
        save_config(job_config(job, folder, folder / job), folder / f"{job}.yaml")
    plan = {
        "train": str(folder / "stage1.yaml"),
        "finish": str(folder / "stage2.yaml"),
        "evaluate": [str(folder / "stage2.yaml"), "training.per_gpu_batch_size=8"],
        "num_contribution_images": 5,
        "seeds": [1],
        "arms": {
            "plain": {
                "title": "plain",
                "overrides": {"model.vq_model.tail_drop": "none", "model.vq_model.length_draw": "uniform"},
                "seeds": [2],
            },
            "other": {"title": "other", "overrides": {"model.vq_model.is_legacy": False}},
        },
    }
    (folder / "arms.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    return folder


@pytest.fixture
def here(monkeypatch):
    """Commands run in this process, which is quicker; the list of those that ran."""
    ran = []
    # Signals are the main thread's, and here the commands run in another.
    monkeypatch.setattr(Processes, "noticing_signals", lambda self: contextlib.nullcontext())

    def execute(trial, words, environ):
        ran.append((trial.folder.name, words[0]))
        monkeypatch.setattr("sys.argv", list(words))
        importlib.import_module(f"scripts.{words[0].removesuffix('.py')}").main()

    monkeypatch.setattr(ablation, "execute", execute)
    return ran


def test_every_arm_is_trained_scored_and_tabled_and_nothing_is_done_twice(world, here, monkeypatch, capsys, tmp_path):
    arguments = ("--arms", world / "arms.yaml", "--output_dir", tmp_path)
    status, out, _ = command(monkeypatch, capsys, ablate.main, *arguments)
    assert status == 0 and len(here) == 2 * 6
    result = json.loads((tmp_path / "ablation.json").read_text())
    plain, other = result["arms"]["plain"], result["arms"]["other"]
    assert [seed["seed"] for seed in plain + other] == [2, 1]
    assert [row["tokens"] for row in other[0]["curves"]] == [1, 2, 4]
    assert 0 < other[0]["head"] < 1 and len(other[0]["entropy"]) == 4
    assert (tmp_path / "ablation.md").read_text() in out
    assert "| plain |" in out
    assert (tmp_path / "ablation.png").stat().st_size > 20_000
    # The arm's own sizes reached the commands that score.
    assert not load_config(tmp_path / "other-1" / "model" / "config.yaml").model.vq_model.is_legacy

    here.clear()
    (tmp_path / "other-1" / "tokens" / "analysis.json").unlink()
    command(monkeypatch, capsys, ablate.main, *arguments)
    assert here == [("other-1", "analyze_tokens.py")]
    assert json.loads((tmp_path / "ablation.json").read_text()) == result

    # Another list with an arm of the same name does not take these results for its own.
    here.clear()
    plan = yaml.safe_load((world / "arms.yaml").read_text())
    plan["arms"]["other"]["overrides"] = {"model.vq_model.tail_drop": "per_sample"}
    (tmp_path / "another.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    status, _, error = command(monkeypatch, capsys, ablate.main, "--arms", tmp_path / "another.yaml", *arguments[2:])
    assert status == 1 and f"{tmp_path / 'other-1'} was run with other settings" in error and not here


def test_an_arm_may_override_with_nothing(tmp_path):
    arm = {"title": "all codes", "overrides": {"model.vq_model.first_codes": None}}
    (trial,) = ablation.trials_of({"train": "", "seeds": [1], "arms": {"all": arm}}, tmp_path)
    config = load_config(ROOT / "configs/fashion/ablation.yaml", trial.overrides)
    assert config.model.vq_model.first_codes is None


def test_a_command_that_fails_is_named_with_its_log(world, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(ablation, "steps_of", lambda trial, plan: [(trial.folder / "result", ["no_such_command.py"])])
    arguments = ("--arms", world / "arms.yaml", "--output_dir", tmp_path)
    status, _, error = command(monkeypatch, capsys, ablate.main, *arguments)
    assert not (tmp_path / "other-1").exists(), "nothing starts after a failure"
    assert status == 1 and "no_such_command.py of plain-2" in error and str(tmp_path / "plain-2" / "log.txt") in error


@pytest.mark.parametrize(
    "prints, told",
    [("", "without a word"), ("time is up\n\n\r 13%|#  | 3/24 [00:57<12:46, 2.8step/s]\r 13%|#  | 3/24", "time is up")],
)
def test_a_command_that_is_killed_is_named_with_what_it_last_said(prints, told, monkeypatch, tmp_path):
    killed = tmp_path / "scripts/killed.py"
    killed.parent.mkdir()
    killed.write_text(f"import os, signal\nprint({prints!r}, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)\n")
    monkeypatch.setattr(ablation, "ROOT", tmp_path)
    trial = ablation.Trial("arm", "arm", 1, (), tmp_path / "arm-1", "")
    with pytest.raises(UserError, match=rf"killed.py of arm-1 ended with status -9 \({told}\)"):
        ablation.execute(trial, ["killed.py"], {})


def test_arms_of_other_numbers_of_tokens_stand_below_the_same_lengths():
    def seed(*lengths):
        scored = {"psnr": 20.0, "ssim": 0.5, "perceptual_efficientnet_lite0": 1.0}
        curves = [{"tokens": length, **scored, "psnr": 10.0 + length} for length in lengths]
        others = dict.fromkeys(("head", "perplexity", "nmi", "nmi_shuffled", "purity", "purity_shuffled"), 0.5)
        bits = {"bits": [2.0] * lengths[-1], "bytes": [100.0 + length for length in lengths]}
        return {"title": f"{lengths[-1]}", "curves": curves, "codes_used": [9] * lengths[-1], **others, **bits}

    text = "\n".join(tables({"few": [seed(1, 2, 3)], "many": [seed(1, 2, 4)]}, []))
    assert " at tokens | 1 | 2 | 3 | 4 |" in text
    assert "| 3 | 11 | 12 | 13 |  |" in text and "| 4 | 11 | 12 |  | 14 |" in text
    assert "| 3 | 101 | 102 | 103 |  |" in text and "| 4 | 101 | 102 |  | 104 |" in text
    assert "| 3 | 2 | 2 | 2 |  | 2 |" in text and "| 4 | 2 | 2 | 2 | 2 | 2 |" in text


def test_seeds_are_told_by_their_mean_and_half_their_range():
    assert spread([20.0, 20.5]) == "20.25 ± 0.25"
    assert spread([20.0]) == "20"


def test_an_entropy_model_is_fitted_where_the_list_says_so_and_an_arm_may_train_otherwise(world, tmp_path):
    plan = ablation.read_arms(world / "arms.yaml")
    trial = next(ablation.trials_of(plan, tmp_path))
    without = list(ablation.steps_of(trial, plan))
    assert "entropy" not in ablation.settings_of(trial, plan), "what older lists left stays theirs"
    plan["entropy"] = ["configs/fashion/generator.yaml", "training.max_train_steps=2"]
    plan["arms"]["plain"]["train"] = "another.yaml"
    trial = next(ablation.trials_of(plan, tmp_path))
    steps = list(ablation.steps_of(trial, plan))
    assert [command[0] for _, command in steps[len(without) :]] == ["pretokenize.py", "fit_entropy_model.py"]
    assert steps[0][1][1] == f"config={ROOT / 'another.yaml'}" and steps[-1][1][-1] == "training.max_train_steps=2"
    assert ablation.settings_of(trial, plan)["train"] == "another.yaml"


def test_a_generator_is_trained_and_scored_where_the_list_says_so(world, tmp_path):
    plan = ablation.read_arms(world / "arms.yaml")
    plan |= {"generation": ["configs/fashion/generator.yaml", "training.max_train_steps=3"], "num_generated_images": 20}
    trial = next(ablation.trials_of(plan, tmp_path))
    *_, pretokenize, train, score = [command for _, command in ablation.steps_of(trial, plan)]
    assert [words[0] for words in (pretokenize, train, score)] == [
        "pretokenize.py",
        "train_generator.py",
        "evaluate_generation.py",
    ]
    config = load_config(train[1].removeprefix("config="), train[2:])
    assert config.dataset.params.token_set == pretokenize[-1] and config.training.max_train_steps == 3
    assert config.training.seed == 2 and config.experiment.output_dir == score[score.index("--checkpoint") + 1]
    images = load_config(world / "stage2.yaml").dataset.params
    assert images.eval_shards_path_or_url, "of the data set that the configuration is based on, and not of this folder"
    assert score[score.index("--reference") + 1] == images.eval_folder
    assert score[score.index("--num_images") + 1] == "20"
    scores = [command for _, command in ablation.steps_of(trial, plan) if command[0] == "evaluate_reconstruction.py"]
    assert scores[0][scores[0].index("--features") + 1] == "efficientnet_lite0"


def test_runs_side_by_side_share_the_gpus_that_were_given(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [ablation.environment(place, 3)["CUDA_VISIBLE_DEVICES"] for place in range(3)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-5")
    assert [ablation.environment(place, 3)["CUDA_VISIBLE_DEVICES"] for place in range(3)] == ["2", "GPU-5", "2"]


def test_how_well_a_generator_does_on_the_tokens_is_tabled(tmp_path):
    row = {"fd_efficientnet_lite0": 250.0, "precision": 0.5, "recall": 0.25}
    assert generation_of(tmp_path / "metrics.json", {}) == {}
    (tmp_path / "metrics.json").write_text(json.dumps({"rows": [row]}))
    seed = {"title": "arm", **generation_of(tmp_path / "metrics.json", {"fd_efficientnet_lite0": 200.0})}
    assert generation_table({"arm": [seed]}).endswith("| arm | 250 | 0.5 | 0.25 | 200 |")


def test_bits_by_position_and_bytes_at_equal_psnr_are_tabled():
    curves = [{"tokens": tokens, "psnr": psnr} for tokens, psnr in ((1, 15.0), (2, 17.0), (4, 19.0))]
    seed = {"title": "arm", "curves": curves, "bytes": [2.0, 4.0, 8.0], "bits": [8.0, 7, 6, 5], "codes_used": [9] * 4}
    assert bytes_at(18.0, seed) == 6 and bytes_at(14.0, seed) == 2
    bits, codes, sizes, equal = entropy_tables({"arm": [seed]}, [1, 2, 4])
    assert "| arm | 8 | 7 | 5 | 6.5 |" in bits and "| arm | 9 | 9 | 9 |" in codes and "| arm | 2 | 4 | 8 |" in sizes
    assert equal.startswith("| bytes at a PSNR (dB) of | 16 | 17 | 18 | 19 |") and "| arm | 3 | 4 | 6 | 8 |" in equal
    worse = {**seed, "curves": [{**row, "psnr": row["psnr"] - 1} for row in curves]}
    assert "not reached" in list(entropy_tables({"arm": [seed], "worse": [worse]}, [1, 2, 4]))[-1]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"seed": 1}, "must have the keys"),
        ({"generation": ["configs/fashion/generator.yaml"]}, "generation and num_generated_images belong together"),
        ({"arms": {"a": {"title": "a"}}}, "title and overrides"),
        ({"arms": {"a": {"title": "a", "overrides": {"model.vq_model.tail_dorp": "none"}}}}, "tail_drop"),
    ],
)
def test_a_mistake_in_the_list_is_told_before_anything_runs(
    world, here, monkeypatch, capsys, tmp_path, change, complaint
):
    plan = yaml.safe_load((world / "arms.yaml").read_text()) | change
    (tmp_path / "arms.yaml").write_text(yaml.safe_dump(plan))
    status, _, error = command(monkeypatch, capsys, ablate.main, "--arms", tmp_path / "arms.yaml")
    assert status == 1 and complaint in error and not here


@pytest.mark.parametrize(
    ("arms", "complaint"),
    [
        ("{a: [", "cannot be read as a list of arms: while parsing"),
        ("[a, b]", "arms must be a mapping of names to arms"),
        ("{a: }", "arm a must have a title and overrides"),
        ("{a: {title: as it is, overrides: }}", "overrides of arm a must be a mapping"),
    ],
)
def test_a_list_that_is_none_is_one_sentence(tmp_path, arms, complaint):
    keys = "".join(f"{key}: x\n" for key in sorted(ablation.KEYS - {"arms"}))
    (tmp_path / "arms.yaml").write_text(f"{keys}arms: {arms}\n")
    with pytest.raises(UserError, match=complaint):
        ablation.read_arms(tmp_path / "arms.yaml")


@pytest.mark.parametrize("path", sorted((ROOT / "configs/ablations").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_committed_lists_can_be_trained(path):
    plan = ablation.read_arms(path)
    for trial in ablation.trials_of(plan, ROOT / "output"):
        load_config(ROOT / trial.train, trial.overrides)
    load_config(ROOT / plan["evaluate"][0], plan["evaluate"][1:])
    if "generation" in plan:
        load_config(ROOT / plan["generation"][0], plan["generation"][1:])
    if "entropy" in plan:
        load_config(ROOT / plan["entropy"][0])
