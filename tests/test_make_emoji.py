"""Emoji into shards: classes drawn evenly, skin tones rarely, a split by emoji, and tarballs that are as expected."""

import hashlib
import io
import itertools
import json
import sys
import tarfile
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from data import DataError, make_emoji
from data.batches import check_count
from data.loaders import evaluation_loader
from data.make_emoji import CLASSES, GROUPS, PACKAGES, TRAINING_SETS, TrainingEmoji, read_emoji
from data.shard_files import read_manifest
from tests.shard_data import make_config
from utils.files import sha256_of
from utils.paths import ROOT

SKIN_TONES = ["1F3FB", "1F3FC", "1F3FD"]
GREY = (200, 200, 200)
NUM_PER_CLASS = 6


def image(code_points: str, style: str, side: int) -> np.ndarray:
    """(S, S, 4) RGBA: a colour of its own on the left, grey on the right, and a transparent first row."""
    pixels = np.full((side, side, 4), (*GREY, 255), dtype=np.uint8)
    pixels[:, : side // 2, :3] = list(hashlib.sha256(f"{style} {code_points}".encode()).digest()[:3])
    pixels[0] = 0
    return pixels


def encoded(pixels: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, **options)
    return file.getvalue()


def is_test(unified: str) -> bool:
    return int(hashlib.sha256(unified.encode()).hexdigest(), 16) % 20 == 0


def labels() -> list[dict]:
    """emoji.json: in every group three emoji for training and one for the test, people with skin tones."""
    found = []
    for number, category in enumerate([*GROUPS, "Component"]):
        names = [f"{code:X}-FE0F" for code in range(4096 * (number + 1), 4096 * (number + 2))]
        names = list(itertools.islice(itertools.filterfalse(is_test, names), 3)) + [next(filter(is_test, names))]
        for unified in names:
            found.append({"unified": unified, "category": category})
            if category == "People & Body":
                found[-1]["skin_variations"] = {tone: {"unified": f"{unified}-{tone}"} for tone in SKIN_TONES}
    return found


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    """Three small tarballs, and what the command makes of them."""
    source, out = tmp_path_factory.mktemp("npm"), tmp_path_factory.mktemp("shards")
    all_labels, pixels = labels(), {}
    patch = pytest.MonkeyPatch()
    for style, package in PACKAGES.items():
        with tarfile.open(source / package.tarball, "w:gz") as tar:
            pixels |= add_package(tar, style, package.folder, all_labels)
        patch.setitem(PACKAGES, style, package._replace(sha256=sha256_of(source / package.tarball)))
    made = SimpleNamespace(source=source, out=out, labels=all_labels, pixels=pixels)
    command("--source", source, "--output_dir", out, "--num_per_class", NUM_PER_CLASS)
    yield made
    patch.undo()


def add_package(tar: tarfile.TarFile, style: str, folder: str, labels: list[dict]) -> dict[tuple, np.ndarray]:
    """Write what an npm package holds, and members that must not be taken; the pixels by style and code points."""
    add_member(tar, "package/emoji.json", json.dumps(labels).encode())
    pixels = {}
    for label in labels:
        if style == "Fluent" and label is labels[0]:  # Fluent lacks some
            continue
        for one in [label, *label.get("skin_variations", {}).values()]:
            side, ending, options = (128, "webp", {"lossless": True}) if style == "Fluent" else (64, "png", {})
            name = one["unified"].lower().replace("-fe0f", "" if style == "Fluent" else "-fe0f")
            pixels[style, one["unified"]] = rgba = image(one["unified"], style, side)
            add_member(tar, f"{folder}/{name}.{ending}", encoded(rgba, format=ending, **options))
    for name in ("../../evil.png", "/tmp/evil.png", f"{folder}/../evil.png"):
        add_member(tar, name, b"not an image")
    add_member(tar, f"{folder}/link.png", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
    return pixels


def add_member(tar: tarfile.TarFile, name: str, data: bytes, **kind) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for key, value in kind.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(data))


def command(*arguments) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["make_emoji.py", *map(str, arguments), "--num_workers", "1"])
        make_emoji.main()


def stored(folder, prefix: str) -> list[tuple[str, np.ndarray]]:
    """Class name and pixels of every image of a set."""
    found = []
    for path in sorted(folder.glob(f"{prefix}-*")):
        with tarfile.open(path) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        for name, data in members.items():
            if name.endswith(".png"):
                label = int(members[name.replace(".png", ".cls")])
                found.append((CLASSES[label], np.array(Image.open(io.BytesIO(data)))))
    return found


