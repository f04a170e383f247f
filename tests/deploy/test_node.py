"""deploy/aws/node.sh with programs that write down what they are asked in the place of those that change a
machine.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

NODE = Path(__file__).parents[2] / "deploy" / "aws" / "node.sh"


class Machine:
    """A machine whose programs are scripts; `said` is what was asked of them, in order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.home.mkdir()
        (folder / "bin").mkdir()
        (folder / "requirements.lock").write_text("ray==2.60.0\n")
        self.has("sudo", '"$@"')
        self.has("mountpoint", "exit 1")
        self.has("lsblk", "")
        for name in ("mdadm", "mkfs.ext4", "mount", "chown", "apt-get"):
            self.has(name, "")
        self.has("mkdir", 'exec /bin/mkdir "$@"')

    def has(self, name: str, body: str, where: str = "bin") -> None:
        """Give it a program."""
        path = self.folder / where / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'#!/bin/bash\necho "{name} $*" >> {self.folder}/said\n{body}\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def run(self, *parts: str) -> subprocess.CompletedProcess[str]:
        environment = {
            "PATH": f"{self.folder}/bin:/usr/bin:/bin",
            "HOME": str(self.home),
            "RESSHIFT_LOCK": str(self.folder / "requirements.lock"),
            "RESSHIFT_NVME": str(self.folder / "nvme"),
            "RESSHIFT_PCI": str(self.folder / "pci"),
            "RESSHIFT_RAY_FILES": str(self.folder / "ray"),
        }
        return subprocess.run(
            ["bash", str(NODE), *parts], env=environment, capture_output=True, text=True, check=False
        )

    @property
    def said(self) -> list[str]:
        path = self.folder / "said"
        return (
            [line for line in path.read_text().splitlines() if not line.startswith(("sudo", "mkdir"))]
            if path.exists()
            else []
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


DISK = 'printf "/dev/nvme0n1 Amazon Elastic Block Store\\n{}"'
LOCAL = "/dev/nvme{}n1 Amazon EC2 NVMe Instance Storage\\n"


@pytest.mark.parametrize(("disks", "used"), [(1, "/dev/nvme1n1"), (2, "/dev/md0")])
def test_local_disks_hold_the_files_of_ray_and_the_cache(machine: Machine, disks: int, used: str) -> None:
    machine.has("lsblk", DISK.format("".join(LOCAL.format(i + 1) for i in range(disks))))
    done = machine.run("scratch")
    assert done.returncode == 0, done.stderr
    nvme = machine.folder / "nvme"
    asked = machine.said
    assert any(line.startswith("mkfs.ext4") and line.endswith(used) for line in asked)
    assert any(line.startswith("mdadm") for line in asked) == (disks > 1)
    assert not any("nvme0n1" in line for line in asked)  # the root disk
    assert f"mount -o noatime {used} {nvme}" in asked
    assert f"mount --bind {nvme}/ray {machine.folder}/ray" in asked
    assert f"RESSHIFT_CACHE={nvme}/cache" in (machine.home / ".bashrc").read_text()


def test_a_disk_that_the_image_has_mounted_is_not_formatted(machine: Machine) -> None:
    machine.has("mountpoint", f'[ "$2" = {machine.folder}/nvme ]')
    for _ in range(2):
        assert machine.run("scratch").returncode == 0
    assert not any(line.startswith(("mkfs", "mdadm")) for line in machine.said)
    assert (machine.home / ".bashrc").read_text().count("RESSHIFT_CACHE") == 1


def test_a_machine_without_local_disks_spills_to_its_root(machine: Machine) -> None:
    done = machine.run("scratch")
    assert done.returncode == 0
    assert "no instance store" in done.stdout
    assert not any(line.startswith("mount ") for line in machine.said)


def test_the_environment_is_made_of_packages_alone_and_once(machine: Machine) -> None:
    python = f"""\
case "$*" in
  -c*) exit 0 ;;
  *venv*) /bin/mkdir -p {machine.home}/uv/bin; cp {machine.folder}/bin/pip {machine.home}/uv/bin/pip ;;
esac"""
    machine.has("pip", f"cp {machine.folder}/bin/uv {machine.home}/uv/bin/uv")
    machine.has(
        "uv",
        f'[ "$1" = venv ] || exit 0; /bin/mkdir -p {machine.home}/venv/bin; '
        f"cp /bin/true {machine.home}/venv/bin/python",
    )
    machine.has("python3", python)
    done = machine.run("environment")
    assert done.returncode == 0, done.stderr
    asked = machine.said
    assert not any(line.startswith("apt-get") for line in asked)
    (venv,) = [line for line in asked if line.startswith("uv venv")]
    assert "--no-python-downloads" in venv
    assert venv.split()[-2] == f"{machine.folder}/bin/python3"
    assert any(line.startswith("uv pip sync") for line in asked)
    assert machine.run("environment").returncode == 0
    assert machine.said == asked  # nothing more: this is what a node of an image does
    (machine.folder / "requirements.lock").write_text("ray==2.60.1\n")
    assert machine.run("environment").returncode == 0
    assert [line for line in machine.said[len(asked) :] if line.startswith("uv")] == [
        line for line in asked if line.startswith("uv pip")
    ]


def test_an_old_python_is_refused_in_one_line(machine: Machine) -> None:
    machine.has("python3", '[ "$1" = --version ] && echo "Python 3.10.12"; exit 1')
    done = machine.run("environment")
    assert done.returncode == 1
    assert done.stderr.strip().endswith("Python 3.11 or newer is required, got Python 3.10.12")


def test_a_gpu_that_torch_cannot_use_ends_the_set_up(machine: Machine) -> None:
    machine.has("python", "echo 'torch 2.10 (CUDA 12.8): driver too old' >&2; exit 1", where="home/venv/bin")
    assert machine.run("driver").returncode == 0  # no GPU, nothing to check
    assert machine.said == []
    vendor = machine.folder / "pci" / "0000:00:1e.0" / "vendor"
    vendor.parent.mkdir(parents=True)
    vendor.write_text("0x10de\n")
    done = machine.run("driver")
    assert done.returncode == 1
    assert "driver too old" in done.stderr
    assert "the GPU of this machine cannot be used" in done.stderr


def test_an_unknown_part_is_named(machine: Machine) -> None:
    done = machine.run("drivers")
    assert done.returncode == 1
    assert "no such part: drivers" in done.stderr


def test_shellcheck_has_nothing_to_say() -> None:
    tool = shutil.which("shellcheck", path=os.environ["PATH"])
    if tool is None:
        pytest.skip("shellcheck is not installed")
    subprocess.run([tool, str(NODE)], check=True)
