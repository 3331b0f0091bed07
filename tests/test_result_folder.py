"""A folder of results: a command replaces its own files, and never anybody else's."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError

from utils import result_folder
from utils.errors import UserError, disk_error
from utils.files import replacing, replacing_files, write_text
from utils.parts import Parts
from utils.processes import Processes
from utils.result_folder import LIST, ResultFolder, ResultPaths, results_in


def run(path, contents, clears=True):
    """A command's whole work: claim, write, finish; returns what `claim` says."""
    folder = ResultFolder(path, clears=clears)
    note = folder.claim(contents)
    for name, text in contents.items():
        (folder / name).write_text(text)
    folder.finish()
    return note


def contents(path):
    return {file.name: file.read_text() for file in path.iterdir() if file.name != LIST}


def test_results_of_two_runs_do_not_mix_and_what_others_put_there_stays(tmp_path):
    run(tmp_path, {"a": "1", "b": "1"})
    (tmp_path / "mine").write_text("mine")
    assert run(tmp_path, {"b": "2", "c": "2"}) == f"1 of the run before will be removed from {tmp_path}, such as a"
    assert contents(tmp_path) == {"b": "2", "c": "2", "mine": "mine"}
    assert results_in(tmp_path) == {"b", "c"}
    assert run(tmp_path, {"b": "3", "c": "3"}) == ""


def test_where_nothing_is_cleared_results_of_other_commands_stay(tmp_path):
    run(tmp_path, {"a": "1"})
    run(tmp_path, {"b": "2"}, clears=False)
    run(tmp_path, {"b": "3"}, clears=False)
    assert contents(tmp_path) == {"a": "1", "b": "3"} and results_in(tmp_path) == {"a", "b"}


@pytest.mark.parametrize("clears", [True, False])
@pytest.mark.parametrize("kind", ["foreign", "changed", "replaced by a link", "replaced by a folder"])
def test_a_file_that_is_not_ours_is_refused_before_anything_is_written_or_removed(tmp_path, kind, clears):
    run(tmp_path, {"a": "1"} if kind == "foreign" else {"a": "1", "b": "1"})
    if kind == "foreign" or kind == "changed":
        (tmp_path / "b").write_text("mine")
    else:
        (tmp_path / "b").unlink()
        (tmp_path / "b").mkdir() if kind.endswith("folder") else (tmp_path / "b").symlink_to(tmp_path / "a")
    folder = ResultFolder(tmp_path, clears=clears)
    message = f"{tmp_path} holds b, and no command of ours has left it there"
    with pytest.raises(UserError, match=message):
        folder.claim(["a", "b"])
    with pytest.raises(UserError, match=message):
        folder / "b"
    assert (tmp_path / "a").read_text() == "1"
    assert kind.startswith("replaced") or (tmp_path / "b").read_text() == "mine"


def test_a_result_that_somebody_changed_is_not_removed_with_the_others(tmp_path):
    run(tmp_path, {"a": "1", "b": "1"})
    (tmp_path / "a").write_text("drawn upon")
    run(tmp_path, {"c": "2"})
    assert contents(tmp_path) == {"a": "drawn upon", "c": "2"}


def killed(path, contents, clears=True):
    """A run that ends without a word while it writes the last file."""
    folder = ResultFolder(path, clears=clears)
    for name, text in contents.items():
        (folder / name).write_text(text)


def test_what_a_killed_run_had_finished_is_ours_and_its_last_file_may_be_anybodys(tmp_path):
    killed(tmp_path, {"a": "1", "b": "ha"})
    with pytest.raises(UserError, match="holds b, and no command of ours has left it there, or one that was cut short"):
        ResultFolder(tmp_path).claim(["a", "b"])
    assert run(tmp_path, {"c": "2"}) == f"1 of the run before will be removed from {tmp_path}, such as a"
    assert contents(tmp_path) == {"b": "ha", "c": "2"}


@pytest.mark.parametrize("name", ["a", "b"])
def test_what_a_user_put_in_place_of_a_killed_run_s_file_is_neither_removed_nor_replaced(tmp_path, name):
    killed(tmp_path, {"a": "1", "b": "1"})
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"holds {name}"):
        ResultFolder(tmp_path).claim([name])
    run(tmp_path, {"c": "2"})
    assert contents(tmp_path)[name] == "mine"


def test_a_killed_run_that_had_not_begun_a_file_leaves_the_one_of_the_run_before_as_ours(tmp_path):
    run(tmp_path, {"a": "1", "b": "1"})
    assert ResultFolder(tmp_path, clears=False) / "a"
    assert run(tmp_path, {"a": "2", "b": "2"}) == ""


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_run_that_an_error_ends_marks_what_it_has_written(tmp_path, error):
    with pytest.raises(error), ResultFolder(tmp_path) as folder:
        (folder / "a").write_text("1")
        raise error
    with pytest.raises(error), ResultPaths() as results:
        places = [results.place(tmp_path / name) for name in ("b", "c")]
        places[0].write_text("1")
        raise error
    assert run(tmp_path, {"a": "2", "b": "2", "c": "2"}) == ""


