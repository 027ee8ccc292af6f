"""Files are written whole or not at all, whatever goes wrong, and the user is told what to do."""
import errno
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nanomoe.files import UserError, is_out_of_memory, remove_leftovers, sha256_of, write_atomically

ROOT = Path(__file__).resolve().parents[1]
is_root = hasattr(os, "geteuid") and os.geteuid() == 0


def names(folder):
    return sorted(p.name for p in Path(folder).iterdir())


def test_bytes_and_text(tmp_path):
    with write_atomically(tmp_path / "a" / "b" / "bytes") as file:
        file.write(b"\x00\r\n")
    with write_atomically(tmp_path / "text", "w") as file:
        file.write("té\n")
    assert (tmp_path / "a" / "b" / "bytes").read_bytes() == b"\x00\r\n"
    assert (tmp_path / "text").read_bytes() == "té\n".encode()
    assert names(tmp_path) == ["a", "text"]


def test_the_old_file_is_seen_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with write_atomically(path, "w") as file:
        file.write("new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, UserError])
def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error), write_atomically(path, "w") as file:
        file.write("half")
        raise error("stop")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_kill_9_in_the_middle_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    code = ("import sys, time; from nanomoe.files import write_atomically\n"
            "with write_atomically(sys.argv[1], 'w') as file:\n"
            "    file.write('half'); file.flush(); print('writing', flush=True); time.sleep(60)")
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert path.read_text() == "old"
    (leftover,) = set(names(tmp_path)) - {"file"}
    assert leftover.startswith(".file.") and leftover.endswith(".tmp")

    # the next writer leaves a young leftover alone, and sweeps it up when it is old
    with write_atomically(path, "w") as file:
        file.write("new")
    assert names(tmp_path) == [leftover, "file"]
    os.utime(tmp_path / leftover, (0, 0))
    with write_atomically(path, "w") as file:
        file.write("newer")
    assert names(tmp_path) == ["file"]


def test_leftovers_of_other_files_are_not_touched(tmp_path):
    for name in (".a.1.tmp", ".ab.1.tmp", ".[a].1.tmp"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, 0))
    remove_leftovers(tmp_path / "[a]")
    assert names(tmp_path) == [".a.1.tmp", ".ab.1.tmp"]


