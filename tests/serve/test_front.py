"""Configurations of before still start."""

from __future__ import annotations

import importlib
import logging
from typing import Any

import pytest
from ray.serve.schema import ServeDeploySchema

# As serve/config.yaml had it, and `python -m serve --print-config` wrote it.
OF_BEFORE = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.front:middlewares",
    "RESSHIFT_SERVE_BODY_MB": "64",
}


def test_the_callback_of_before_can_be_called_and_says_that_it_does_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = {"controller_options": {"runtime_env": {"env_vars": OF_BEFORE}}, "applications": []}
    controller: Any = ServeDeploySchema.model_validate(config).controller_options
    variables = controller.model_dump()["runtime_env"]["env_vars"]
    module, _, name = variables["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"].partition(":")
    with caplog.at_level(logging.WARNING):
        assert getattr(importlib.import_module(module), name)() == []
    assert "no longer does anything: delete controller_options" in caplog.text
