"""Writing whole files: modes, names, killed and concurrent writers."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch

from zs3fast.utils.files import replacing


def write(path: Path, text: str = "new") -> None:
    with replacing(path) as temporary:
        temporary.write_text(text)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


def test_a_replaced_file_keeps_its_mode(tmp_path: Path) -> None:
    """A result that only its owner may read became readable to all."""
    path = tmp_path / "a.json"
    path.write_text("old")
    for kept in (0o600, 0o640, 0o444):
        path.chmod(kept)
        write(path)
        assert path.read_text() == "new" and mode(path) == kept


def test_a_new_file_has_the_mode_of_the_umask_which_is_not_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The umask is the whole process's: setting it for a moment changes files that other threads make meanwhile."""
    before = os.umask(0o027)
    try:
        monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask was set"))
        write(tmp_path / "a.json")
    finally:
        monkeypatch.undo()
        os.umask(before)
    assert mode(tmp_path / "a.json") == 0o640


@pytest.mark.parametrize("name", ["猫" * 81 + ".png", "é" * 120 + ".png", "a" * 251 + ".png", "x." + "y" * 240, ".png"])
def test_names_are_counted_in_bytes(tmp_path: Path, name: str) -> None:
    write(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.txt")
    write(tmp_path / name)
    assert os.listdir(tmp_path) == [name]


def test_the_suffix_is_kept_and_the_name_is_hidden(tmp_path: Path) -> None:
    with replacing(tmp_path / "a.png") as temporary:
        assert temporary.parent == tmp_path and temporary.suffix == ".png" and temporary.name.startswith(".")


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "old")
    with pytest.raises(KeyError), replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise KeyError
    assert os.listdir(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "old"


def test_a_killed_writer_leaves_nothing_behind_the_next_one(tmp_path: Path) -> None:
    """kill -9 ran no clean-up, and each run added another half file."""
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom zs3fast.utils.files import replacing\n"
        "with replacing(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half' * 1000)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "config.yaml")], timeout=60)
        assert len(os.listdir(tmp_path)) == 1
    write(tmp_path / "config.yaml")
    assert os.listdir(tmp_path) == ["config.yaml"] and (tmp_path / "config.yaml").read_text() == "new"


def test_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path, errors = tmp_path / "a.txt", []

    def many(letter: str) -> None:
        try:
            for _ in range(50):
                with replacing(path) as temporary:
                    temporary.write_text(letter * 1000)
                assert len(set(path.read_text())) == 1
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=many, args=(letter,)) for letter in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    assert os.listdir(tmp_path) == ["a.txt"] and len(path.read_text()) == 1000


def test_no_link_is_followed(tmp_path: Path) -> None:
    """A name that anybody can foresee must not lead out of the folder."""
    (tmp_path / "out").mkdir()
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "out" / ".a.part.txt").symlink_to(tmp_path / "precious")
    write(tmp_path / "out" / "a.txt")
    assert (tmp_path / "precious").read_text() == "mine" and (tmp_path / "out" / "a.txt").read_text() == "new"


def test_a_full_disk_is_an_os_error_that_names_the_file(tmp_path: Path) -> None:
    """safetensors has an error of its own for it, which no command caught."""
    resource = pytest.importorskip("resource", reason="no limits of a file's size on this system")
    path = tmp_path / "weights.safetensors"
    path.write_text("old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError) as caught, replacing(path) as temporary:
            safetensors.torch.save_file({"a": torch.zeros(10_000)}, temporary)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