def test_a_file_that_is_replaced_while_its_run_goes_on_is_somebody_elses(tmp_path):
    with ResultFolder(tmp_path) as folder:
        for name in ("a", "b"):
            (folder / name).write_text("1")
        (tmp_path / "a").write_text("mine")
    run(tmp_path, {"c": "2"})
    assert contents(tmp_path) == {"a": "mine", "c": "2"}


def test_lists_of_before_are_read_and_give_no_right_to_remove(tmp_path):
    """As they were up to 2179dca: bare names."""
    for name in ("a", "b"):
        (tmp_path / name).write_text("1")
    (tmp_path / LIST).write_text('"a"\n"b"\n')
    assert results_in(tmp_path) == {"a", "b"}
    assert run(tmp_path, {"c": "2"}) == ""
    assert contents(tmp_path) == {"a": "1", "b": "1", "c": "2"}


def test_a_file_may_be_written_twice_in_a_run(tmp_path):
    folder = ResultFolder(tmp_path)
    for text in ("1", "2"):
        (folder / "a").write_text(text)
    folder.finish()
    run(tmp_path, {"a": "3"})
    assert contents(tmp_path) == {"a": "3"}


def test_many_foreign_files_are_counted_in_one_sentence(tmp_path):
    for number in range(5):
        (tmp_path / f"{number}").write_text("")
    with pytest.raises(UserError, match="holds 0, 1, 2, ..., and no command of ours has left them there"):
        ResultFolder(tmp_path).claim(map(str, range(5)))


def test_a_list_that_is_none_is_one_sentence_and_leads_nowhere_else(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / LIST).write_text(json.dumps("../outside") + "\n")
    run(tmp_path / "out", {"a": "1"})
    assert outside.read_text() == "mine"
    (tmp_path / "out" / LIST).write_text("of another program\n")
    with pytest.raises(UserError, match="must list the results"):
        ResultFolder(tmp_path / "out")
    assert results_in(tmp_path / "out") == set()


def test_paths_in_several_folders_are_claimed_and_listed_each_in_its_own(tmp_path):
    results = ResultPaths()
    results.claim(tmp_path / "a/one", tmp_path / "b/two")
    for name in ("a/one", "b/two"):
        results.place(tmp_path / name).write_text("1")
    results.finish()
    assert results_in(tmp_path / "a") == {"one"} and results_in(tmp_path / "b") == {"two"}
    (tmp_path / "b/two").write_text("mine")
    with pytest.raises(UserError, match=f"{tmp_path}/b holds two, and no command of ours"):
        ResultPaths().claim(tmp_path / "a/one", tmp_path / "b/two")


def test_what_a_run_before_has_left_is_removed_with_the_folders_that_it_leaves_empty(tmp_path):
    old = [tmp_path / name for name in ("a", "b", "c", "one/a", "one/png/0", "two/a")]
    with ResultPaths() as results:
        for path in old:
            results.place(path).write_text("1")
    (tmp_path / "b").write_text("mine")
    (tmp_path / "two/mine").write_text("mine")
    with ResultPaths() as results:
        results.place(tmp_path / "c").write_text("2")
        assert set(results.left(*old)) == {tmp_path / name for name in ("a", "one/a", "one/png/0", "two/a")}
        results.remove(*old, tmp_path / "two/mine")
    there = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("[!.]*")}
    assert there == {"b", "c", "two", "two/mine"}
    (tmp_path / "a").write_text("1")  # a user's, that happens to be alike
    assert ResultPaths().left(tmp_path / "a") == []


def test_files_that_other_processes_write_are_listed_beforehand(tmp_path):
    with ResultFolder(tmp_path) as folder:
        folder.enter(["0", "1", "2"])
        for name in ("0", "1", "2"):
            (tmp_path / name).write_text("")
    (tmp_path / "2").write_text("mine")
    (tmp_path / "3").write_text("mine")
    ResultFolder(tmp_path).enter(["0"])
    assert not (tmp_path / "1").exists() and (tmp_path / "2").exists() and (tmp_path / "3").exists()
    (tmp_path / "0").write_text("mine")  # in place of what that run would have written
    run(tmp_path, {"4": ""})
    assert (tmp_path / "0").read_text() == "mine"
    with pytest.raises(UserError, match="holds 0, 3"):
        ResultFolder(tmp_path).enter(["0", "3"])