class FullDisk:
    "A file whose every write fails as it does on a full disk."
    def __init__(self, file):
        self.file = file
    def __enter__(self):
        return self
    def __exit__(self, *_):
        self.file.close()
    def write(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_one_sentence_and_the_old_file_stays(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")
    real_open = open
    monkeypatch.setattr("builtins.open", lambda name, mode="r", **kw: FullDisk(real_open(name, mode, **kw)))
    with pytest.raises(UserError, match="disk is full; free some space") as caught, write_atomically(path) as file:
        file.write(b"x")
    monkeypatch.undo()
    assert str(path) in str(caught.value)
    assert path.read_text() == "old" and names(tmp_path) == ["file"]


@pytest.fixture
def tiny_disk(tmp_path):
    "A real file system of 64 kB, where this process may mount one."
    folder = tmp_path / "disk"
    folder.mkdir()
    if not (is_root and sys.platform == "linux"):
        pytest.skip("mounting a small disk needs root on Linux")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this system does not let us mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(tiny_disk):
    path = tiny_disk / "file"
    path.write_text("old")
    with pytest.raises(UserError, match="disk is full"), write_atomically(path) as file:
        for _ in range(100):
            file.write(bytes(4096))
    assert path.read_text() == "old" and names(tiny_disk) == ["file"]
    with write_atomically(path) as file:  # the space is free again
        file.write(b"new")
    assert path.read_bytes() == b"new"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_the_last_flush_meets_a_full_disk(tmp_path, monkeypatch):
    real_open = open
    monkeypatch.setattr("builtins.open", lambda name, mode="r", **kw: real_open("/dev/full", mode, **kw))
    with pytest.raises(UserError, match="disk is full"), write_atomically(tmp_path / "file") as file:
        file.write(b"small enough to stay in the buffer until it is flushed")
    assert names(tmp_path) == []


@pytest.mark.skipif(os.name == "nt", reason="Windows has no read-only folders of this kind")
def test_a_read_only_folder(tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir()
    (folder / "file").write_text("old")
    code = ("import os, sys\n"
            "from nanomoe.files import UserError, write_atomically\n"
            "if os.geteuid() == 0: os.setuid(65534)\n"  # root may write everywhere, so become nobody
            "try:\n"
            "    with write_atomically(sys.argv[1]) as file: file.write(b'new')\n"
            "except UserError as error: print(error)\n")
    for p in (tmp_path, *tmp_path.parents[:2]):
        if is_root:
            p.chmod(0o755)
    folder.chmod(0o555)
    out = subprocess.run([sys.executable, "-c", code, str(folder / "file")], cwd=ROOT, capture_output=True, text=True)
    folder.chmod(0o755)
    assert out.stdout == f"Cannot write {folder / 'file'}: permission denied; choose a folder that you may write to.\n", out
    assert (folder / "file").read_text() == "old"


@pytest.mark.parametrize("code", [errno.EROFS, errno.EDQUOT, errno.EPERM])
def test_other_disks_that_refuse(tmp_path, monkeypatch, code):
    def refuse(self, *args, **kwargs):
        raise OSError(code, os.strerror(code), str(self))
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match="Cannot write .*file: .*; (choose|free)"), write_atomically(tmp_path / "file"):
        pass


def test_a_file_where_a_folder_should_be_and_the_other_way_round(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(UserError, match="a file stands where a folder is needed"):
        with write_atomically(tmp_path / "file" / "new"):
            pass
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="Cannot write"), write_atomically(tmp_path / "folder") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="name is too long"), write_atomically(tmp_path / ("n" * 250)):
        pass
    assert names(tmp_path) == ["file", "folder"]


def test_a_folder_that_is_removed_meanwhile(tmp_path):
    with pytest.raises(UserError, match="Cannot write .*file: its folder is gone"), write_atomically(tmp_path / "folder" / "file") as file:
        file.write(b"x")
        next((tmp_path / "folder").iterdir()).unlink()
        (tmp_path / "folder").rmdir()
    assert names(tmp_path) == []


def test_errors_about_other_things_are_left_as_they_are(tmp_path):
    with pytest.raises(FileNotFoundError), write_atomically(tmp_path / "file"):
        open(tmp_path / "no such file")
    with pytest.raises(IsADirectoryError if os.name != "nt" else PermissionError), write_atomically(tmp_path / "file"):
        (tmp_path / "other").mkdir()
        open(tmp_path / "other")
    with pytest.raises(ConnectionResetError), write_atomically(tmp_path / "file"):
        raise ConnectionResetError(errno.ECONNRESET, "the network went away")
    assert names(tmp_path) == ["other"]


@pytest.mark.skipif(os.name == "nt", reason="Windows refuses to replace a file that is being read")
def test_a_reader_never_sees_half_a_file(tmp_path):
    path = tmp_path / "file"
    contents = [bytes([k]) * 50_000 for k in range(30)]
    path.write_bytes(contents[0])
    seen, done = set(), threading.Event()

    def read():
        while not done.is_set():
            seen.add(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for content in contents:
        with write_atomically(path) as file:
            for k in range(0, len(content), 10_000):
                file.write(content[k:k + 10_000])
            time.sleep(0.001)
    done.set()
    reader.join()
    assert seen <= set(contents) and len(seen) > 1


@pytest.mark.skipif(os.name == "nt", reason="Windows opens no folders")
def test_the_disk_is_asked_for_the_contents_before_the_name_and_for_the_name_after(tmp_path, monkeypatch):
    order, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (order.append("folder" if stat.S_ISDIR(os.fstat(number).st_mode) else os.fstat(number).st_size), fsync(number)))
    monkeypatch.setattr(os, "replace", lambda *names: (order.append("renamed"), replace(*names)))
    with write_atomically(tmp_path / "file") as file: file.write(b"seven b")
    assert order == [7, "renamed", "folder"]


@pytest.mark.skipif(os.name == "nt", reason="Windows opens no folders")
def test_a_disk_that_cannot_be_asked_for_a_folder(tmp_path, monkeypatch):
    fsync = os.fsync
    def refuse(number):
        if stat.S_ISDIR(os.fstat(number).st_mode): raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(number)
    monkeypatch.setattr(os, "fsync", refuse)
    with write_atomically(tmp_path / "file") as file: file.write(b"x")
    assert (tmp_path / "file").read_bytes() == b"x"


@pytest.mark.parametrize("error, whether", [
    (MemoryError(), True), (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), True), (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True), (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
    (RuntimeError("Invalid buffer size: 24.00 GiB"), True), (RuntimeError("MPS backend out of memory (MPS allocated: 1.00 GiB)"), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), False), (ValueError("Invalid buffer size"), False), (RuntimeError("shapes differ"), False)])
def test_what_says_that_the_memory_does_not_suffice(error, whether): assert is_out_of_memory(error) == whether


def test_fingerprints():
    # the value that FIPS 180-4 gives for "abc"
    assert sha256_of("abc") == sha256_of(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_of("é") == sha256_of("é".encode("utf-8"))
