"""How the local engine and its processes talk: one JSON object a line, marked, so that what others print is not taken
for it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_MARK = "\x1evaecirc "


def sent(message: Mapping[str, Any]) -> str:
    """The line of a message."""
    return f"{_MARK}{json.dumps(message, allow_nan=False)}\n"


def received(line: str) -> dict[str, Any] | None:
    """The message of a line, None for a line that is none."""
    return json.loads(line.removeprefix(_MARK)) if line.startswith(_MARK) else None
