"""Broken samples and shards: training counts them and goes on, evaluation names the first and stops."""

import json
import logging
import os
import signal
import tarfile

import pytest

from data import DataError
from data.loaders import evaluation_loader, training_loader
from data.tar_samples import ShardError, key_prefixes, read_shard
from tests.shard_data import keys, make_config, make_shards, png, shard_spec, take, write_tar


def loaders(path, **params):
    config = make_config(train_shards_path_or_url=str(path), eval_shards_path_or_url=str(path), **params)
    return (
        training_loader(config, rank=0, world_size=1, batches_per_chunk=5),
        evaluation_loader(config, rank=0, world_size=1),
    )


GOOD = [member for number in range(30) for member in ((f"{number:02d}.png", png(number)), (f"{number:02d}.cls", b"1"))]
BAD_SAMPLES = {
    "broken image": [("bad.png", png(0)[:100]), ("bad.cls", b"1")],
    "no image": [("bad.cls", b"1")],
    "wrong label": [("bad.png", png(0)), ("bad.cls", b"cat")],
    "two members of one name": [("bad.png", png(0)), ("bad.png", png(1))],
}


@pytest.mark.parametrize("reason", BAD_SAMPLES)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_sample_is_counted_in_training_and_named_in_evaluation(tmp_path, reason, num_workers, caplog):
    path = tmp_path / "s.tar"
    write_tar(path, GOOD[:20] + BAD_SAMPLES[reason] + GOOD[20:])
    training, evaluation = loaders(path, num_workers_per_gpu=num_workers, max_bad_fraction=0.1)
    with caplog.at_level(logging.WARNING, "data"):
        batches = take(training, 40)
    assert "bad" not in keys(batches) and len(keys(batches)) == 160
    assert set(training.bad_reasons) == {reason} and 1 <= training.num_bad < 12
    assert f"skipped {reason}: {path}, sample 'bad': " in caplog.text
    with pytest.raises(DataError, match=f"{reason}: {path}, sample 'bad': .*; evaluation needs every sample: repair"):
        list(evaluation)


def test_evaluation_goes_on_and_counts_when_told_to(tmp_path):
    write_tar(tmp_path / "s.tar", GOOD + BAD_SAMPLES["broken image"])
    _, evaluation = loaders(tmp_path / "s.tar", eval_skip_broken=True)
    assert len(keys(list(evaluation))) == 30
    assert evaluation.bad_reasons == {"broken image": 1} and evaluation.num_seen == 30


@pytest.mark.parametrize("label, good", [(b"9", True), (b" 3\n", True), (b"-1", True), (b"10", False), (b"-2", False)])
def test_labels_are_held_against_the_classes_of_the_manifest(tmp_path, label, good):
    make_shards(tmp_path, [3])
    write_tar(tmp_path / "s-000000.tar", [("0.png", png(0)), ("0.cls", label)])
    _, evaluation = loaders(tmp_path / "s-000000.tar")
    if good:
        assert list(evaluation)[0]["class_id"].tolist() == [int(label)]
    else:
        with pytest.raises(DataError, match=r"wrong label: .* cls must be a whole number in 0..9, got b'"):
            list(evaluation)


def test_a_sample_without_label_has_class_minus_one(tmp_path):
    write_tar(tmp_path / "s.tar", [("0.jpeg", png(0))])
    assert list(loaders(tmp_path / "s.tar")[1])[0]["class_id"].tolist() == [-1]


