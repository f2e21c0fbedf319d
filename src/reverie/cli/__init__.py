"""The command `reverie`, one file per subcommand.

The files import at their top only what reading the command line takes; torch comes when a command really runs, so that
`reverie --help` answers at once.

    exit status   means
    0             done
    1             a `ReverieError`: one line on standard error says what to change
    2             wrong usage: an unknown option, a missing argument, a value that is no number
    130           interrupted; the same command goes on from there

Anything else is our bug and shows its traceback.
"""

import os
import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError, Parameter

import reverie
from reverie.cli import capsule, diagnose, evaluate, export, inspect, methods, quantize, recipe, synthesize
from reverie.errors import ReverieError

app = App(
    name="reverie",
    help="Quantize trained vision networks without their training data, and prove the result in a real runtime.\n\n"
    "Example: reverie quantize embedded:digits --weight-bits 4 --evaluate held-out",
    help_format="plaintext",
    version=lambda: reverie.__version__,
    default_parameter=Parameter(negative=()),
    suppress_keyboard_interrupt=False,
    exit_on_error=False,
    print_error=False,
    result_action="return_value",
)
for command in (
    quantize.quantize,
    synthesize.synthesize,
    capsule.capsule,
    evaluate.evaluate,
    diagnose.diagnose,
    export.export,
    inspect.inspect,
    methods.methods,
    recipe.recipe,
):
    app.command(command)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (`sys.argv[1:]` by default); its exit status."""
    try:
        app(sys.argv[1:] if argv is None else list(argv), verbose=False)
    except CycloptsError as error:
        return _failed(2, f"{_one_line(error)} See --help.")
    except ReverieError as error:
        return _failed(1, _one_line(error))
    except KeyboardInterrupt:
        return _failed(130, "interrupted; run the same command again to resume")
    except BrokenPipeError:
        # Whoever read our output has gone (`reverie inspect ... | head`); the interpreter must not flush into the void.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _failed(status: int, message: str) -> int:
    sys.stderr.write(f"reverie: {message}\n")
    return status


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
