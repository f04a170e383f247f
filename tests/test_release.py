"""What a release is made of: the wheel, by its list of files and in an environment of its own, and the
licences of what it needs.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from email import message_from_string
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

import resshift
from tests.scripts import load_script

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel with the installed build backend; no index is asked."""
    target = tmp_path_factory.mktemp("wheel")
    build = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(target)], check=True, cwd=ROOT)
    (built,) = target.glob("*.whl")
    return built


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.mark.slow
def test_the_wheel_has_every_file_of_the_packages(wheel: Path) -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "resshift", "pipelines", "serve"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    expected = {name for name in tracked.stdout.splitlines() if (ROOT / name).exists()}
    assert expected
    assert expected - names(wheel) == set()
    assert {
        "resshift/pretrained/tiny-x4/model.safetensors",
        "resshift/pretrained/tiny-x4/config.json",
        "resshift/pretrained/tiny-x4-s4/model.safetensors",
        "pipelines/ledger/report.html",
    } <= names(wheel)


@pytest.mark.slow
def test_the_wheel_has_nothing_else(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in names(wheel)}
    assert tops == {"resshift", "pipelines", "serve", f"resshift-{resshift.__version__}.dist-info"}
    assert [name for name in names(wheel) if "__pycache__" in name or name.endswith((".pyc", ".log"))] == []
    assert wheel.stat().st_size < 40 << 20


@pytest.mark.slow
def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        about = message_from_string(
            archive.read(f"resshift-{resshift.__version__}.dist-info/METADATA").decode()
        )
        assert f"resshift-{resshift.__version__}.dist-info/licenses/LICENSE" in archive.namelist()
    assert about["Version"] == resshift.__version__
    assert about["License-Expression"] == "Apache-2.0"
    assert about["Requires-Python"] == ">=3.11"
    assert {"train", "serve", "demo"} <= set(about.get_all("Provides-Extra") or [])


@pytest.mark.slow
def test_the_installed_wheel_upscales_outside_the_repository(wheel: Path, tmp_path: Path) -> None:
    """Unpacked into a folder of its own, first on the path of an interpreter that sees the dependencies and
    not the repository.
    """
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import numpy as np, resshift\n"
        f"assert resshift.__file__.startswith({str(tmp_path)!r}), resshift.__file__\n"
        "out = resshift.Upscaler.from_pretrained('tiny-x4', device='cpu')(np.zeros((16, 16, 3), np.uint8), "
        "seed=0)\n"
        "assert out.shape == (64, 64, 3) and out.dtype == np.uint8\n"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": ""},
        check=True,
    )


def licences() -> ModuleType:
    return load_script("deploy/licences.py")


def test_nothing_installed_is_refused() -> None:
    found = list(licences().installed())
    assert {"torch", "ray", "numpy"} <= {one.package.lower() for one in found}
    assert [(one.package, one.text) for one in found if one.is_refused] == []


def test_exceptions_are_of_packages_that_are_there() -> None:
    """An exception that outlives its package would let the next one of that name through."""
    module = licences()
    have = {one.metadata["Name"].lower() for one in metadata.distributions()}
    named = set(module.SEPARATE_PROGRAMS) | (set(module.KNOWN) if sys.platform == "linux" else set())
    assert named <= have


@pytest.mark.parametrize(
    ("text", "is_refused"),
    [
        ("MIT", False),
        ("Apache-2.0 AND BSD-3-Clause", False),
        ("LGPL-2.1-or-later", False),
        ("GNU Lesser General Public License v3 (LGPLv3)", False),
        ("GPL-3.0-only OR MIT", False),
        ("GPLv2", True),
        ("GNU General Public License v3 (GPLv3)", True),
        ("AGPL-3.0", True),
        ("CC BY-NC 4.0", True),
        ("CC-BY-NC-SA-4.0", True),
        ("S-Lab License, non-commercial", True),
        ("", True),
    ],
)
def test_what_is_refused(text: str, is_refused: bool) -> None:
    assert licences().Licence("some-package", "1.0", text).is_refused is is_refused
