"""Checks of this machine: Python, packages, GPU, memory, disk, limits, weights.

Each check is a function of values that `machine_checks` and `local_checks` read, so that every finding has a
test.
`pipelines.doctor.cluster` checks Ray and `pipelines.doctor.bucket` buckets. Nothing is changed except scratch
objects, which are deleted again.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from resshift.doctor.finding import Finding, fail, ok, warn

GIB = 1 << 30
# Without one of these, or with another version of it, nothing works or nodes do not understand each other.
CORE = (
    "numpy",
    "opencv-python-headless",
    "pillow",
    "pyarrow",
    "ray",
    "s3fs",
    "safetensors",
    "torch",
    "torchvision",
)
# Modules of the extras of the package, and what they are for.
EXTRAS = {
    "spandrel": "models of other people [models]",
    "onnxscript": "export [export]",
    "ray": "clusters [train, serve]",
}
_SHARE_OF_OBJECT_STORE = 0.3  # Ray's default, of the machine's memory
_FULL_DISK = 0.95  # above, Ray does not spill and refuses objects (local_fs_capacity_threshold)


def check_python(version: tuple[int, int, int]) -> Finding:
    """Python itself, as (major, minor, micro)."""
    shown = ".".join(map(str, version))
    if version < (3, 11):
        return fail(
            "python",
            shown,
            "install Python 3.11 or newer and make the environment again: make setup PYTHON=python3.11",
        )
    return ok("python", shown)


def read_lock(text: str) -> dict[str, str]:
    """Return the pinned version of every package that applies to this platform.

    Raises:
        ValueError: A line is not a pin.
    """
    from packaging.requirements import InvalidRequirement, Requirement

    pins: dict[str, str] = {}
    for line in text.splitlines():
        stripped = line.split(" #")[0].strip()
        if not stripped or stripped.startswith("#"):
            continue
        try:
            pin = Requirement(stripped)
        except InvalidRequirement:
            raise ValueError(f"not a pin: {stripped}") from None
        exact = [one.version for one in pin.specifier if one.operator == "=="]
        if len(exact) != 1:
            raise ValueError(f"not a pin: {stripped}")
        if pin.marker is None or pin.marker.evaluate():
            pins[_normal(pin.name)] = exact[0]
    return pins


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def installed_versions() -> dict[str, str]:
    """Return name and version of every installed distribution."""
    return {_normal(one.metadata["Name"]): one.version for one in metadata.distributions()}


def check_versions(pins: Mapping[str, str], installed: Mapping[str, str]) -> Iterator[Finding]:
    """Installed packages beside the lock; the local part of a version ("+cu132") says which build it is and
    does not count.
    """
    missing = [name for name in pins if name not in installed]
    other = [
        f"{name} {installed[name]} (lock: {pin})"
        for name, pin in pins.items()
        if name in installed and not _same(installed[name], pin)
    ]
    remedy = "install the lock: make setup; on a cluster node: uv pip sync requirements.lock"
    core = [name for name in missing if name in CORE]
    if core:
        yield fail("packages", f"not installed: {', '.join(core)}", remedy)
    elif missing:
        yield warn("packages", f"{len(missing)} of the lock are not installed: {_some(missing)}", remedy)
    else:
        yield ok("packages", f"all {len(pins)} of the lock are installed")
    core = [text for text in other if text.split(" ")[0] in CORE]
    if core:
        yield fail("versions", f"other than the lock: {', '.join(core)}", remedy)
    elif other:
        yield warn("versions", f"{len(other)} other than the lock: {_some(other)}", remedy)
    else:
        yield ok("versions", "as in the lock")


def _same(installed: str, pin: str) -> bool:
    return installed == pin or installed.split("+")[0] == pin.split("+")[0]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")


def check_gpu(memory_bytes: Sequence[int], has_driver: bool, has_amx: bool = False) -> Finding:
    """Devices that torch can use, by their memory.

    Args:
        memory_bytes: Of each device.
        has_driver: The kernel has an NVIDIA device, whatever torch says.
        has_amx: The CPU multiplies matrices in bfloat16.
    """
    if not memory_bytes and has_driver:
        return fail(
            "gpu",
            "there is an NVIDIA device, and torch cannot use it",
            "update the driver to what `nvidia-smi` and torch.version.cuda need",
        )
    if not memory_bytes:
        return ok(
            "gpu",
            "none; the CPU computes"
            + (", fastest in bfloat16 (AMX): --model NAME@bfloat16" if has_amx else ""),
        )
    found = ", ".join(f"{size / GIB:.0f} GiB" for size in memory_bytes)
    if min(memory_bytes) < 4 * GIB:
        return warn(
            "gpu", found, "below 4 GiB tiles become small and slow: set --tile 64, or use another device"
        )
    return ok("gpu", found)


def check_memory(available_bytes: int) -> Finding:
    """Memory that is free or can be freed."""
    found = f"{available_bytes / GIB:.1f} GiB available"
    if available_bytes < GIB:
        return fail(
            "memory",
            found,
            "a worker of Ray and a model take about 1 GiB: end other programs or take a larger machine",
        )
    if available_bytes < 4 * GIB:
        return warn("memory", found, "give fewer replicas, and decoders less: --set limits.memory_mb=1000")
    return ok("memory", found)


def check_disk(path: str, free_bytes: int, total_bytes: int) -> Finding:
    """The file system of Ray's session directory, which takes spilled objects and logs."""
    found = f"{free_bytes / GIB:.0f} of {total_bytes / GIB:.0f} GiB free at {path}"
    if 1 - free_bytes / total_bytes > _FULL_DISK:
        return fail(
            "disk",
            found,
            "Ray refuses objects on a disk that is 95 % full: free some, or start it with --temp-dir on "
            "another disk",
        )
    if free_bytes < 20 * GIB:
        return warn(
            "disk",
            found,
            "large jobs spill objects: have 20 GiB free, or start Ray with --temp-dir on another disk",
        )
    return ok("disk", found)


