"""Board and alerts ask for metrics that somebody exports, and send people to sections that are written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

ROOT = Path(__file__).parents[2]
GRAFANA = ROOT / "deploy" / "grafana"


def board() -> dict[str, Any]:
    return json.loads((GRAFANA / "board.json").read_text())


def alerts() -> list[dict[str, Any]]:
    return [
        rule
        for group in yaml.safe_load((GRAFANA / "alerts.yaml").read_text())["groups"]
        for rule in group["rules"]
    ]


def expressions() -> list[str]:
    panels = [target["expr"] for panel in board()["panels"] for target in panel.get("targets", [])]
    return panels + [rule["expr"] for rule in alerts()]


def exported() -> set[str]:
    """Return the metrics of the bulk job (declared in pipelines/) and those that Ray's own boards ask for."""
    ours = {
        f"ray_{name}"
        for path in (ROOT / "pipelines").rglob("*.py")
        for name in re.findall(r'"(resshift_\w+)"', path.read_text())
    }
    boards = Path(ray.__file__).parent / "dashboard" / "modules" / "metrics" / "dashboards"
    return ours | {
        name for path in boards.glob("*.py") for name in re.findall(r"\bray_\w+", path.read_text())
    }


def exported_by_the_gateway() -> set[str]:
    """Return the names at /metrics, as Prometheus stores them."""
    from serve.http.metrics import Metrics

    made = Metrics()
    made.requests.labels("/", "200").inc()
    made.megapixels.labels("in").inc()
    made.phases.labels("model").observe(1)
    made.ready.labels("m").set(1)
    made.replicas.labels("m").set(1)
    return {
        line.split("{")[0].split(" ")[0]
        for line in made.text().decode().splitlines()
        if line.startswith("resshift_")
    }


def asked(expression: str) -> set[str]:
    without_labels = re.sub(r"\{[^}]*\}|by \([^)]*\)", "", expression)
    return set(re.findall(r"\b(?:ray|resshift)_\w+", without_labels))


def test_every_metric_is_exported_by_somebody() -> None:
    assert {
        name for expression in expressions() for name in asked(expression)
    } - exported() - exported_by_the_gateway() == set()


def test_every_metric_of_the_bulk_job_is_on_the_board() -> None:
    shown = {
        name
        for panel in board()["panels"]
        for target in panel.get("targets", [])
        for name in asked(target["expr"])
    }
    assert {name for name in exported() if name.startswith("ray_resshift_bulk")} <= shown


def test_every_metric_of_the_gateway_is_on_the_board() -> None:
    shown = {
        name
        for panel in board()["panels"]
        for target in panel.get("targets", [])
        for name in asked(target["expr"])
    }
    families = {re.sub(r"_(bucket|count|sum|created)$", "", name) for name in exported_by_the_gateway()}
    assert {name.removesuffix("_total") for name in families} <= {
        re.sub(r"_(bucket|total)$", "", name) for name in shown
    }


@pytest.mark.parametrize("expression", expressions())
def test_brackets_close(expression: str) -> None:
    for opening, closing in ("()", "{}", "[]"):
        assert expression.count(opening) == expression.count(closing)
    assert expression.count('"') % 2 == 0


def test_panels_have_their_own_number_and_do_not_overlap() -> None:
    panels = board()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for p in panels
        for g in [p["gridPos"]]
        for x in range(g["x"], g["x"] + g["w"])
        for y in range(g["y"], g["y"] + g["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


def test_states_of_training_are_states_that_ray_has() -> None:
    from ray.train.v2._internal.execution.controller.state import TrainControllerStateType

    named = {
        state
        for expression in expressions()
        for state in re.findall(r'ray_train_controller_state="(\w+)"', expression)
    }
    assert named
    assert named <= {state.name for state in TrainControllerStateType}


def test_every_alert_leads_to_a_section_of_the_runbook() -> None:
    headings = re.findall(r"^#+ (.+)$", (ROOT / "docs" / "operate.md").read_text(), re.MULTILINE)
    anchors = {heading.lower().replace(" ", "-") for heading in headings}
    for rule in alerts():
        page, anchor = rule["annotations"]["runbook"].split("#")
        assert page == "docs/operate.md"
        assert anchor in anchors, rule["alert"]
        assert rule["labels"]["severity"] in {"page", "ticket"}
