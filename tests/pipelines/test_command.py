"""What all commands share."""

from __future__ import annotations

import pytest

from pipelines.command import UsageError, min_max


@pytest.mark.parametrize(
    ("text", "expected"), [("1", (1, 1)), ("4", (4, 4)), ("2:8", (2, 8)), ("3:3", (3, 3))]
)
def test_a_range_is_a_number_or_two(text: str, expected: tuple[int, int]) -> None:
    assert min_max("--workers", text) == expected


@pytest.mark.parametrize("text", ["0", "4:2", "0:2", "-1", "two", "1:2:3", "", "1:", ":2", "1 : 2", "\u0663"])
def test_another_range_is_refused_with_the_name_of_its_flag(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--workers must be N or MIN:MAX with 1 <= MIN <= MAX, got"):
        min_max("--workers", text)


def test_a_range_may_begin_at_zero_and_not_end_there() -> None:
    assert min_max("--replicas", "0:2", least=0) == (0, 2)
    with pytest.raises(UsageError, match="0 <= MIN <= MAX and 1 <= MAX, got '0'"):
        min_max("--replicas", "0", least=0)
