"""`reverie completion`: what makes a shell complete commands and options."""

from typing import Literal

from reverie.cli._output import say

Shell = Literal["bash", "zsh", "fish"]


def completion(shell: Shell, /) -> None:
    """Print the script with which a shell completes commands and options of reverie.

    For bash, `eval "$(reverie completion bash)"` in ~/.bashrc; for zsh, write it to a file _reverie in a folder of $fpath; for fish, to
    ~/.config/fish/completions/reverie.fish. It is for this version: print it again after an update.

    Example: reverie completion bash

    Example: reverie completion fish > ~/.config/fish/completions/reverie.fish

    Args:
        shell: bash, zsh or fish.
    """
    from reverie.cli import app

    say(app.generate_completion(shell=shell).rstrip())
