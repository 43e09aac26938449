"""Output files: whole or absent, and what cannot be written is named."""

from __future__ import annotations

import os

import numpy as np
import pytest

from ttt4as_fast.io import absolute, atomic_path, check_folder


def test_file_appears_with_its_contents_only_at_the_end(tmp_path):
    target = tmp_path / "a.txt"
    with atomic_path(target) as temporary:
        temporary.write_text("new")
        assert not target.exists()
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".txt"
    assert target.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_failure_keeps_the_old_file_and_leaves_nothing_beside_it(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")

    def write_half() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("new")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        write_half()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_permissions_are_those_of_a_plain_open(tmp_path):
    (tmp_path / "plain").write_text("")
    with atomic_path(tmp_path / "atomic") as temporary:
        temporary.write_text("")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_writer_that_adds_a_suffix_is_caught(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing was written"), atomic_path(tmp_path / "maps") as temporary:
        np.save(temporary, np.zeros(3))
    assert not (tmp_path / "maps").exists()


@pytest.mark.parametrize(
    "write",
    [lambda path: path.write_bytes(bytes(8192)), lambda path: np.save(path, np.zeros(8192))],
    ids=["bytes", "npy"],
)
def test_a_failed_write_names_the_file_and_the_cause(tmp_path, full_disk, write):
    target = tmp_path / "a.npy"
    with pytest.raises(OSError, match=r"large|requested and .* written") as caught, atomic_path(target) as file:
        write(file)
    assert repr(str(target)) in str(caught.value)
    assert not os.listdir(tmp_path)


def test_no_error_names_the_temporary_file(tmp_path):
    with pytest.raises(PermissionError) as caught, atomic_path(tmp_path / "a.txt") as temporary:
        raise PermissionError(13, "Permission denied", str(temporary))
    assert caught.value.filename == str(tmp_path / "a.txt")


def test_the_longest_names_are_written(tmp_path):
    target = tmp_path / ("\U0001f600" * 61 + ".safetensor")
    assert len(os.fsencode(target.name)) == 255
    with atomic_path(target) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "new"


def test_an_error_with_a_text_of_its_own_keeps_it(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, atomic_path(tmp_path / "a.txt"):
        raise FileNotFoundError("no such weights")
    assert str(caught.value) == "no such weights"
    with pytest.raises(FileNotFoundError, match=r"nothing was written to .*a\.txt"), atomic_path(tmp_path / "a.txt"):
        pass


def test_folder_must_exist_and_target_must_be_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="existing folder"), atomic_path(tmp_path / "no" / "a"):
        pass
    with pytest.raises(IsADirectoryError), atomic_path(tmp_path):
        pass


def test_a_folder_is_tried_and_not_made(tmp_path):
    check_folder(tmp_path / "a" / "b", "output")
    assert not os.listdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"output: expected a folder to write to, got '.*below'"):
        check_folder(tmp_path / "file" / "below", "output")


def test_absolute_goes_up_from_where_a_link_leads(tmp_path, monkeypatch):
    (tmp_path / "far" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "inner")
    monkeypatch.chdir(tmp_path)
    assert absolute("link/../a.png") == str(tmp_path / "far" / "a.png")
    assert absolute("far/../a.png") == absolute("./a.png") == str(tmp_path / "a.png")
    assert absolute("link/a.png") == str(tmp_path / "link" / "a.png")
