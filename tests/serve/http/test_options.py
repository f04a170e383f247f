"""Content negotiation, and settings that refuse what they do not know."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from serve.http.options import negotiated_format
from serve.http.problems import Problem
from serve.jobs import check_prefix
from serve.settings import parse


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", "png"),
        ("*/*", "png"),
        ("image/webp", "webp"),
        ("text/html, image/*;q=0.8", "png"),
        ("image/png;q=0.5, image/jpeg", "jpeg"),
        ("image/avif,image/webp,image/apng,*/*;q=0.8", "avif"),
        ("IMAGE/TIFF", "tiff"),
    ],
)
def test_format_is_the_best_that_is_accepted(accept: str, expected: str) -> None:
    assert negotiated_format(None, accept) == expected


@pytest.mark.parametrize("accept", ["application/json", "image/gif", "image/png;q=0"])
def test_nothing_acceptable_is_406(accept: str) -> None:
    with pytest.raises(Problem) as refused:
        negotiated_format(None, accept)
    assert refused.value.status == 406
    assert negotiated_format("jpeg", accept) == "jpeg"  # the option is more than a preference


@pytest.mark.parametrize(
    "args",
    [
        {"modelz": ["a"]},
        {"models": []},
        {"models": ["a", "a"]},
        {"limits": {"queue": -1}},
        {"limits": {"body_mb": 0}},
        {"limits": {"timeout": 3}},
        {"keys": [{"name": "a", "sha256": "b"}]},
        {"jobs": {"bulk": {"output": {"frames": "some"}}}},
    ],
)
def test_settings_refuse_what_cannot_be(args: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        parse(args)


@pytest.mark.parametrize("uri", ["s3://in/photos", "s3://in/photos/2026", "/data/in/x", "file:///data/in/x"])
def test_places_inside_the_prefixes_are_allowed(uri: str) -> None:
    check_prefix(uri, ("s3://in/photos", "/data/in"), "source")


@pytest.mark.parametrize(
    "uri",
    [
        *(
            "s3://in/photos2",
            "s3://in",
            "s3://other/photos",
            "s3://in/photos/../secret",
            "/data",
            "/data/in/../secret",
            "/etc/passwd",
            "",
        ),
        *(
            "http://169.254.169.254/latest",
            "gopher://127.0.0.1/",
            "https://in/photos",
            "/data/in\0/x",
            "s3://",
        ),
    ],
)
def test_places_outside_the_prefixes_are_forbidden(uri: str) -> None:
    with pytest.raises(Problem) as refused:
        check_prefix(uri, ("s3://in/photos", "/data/in"), "source")
    assert refused.value.status == 403
