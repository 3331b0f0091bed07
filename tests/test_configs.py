"""The configuration files: published values, what each key is for, and a model for every file."""

import importlib
import json
import re

import pytest
import torch
import yaml

from utils.config import load_config, to_plain
from utils.paths import ROOT

PUBLISHED = json.loads((ROOT / "tests/facts/configs.json").read_text())
NAMED = sorted(
    str(path.relative_to(ROOT))
    for folder in ("training", "eval", "fashion", "emoji")
    for path in (ROOT / "configs" / folder).rglob("*.yaml")
)
SHARDS = "./imagenet_sharded/imagenet-{}.tar"
# Everything in which our files differ from the published ones, and why: (files, key, our value).
DIFFERENCES = [
    # The configs read where the converter's README command writes; the TiTok runs had shards of other sizes.
    (r".*", "dataset.params.train_shards_path_or_url", SHARDS.format("train-{000000..000320}")),
    (r".*", "dataset.params.eval_shards_path_or_url", SHARDS.format("val-{000000..000049}")),
    # No code reads it: AdamW's own epsilon is the same number.
    (r"training/stage1/.*", "optimizer.params.epsilon", None),
    # Stage 2 starts from the folder that stage 1 wrote, so no file is renamed in between (and published B-256 started
    # from the L-256 weights).
    (r"training/stage2/one-d-piece_s256", "experiment.init_weight", "checkpoints/one_d_piece_s256_stage1_run1"),
    (r"training/stage2/one-d-piece_b256", "experiment.init_weight", "checkpoints/one_d_piece_b256_stage1_run1"),
    (r"training/stage2/one-d-piece_l256", "experiment.init_weight", "checkpoints/one_d_piece_l256_stage1_run1"),
    (r"training/stage2/titok_s128", "experiment.init_weight", "titok_s_128_stage1_run1"),
    (r"training/stage2/titok_b64", "experiment.init_weight", "titok_b_64_stage1_run1"),
    (r"training/stage2/titok_l32", "experiment.init_weight", "titok_l_32_stage1_run1"),
    # Generators take the published tokenizer from the hub, not a file that somebody has to name so.
    (r"training/generator/.*_s256", "experiment.tokenizer_checkpoint", "turing-motors/One-D-Piece-S-256"),
    (r"training/generator/.*_b256", "experiment.tokenizer_checkpoint", "turing-motors/One-D-Piece-B-256"),
    (r"training/generator/.*_l256", "experiment.tokenizer_checkpoint", "turing-motors/One-D-Piece-L-256"),
]
# Sections that code hands on whole, whose keys it then reads by other names than the section's.
HANDED_ON = ("losses", "model.generator", "model.pixel_vqgan", "training.perturb")
# Keys that no code reads by their names.
UNREAD = {
    # Read as "discriminator" + "_learning_rate".
    "optimizer.params.discriminator_learning_rate",
    # Kept because published checkpoints carry them.
    "experiment.length",
    "experiment.log_grad_norm_every",
    "losses.target_codebook_size",
    "model.generator_type",
}


def our_file(published):
    """Where a published configuration stands here."""
    sampling = re.fullmatch(r"generator_(titok_\w+) \(sampling\)", published)
    if sampling:
        return f"configs/training/generator/maskgit_{sampling[1]}.yaml"
    return f"configs/{published}.yaml" if "/" in published else f"configs/eval/{published}.yaml"


def flatten(values, prefix=""):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def build(config):
    """The model that a file describes."""
    if "generator" in config.model:
        name = {"ViT": "ImageBert", "UViT": "UViTBert"}[config.model.generator.model_type]
        module = "modeling.maskgit"
    else:
        name = {"one_d_piece": "OneDPiece", "titok": "TiTok", "pixel_vqgan": "PixelVQGAN"}[config.model.type]
        module = f"modeling.{config.model.type}"
    with torch.device("meta"):
        return getattr(importlib.import_module(module), name)(config)


@pytest.mark.parametrize("published", PUBLISHED)
def test_published_values_stand_in_our_file(published):
    ours = dict(flatten(to_plain(load_config(ROOT / our_file(published)))))
    wrong = {}
    for key, value in flatten(PUBLISHED[published]):
        expected = value
        for files, name, our_value in DIFFERENCES:
            if name == key and re.fullmatch(files, published):
                expected = our_value
        if ours.get(key) != expected or type(ours.get(key)) is not type(expected):
            wrong[key] = f"{ours.get(key)!r}, expected {expected!r}"
    assert not wrong


def test_listed_differences_are_differences():
    for files, key, our_value in DIFFERENCES:
        published = [dict(flatten(values)) for name, values in PUBLISHED.items() if re.fullmatch(files, name)]
        assert any(values.get(key, our_value) != our_value for values in published), (files, key)


