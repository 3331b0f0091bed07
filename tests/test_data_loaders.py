"""Loaders over shards: every sample once in evaluation, the same stream after a restart in training."""

import http.server
import random
import socket
import threading
from collections import Counter
from functools import partial

import pytest
import torch

from data import DataError
from data.batches import check_count, seeded
from data.loaders import evaluation_loader, training_loader
from data.shard_urls import ALLOW_PIPE
from data.transforms import decode_image
from tests.shard_data import keys, make_config, make_shards, png, same, shard_spec, take, write_tar
from utils.paths import ROOT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards"), [12, 9, 15])


def train(config, **options):
    return training_loader(config, **({"rank": 0, "world_size": 1, "batches_per_chunk": 5} | options))


@pytest.mark.parametrize("num_shards", [1, 3, 7])
def test_evaluation_sees_every_sample_once_on_two_ranks_with_two_workers(tmp_path, num_shards):
    counts = [5 + 3 * index for index in range(num_shards)]
    make_shards(tmp_path, counts)
    config = make_config(eval_shards_path_or_url=shard_spec(tmp_path, num_shards), num_workers_per_gpu=2)
    loaders = [evaluation_loader(config, rank=rank, world_size=2) for rank in range(2)]
    for _ in range(2):  # a loader can be iterated again
        seen = [key for loader in loaders for key in keys(list(loader))]
        assert sorted(seen) == [f"{number:05d}" for number in range(sum(counts))]
    assert [loader.expected for loader in loaders] == [sum(counts)] * 2
    assert sum(loader.num_seen for loader in loaders) == sum(counts)


def test_chance_may_depend_on_the_name_of_any_file():
    draws = {name: seeded(0, name).random() for name in ("a.png", "\xe9.png", "\udce9.png")}  # the last is no UTF-8
    assert len(set(draws.values())) == 3 and draws["a.png"] == random.Random("0:a.png").random()


def test_an_evaluation_batch_holds_images_labels_and_keys_and_the_last_is_smaller(folder):
    config = make_config(eval_shards_path_or_url=shard_spec(folder, 3))
    batches = list(evaluation_loader(config, rank=0, world_size=1, batch_size=10))
    assert [len(batch["__key__"]) for batch in batches] == [10, 10, 10, 6]
    assert set(batches[0]) == {"image", "class_id", "__key__"}
    assert batches[0]["image"].shape == (10, 3, 6, 6) and batches[0]["image"].dtype == torch.uint8
    assert batches[0]["class_id"].tolist() == list(range(10)) and batches[0]["class_id"].dtype == torch.int64
    assert batches[0]["image"].is_contiguous()


def test_the_count_is_checked(folder, tmp_path):
    config = make_config(eval_shards_path_or_url=shard_spec(folder, 3), num_eval_examples=50000)
    with pytest.raises(DataError, match="expected 50000 evaluation samples, got 36 by the shards' manifest"):
        evaluation_loader(config, rank=0, world_size=1)
    make_shards(tmp_path, [3], manifest=False)
    config = make_config(eval_shards_path_or_url=shard_spec(tmp_path, 1), num_eval_examples=50000)
    assert evaluation_loader(config, rank=0, world_size=1).expected == 50000
    with pytest.raises(DataError, match="expected 50000 evaluation samples, got 36: shards are missing"):
        check_count(36, 50000)
    with pytest.raises(DataError, match="expected 30 evaluation samples, got 36"):
        check_count(36, 30, num_bad=1)
    check_count(36, 36)
    check_count(36, None)
    check_count(35, 36, num_bad=1)


@pytest.mark.parametrize("most", [1, 5, 9, 20, 99])
@pytest.mark.parametrize("kind", ["shards", "shards without a manifest", "folder"])
def test_the_same_images_are_evaluated_however_they_are_shared_and_batched(tmp_path, kind, most):
    """max_eval_examples, of 20 images."""
    if kind == "folder":
        for number in range(20):
            (tmp_path / f"{number}.png").write_bytes(png(number))
        params = {"type": "folder", "eval_folder": str(tmp_path)}
    else:
        sizes = [7, 2, 11] if kind == "shards" else [9, 9, 9]
        make_shards(tmp_path, sizes, manifest=kind == "shards")
        params = {"eval_shards_path_or_url": shard_spec(tmp_path, 3)}
    config = make_config(**params, max_eval_examples=most)
    if "without" in kind and most > 20:
        pytest.skip("nothing says how many there are")
    chosen = set()
    for world_size, batch_size in ((1, 4), (2, 3), (4, 64)):
        found = []
        for rank in range(world_size):
            loader = evaluation_loader(config, rank=rank, world_size=world_size, batch_size=batch_size)
            found += keys(list(loader))
        assert len(found) == len(set(found)) == min(most, 20)
        assert loader.expected == (None if "without" in kind else min(most, 20))
        chosen.add(tuple(sorted(found)))
    assert len(chosen) == 1


