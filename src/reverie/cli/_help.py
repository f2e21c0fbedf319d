"""Docstrings as help texts: the line ends that keep source code narrow are none for a terminal, which has its own width."""

import inspect


def reflowed(docstring: str) -> str:
    """The docstring with each paragraph, and each entry of its `Args:`, on one line."""
    lines: list[str] = []
    for line in inspect.cleandoc(docstring).splitlines():
        indent = len(line) - len(line.lstrip())
        # Entries are indented once, and what goes on with one of them twice.
        goes_on = indent > 4 or (indent == 0 and lines and not lines[-1].startswith(" "))
        if line and lines and lines[-1] and goes_on:
            lines[-1] += f" {line.strip()}"
        else:
            lines.append(line)
    return "\n".join(lines)