def identities(emoji, images: list[tuple[str, np.ndarray]]) -> Counter:
    """How often each emoji was drawn, as (style, code points), by the colour on one of its sides."""
    by_colour = {tuple(map(int, pixels[-1, 0, :3])): key for key, pixels in emoji.pixels.items()}
    sides = [[tuple(map(int, pixels[32, x])) for x in (16, 47)] for _, pixels in images]
    return Counter(by_colour[left if left != GREY else right] for left, right in sides)


def test_every_class_and_every_emoji_of_it_is_drawn_equally_often(emoji):
    images = stored(emoji.out, "emoji-train")
    assert Counter(name for name, _ in images) == dict.fromkeys(CLASSES, NUM_PER_CLASS)
    drawn = Counter()
    for (style, unified), count in identities(emoji, images).items():
        drawn[style, unified[:9]] += count  # with its skin tones
    trained = [label["unified"] for label in emoji.labels[:-4] if not is_test(label["unified"])]
    assert len(trained) == 27
    expected = {(style, name): NUM_PER_CLASS // 3 for style in PACKAGES for name in trained}
    del expected["Fluent", trained[0]]
    for name in trained[1:3]:
        expected["Fluent", name] = NUM_PER_CLASS // 2
    assert drawn == expected
    assert Counter(name for name, _ in stored(emoji.out, "emoji-recoloured")) == dict.fromkeys(CLASSES, NUM_PER_CLASS)


def test_skin_tones_are_drawn_one_time_in_ten(emoji):
    train, _ = read_emoji(emoji.source)
    source = TrainingEmoji(train, TRAINING_SETS["emoji-train"], num_per_class=300, seed="s")
    label = CLASSES.index("Noto people")
    images = []
    for index in range(label, len(source), len(CLASSES)):
        data, class_id = source.read(index)
        assert class_id == label
        images.append((CLASSES[label], np.array(Image.open(io.BytesIO(data)))))
    toned = {key: count for key, count in identities(emoji, images).items() if key[1].endswith(tuple(SKIN_TONES))}
    assert len(toned) == 9 and 15 < sum(toned.values()) < 45


def test_the_test_set_has_each_image_of_a_twentieth_of_the_emoji_once_and_as_it_is(emoji):
    images = stored(emoji.out, "emoji-test")
    expected = Counter()
    for label in emoji.labels[:-4]:
        if is_test(label["unified"]):
            for one in [label, *label.get("skin_variations", {}).values()]:
                expected.update((style, one["unified"]) for style in PACKAGES)
    assert identities(emoji, images) == expected and len(expected) == 3 * (9 + 3)
    for name, pixels in images:
        assert pixels.shape == (64, 64, 3)
        [(style, unified)] = identities(emoji, [(name, pixels)])
        assert name.startswith(f"{style} ")
        if style != "Fluent":  # which is reduced
            original = emoji.pixels[style, unified]
            assert (pixels[0] == 255).all() and (pixels[1:] == original[1:, :, :3]).all()


def test_training_images_lie_inside_the_frame_and_symbols_and_flags_are_not_mirrored(emoji):
    mirrored = Counter()
    for name, pixels in stored(emoji.out, "emoji-train"):
        assert pixels.shape == (64, 64, 3)
        height, width = ((pixels != 255).any(-1).any(axis).sum() for axis in (1, 0))
        assert 50 <= width <= 64 and 49 <= height <= 64
        mirrored[name.split()[1]] += tuple(pixels[32, 16]) == GREY
    assert mirrored["symbols"] == mirrored["flags"] == 0
    assert all(0 < mirrored[group] < 3 * NUM_PER_CLASS for group in set(GROUPS.values()) - {"symbols", "flags"})


def test_large_ones_fill_more_of_the_frame_on_white_and_only_hued_ones_change_their_hue(emoji):
    own = {tuple(map(int, pixels[16, 16, :3])) for pixels in emoji.pixels.values()}
    for prefix, is_hued in (("emoji-large", False), ("emoji-hued", True)):
        images = stored(emoji.out, prefix)
        assert Counter(name for name, _ in images) == dict.fromkeys(CLASSES, NUM_PER_CLASS)
        heights = [(pixels != 255).any(-1).any(1).sum() for _, pixels in images]
        assert 56 <= min(heights) and max(heights) <= 64
        kept = sum(tuple(map(int, pixels[16, 16])) in own for _, pixels in images)
        assert kept < 0.2 * len(images) if is_hued else kept > 0.5 * len(images)


def test_recoloured_images_have_many_backgrounds(emoji):
    corners = {tuple(pixels[0, 32]) for _, pixels in stored(emoji.out, "emoji-recoloured")}
    assert len(corners) > 0.9 * len(CLASSES) * NUM_PER_CLASS


def test_an_image_of_the_test_is_in_no_training_set(emoji, monkeypatch):
    shared = image("shared", "Noto", 64)
    monkeypatch.setattr(
        make_emoji,
        "read_members",
        lambda path, folder, read=make_emoji.read_members: {
            name: encoded(shared, format="PNG") if name.startswith(f"{folder}/2") and name.endswith("png") else data
            for name, data in read(path, folder).items()
        },
    )
    train, test = read_emoji(emoji.source)
    assert any(one.images[0] == encoded(shared, format="PNG") for one in test)
    assert not any(one.name.startswith(("Noto 2", "Twemoji 2")) for one in train)
    assert sum(one.name.startswith("Fluent 2") for one in train) == 3


def test_a_restart_makes_what_is_missing_and_refuses_another_plan(emoji):
    missing = emoji.out / "emoji-recoloured-000004.tar"
    whole = {path.name: path.read_bytes() for path in emoji.out.iterdir()}
    missing.unlink()
    command("--source", emoji.source, "--output_dir", emoji.out, "--num_per_class", NUM_PER_CLASS)
    assert {path.name: path.read_bytes() for path in emoji.out.iterdir()} == whole
    with pytest.raises(DataError, match="already holds emoji-train shards that were made with another source"):
        command("--source", emoji.source, "--output_dir", emoji.out, "--num_per_class", NUM_PER_CLASS + 1)


def test_names_in_a_tarball_are_never_paths(emoji):
    for package in PACKAGES.values():
        members = make_emoji.read_members(emoji.source / package.tarball, package.folder)
        assert members and not any("evil" in name or "link" in name for name in members)


def test_a_tarball_that_is_missing_or_another_is_an_error(emoji, tmp_path):
    with pytest.raises(DataError, match="google-16.0.0.tgz is not there: `npm pack emoji-datasource-google@16.0.0` wr"):
        command("--source", tmp_path)
    for package in PACKAGES.values():
        (tmp_path / package.tarball).write_bytes((emoji.source / package.tarball).read_bytes())
    with open(tmp_path / PACKAGES["Fluent"].tarball, "ab") as file:
        file.write(b"\0")
    with pytest.raises(DataError, match=r"3d-1.1.0.tgz must have sha256 \w{64}, got \w{64}: remove it and download"):
        command("--source", tmp_path)


def test_npm_fetches_the_packages_or_says_what_is_wrong(emoji, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="npm fetches the images, and is not installed: install it, or give a folder"):
        command("--output_dir", tmp_path / "out")
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error network ECONNREFUSED' >&2\nexit 1\n")
    npm.chmod(0o755)
    with pytest.raises(DataError, match=r"could not fetch the images \(npm error network ECONNREFUSED\): check the"):
        command("--output_dir", tmp_path / "out")
    npm.write_text(f'#!/bin/sh\n[ "$1" = pack ] && [ $# = 4 ] && /bin/cp {emoji.source}/*.tgz .\n')
    command("--output_dir", tmp_path / "out", "--test_only")
    assert {path.name.split("-0")[0] for path in (tmp_path / "out").iterdir()} == {"emoji-test", "manifest.json"}
    made = read_manifest(tmp_path / "out")["splits"]["emoji-test"]
    assert made == read_manifest(emoji.out)["splits"]["emoji-test"]


def test_the_committed_test_set_is_whole_and_what_the_configs_read():
    folder = ROOT / "assets" / "emoji_test"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2_000_000
    manifest = read_manifest(folder)
    assert manifest["classes"] == CLASSES
    for name, record in manifest["splits"]["emoji-test"]["shards"].items():
        assert sha256_of(folder / name) == record["sha256"]
    config = OmegaConf.load(ROOT / "configs/data/emoji.yaml")
    assert config.dataset.class_names == CLASSES
    params = config.dataset.params
    spec = params.eval_shards_path_or_url
    loader = evaluation_loader(make_config(eval_shards_path_or_url=spec, crop_size=32), rank=0, world_size=1)
    labels = Counter(CLASSES[c] for batch in loader for c in batch["class_id"].tolist())
    check_count(loader.num_seen, params.num_eval_examples)
    assert set(labels) == set(CLASSES) and labels["Noto people"] == 75


def test_training_sets_of_no_images_are_refused_before_anything_is_written(emoji, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command("--source", emoji.source, "--output_dir", tmp_path / "out", "--num_per_class", 0)
    assert "--num_per_class must be 1 or more, got 0" in capsys.readouterr().err and not (tmp_path / "out").exists()
