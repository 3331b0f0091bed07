"""Whatever bytes and values come in, the outcome is a result or one sentence, and no file is touched (hypothesis)."""

import copy
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.transforms import bytes_as_shown, decode_as_shown, decode_as_stored, decode_image
from modeling.checkpoints.registry import build_empty, model_class
from tests.faults import FUZZED, outcome
from utils.config import load_config, to_plain
from utils.errors import UserError
from utils.paths import ROOT

IMAGES = [name for name in FUZZED if name.endswith(" image")]
OTHERS = [name for name in FUZZED if name not in IMAGES]
FILES = ["fashion/stage2", "fashion/generator", "fashion/teacher", "eval/titok_l32", "entropy"]
KEYS = ["model", "dataset", "defaults", "training", "params", "vq_model", "a.b", "", "~", "???", "1"]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 300)
    | st.sampled_from([2**63, -(2**70), 10**400, float("nan"), float("inf"), 1e-300])
    | st.sampled_from(["", "???", "${a}", "${oc.env:HOME}", "${", "~", "~nobody", "a=b", "\0", "-1", "[", "\ud800"])
    | st.text(max_size=8)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=8,
)
pytestmark = pytest.mark.long


def examples(count):
    """The same examples in every run, none of which is too slow: `outcome` ends what hangs."""
    health = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=count, deadline=None, database=None, derandomize=True, suppress_health_check=health)


# Places as shares of the file, so that they are spread over a file of any length; small ones are in its header.
PLACES = st.floats(0, 1) | st.floats(0, 0.02)
KINDS = ["replace", "insert", "delete", "repeat", "cut"]
EDITS = st.lists(
    st.tuples(st.sampled_from(KINDS), PLACES, st.binary(min_size=1, max_size=16)),
    min_size=1,
    max_size=4,
)


def edited(whole, edits):
    """Bytes with some replaced, put in, left out, said twice, or cut off."""
    data = bytearray(whole)
    for kind, share, new in edits:
        place = int(share * len(data))
        if kind == "cut":
            del data[place:]
        elif kind == "repeat":
            data[place:place] = data[place : place + 64 * len(new)]
        else:
            data[place : place + (0 if kind == "insert" else len(new))] = b"" if kind == "delete" else new
    return bytes(data)


def is_a_result_or_a_sentence(work):
    """Run `work`; anything but a result or a `UserError` of one line passes through, and so does a hang."""
    with tempfile.TemporaryDirectory() as outside:
        return outcome(lambda folder: str(work(folder)).replace("\n", " "), Path(outside))


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", IMAGES)
def test_bytes_of_an_image(name, tmp_path):
    make, _ = FUZZED[name]
    whole = make(tmp_path).read_bytes()

    @examples(300)
    @given(EDITS.map(lambda edits: edited(whole, edits)) | st.binary(max_size=200))
    def try_one(data):
        for decode in (decode_image, decode_as_shown, decode_as_stored, bytes_as_shown):
            is_a_result_or_a_sentence(lambda _, decode=decode: type(decode(data)))

    try_one()


@pytest.mark.parametrize("name", OTHERS)
def test_bytes_of_shards_weights_arrays_token_sets_and_configurations(name, tmp_path):
    make, read = FUZZED[name]
    path = make(tmp_path)
    whole, others = path.read_bytes(), files_of(tmp_path)

    @examples(100)
    @given(EDITS.map(lambda edits: edited(whole, edits)) | st.binary(max_size=200))
    def try_one(data):
        path.write_bytes(data)
        is_a_result_or_a_sentence(lambda _: read(path))
        assert files_of(tmp_path) == others | {path.relative_to(tmp_path): data}

    try_one()


@examples(300)
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4) | VALUES)
def test_any_values_as_a_configuration(values):
    def load(folder):
        (folder / "any.yaml").write_text(json.dumps(values))  # YAML too
        return load_config(folder / "any.yaml")

    is_a_result_or_a_sentence(load)


def leaves(values, path=()):
    for key, value in values.items():
        yield from leaves(value, (*path, key)) if isinstance(value, dict) and value else [(*path, key)]


CONFIGS = {file: to_plain(load_config(ROOT / f"configs/{file}.yaml")) for file in FILES if file != "entropy"}


@examples(300)
@given(st.sampled_from(sorted(CONFIGS)), st.data())
def test_any_value_in_place_of_one_of_a_model(file, data):
    config = copy.deepcopy(CONFIGS[file])
    *above, last = data.draw(st.sampled_from([path for path in leaves(config) if path[0] == "model"]))
    section = config
    for key in above:
        section = section[key]
    section[last] = data.draw(VALUES)
    is_a_result_or_a_sentence(lambda _: type(build_empty(model_class(config), config)))


@examples(200)
@given(st.sampled_from(sorted(CONFIGS)), st.data())
def test_any_text_as_an_override(file, data):
    key = ".".join(data.draw(st.sampled_from(sorted(leaves(CONFIGS[file])))))
    text = data.draw(st.text(max_size=12) | SCALARS.map(str))
    is_a_result_or_a_sentence(lambda _: load_config(ROOT / f"configs/{file}.yaml", [f"{key}={text}"]).keys())


def test_the_kinds_are_those_of_the_page():
    assert len(IMAGES) == 6 and {"a configuration", "weights, w.safetensors"} <= set(OTHERS)
    with pytest.raises(UserError):
        decode_image(b"")
