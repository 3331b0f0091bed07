"""The configuration loader: merging, checks, and errors that name the file and the key."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError

from utils.cli import run
from utils.config import (
    ConfigError,
    check_kind,
    keep_changed,
    lenient_config,
    load_config,
    save_config,
    to_plain,
    training_arguments,
)
from utils.paths import ROOT

STAGE1 = ROOT / "configs/training/stage1/one-d-piece_s256.yaml"


@pytest.fixture
def write(tmp_path):
    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


@pytest.fixture
def named(write):
    """A file as users name them, over one that holds its keys."""
    write(
        "base.yaml",
        "training: {steps: 10, rate: 1e-4, resume: True, name: run, lengths: [], note: null,"
        " path: 'out/${training.name}'}",
    )
    return write("named.yaml", "defaults: [base.yaml]\ntraining: {steps: 20}\n")


def test_defaults_merge_left_to_right_then_the_body_then_overrides(write):
    write("a.yaml", "x: {one: a, two: a, three: a, four: a}")
    write("deeper/c.yaml", "x: {two: c, three: c, four: c, five: c}")
    write("deeper/b.yaml", "defaults: [c.yaml]\nx: {three: b, four: b}")
    path = write("named.yaml", "defaults: [a.yaml, deeper/b.yaml]\nx: {four: named}")
    config = load_config(path, ["x.five=typed"])
    assert to_plain(config) == {"x": {"one": "a", "two": "c", "three": "b", "four": "named", "five": "typed"}}


def test_a_variant_is_a_few_lines_over_a_published_run(write):
    path = write("mine/variant.yaml", f"defaults: [{STAGE1}]\nmodel: {{vq_model: {{num_latent_tokens: 128}}}}\n")
    config = load_config(path)
    assert config.model.vq_model.num_latent_tokens == 128
    assert config.optimizer.params.beta2 == 0.99


@pytest.mark.parametrize("where", ["file", "override"])
@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("training.max_train_step", "did you mean training.max_train_steps?"),
        ("per_gpu_batch_size", "did you mean training.per_gpu_batch_size?"),
        ("optimizer.learning_rate", "did you mean optimizer.params.learning_rate"),
        ("losses.entirely_other", "the keys of losses are full_weight, prefix_weight, quantizer_weight, target_"),
    ],
)
def test_a_misspelt_key_is_an_error_with_a_suggestion(write, where, key, meant):
    if where == "override":
        path, overrides, source = STAGE1, [f"{key}=3"], f"override {key}=3"
    else:
        path = write("variant.yaml", f"defaults: [{STAGE1}]\n{key}: 3\n")
        overrides, source = [], str(path)
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    assert str(error.value).startswith(f"{source}: unknown key {key}; {meant}")


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("training.steps=1e4", 10000),
        ("training.rate=2e-5", 2e-5),
        ("training.rate=1", 1.0),
        ("training.resume=false", False),
        ("training.name=12", "12"),
        ("training.name={000..320}.tar", "{000..320}.tar"),
        ("training.name=a=b: c", "a=b: c"),
        ("training.path=elsewhere/${training.name}", "elsewhere/run"),
        ("training.lengths=[1,2,4]", [1, 2, 4]),
        ("training.note=12", 12),
        ("training.steps=null", None),
    ],
)
def test_an_override_is_read_in_the_type_of_what_it_replaces(named, override, value):
    name = override.partition("=")[0].rpartition(".")[2]
    got = to_plain(load_config(named, [override]))["training"][name]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("training.steps=many", "must be a whole number"),
        ("training.steps=1.5", "must be a whole number"),
        ("training.steps=true", "must be a whole number"),
        ("training.rate=fast", "must be a number"),
        ("training.resume=1", "must be true or false"),
        ("training.lengths=8", "must be a list"),
        ("training=3", "is a section"),
        ("training.steps", "written a.b=c"),
        ("=3", "written a.b=c"),
        ("training.steps={a: b", "cannot read the value"),
        ("training.steps=${training.nothing}", "cannot be resolved"),
    ],
)
def test_an_override_of_another_type_is_an_error(named, override, complaint):
    with pytest.raises(ConfigError, match=complaint):
        load_config(named, [override])


@given(key=st.text(max_size=12), value=st.text(max_size=12))
@settings(max_examples=50, deadline=None)
def test_no_override_raises_anything_but_a_config_error(key, value):
    try:
        load_config(ROOT / "configs/fashion/teacher.yaml", [f"{key}={value}", f"training.seed={value}"])
    except ConfigError:
        pass


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("training.max_train_steps=-1", "a whole number of at least 0, got -1"),
        ("training.max_train_steps=null", "a whole number of at least 0, got None"),
        ("training.per_gpu_batch_size=0", "a whole number of at least 1, got 0"),
        ("training.gradient_accumulation_steps=0", "a whole number of at least 1, got 0"),
        ("training.seed=-1", "a whole number of at least 0, got -1"),
        ("training.seed=18446744073709551616", f"from 0 to {2**63 - 1}, got 18446744073709551616"),
        ("training.num_generated_images=-1", "at least 0, got -1"),
        ("training.codebook.restart_every=-1", "at least 0, got -1"),
        ("training.max_grad_norm=.nan", "a number above 0 (.inf: no limit), got nan"),
        ("training.max_grad_norm=0", "a number above 0 (.inf: no limit), got 0"),
        ("experiment.log_every=0", "a whole number of at least 1, got 0"),
        ("experiment.save_every=0", "at least 1, got 0"),
        ("experiment.eval_every=-5", "at least 0, got -5"),
        ("experiment.max_train_examples=0", "at least 1, got 0"),
        ("optimizer.params.learning_rate=.nan", "a number of at least 0, and finite, got nan"),
        ("optimizer.params.learning_rate=.inf", "a number of at least 0, and finite, got inf"),
        ("optimizer.params.learning_rate=-1e-3", "a number of at least 0, and finite, got -0.001"),
        ("optimizer.params.beta2=1", "a number from 0 to below 1, got 1.0"),
        ("lr_scheduler.params.warmup_steps=-1", "at least 0, got -1"),
        ("dataset.params.max_eval_examples=0", "at least 1, got 0"),
        ("dataset.params.num_workers_per_gpu=-1", "at least 0, got -1"),
        ("dataset.max_bad_fraction=2", "a number from 0 to 1, got 2.0"),
        ("dataset.preprocessing.crop_size=0", "at least 1, got 0"),
    ],
)
def test_an_impossible_number_names_its_key_and_what_is_expected(override, complaint):
    with pytest.raises(ConfigError) as error:
        training_arguments([f"config={STAGE1}", override], description="", example="", kind="tokenizer")
    assert f": {override.partition('=')[0]} must be " in str(error.value) and complaint in str(error.value)


@pytest.mark.parametrize(
    "override", ["experiment.eval_every=0", "training.max_grad_norm=.inf", "dataset.params.max_eval_examples=null"]
)
def test_numbers_that_switch_something_off_are_taken(override):
    load_config(STAGE1, [override])


@pytest.mark.parametrize(("text", "value"), [("False", "False"), ("auto", "auto"), ("'True'", "True")])
def test_a_choice_of_truths_and_words_takes_both(write, text, value):
    write("base.yaml", "training: {compile: auto, name: run}")
    config = load_config(write("named.yaml", f"defaults: [base.yaml]\ntraining: {{compile: {text}}}"))
    assert config.training.compile == value
    with pytest.raises(ConfigError, match="training.name must be a string"):
        load_config(write("other.yaml", "defaults: [base.yaml]\ntraining: {name: False}"))


def test_small_numbers_are_numbers(named):
    assert load_config(named).training.rate == 0.0001


def test_undecided_values_say_which_key_to_set(write):
    path = write("named.yaml", "dataset:\n  shards: ???\n  again: ${dataset.shards}\n")
    with pytest.raises(ConfigError, match=r"dataset\.shards=VALUE$"):
        load_config(path)
    assert load_config(path, ["dataset.shards=x.tar"]).dataset.again == "x.tar"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a: 1\n b: 2\n", "line 2: not valid YAML"),
        ("a: 1\na: 2\n", "line 2: not valid YAML: found duplicate key a"),
        ("- 1\n", "got a list"),
        ("a: ${nothing.there}\n", "a cannot be resolved"),
        ("a: ${b\n", "cannot be read"),
        ("defaults: base.yaml\n", "defaults must be a list"),
        ("defaults: [nothing.yaml]\n", "there is no .*nothing.yaml"),
        ("defaults: [named.yaml]\n", "cycle"),
        ("a: !!python/object/apply:os.system [true]\n", "not valid YAML"),
    ],
)
def test_a_broken_file_is_named_with_its_line(write, text, complaint):
    path = write("named.yaml", text)
    with pytest.raises(ConfigError, match=complaint) as error:
        load_config(path)
    assert str(path) in str(error.value)


def test_a_missing_file_suggests_its_neighbour():
    with pytest.raises(ConfigError, match="did you mean .*one-d-piece_s256.yaml"):
        load_config(STAGE1.with_name("one-d-piece-s256.yaml"))


def test_the_saved_configuration_repeats_the_run(tmp_path):
    config = load_config(STAGE1, ["training.seed=7"])
    path = tmp_path / "out/config.yaml"
    save_config(config, path)
    assert to_plain(load_config(path)) == to_plain(config)
    assert load_config(path, ["training.seed=8"]).training.seed == 8
    # What refers to a value follows it, as in the file that the run was started with.
    other = load_config(path, ["optimizer.params.learning_rate=1e-6"])
    assert other.lr_scheduler.params.learning_rate == 1e-6
    assert [file.name for file in path.parent.iterdir()] == ["config.yaml"]
    with pytest.raises(ConfigError, match="did you mean training.seed"):
        load_config(path, ["training.sed=8"])


@pytest.mark.parametrize("text", ["training:\n  seed: ${training.sed}\n", "training: {seed: 7"])
def test_a_run_s_configuration_that_cannot_be_read_is_kept_and_replaced(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    changes, copy = keep_changed(load_config(STAGE1, ["training.seed=7"]), tmp_path / "config.yaml", "before")
    assert "training.seed: None -> 7" in changes and copy.read_text() == text


def test_code_that_reads_a_key_that_is_not_there_fails():
    config = load_config(STAGE1)
    with pytest.raises(ConfigAttributeError):
        _ = config.training.max_steps
    assert config.training.get("max_steps", 5) == 5


def test_a_checkpoints_own_configuration_is_read_leniently():
    config = lenient_config({"model": {"vq_model": {"unheard_of": 1}}})
    assert config.model.vq_model.unheard_of == 1
    assert config.model.vq_model.get("is_legacy", True) is True
    assert lenient_config(config) is config
    with pytest.raises(ConfigError, match="got list"):
        lenient_config([1])


def arguments_of(*argv):
    return training_arguments(argv, description="Train a tokenizer.", example="configs/mine.yaml", kind="tokenizer")


def test_training_arguments_read_the_file_and_the_overrides():
    config = arguments_of(f"config={STAGE1}", "training.seed=7")
    assert config.training.seed == 7 and OmegaConf.is_struct(config)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "write config=PATH, for example config=configs/mine.yaml"),
        (["training.seed=7"], "write config=PATH"),
        (["--config", "x.yaml"], "cannot read the argument"),
        (["x.yaml"], "write config=x.yaml"),
        (["config=a.yaml", "config=b.yaml"], "one config=PATH"),
    ],
)
def test_arguments_that_cannot_be_read_say_how_to_write_them(arguments, complaint):
    with pytest.raises(ConfigError, match=complaint):
        arguments_of(*arguments)


def test_a_training_file_without_its_sections_is_an_error(write):
    path = write("named.yaml", "training: {seed: 7}")
    with pytest.raises(ConfigError, match="no section experiment nor model nor dataset"):
        arguments_of(f"config={path}")


@pytest.mark.parametrize(
    ("kind", "file", "complaint"),
    [
        (
            "tokenizer",
            "fashion/generator",
            "describes a generator, and .* needs a tokenizer: .*train_generator",
        ),
        ("tokenizer", "fashion/teacher", "describes a teacher, and this command needs a tokenizer: .*train_teacher"),
        ("generator", "fashion/stage1", "describes a tokenizer, and this command needs a generator: .*train_tokenizer"),
        ("teacher", "fashion/stage1", "describes a tokenizer, and this command needs a teacher"),
        ("tokenizer", "eval/titok_l32", "is for evaluation, and this command needs the training of a tokenizer"),
    ],
)
def test_a_configuration_of_another_kind_is_one_sentence(kind, file, complaint):
    path = ROOT / f"configs/{file}.yaml"
    with pytest.raises(ConfigError, match=complaint):
        training_arguments([f"config={path}"], description="Train.", example="x.yaml", kind=kind)


def test_a_configuration_without_a_model_is_one_sentence():
    with pytest.raises(ConfigError, match="x.yaml has no section model"):
        check_kind(OmegaConf.create({"training": {}}), "x.yaml", "tokenizer")


@pytest.mark.parametrize(
    "text", ["true", "-3", "1e-300", "defaults: ${a}", "defaults: ['???']", "experiment: []", "experiment: [1]"]
)
def test_values_in_wrong_places_are_one_sentence(write, text):
    with pytest.raises(ConfigError, match="any.yaml") as error:
        load_config(write("any.yaml", text))
    assert "\n" not in str(error.value)


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit) as exit:
        arguments_of("--help")
    assert exit.value.code == 0
    shown = capsys.readouterr().out
    assert "Train a tokenizer." in shown and "config=configs/mine.yaml dry_run=true" in shown


def test_a_config_error_reaches_the_user_as_one_line(capsys):
    with pytest.raises(SystemExit) as exit:
        run(arguments_of)
    assert exit.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("value", ["${oc.env:HOME}", "x${ oc.env:HOME }", "[1, '${oc.decode:1}']", "${${a}:HOME}"])
def test_a_configuration_calls_no_functions_of_omegaconf(write, value):
    path = write("foreign.yaml", f"a: oc.env\nb: {value}\n")
    with pytest.raises(ConfigError, match=r"b may refer to other keys as \$\{section.key\} only, got"):
        load_config(path)
    with pytest.raises(ConfigError, match="the configuration of a checkpoint: model.b may refer"):
        lenient_config({"model": {"a": "oc.env", "b": value}})


@pytest.mark.parametrize(
    "text", ["a: !!python/object/apply:os.system ['touch ran']", "a: " + "[" * 2000 + "]" * 2000, "a: " + "9" * 5000]
)
def test_a_hostile_file_is_one_sentence(write, tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="hostile.yaml") as error:
        load_config(write("hostile.yaml", text))
    assert "\n" not in str(error.value) and not (tmp_path / "ran").exists()
