"""Commands in the documents are commands that exist: each line of a job is parsed by that job's own parser,
every file named is there.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.scripts import load_script

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# A file's name in backticks, with a folder in it, or of this repository's top.
_FILE = re.compile(
    r"`((?:resshift|pipelines|serve|jobs|benchmarks|tests|deploy|docs)/[\w./-]+\.\w+|[\w-]+\.(?:yaml|lock|toml))`"
)
_MADE_BY_RUNS = {"config.yaml"}


def code(document: Path) -> Iterator[str]:
    """Yield the lines of code blocks (continued ones joined) and the code in running text."""
    text = document.read_text()
    blocks = re.findall(r"```sh\n(.*?)```|((?:^    .*\n)+)", text, re.MULTILINE | re.DOTALL)
    for fenced, indented in blocks:
        yield from (fenced or indented).replace("\\\n", " ").splitlines()
    yield from (" ".join(one.split()) for one in re.findall(r"(?<!`)`([^`]+)`(?!`)", text))


def commands() -> list[tuple[str, str]]:
    """Return (document, command line of a job), the part from `python jobs/...` on."""
    found: list[tuple[str, str]] = []
    for document in DOCUMENTS:
        for line in code(document):
            at = line.find("python jobs/")
            if at >= 0:
                found.append((document.name, re.sub(r"\s#.*|\s*\|.*", "", line[at:])))
    return found


@pytest.mark.parametrize(("document", "line"), commands())
def test_every_command_parses(document: str, line: str) -> None:
    _, script, *arguments = shlex.split(line)
    assert (ROOT / script).exists(), document
    if arguments == [] or "..." in arguments:  # `python jobs/train.py ...` stands for any
        return
    try:
        load_script(script).arguments().parse_args(arguments)
    except SystemExit as stop:
        pytest.fail(f"{document}: {line!r} ends with {stop.code}")


def test_the_commands_were_found() -> None:
    jobs = {shlex.split(line)[1] for _, line in commands()}
    assert {
        "jobs/train.py",
        "jobs/upscale.py",
        "jobs/prepare.py",
        "jobs/evaluate.py",
        "jobs/doctor.py",
    } <= jobs
    assert {document for document, _ in commands()} >= {
        "README.md",
        "operate.md",
        "faq.md",
        "bulk.md",
        "training.md",
    }


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_and_links_lead_somewhere(document: Path) -> None:
    text = document.read_text()
    named = {name for name in _FILE.findall(text) if name not in _MADE_BY_RUNS}
    tops = ("", "resshift", "docs", "deploy", "deploy/aws", "deploy/kuberay")
    missing = {name for name in named if not any((ROOT / top / name).exists() for top in tops)}
    links = {link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link}
    missing |= {link for link in links if link and not (document.parent / link).exists()}
    assert missing == set()


def test_settings_in_commands_are_settings_that_exist() -> None:
    from pipelines.bulk.settings import BulkSettings
    from resshift.config import with_settings

    tried = 0
    for _, line in commands():
        _, script, *arguments = shlex.split(line)
        if Path(script).stem in ("upscale", "doctor") and "..." not in arguments and arguments:
            settings = load_script(script).arguments().parse_args(arguments).set
            with_settings(BulkSettings(), settings)
            tried += len(settings)
    assert tried > 0
