"""The bill of materials, and the script of a release with programs in the place of those that take long or
need a network.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.scripts import load_script

ROOT = Path(__file__).parents[2]
LOCK = """\
# a comment
attrs==26.1.0
    # via jsonschema
colorama==0.4.6 ; sys_platform == 'no-such-platform'
    # via jsonschema
jsonschema[format]==4.26.0
    # via
    #   resshift (pyproject.toml)
    #   moto
moto==5.2.5
    # via resshift (pyproject.toml)
"""


def bill(lock: str) -> dict[str, Any]:
    return load_script("deploy/sbom.py").bill(lock, "1.2.3")


def test_components_are_the_pins_of_this_platform_and_dependencies_those_of_the_lock() -> None:
    made = bill(LOCK)
    assert [(one["name"], one["version"]) for one in made["components"]] == [
        ("attrs", "26.1.0"),
        ("jsonschema", "4.26.0"),
        ("moto", "5.2.5"),
    ]
    assert {one["ref"]: one["dependsOn"] for one in made["dependencies"]} == {
        "pkg:pypi/attrs@26.1.0": [],
        "pkg:pypi/jsonschema@4.26.0": ["pkg:pypi/attrs@26.1.0"],
        "pkg:pypi/moto@5.2.5": ["pkg:pypi/jsonschema@4.26.0"],
        "pkg:pypi/resshift@1.2.3": ["pkg:pypi/jsonschema@4.26.0", "pkg:pypi/moto@5.2.5"],
    }
    assert made["components"][1]["licenses"] == [{"license": {"name": "MIT"}}]


def test_the_lock_of_the_repository_is_one_graph() -> None:
    made = bill((ROOT / "requirements.lock").read_text())
    names = {one["name"] for one in made["components"]}
    assert {"torch", "ray", "numpy"} <= names
    needs = {one["ref"]: one["dependsOn"] for one in made["dependencies"]}
    reached, open_refs = set[str](), [made["metadata"]["component"]["bom-ref"]]
    while open_refs:
        ref = open_refs.pop()
        if ref not in reached:
            reached.add(ref)
            open_refs += needs[ref]
    assert reached == set(needs)
    assert all(one["licenses"] for one in made["components"])


def test_the_bill_is_valid_where_a_validator_is_installed() -> None:
    if importlib.util.find_spec("cyclonedx") is None:
        pytest.skip("cyclonedx-python-lib is not installed")
    from cyclonedx.schema import SchemaVersion  # pyright: ignore
    from cyclonedx.validation.json import JsonStrictValidator  # pyright: ignore

    text = json.dumps(bill((ROOT / "requirements.lock").read_text()))
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None  # pyright: ignore


TOOL = """\
#!/bin/bash
echo "{name} $*" >> {folder}/said
{body}
"""


class Release:
    """A repository of one commit with the tag v1.2.3, and programs that write down what they are asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tree = folder / "tree"
        for name, text in (
            ("resshift/__init__.py", '__version__ = "1.2.3"\n'),
            ("CHANGELOG.md", "## 1.2.3\n"),
            (".gitignore", "dist/\n"),
            (".ci/release", (ROOT / ".ci/release").read_text()),
        ):
            path = self.tree / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        self.git("init", "--quiet")
        self.commit()
        self.git("tag", "v1.2.3")
        (folder / "bin").mkdir()
        self.has("make", "[[ $* != *wheel* ]] || { mkdir -p dist; echo x > dist/resshift.whl; }")
        self.has("docker")
        self.has("trivy")

    def git(self, *arguments: str) -> None:
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *identity, *arguments], cwd=self.tree, check=True, capture_output=True)

    def commit(self) -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", "x")

    def has(self, name: str, body: str = "") -> None:
        path = self.folder / "bin" / name
        path.write_text(TOOL.format(name=name, folder=self.folder, body=body))
        path.chmod(0o755)

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", ".ci/release", *arguments],
            cwd=self.tree,
            env={"PATH": f"{self.folder}/bin:/usr/bin:/bin", "HOME": str(self.folder), **variables},
            capture_output=True,
            text=True,
            check=False,
        )

    @property
    def said(self) -> list[str]:
        path = self.folder / "said"
        return path.read_text().splitlines() if path.exists() else []


@pytest.mark.slow
def test_a_release_tests_builds_and_scans_in_this_order(tmp_path: Path) -> None:
    release = Release(tmp_path)
    done = release.run("example.org", BASE="python@sha256:0", TORCH_INDEX="https://index.example")
    assert done.returncode == 0, done.stderr
    first, second, *images = release.said
    assert [first, second] == ["make test licences audit", "make wheel sbom"]
    assert [line.split()[0] for line in images] == ["docker", "trivy"] * 2
    assert "--build-arg BASE=python@sha256:0" in images[0]
    assert images[1].endswith("example.org/resshift:1.2.3-cuda")
    assert images[3].endswith("example.org/resshift:1.2.3-cpu")
    assert "resshift.whl" in (release.tree / "dist" / "SHA256SUMS").read_text()


@pytest.mark.slow
def test_a_release_ends_at_the_first_step_that_fails(tmp_path: Path) -> None:
    release = Release(tmp_path)
    release.has("trivy", "exit 1")
    assert release.run("example.org").returncode == 1
    assert not (release.tree / "dist" / "SHA256SUMS").exists()
    assert "usage" in release.run().stderr
    (release.tree / "new.py").write_text("")
    assert "no commit" in release.run("example.org").stderr
    release.commit()
    assert "no tag" in release.run("example.org").stderr
    release.git("tag", "v1.2.4")
    assert "another version" in release.run("example.org").stderr
    (release.tree / "resshift/__init__.py").write_text('__version__ = "1.2.5"\n')
    release.commit()
    release.git("tag", "v1.2.5")
    assert "no section 1.2.5" in release.run("example.org").stderr