@pytest.mark.parametrize("path", NAMED)
def test_every_named_file_builds_its_model(path):
    config = load_config(ROOT / path)
    model = build(config)
    assert sum(parameter.numel() for parameter in model.parameters()) > 0
    assert all(parameter.device.type == "meta" for parameter in model.parameters())


@pytest.mark.parametrize("path", NAMED)
def test_every_named_file_opens_with_its_command_and_what_to_expect(path):
    comment = re.match(r"(#.*\n)+", (ROOT / path).read_text())[0]
    commands = re.findall(r"(?:sbatch|bash|python3) (\S+) .*", comment)
    assert commands, "no command"
    assert re.search(rf"(?:config=|--config |\.sh ){re.escape(path)}(\s|$)", comment), "a command for this file"
    assert re.search(r"[Ee]xpect|figure", comment), "what to expect"


def as_written(path):
    """A file over its defaults, unresolved, as {dotted key: value}; and what its body repeats of them."""
    body = yaml.safe_load(path.read_text())
    inherited = {}
    for name in body.pop("defaults", []):
        inherited.update(as_written(path.parent / name)[0])
    body = dict(flatten(body))
    return inherited | body, {key: value for key, value in body.items() if inherited.get(key, ...) == value}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_no_file_repeats_what_its_defaults_say(path):
    _, repeated = as_written(path)
    assert not repeated


@pytest.mark.parametrize("name", ["one-d-piece_s256", "one-d-piece_b256", "one-d-piece_l256"])
def test_each_step_reads_where_the_step_before_wrote(name):
    stage1, stage2, evaluation = (
        load_config(ROOT / f"configs/{folder}/{name}.yaml").experiment
        for folder in ("training/stage1", "training/stage2", "eval")
    )
    assert stage2.init_weight == stage1.output_dir
    assert evaluation.output_dir == stage2.output_dir


def test_the_recommended_runs_change_a_few_lines_of_the_published_ones():
    changed = {}
    for stage in ("stage1", "stage2"):
        published, recommended = (
            dict(flatten(to_plain(load_config(ROOT / f"configs/training/{stage}/one-d-piece_s256{name}.yaml"))))
            for name in ("", "_recommended")
        )
        changed[stage] = {key for key in recommended if recommended[key] != published.get(key)}
        assert published.keys() == recommended.keys()
        place = recommended["experiment.output_dir"]
        assert stage == "stage1" or recommended["experiment.init_weight"] == place.replace("stage2", "stage1")
    names = {"experiment.name", "experiment.output_dir"}
    assert changed["stage1"] - names == {"model.vq_model.tail_drop"}
    assert changed["stage2"] - names == {
        "experiment.init_weight",
        "model.vq_model.tail_drop",
        "model.vq_model.freeze_tokens",
        "losses.quantizer_weight",
    }


@pytest.mark.parametrize("folder", ["fashion", "emoji/64"])
def test_the_small_runs_read_where_the_run_before_wrote(folder):
    teacher, stage1, stage2, evaluation, generator = (
        load_config(ROOT / f"configs/{folder}/{name}.yaml")
        for name in ("teacher", "stage1", "stage2", "eval", "generator")
    )
    for config in (stage1, stage2):
        assert config.model.vq_model.pretrained_tokenizer_weight == teacher.experiment.output_dir
        assert config.model.pixel_vqgan.items() <= teacher.model.pixel_vqgan.items()
    assert stage2.experiment.init_weight == stage1.experiment.output_dir
    assert evaluation.experiment.output_dir == stage2.experiment.output_dir
    assert generator.experiment.tokenizer_checkpoint == stage2.experiment.output_dir


def test_the_emoji_runs_read_where_the_tokenizer_wrote():
    tokenizer, evaluation, generator = (
        load_config(ROOT / f"configs/emoji/{name}.yaml") for name in ("tokenizer", "eval", "generator")
    )
    assert evaluation.experiment.output_dir == tokenizer.experiment.output_dir
    assert generator.experiment.tokenizer_checkpoint == tokenizer.experiment.output_dir
    assert tokenizer.model.vq_model == load_config(ROOT / "configs/fashion/stage2.yaml").model.vq_model


def test_every_key_is_read_by_code():
    code = "\n".join(
        path.read_text()
        for folder in ("modeling", "data", "utils", "scripts")
        for path in (ROOT / folder).rglob("*.py")
    )
    keys = {key for path in NAMED for key, _ in flatten(to_plain(load_config(ROOT / path)))}
    assert {key for key in keys if not re.search(read_as(key), code)} == UNREAD


def read_as(key):
    """The pattern of `section.name` or `section.get("name"`; of the name alone where its section is handed on whole."""
    section, _, name = key.rpartition(".")
    if section in HANDED_ON:
        return rf"\b{name}\b"
    return rf"\b{section.rpartition('.')[2]}\.(get\(\")?{name}\b"