def test_few_images_of_a_folder_are_of_all_its_classes(tmp_path):
    for label in "abcd":
        (tmp_path / label).mkdir()
        for number in range(5):
            (tmp_path / label / f"{number}.png").write_bytes(png(number))
    folders = {"train_folder": str(tmp_path), "eval_folder": str(tmp_path)}
    loader = evaluation_loader(make_config(type="folder", **folders, max_eval_examples=8), rank=0, world_size=1)
    assert sorted(torch.cat([batch["class_id"] for batch in loader]).tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_without_a_manifest_nothing_is_expected(tmp_path):
    make_shards(tmp_path, [4], manifest=False)
    loader = evaluation_loader(make_config(eval_shards_path_or_url=shard_spec(tmp_path, 1)), rank=0, world_size=1)
    assert loader.expected is None and len(keys(list(loader))) == 4


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
def test_a_restart_at_any_batch_gives_the_batches_that_would_have_come(folder, num_workers):
    config = make_config(train_shards_path_or_url=shard_spec(folder, 3), num_workers_per_gpu=num_workers)
    whole = take(train(config), 13)
    assert len({batch["image"].numpy().tobytes() for batch in whole}) == 13
    for start in range(13):
        assert same(take(train(config, start_batch=start), 13 - start), whole[start:]), start


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_with_another_seed_nothing_comes_again_and_a_restart_is_as_exact(folder):
    config = make_config(train_shards_path_or_url=shard_spec(folder, 3), num_workers_per_gpu=1)
    given = take(train(config, batches_per_chunk=100), 10)
    config.dataset.params.num_workers_per_gpu = 2
    options = {"batches_per_chunk": 100, "reseeded_at": 10}
    following = take(train(config, start_batch=10, **options), 10)
    assert not {tuple(batch["__key__"]) for batch in given} & {tuple(batch["__key__"]) for batch in following}
    assert same(take(train(config, start_batch=15, **options), 5), following[5:])


def test_a_restart_skips_without_decoding(folder, monkeypatch):
    decoded = []
    monkeypatch.setattr("data.image_shards.decode_image", lambda data: decoded.append(1) or decode_image(data))
    config = make_config(train_shards_path_or_url=shard_spec(folder, 3))
    take(train(config, start_batch=99, batches_per_chunk=100), 1)
    assert len(decoded) == 4


def test_a_restart_is_exact_with_broken_images_and_shards(tmp_path):
    make_shards(tmp_path, [12, 9, 15])
    damaged = (tmp_path / "s-000001.tar").read_bytes()
    (tmp_path / "s-000001.tar").write_bytes(damaged[: len(damaged) // 2])
    whole = (tmp_path / "s-000002.tar").read_bytes()
    (tmp_path / "s-000002.tar").write_bytes(whole.replace(b"IDAT", b"IDXX", 3))
    config = make_config(train_shards_path_or_url=shard_spec(tmp_path, 3), num_workers_per_gpu=2, max_bad_fraction=1.0)
    loader = train(config)
    batches = take(loader, 13)
    assert loader.num_bad > 0 and all(len(batch["__key__"]) == 4 for batch in batches)
    for start in (1, 6, 10):
        assert same(take(train(config, start_batch=start), 13 - start), batches[start:]), start


def test_ranks_workers_and_seeds_draw_different_samples(folder):
    config = make_config(train_shards_path_or_url=shard_spec(folder, 3))
    first = take(train(config), 4)
    assert same(first, take(train(config), 4))
    assert not same(first, take(train(config, rank=1, world_size=2), 4))
    config.training.seed = 4
    assert not same(first, take(train(config), 4))


def test_short_chunks_use_all_of_a_shard_evenly(tmp_path):
    make_shards(tmp_path, [60])
    config = make_config(train_shards_path_or_url=shard_spec(tmp_path, 1), shuffle_buffer_size=1)
    counts = Counter(keys(take(train(config, batches_per_chunk=2), 600)))  # 8 samples a chunk, from 60
    assert len(counts) == 60
    assert min(counts.values()) > 0.6 * 2400 / 60


def test_the_random_state_of_the_process_is_left_alone(folder):
    config = make_config(train_shards_path_or_url=shard_spec(folder, 3), eval_shards_path_or_url=shard_spec(folder, 3))
    before = torch.get_rng_state()
    take(train(config), 2)
    list(evaluation_loader(config, rank=0, world_size=1))
    assert torch.get_rng_state().equal(before)


def test_workers_can_be_spawned(folder):
    spec = shard_spec(folder, 3)
    config = make_config(train_shards_path_or_url=spec, eval_shards_path_or_url=spec, num_workers_per_gpu=1)
    assert same(take(train(config, start_method="spawn"), 3), take(train(config), 3))
    loader = evaluation_loader(config, rank=0, world_size=1, start_method="spawn")
    assert len(keys(list(loader))) == 36


def test_shards_are_named_by_braces_lists_and_relative_paths(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for spec in (
        "s-{000000..000002}.tar",
        ["s-000000.tar", f"{folder}/s-{{000001..000002}}.tar"],
        f"file://{folder}/s-00000{{0..2}}.tar",
    ):
        loader = evaluation_loader(make_config(eval_shards_path_or_url=spec), rank=0, world_size=1)
        assert len(keys(list(loader))) == loader.expected == 36


def test_relative_paths_are_also_looked_for_in_the_repository(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    spec = "assets/fashion_mnist_test/fashion-test-{000000..000001}.tar.gz"
    config = make_config(eval_shards_path_or_url=spec, crop_size=32)
    loader = evaluation_loader(config, rank=0, world_size=1, batch_size=500)
    batches = list(loader)
    check_count(loader.num_seen, loader.expected)
    assert torch.cat([batch["class_id"] for batch in batches]).bincount().tolist() == [100] * 10
    assert batches[0]["image"][:, 0].equal(batches[0]["image"][:, 2])


def test_a_missing_shard_is_an_error_at_the_start(folder):
    config = make_config(train_shards_path_or_url=shard_spec(folder, 5))
    with pytest.raises(DataError, match=f"url: 2 of 5 shards are not there, the first is {folder}/s-000003.tar: make"):
        train(config)


def test_a_missing_shard_says_where_it_was_looked_for_each_place_once(monkeypatch, tmp_path):
    config = make_config(train_shards_path_or_url="absent.tar")
    for place, looked in ((tmp_path, f"{tmp_path} and {ROOT}"), (ROOT, f"{ROOT}")):
        monkeypatch.chdir(place)
        with pytest.raises(DataError, match=rf"the first is absent.tar \(looked from {looked}\): make them"):
            train(config)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("gs://x';touch ran;'", "shards cannot be read from gs:"),
        (None, "dataset.params.train_shards_path_or_url must name shards, .* and it is empty"),
        ("s3://bucket/{0..3}.tar", "shards cannot be read from s3://bucket/0.tar; use .*pipe:aws s3 cp"),
        ("train-{0..3.tar", "paths or URLs with brace expansion, got 'train-"),
    ],
)
def test_a_wrong_list_of_shards_is_an_error(spec, message):
    with pytest.raises(DataError, match=message):
        train(make_config(train_shards_path_or_url=spec))


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("type", "tar", "dataset.type must be shards, folder or tokens, got tar"),
        ("per_gpu_batch_size", 0, "training.per_gpu_batch_size must be a whole number of at least 1, got 0"),
        ("num_workers_per_gpu", -1, "num_workers_per_gpu must be a whole number of at least 0, got -1"),
        ("shuffle_buffer_size", 0, "shuffle_buffer_size must be a whole number of at least 1, got 0"),
        ("resize_shorter_edge", 4, "resize_shorter_edge must be at least crop_size"),
    ],
)
def test_a_value_that_makes_no_sense_is_an_error(folder, key, value, message):
    with pytest.raises(DataError, match=message):
        train(make_config(**{"train_shards_path_or_url": shard_spec(folder, 3), key: value}))


def test_shards_come_from_commands_and_servers(folder, monkeypatch):
    monkeypatch.setenv(ALLOW_PIPE, "1")
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        handler.func.log_message = lambda *_: None
        for spec in (f"{address}/s-{{000000..000002}}.tar", f"pipe:cat {folder}/s-{{000000..000002}}.tar"):
            config = make_config(eval_shards_path_or_url=spec, train_shards_path_or_url=spec)
            assert len(keys(list(evaluation_loader(config, rank=0, world_size=1)))) == 36
            assert same(take(train(config), 9)[4:], take(train(config, start_batch=4), 5))
        for spec in (f"{address}/absent.tar", "pipe:cat /absent.tar 2>/dev/null"):
            config = make_config(eval_shards_path_or_url=spec)
            with pytest.raises(DataError, match="broken shard: .*absent.tar.*: .*; evaluation needs every sample"):
                list(evaluation_loader(config, rank=0, world_size=1))
        server.shutdown()


def test_a_server_that_stalls_is_an_error(monkeypatch):
    monkeypatch.setattr("data.shard_urls.TIMEOUT", 0.3)
    monkeypatch.setattr("data.shard_urls.NUM_ATTEMPTS", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        config = make_config(eval_shards_path_or_url=f"http://127.0.0.1:{silent.getsockname()[1]}/a.tar")
        with pytest.raises(DataError, match="broken shard: http.*a.tar: cannot be read .*timed out"):
            list(evaluation_loader(config, rank=0, world_size=1))


@pytest.mark.parametrize(
    "command, seconds, stalls",
    [
        ("sleep 60", 0.3, "was silent for 0.3"),
        ("exec >&-; sleep 60", 3.0, "did not end within 3"),  # its shell, too, takes time to start
    ],
)
def test_a_command_that_stalls_is_an_error(monkeypatch, command, seconds, stalls):
    monkeypatch.setenv(ALLOW_PIPE, "1")
    monkeypatch.setattr("data.shard_urls.TIMEOUT", seconds)
    config = make_config(eval_shards_path_or_url=f"pipe:{command}")
    with pytest.raises(DataError, match=f"broken shard: pipe:{command}: .*the command {stalls}"):
        list(evaluation_loader(config, rank=0, world_size=1))


def test_a_shell_command_runs_only_where_the_user_allows_it(monkeypatch, tmp_path):
    monkeypatch.delenv(ALLOW_PIPE, raising=False)
    config = make_config(train_shards_path_or_url=f"pipe:touch {tmp_path}/ran")
    with pytest.raises(DataError, match="runs a shell command, .*: if you trust it, set ODP_ALLOW_PIPE=1 in the"):
        train(config)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("address", ["http://[/a.tar", "http://h:x/a.tar", "http://127.0.0.1:1/\u00e4.tar"])
def test_an_address_that_is_none_is_an_error(monkeypatch, address):
    monkeypatch.setattr("data.shard_urls.NUM_ATTEMPTS", 1)
    with pytest.raises(DataError, match="broken shard: http.*: cannot be read"):
        list(evaluation_loader(make_config(eval_shards_path_or_url=address), rank=0, world_size=1))


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("s-*.tar", r"; \* is not expanded: write s-{000008..000011}.tar"),
        ("s-0000[01]*.tar", r"; \* is not expanded: write s-{000008..000011}.tar"),
        ("*.tar", r"; \* is not expanded: write s-{000008..000011}.tar"),
        ("t-?.tar", r"; \* is not expanded: use braces, such as t-{000000..000320}.tar"),
    ],
)
def test_a_wildcard_gets_a_hint_at_braces(tmp_path, monkeypatch, pattern, hint):
    monkeypatch.chdir(tmp_path)
    for number in range(8, 12):
        write_tar(tmp_path / f"s-{number:06d}.tar", [("0.png", png(number))])
    with pytest.raises(DataError, match=hint):
        evaluation_loader(make_config(eval_shards_path_or_url=pattern), rank=0, world_size=1)


def test_shards_with_gaps_behind_a_wildcard_are_a_list(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a-1.tar", "a-3.tar", "b.tar"):
        write_tar(tmp_path / name, [("0.png", png(0))])
    with pytest.raises(DataError, match=r"is not expanded: give a list, such as \[a-1.tar, a-3.tar, \.\.\.\]"):
        evaluation_loader(make_config(eval_shards_path_or_url="*.tar"), rank=0, world_size=1)
