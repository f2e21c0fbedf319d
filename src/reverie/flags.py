"""What a network was loaded with, as words of a command line."""

from collections.abc import Mapping
from typing import Any


def words(options: Mapping[str, Any]) -> list[str]:
    """Such as `--mean 0.5,0.5,0.5` for `{"mean": (0.5, 0.5, 0.5)}`.

    Args:
        options: Keyword arguments of `models.load`; a flag that is on stands alone, what is off or None is left out.
    """
    found: list[str] = []
    for name, value in options.items():
        if value is None or value is False:
            continue
        found.append(f"--{name.replace('_', '-')}")
        if value is not True:
            found.append(",".join(map(str, value)) if isinstance(value, tuple | list) else str(value))
    return found
