"""Everything that must hold before a change lands: style, types, import layers, tests. Stops at the first failure."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent

CHECKS = (
    ("ruff", "check"),
    ("ruff", "format", "--check"),
    ("mypy",),
    ("lint-imports",),
    # A process for each core, up to as many as fit in memory; tests keep PyTorch to one thread each.
    ("pytest", "-q", "-n", "auto", "--maxprocesses", "4", "--dist", "worksteal"),
)


def main() -> int:
    """0 when all checks pass, else the status of the first that does not."""
    for command in CHECKS:
        sys.stdout.write(f"$ {' '.join(command)}\n")
        sys.stdout.flush()
        status = subprocess.run([BIN / command[0], *command[1:], *sys.argv[1:] * (command[0] == "pytest")], cwd=ROOT).returncode
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
