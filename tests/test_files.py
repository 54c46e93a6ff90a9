"""A corpus is read the same from a folder and from any URL; what cannot be read is one line."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from lst.errors import UserError
from lst.files import (
    Location,
    expect_absent,
    make_folder,
    making_folder,
    replacing,
    write_atomically,
    write_json,
)

FILES = {"a/one.txt": b"1", "a/two.txt": b"22", "b/three.txt": b"333", "top.txt": b""}


@pytest.fixture(params=["path", "file://", "memory://"])
def folder(request, tmp_path):
    if request.param == "memory://":
        fs = fsspec.filesystem("memory")
        for name, content in FILES.items():
            fs.pipe_file(f"/test_files/{name}", content)
        yield Location("memory://test_files")
        fs.rm("/test_files", recursive=True)
        return
    for name, content in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    yield Location(tmp_path if request.param == "path" else f"file://{tmp_path}")


def test_a_place_tells_what_it_holds(folder):
    assert folder.folders() == ["a", "b"]
    assert (folder / "a").sizes() == {"one.txt": 1, "two.txt": 2}
    assert (folder / "b" / "three.txt").read_bytes() == b"333"
    assert (folder / "top.txt").read_bytes() == b""
    assert folder.exists()
    assert folder.is_folder()
    assert not (folder / "top.txt").is_folder()


def test_what_is_not_there_is_not_there(folder):
    assert not (folder / "c").exists()
    assert (folder / "c").folders() == []
    assert (folder / "c").sizes() == {}
    with pytest.raises(FileNotFoundError):
        (folder / "c").read_bytes()


def test_a_file_that_appears_later_is_seen(folder):
    assert "new.txt" not in (folder / "a").sizes()
    fs, path = fsspec.core.url_to_fs((folder / "a" / "new.txt").url)
    fs.pipe_file(path, b"new")
    assert (folder / "a").sizes()["new.txt"] == 3


def test_a_place_prints_as_it_was_given(tmp_path):
    assert str(Location(tmp_path) / "x") == str(tmp_path / "x")
    assert str(Location("data/demo/") / "x") == "data/demo/x"
    assert str(Location(Location("s3://bucket/corpus")) / "x") == "s3://bucket/corpus/x"
    assert Location(Path("a")) == Location("a")


def test_an_unknown_protocol_and_a_missing_package_are_one_line():
    with pytest.raises(UserError, match=r"^nowhere://x: could not be read \(Protocol not known"):
        Location("nowhere://x").exists()
    fsspec.register_implementation("absent", "no_such_package.FileSystem", errtxt="Install it")
    with pytest.raises(UserError, match=r"^absent://x: could not be read \(Install it"):
        Location("absent://x").read_bytes()


def test_errors_of_any_protocol_are_one_line():
    class Guarded(fsspec.AbstractFileSystem):
        def cat_file(self, path, **_):
            raise RuntimeError("no credentials")

    fsspec.register_implementation("guarded", Guarded)
    with pytest.raises(UserError, match=r"^guarded://x: could not be read \(no credentials\)$"):
        Location("guarded://x").read_bytes()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_one_line(tmp_path):
    path = tmp_path / "secret"
    path.write_bytes(b"")
    path.chmod(0)
    with pytest.raises(UserError, match="could not be read"):
        Location(path).read_bytes()


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(UserError, match=r"could not be read \(Is a directory\)"):
        Location(tmp_path).read_bytes()


def test_a_file_is_the_old_one_or_the_whole_new_one(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"word": "größer"})

    def fail():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert json.loads(path.read_text()) == {"word": "größer"}
    write_atomically(path, b"\0new")
    assert path.read_bytes() == b"\0new"
    assert [each.name for each in tmp_path.iterdir()] == ["a.json"]


def test_json_holds_names_of_files_that_are_no_unicode(tmp_path):
    names = [os.fsdecode(b"\xff.wav"), "größer"]
    write_json(tmp_path / "a", names)
    assert json.loads((tmp_path / "a").read_text()) == names


def test_threads_that_write_one_file_leave_one_of_theirs(tmp_path):
    path = tmp_path / "a"
    texts = [str(number) * 100_000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: write_atomically(path, text), texts))
    assert path.read_text() in texts
    assert [each.name for each in tmp_path.iterdir()] == ["a"]


def test_a_pipe_and_a_link_are_not_replaced_by_a_file(tmp_path):
    """As root, a result written to /dev/null took the device's place."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"pipe: expected a file to write, got a device or a pipe$"):
        write_json(tmp_path / "pipe", 1)
    assert (tmp_path / "pipe").is_fifo()
    (tmp_path / "link").symlink_to("elsewhere")
    for value in (1, 2):  # first to nothing, then to a file
        write_json(tmp_path / "link", value)
        assert (tmp_path / "link").is_symlink()
        assert json.loads((tmp_path / "elsewhere").read_text()) == value


def test_what_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/a: cannot be written \(Not a directory\)$"):
        write_json(tmp_path / "file" / "a", 1)


def test_a_folder_is_made_once_and_a_file_in_its_way_is_told(tmp_path: Path) -> None:
    for _ in range(2):
        make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "c"):
        with pytest.raises(UserError, match=f"{path}: cannot be written"):
            make_folder(path)


def test_a_folder_below_a_file_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"a/b: expected a folder to make, got a file above it, /"):
        expect_absent(tmp_path / "file" / "a" / "b")
    expect_absent(tmp_path / "new" / "a")


def test_a_folder_and_no_name_are_no_files_to_write(tmp_path: Path) -> None:
    for path in (tmp_path, Path(), Path("/"), tmp_path / ".."):
        with pytest.raises(UserError, match="expected a file to write, got a folder"):
            write_json(path, {})


def test_a_file_that_cannot_be_written_is_named_as_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^none/a\.json: cannot be written \(No such file"):
        write_json(Path("none/a.json"), {})


def test_a_name_too_long_that_is_read_is_not_told_of_what_is_written(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"^x+: File name too long"),
        making_folder(tmp_path / "out"),
    ):
        Path("x" * 5000).read_text()
    assert list(tmp_path.iterdir()) == []