def check_shared_memory(total_bytes: int, memory_bytes: int) -> Finding:
    """/dev/shm, where Ray keeps its objects."""
    found = f"{total_bytes / GIB:.2f} GiB for {memory_bytes / GIB:.1f} GiB of memory"
    if total_bytes < GIB // 4:
        return fail(
            "shared memory",
            found,
            "start the container with --shm-size=8g (Kubernetes: an emptyDir of medium Memory at /dev/shm)",
        )
    if total_bytes < _SHARE_OF_OBJECT_STORE * memory_bytes:
        return warn(
            "shared memory",
            found,
            "Ray's object store takes 30 % of the memory: enlarge /dev/shm or start Ray with "
            "--object-store-memory",
        )
    return ok("shared memory", found)


def check_open_files(limit: int) -> Finding:
    """How many files and connections a process may have open."""
    if limit < 4096:
        return fail("open files", f"{limit} a process", "ulimit -n 65536 before Ray starts")
    if limit < 65536:
        return warn(
            "open files",
            f"{limit} a process",
            "fine for one machine; on a cluster ulimit -n 65536 before Ray starts",
        )
    return ok("open files", f"{limit} a process")


def check_weights(names: Sequence[str]) -> Finding:
    """Models that ship with the package and are there."""
    if not names:
        return fail(
            "weights",
            "tiny-x4 is not in the installed package",
            "install the wheel or the repository again; see docs/faq.md",
        )
    return ok("weights", ", ".join(names))


def check_extras(missing: Collection[str]) -> Finding:
    """Optional packages, by their modules; nothing is wrong without them."""
    found = [f"{told}: {'no' if name in missing else 'yes'}" for name, told in EXTRAS.items()]
    return ok("extras", ", ".join(found))


def machine_checks(lock: str | None) -> Iterator[Finding]:
    """Read this machine.

    Args:
        lock: Text of requirements.lock; None when there is none to compare with.
    """
    yield _python()
    if lock is None:
        yield warn(
            "versions", "no requirements.lock to compare with", "run from the repository, or give --lock FILE"
        )
    else:
        yield from check_versions(read_lock(lock), installed_versions())
    yield _gpu()
    memory_bytes, available_bytes = _memory()
    yield check_memory(available_bytes)
    disk = shutil.disk_usage(tempfile.gettempdir())
    yield check_disk(tempfile.gettempdir(), disk.free, disk.total)
    if Path("/dev/shm").is_dir():
        yield check_shared_memory(shutil.disk_usage("/dev/shm").total, memory_bytes)
    yield check_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    yield _weights()


def local_checks() -> Iterator[Finding]:
    """Read of this machine what upscaling without Ray needs."""
    yield _python()
    yield _gpu()
    yield check_memory(_memory()[1])
    yield _weights()
    yield check_extras({name for name in EXTRAS if find_spec(name) is None})


def _python() -> Finding:
    return check_python((sys.version_info.major, sys.version_info.minor, sys.version_info.micro))


def _gpu() -> Finding:
    import torch

    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else range(0)
    memory_bytes = [torch.cuda.get_device_properties(i).total_memory for i in devices]
    has_amx = bool(torch.cpu.get_capabilities().get("amx_bf16"))
    return check_gpu(memory_bytes, Path("/proc/driver/nvidia/version").exists(), has_amx)


def _weights() -> Finding:
    shipped = Path(__file__).parents[1] / "pretrained"
    return check_weights(sorted(path.parent.name for path in shipped.glob("*/model.safetensors")))


def _memory() -> tuple[int, int]:
    """Return (total, available) bytes; where the kernel does not tell, all counts as available."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        told = Path("/proc/meminfo").read_text()
    except FileNotFoundError:  # not Linux
        return total, total
    found = re.search(r"MemAvailable:\s+(\d+) kB", told)
    return total, int(found[1]) * 1024 if found else total