def test_a_shard_cut_anywhere_is_noticed_and_gives_its_whole_samples(tmp_path):
    path = tmp_path / "s.tar"
    write_tar(path, GOOD[:8])
    whole = path.read_bytes()
    image = {number: png(number) for number in range(4)}
    with tarfile.open(path) as tar:
        read = [member.offset_data + member.size for member in tar]
    end = -(-read[-1] // 512) * 512
    for size in [0, 1, 511, 512, 513, *range(700, end, 256), *read, end]:
        path.write_bytes(whole[:size])
        found = []
        with pytest.raises(ShardError, match="ends early or is damaged"):
            for sample in read_shard(str(path)):
                found.append(sample)
        # A sample is known to be whole when the next one has begun.
        assert len(found) == sum(size >= begun for begun in read[2::2]), size
        assert all(sample["png"] == image[int(sample["__key__"])] and "cls" in sample for sample in found)
    path.write_bytes(whole[: end + 512])
    assert len(list(read_shard(str(path)))) == 4


def test_a_damaged_header_is_not_the_end(tmp_path):
    path = tmp_path / "s.tar"
    write_tar(path, GOOD[:8])
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        data[tar.getmembers()[4].offset + 3] ^= 255
    path.write_bytes(data)
    with pytest.raises(ShardError, match="ends early or is damaged .*bad checksum at byte"):
        list(read_shard(str(path)))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_cut_shard_is_counted_in_training_and_named_in_evaluation(tmp_path, num_workers):
    make_shards(tmp_path, [20, 20])
    path = tmp_path / "s-000001.tar"
    path.write_bytes(path.read_bytes()[:20000])
    training, evaluation = loaders(shard_spec(tmp_path, 2), num_workers_per_gpu=num_workers, max_bad_fraction=1.0)
    take(training, 10)
    assert set(training.bad_reasons) == {"broken shard"}
    with pytest.raises(DataError, match="broken shard: .*s-000001.tar: ends early or is damaged .*; evaluation needs"):
        list(evaluation)
    _, evaluation = loaders(shard_spec(tmp_path, 2), num_workers_per_gpu=num_workers, eval_skip_broken=True)
    assert 20 < len(keys(list(evaluation))) < 40 and evaluation.num_bad == 1


def test_a_shard_that_vanishes_during_training_is_counted(tmp_path):
    make_shards(tmp_path, [20, 20])
    training, evaluation = loaders(shard_spec(tmp_path, 2), max_bad_fraction=1.0)
    (tmp_path / "s-000001.tar").unlink()
    assert {key < "00020" for key in keys(take(training, 10))} == {True}
    assert training.bad_reasons.keys() == {"broken shard"}
    with pytest.raises(DataError, match="broken shard: .*s-000001.tar: cannot be read .*No such file"):
        list(evaluation)


@pytest.mark.parametrize("content", ["absent", "empty", "no samples"])
def test_nothing_but_useless_shards_ends_in_an_error(tmp_path, content):
    path = tmp_path / "s.tar"
    write_tar(path, GOOD if content == "absent" else [("readme", b"hello")])
    training, _ = loaders(path, max_bad_fraction=1.0)
    if content == "absent":
        path.unlink()
    if content == "empty":
        path.write_bytes(b"")
    with pytest.raises(DataError, match=f"100 shards in a row gave no sample; the last was .* shard: {path}: "):
        take(training, 1)


def test_too_many_bad_samples_stop_training(tmp_path):
    path = tmp_path / "s.tar"
    bad = [(f"x{number}.png", b"broken") for number in range(2)]
    write_tar(path, GOOD + bad)
    training, _ = loaders(path, num_workers_per_gpu=1)
    with pytest.raises(DataError, match=r"11 of the first \d+ samples cannot be used \(11 broken image\), more than "):
        take(training, 1000)
    assert training.num_seen < 1000


def test_a_batch_without_any_good_sample_is_an_error(tmp_path):
    write_tar(tmp_path / "s.tar", [(f"{number}.png", b"broken") for number in range(30)])
    training, _ = loaders(tmp_path / "s.tar", max_bad_fraction=1.0)
    with pytest.raises(DataError, match="samples of one batch cannot be used, the last: broken image: "):
        take(training, 1)


def test_names_in_a_shard_are_never_paths(tmp_path):
    inner = tmp_path / "inner"
    inner.mkdir()
    names = ["../escape", "/etc/escape", "a/../../escape", "x\x1b[31m\udcff"]
    write_tar(inner / "s.tar", [(f"{name}.png", png(0)) for name in names])
    _, evaluation = loaders(inner / "s.tar")
    found = keys(list(evaluation))
    assert len(found) == 4
    assert [path.name for path in tmp_path.rglob("*")] == ["inner", "s.tar"]
    [key.encode("utf-8") for key in found]


def test_links_and_devices_in_a_shard_are_not_followed(tmp_path):
    path = tmp_path / "s.tar"
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)
    with tarfile.open(path, "w") as tar:
        for number, kind in enumerate((*kinds, tarfile.DIRTYPE)):
            member = tarfile.TarInfo(f"{number}.png")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    _, evaluation = loaders(path, eval_skip_broken=True)
    assert list(evaluation) == [] and evaluation.bad_reasons == {"no image": len(kinds)}


@pytest.mark.parametrize(
    "name, size, kind",
    [
        ("0.png", 1 << 40, tarfile.REGTYPE),
        ("0.txt", -512, tarfile.REGTYPE),
        ("name", 1 << 20, tarfile.GNUTYPE_LONGNAME),
    ],
)
def test_a_member_of_impossible_size_is_refused(tmp_path, name, size, kind):
    """tarfile would read a long name into memory, and lose samples after a size below zero."""
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    write_tar(tmp_path / "s.tar", GOOD)
    header = member.tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "s.tar").write_bytes(header + (tmp_path / "s.tar").read_bytes())
    with pytest.raises(ShardError, match=f"member {name} claims {size} bytes"):
        list(read_shard(str(tmp_path / "s.tar")))


