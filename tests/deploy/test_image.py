"""The Dockerfile: pinned, not root, no package index in it, and made of files that exist."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """Return (instruction, rest) with continued lines joined and comments dropped."""
    lines = [
        line
        for line in DOCKERFILE.read_text().splitlines()
        if line.strip() and not line.lstrip().startswith("#")
    ]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines())]


def test_the_base_is_pinned_and_the_user_is_not_root() -> None:
    base = next(rest for word, rest in instructions() if word == "ARG" and rest.startswith("BASE="))
    assert re.fullmatch(r"BASE=python:3\.11\.\d+-slim-\w+", base)
    assert [rest for word, rest in instructions() if word == "FROM"] == ["${BASE}"]
    user = [rest for word, rest in instructions() if word == "USER"][-1]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    assert not any(
        word == "RUN" for word, _ in instructions()[[w for w, _ in instructions()].index("USER") :]
    )


def test_what_is_copied_exists_and_passes_the_ignore_file() -> None:
    allowed = {
        line[1:]
        for line in (ROOT / "deploy/Dockerfile.dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    copied = {name for word, rest in instructions() if word == "COPY" for name in rest.split()[:-1]}
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)


def test_versions_come_from_the_lock_and_both_variants_are_there() -> None:
    (install,) = [rest for word, rest in instructions() if word == "RUN" and "uv pip install" in rest]
    assert "--constraint /tmp/constraints.txt" in install
    assert {"cuda)", "cpu)"} <= set(install.split())
    assert re.search(r"uv==\d+\.\d+\.\d+", install)
    lock = (ROOT / "requirements.lock").read_text()
    dropped = re.compile(r"^(cuda-|nvidia-|triton)", re.MULTILINE)
    assert dropped.pattern in install  # the pattern of the image is the one that is tried here
    assert {"torch", "torchvision", "ray"} <= {
        line.split("==")[0] for line in lock.splitlines() if "==" in line and not dropped.match(line)
    }


def test_no_index_host_is_named() -> None:
    assert not re.search(r"https?://(?!www\.apache)", DOCKERFILE.read_text())


def test_hadolint_has_nothing_to_say() -> None:
    tool = shutil.which("hadolint")
    if tool is None:
        pytest.skip("hadolint is not installed")
    subprocess.run([tool, str(DOCKERFILE)], check=True)
