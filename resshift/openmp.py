"""How threads of a network on a CPU wait for each other.

PyTorch's wheels carry GNU's OpenMP (libgomp), whose threads spin while they wait. On a machine that does
something else as well, a spinning thread takes the core that the thread it waits for needs: with two threads
on two busy cores (load 25 to 36) a small convolution network made 1.2 to 1.7 calls a second, and 25 to 42
when its threads sleep. KMP_BLOCKTIME is of another runtime and changes nothing.
"""

from __future__ import annotations

import os


def wait_passively() -> None:
    """Let threads sleep while they wait, in this process and those that it starts. It must come before torch
    is imported; what the user has set stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