def test_a_record_that_changes_a_size_is_held_to_the_same_limits(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("0.png")
        member.pax_headers = {"size": "-512"}
        tar.addfile(member)
    with pytest.raises(ShardError, match="member 0.png claims -512 bytes"):
        list(read_shard(str(tmp_path / "s.tar")))


def test_a_line_break_in_a_name_loses_no_sample(tmp_path):
    write_tar(tmp_path / "s.tar", [("a\nb.png", png(0)), ("c\x1b[2J.png", png(1))])
    assert keys(list(loaders(tmp_path / "s.tar")[1])) == [r"a\nb", r"c\x1b[2J"]


def test_shards_that_only_cost_time_end_in_an_error(tmp_path, monkeypatch):
    write_tar(tmp_path / "s.tar", GOOD)
    training, _ = loaders(tmp_path / "s.tar", max_bad_fraction=1.0)
    (tmp_path / "s.tar").unlink()
    monkeypatch.setattr("data.image_shards.PATIENCE", 0.0)
    with pytest.raises(DataError, match="^1 shards in a row gave no sample"):
        take(training, 1)


def test_a_worker_that_is_killed_is_an_error(tmp_path, monkeypatch):
    write_tar(tmp_path / "s.tar", GOOD)
    training, _ = loaders(tmp_path / "s.tar", num_workers_per_gpu=1)
    monkeypatch.setattr("data.image_shards.decode_image", lambda data: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(DataError, match="a process that reads data was killed .*: if memory ran out, lower"):
        take(training, 1)


def read(path, members):
    write_tar(path, members)
    return list(read_shard(str(path)))


@pytest.mark.parametrize("count", [3, 40])
def test_names_with_dots_are_whole_keys(tmp_path, count):
    names = [f"scans/v1.2/scan.v2.{number:04d}" for number in range(count)]
    members = [
        member for number, name in enumerate(names) for member in ((f"{name}.cls", b"1"), (f"{name}.png", png(number)))
    ]
    found = read(tmp_path / "s.tar", members)
    assert [sample["__key__"] for sample in found] == names
    assert [(sample["cls"], sample["png"]) for sample in found] == [(b"1", png(number)) for number in range(count)]


def test_a_mask_beside_an_image_is_no_sample_of_its_own(tmp_path):
    """WebDataset's convention: a field's name is all after the first dot."""
    for names in (("0.mask.png", "0.png", "0.cls"), ("0.cls", "0.png", "0.seg.png"), ("0.a.b.png", "0.json", "0.png")):
        members = [(name, b"5" if name == "0.cls" else png(number)) for number, name in enumerate(names)]
        (sample,) = read(tmp_path / "s.tar", members)
        assert sample["__key__"] == "0" and sample["png"] == dict(members)["0.png"]


def test_members_of_a_sample_that_are_apart_are_named(tmp_path):
    labels = [(f"{number}.cls", b"1") for number in range(3)]
    images = [(f"{number}.png", png(number)) for number in range(3)]
    write_tar(tmp_path / "s.tar", images + labels)
    with pytest.raises(DataError, match="sample '0': members of this name stand in two places of the shard, cls apart"):
        list(loaders(tmp_path / "s.tar")[1])


def test_a_sample_without_an_image_names_what_it_has(tmp_path):
    write_tar(tmp_path / "s.tar", [*GOOD[:4], ("a.cls", b"1"), ("a.tga", b"?"), ("a.json", b"{}"), ("a.b.npy", b"")])
    with pytest.raises(DataError, match="sample 'a': expected one of the fields jpg.*, got cls, tga, json, b.npy"):
        list(loaders(tmp_path / "s.tar")[1])


def test_a_shard_of_other_files_names_them(tmp_path):
    write_tar(tmp_path / "s.tar", [("a.tga", b"?"), ("b.tga", b"?")])
    with pytest.raises(DataError, match="broken shard: .*: holds no image: expected .*, and the first is 'a.tga'"):
        list(loaders(tmp_path / "s.tar")[1])


def test_files_beside_the_samples_do_no_harm(tmp_path):
    assert len(read(tmp_path / "s.tar", [("README.txt", b"hello"), ("meta.json", b"{}"), *GOOD[:4]])) == 2


def test_keys_that_start_again_in_every_shard_are_told_apart(tmp_path):
    for shard in ("a/s-0.tar", "a/s-1.tar", "b/s-0.tar"):
        (tmp_path / shard).parent.mkdir(exist_ok=True)
        write_tar(tmp_path / shard, GOOD[:4])
    shards = [str(tmp_path / shard) for shard in ("a/s-0.tar", "a/s-1.tar", "b/s-0.tar")]

    def keys_of(shards):
        return keys(list(evaluation_loader(make_config(eval_shards_path_or_url=shards), rank=0, world_size=1)))

    assert keys_of(shards[:1]) == ["00", "01"]
    assert keys_of(shards[:2]) == ["s-0/00", "s-0/01", "s-1/00", "s-1/01"]
    assert keys_of(shards) == [f"{shard:06d}/0{number}" for shard in range(3) for number in range(2)]


def test_keys_of_our_own_shards_are_as_they_are_stored(tmp_path):
    """Their manifest numbers the samples of a split; those of two splits start again."""
    make_shards(tmp_path, [2, 1])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert key_prefixes([str(tmp_path / f"s-00000{shard}.tar") for shard in range(2)]) == {}
    records = manifest["splits"]["s"]["shards"]
    splits = {split: {"shards": {name: records[name]}} for split, name in zip("st", records, strict=True)}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"splits": splits}))
    shards = [str(tmp_path / f"s-00000{shard}.tar") for shard in range(2)]
    assert key_prefixes(shards) == {shards[0]: "s-000000/", shards[1]: "s-000001/"}
