"""A confined process tries what a file that took it over would try."""

from __future__ import annotations

import errno
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"), reason="no filters here"
)

_CHILD = """
import ctypes, json, mmap, os, signal, socket, sys, threading
from resshift.images.seccomp import confine

there, new, is_confined = sys.argv[1], sys.argv[2], sys.argv[3] == "confined"
libc = ctypes.CDLL(None, use_errno=True)
ours, theirs = socket.socketpair()

def call(name, *arguments):
    if getattr(libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)

def fork():
    if os.fork() == 0:
        os._exit(0)
    os.wait()

def listen():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))

TRIED = {
    "read a file": lambda: os.close(os.open(there, os.O_RDONLY)),
    "read the parent's environment": lambda: os.close(os.open(f"/proc/{os.getppid()}/environ", os.O_RDONLY)),
    "write a file": lambda: os.close(os.open(new, os.O_WRONLY | os.O_CREAT)),
    "delete a file": lambda: os.unlink(new),
    "make a directory": lambda: os.mkdir(new + "-directory"),
    "list a directory": lambda: os.listdir("/"),
    "reach the network": listen,
    "reach a local socket": lambda: [one.close() for one in socket.socketpair()],
    "start a process": fork,
    "start a shell": lambda: os.posix_spawn("/bin/true", ["true"], {}),
    "signal another process": lambda: os.kill(os.getppid(), 0),
    "trace": lambda: call("ptrace", 16, 1 << 23, 0, 0),
    "run new code": lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC).close(),
    "gain from a set-user-id file": lambda: call("prctl", 38, 1, 0, 0, 0),
    "make a pipe": lambda: [os.close(one) for one in os.pipe()],
}

def thread():
    worker = threading.Thread(target=lambda: done.append(sum(range(1000))))
    done = []
    worker.start()
    worker.join()
    assert done == [499500]

ALLOWED = {
    "start a thread": thread,
    "take memory": lambda: bytearray(1 << 24),
    "use what is open": lambda: (ours.sendall(b"x"), theirs.recv(1)),
}

def outcome(attempt):
    try:
        attempt()
        return 0
    except OSError as error:
        return error.errno

if is_confined:
    assert confine()
found = {name: outcome(attempt) for name, attempt in {**TRIED, **ALLOWED}.items()}
os.write(1, json.dumps(found).encode())
"""


@pytest.mark.parametrize("mode", ["free", "confined"])
def test_a_confined_process_can_compute_and_nothing_else(mode: str, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("secret")
    command = [sys.executable, "-c", _CHILD, str(tmp_path / "there"), str(tmp_path / "new"), mode]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=120).stdout)
    allowed = {name: found.pop(name) for name in ("start a thread", "take memory", "use what is open")}
    assert set(allowed.values()) == {0}
    # EPERM; a process that is free gets at most ESRCH, from tracing one that is not there
    assert {code == errno.EPERM for code in found.values()} == {mode == "confined"}
    assert (tmp_path / "new-directory").exists() is (mode == "free")
