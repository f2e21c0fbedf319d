"""The command `reverie`, one file per subcommand.

The files import at their top only what reading the command line takes; torch comes when a command really runs, so that
`reverie --help` answers at once.

    exit status   means
    0             done
    1             a `ReverieError`: one line on standard error says what to change
    2             wrong usage: an unknown option, a missing argument, a value that is no number
    130           interrupted; `reverie resume RUN`, or the same command, goes on from there (143: by SIGTERM)

Anything else is our bug and shows its traceback.
"""

import os
import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError, Parameter, UnknownCommandError, UnknownOptionError, UnusedCliTokensError

import reverie
from reverie.cli import (
    benchmark,
    capsule,
    compare,
    completion,
    diagnose,
    evaluate,
    export,
    images,
    inspect,
    methods,
    push,
    quantize,
    recipe,
    resume,
    runs,
    synthesize,
    verify,
)
from reverie.cli._help import reflowed
from reverie.errors import ReverieError, nearest, unknown
from reverie.interrupts import Interrupted

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
    resume.resume,
    synthesize.synthesize,
    capsule.capsule,
    evaluate.evaluate,
    diagnose.diagnose,
    export.export,
    verify.verify,
    benchmark.benchmark,
    images.images,
    runs.runs,
    compare.compare,
    push.push,
    inspect.inspect,
    methods.methods,
    recipe.recipe,
    completion.completion,
):
    command.__doc__ = reflowed(command.__doc__ or "")
    app.command(command)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (`sys.argv[1:]` by default); its exit status."""
    try:
        app(sys.argv[1:] if argv is None else list(argv), verbose=False)
    except CycloptsError as error:
        return _failed(2, _wrong_usage(error))
    except ReverieError as error:
        return _failed(1, _one_line(error))
    except Interrupted as error:
        return _failed(128 + error.number, str(error))
    except KeyboardInterrupt:
        return _failed(130, "interrupted; run the same command again to resume")
    except BrokenPipeError:
        # Whoever read our output has gone (`reverie inspect ... | head`); the interpreter must not flush into the void.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _wrong_usage(error: CycloptsError) -> str:
    """What is wrong with the words of the command line, and the nearest that would be right."""
    if isinstance(error, UnknownCommandError):
        word = (error.unused_tokens or [""])[0]
        if word.startswith("-"):
            return f"unknown option {word!r}; `reverie --help` lists them, and options of a command stand behind it"
        return str(unknown("command", word, [name for name in app if not name.startswith("-")]))
    if isinstance(error, UnknownOptionError):
        command, option = " ".join(error.command_chain or ()), error.token.keyword or error.token.value
        near = nearest(option, [name for argument in error.argument_collection for name in argument.names])
        hint = f"did you mean {near}?" if near else f"`{f'reverie {command}'.strip()} --help` lists them"
        return f"unknown option {option!r}{f' of {command}' if command else ''}; {hint}"
    if isinstance(error, UnusedCliTokensError):
        return _left_over(" ".join(error.command_chain or ()), list(error.unused_tokens or ()), error.root_input_tokens or [])
    return f"{_one_line(error)} See --help."


def _left_over(command: str, words: list[str], typed: Sequence[str]) -> str:
    numbers = [word for word in words if word.replace(".", "", 1).isdigit()]
    cure = (
        "numbers of one option are one word, such as --mean 0.485,0.456,0.406"
        if numbers and not {"--mean", "--std"}.isdisjoint(typed)
        else f"`reverie {command} --help` lists what it takes"
    )
    return f"{command}: got more words than it takes, {', '.join(map(repr, words))}; {cure}"


def _failed(status: int, message: str) -> int:
    sys.stderr.write(f"reverie: {message}\n")
    return status


def _one_line(error: Exception) -> str:
    # A file's name may hold what moves a terminal's cursor.
    text = " ".join(str(error).split())
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)
