"""Take from this process what decoding a picture does not need, by a list of system calls that it may make.

    is_confined = confine()

Afterwards the process can compute, allocate memory, start threads, and use the descriptors that it has open.
Everything else fails with EPERM: opening any file, sockets, other processes and programs, signals to others,
tracing, memory that is executed. The filter holds for all threads, cannot be taken off, and stays through
exec (seccomp(2), Linux 3.17). Import what is needed before: an import opens files.

What it does not do: limit time and memory (`resshift.images.sandbox`).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys

_SET_NO_NEW_PRIVS = 38  # of prctl(2)
_SET_MODE_FILTER, _ALL_THREADS = 1, 1  # of seccomp(2)
_LOAD, _IF_EQUAL, _IF_SET, _RETURN = 0x20, 0x15, 0x45, 0x06  # of linux/bpf_common.h
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000  # of linux/seccomp.h
# Positions in struct seccomp_data: number of the call, architecture, lower halves of arguments 0 and 2.
_NUMBER, _ARCHITECTURE, _ARGUMENT_0, _ARGUMENT_2 = 0, 4, 16, 32
_EXECUTABLE = 4  # PROT_EXEC
_THREAD = 0x10000  # CLONE_THREAD


# Numbers on x86_64 (asm/unistd_64.h) and aarch64 (asm-generic/unistd.h; it has no poll).
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column; linux/audit.h
_ALWAYS = {
    **{"read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "close": (3, 57)},
    **{"sendto": (44, 206), "recvfrom": (45, 207), "ppoll": (271, 73), "poll": (7, 73)},
    **{"fstat": (5, 80), "newfstatat": (262, 79), "lseek": (8, 62)},
    **{"munmap": (11, 215), "brk": (12, 214), "mremap": (25, 216), "madvise": (28, 233)},
    **{"rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139)},
    **{"sigaltstack": (131, 132), "restart_syscall": (219, 128)},
    **{"futex": (202, 98), "set_robust_list": (273, 99), "rseq": (334, 293), "membarrier": (324, 283)},
    **{"sched_yield": (24, 124), "sched_getaffinity": (204, 123), "getcpu": (309, 168)},
    **{"clock_gettime": (228, 113), "clock_getres": (229, 114), "gettimeofday": (96, 169)},
    **{"nanosleep": (35, 101), "clock_nanosleep": (230, 115)},
    **{"getpid": (39, 172), "gettid": (186, 178), "uname": (63, 160), "getrusage": (98, 165)},
    **{"getrandom": (318, 278), "exit": (60, 93), "exit_group": (231, 94)},
}
_SECCOMP, _MMAP, _MPROTECT, _CLONE, _TGKILL = (317, 277), (9, 222), (10, 226), (56, 220), (234, 131)
_CLONE3 = (435, 435)


class _Program(ctypes.Structure):
    """struct sock_fprog of linux/filter.h."""

    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p)]


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """Return struct sock_filter; `if_true` and `if_false` are instructions to skip."""
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _filter(column: int, architecture: int, pid: int) -> bytes:
    """Return the instructions of the filter for a process."""
    allow, deny = _instruction(_RETURN, _ALLOW), _instruction(_RETURN, _ERRNO | errno.EPERM)

    def when(call: tuple[int, int], *answer: bytes) -> bytes:
        return _instruction(_IF_EQUAL, call[column], 0, len(answer)) + b"".join(answer)

    def looking(position: int, code: int, value: int, if_so: bytes, if_not: bytes) -> tuple[bytes, ...]:
        return _instruction(_LOAD, position), _instruction(code, value, 0, 1), if_so, if_not

    is_executed = looking(_ARGUMENT_2, _IF_SET, _EXECUTABLE, deny, allow)
    return b"".join(
        [
            _instruction(_LOAD, _ARCHITECTURE),
            _instruction(_IF_EQUAL, architecture, 1, 0),
            _instruction(_RETURN, _KILL),
            _instruction(_LOAD, _NUMBER),
            *(when(call, allow) for call in _ALWAYS.values()),
            when(_MMAP, *is_executed),
            when(_MPROTECT, *is_executed),
            when(_CLONE, *looking(_ARGUMENT_0, _IF_SET, _THREAD, allow, deny)),
            # abort(3) ends this process by it.
            when(_TGKILL, *looking(_ARGUMENT_0, _IF_EQUAL, pid, allow, deny)),
            # Filters cannot look into its arguments; told that it is missing, libc uses clone.
            when(_CLONE3, _instruction(_RETURN, _ERRNO | errno.ENOSYS)),
            deny,
        ]
    )


def confine() -> bool:
    """Confine this process for the rest of its life.

    Returns:
        Whether the kernel has filters and its architecture is known here; without them only gaining
        privileges is forbidden.
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    known = _ARCHITECTURES.get(platform.machine())
    if known is None or sys.maxsize < 2**32:
        return False
    instructions = _filter(*known, os.getpid())
    buffer = ctypes.create_string_buffer(instructions, len(instructions))
    program = _Program(len(instructions) // 8, ctypes.addressof(buffer))
    return libc.syscall(_SECCOMP[known[0]], _SET_MODE_FILTER, _ALL_THREADS, ctypes.byref(program)) == 0
