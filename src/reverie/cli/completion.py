"""`reverie completion`: what makes a shell complete commands and options."""

from typing import Literal

from reverie.cli._output import say

Shell = Literal["bash", "zsh", "fish"]
# The library's script for zsh defines a function and calls it nowhere: as a file of $fpath it has to, and read by eval it has to be made known.
_ZSH = """
if [[ $funcstack[1] == _reverie ]]; then
  _cyclopts_reverie "$@"
else
  compdef _cyclopts_reverie reverie
fi
"""


def completion(shell: Shell, /) -> None:
    """Print the script with which a shell completes commands and options of reverie.

    For bash, `eval "$(reverie completion bash)"` in ~/.bashrc; for zsh, the same in ~/.zshrc behind compinit, or write it to a file _reverie in a
    folder of $fpath; for fish, to ~/.config/fish/completions/reverie.fish. It is for this version: print it again after an update.

    Example: reverie completion bash

    Example: reverie completion fish > ~/.config/fish/completions/reverie.fish

    Args:
        shell: bash, zsh or fish.
    """
    from reverie.cli import app

    script = app.generate_completion(shell=shell).rstrip()
    say(script + (_ZSH.rstrip() if shell == "zsh" else ""))
