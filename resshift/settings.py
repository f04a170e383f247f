"""What `--set` can change: every field of a configuration with its default, its type and its meaning.

The meaning is that of the docstrings of the dataclasses, where a section of fields has entries

    name, other_name: What they are, and which values are allowed.

so commands, documents and code say the same.
"""

from __future__ import annotations

import inspect
import itertools
import json
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

_NAMES: dict[Any, str] = {
    NoneType: "null",
    float: "number",
    int: "integer",
    str: "text",
    bool: "true | false",
}
_ENTRY = re.compile(r" {4}(\w+(?:, \w+)*): (\S.*)")


@dataclass(frozen=True, slots=True)
class Setting:
    """A field of a configuration.

    Fields:
        path: Name after `--set`, section.field.
        value: Value, as it is written after `=`.
        allowed: Type, or the values of a choice.
        meaning: From the docstring; empty if it has no entry.
    """

    path: str
    value: str
    allowed: str
    meaning: str


def settings_of(config: Any, section: str = "") -> Iterator[Setting]:
    """Yield the settings of a configuration in its order, those of nested sections behind its own.

    Args:
        config: Instance of a dataclass of dataclasses.
        section: Path of `config` itself.
    """
    kind: type[Any] = type(config)
    meanings, hints = meanings_of(kind), get_type_hints(kind)
    prefix = f"{section}." if section else ""
    values = [(field.name, getattr(config, field.name)) for field in fields(config)]
    # A section that a configuration does not have is nothing that can be set.
    values = [
        (name, value)
        for name, value in values
        if value is not None or not any(map(is_dataclass, get_args(hints[name])))
    ]
    for name, value in values:
        if not is_dataclass(value) and not _sections(value):
            yield Setting(prefix + name, _written(value), _allowed(hints[name]), meanings.get(name, ""))
    for name, value in values:
        if is_dataclass(value):
            yield from settings_of(value, prefix + name)
        for i, one in enumerate(_sections(value)):
            yield from settings_of(one, f"{prefix}{name}.{i}")


def _sections(value: Any) -> tuple[Any, ...]:
    """Return the sections that a field holds by their numbers."""
    return value if isinstance(value, tuple) and value and is_dataclass(value[0]) else ()


def meanings_of(kind: type[Any]) -> dict[str, str]:
    """Return the entries of a docstring by the names of fields."""
    names = {field.name for field in fields(kind)}
    found: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in inspect.cleandoc(kind.__doc__ or "").splitlines():
        entry = _ENTRY.fullmatch(line)
        if entry and set(entry[1].split(", ")) <= names:
            current = [entry[2]]
            found |= dict.fromkeys(entry[1].split(", "), current)
        elif current is not None and line.startswith(" " * 8):
            current.append(line.strip())
        else:
            current = None
    return {name: " ".join(lines) for name, lines in found.items()}


def listing(config: Any, sections: tuple[str, ...] = (), width: int = 110) -> str:
    """Return the settings as lines: path, value, allowed values, and the meaning below; settings
    that share a meaning stand together.

    Args:
        config: Configuration.
        sections: Only settings that begin with one of these; all without any.
        width: Characters of a line.
    """
    lines: list[str] = []
    for meaning, together in itertools.groupby(settings_of(config), key=lambda one: one.meaning):
        chosen = [
            setting
            for setting in together
            if not sections or any(f"{setting.path}.".startswith(f"{section}.") for section in sections)
        ]
        if chosen:
            lines += [f"{setting.path}={setting.value}    ({setting.allowed})" for setting in chosen]
            lines += textwrap.wrap(meaning, width, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def _written(value: Any) -> str:
    if isinstance(value, tuple):
        joined = ",".join(_written(one) for one in value)
        return joined if len(value) > 1 else f"[{joined}]"
    if isinstance(value, Enum):
        value = value.value
    return value if isinstance(value, str) else json.dumps(value)


def _allowed(hint: Any) -> str:
    """Return a type as a user knows it."""
    if get_origin(hint) is Literal:
        return " | ".join(map(str, get_args(hint)))
    if inspect.isclass(hint) and issubclass(hint, Enum):
        return " | ".join(str(member.value) for member in hint)
    if get_origin(hint) is tuple:
        inner = [one for one in get_args(hint) if one is not ...]
        told = _allowed(inner[0])
        return f"{len(inner)} x {told}" if ... not in get_args(hint) else f"list of {told}"
    if is_dataclass(hint):
        return "section"
    if members := get_args(hint):
        return " | ".join(_allowed(one) for one in members)
    return _NAMES[hint]