def test_a_large_file_is_known_by_its_size_and_time(tmp_path, monkeypatch):
    monkeypatch.setattr(result_folder, "LARGE", 2)
    monkeypatch.setattr(result_folder, "sha256_of", None)
    run(tmp_path, {"a": "large"})
    run(tmp_path, {"a": "LARGE"})
    (tmp_path / "a").write_text("other")
    os.utime(tmp_path / "a", (0, 0))
    with pytest.raises(UserError, match="holds a"):
        ResultFolder(tmp_path).claim(["a"])


# Commands that make their results of parts


def test_parts_begin_in_no_folder_with_other_files_and_delete_their_own_alone(tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/mine").write_text("mine")
    with pytest.raises(UserError, match="holds parts, and no command of ours has left that there"):
        Parts(tmp_path, {}, 1, Processes("cpu"))
    (tmp_path / "parts/mine").unlink()
    (tmp_path / "tokens.npy").write_text("mine")
    with pytest.raises(UserError, match="holds tokens.npy"):
        Parts(tmp_path, {}, 1, Processes("cpu"), ["tokens.npy"])
    (tmp_path / "tokens.npy").unlink()
    parts = Parts(tmp_path, {}, 1, Processes("cpu"), ["tokens.npy"])
    parts.write(0, a=np.zeros(1))
    (tmp_path / "parts/mine").write_text("mine")
    parts.lock.release()
    (tmp_path / "tokens.npy").write_text("half of ours, as a killed run leaves it")
    parts = Parts(tmp_path, {}, 1, Processes("cpu"), ["tokens.npy"])
    parts.remove()
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["mine"]


@pytest.mark.parametrize("text", ["", "[]", "null", "mine"])
def test_parts_beside_another_program_s_plan_are_explained_in_one_sentence(tmp_path, text):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/plan.json").write_text(text)
    with pytest.raises(UserError, match="parts holds plan.json, and no command of ours has left that there: name"):
        Parts(tmp_path, {}, 1, Processes("cpu"))


def test_parts_of_before_their_images_were_noted_go_on(tmp_path):
    for plan in ({"seed": 1}, {"seed": 1, "source": "2 shards"}):
        Parts(tmp_path, plan, 1, Processes("cpu")).lock.release()
    with pytest.raises(UserError, match="seed was 1 and is now 2"):
        Parts(tmp_path, {"seed": 2, "source": "2 shards"}, 1, Processes("cpu"))


def test_no_file_takes_the_place_of_a_device(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(UserError, match="pipe is a device or a pipe, and files are written here: name a file"):
        write_text(pipe, "x")
    assert pipe.is_fifo()


def no_space(path, data):
    raise OSError(errno.ENOSPC, "No space left on device")


def no_space_by_safetensors(path, data):
    raise SafetensorError(f"Error while serializing: I/O error: No space left on device (os error 28) at path {path}")


def no_space_by_numpy(path, data):
    raise OSError("10 requested and 2 written")


@pytest.mark.parametrize("write", [no_space, no_space_by_safetensors, no_space_by_numpy])
def test_an_error_of_the_disk_names_the_file_or_folder_that_was_to_be(tmp_path, write):
    with pytest.raises(OSError) as found, replacing(tmp_path / "x.npz") as aside:
        aside.touch()
        write(aside, b"")
    assert f"{tmp_path}/x.npz" in disk_error(found.value) and "could not be written" in disk_error(found.value)
    with pytest.raises(OSError) as found, replacing_files(tmp_path / "model", ["x"]) as aside:
        write(aside / "x", b"")
    assert f"{tmp_path}/model" in disk_error(found.value)
    with pytest.raises(OSError) as found, replacing_files(tmp_path / "model", ["x"]) as aside:
        (aside / "missing").read_bytes()
    assert found.value.filename == f"{tmp_path}/model"
    assert not list(tmp_path.iterdir())


def test_files_for_a_folder_that_exists_are_written_aside_in_it(tmp_path):
    """It may be a link to another disk, onto which nothing can be renamed, or in a folder that takes no files."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "model").symlink_to(tmp_path / "disk")
    with replacing_files(tmp_path / "model", ["x"]) as aside:
        assert aside.resolve().parent == tmp_path / "disk"
        (aside / "x").touch()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["x"]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="/proc is Linux's")
def test_a_folder_that_takes_no_files_is_one_sentence():
    with pytest.raises(UserError, match="no file can be written into /proc"):
        write_text(Path("/proc/x.txt"), "x")
    with pytest.raises(UserError, match="no file can be written into /proc"), replacing_files("/proc/x", ["x"]):
        pass


def test_a_folder_that_cannot_be_made_for_a_file_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match="the folder .*file/x cannot be made .Not a directory.: a file is where a folder"
    ):
        write_text(tmp_path / "file/x/y.txt", "x")
