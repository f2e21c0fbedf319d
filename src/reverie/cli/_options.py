"""Options that several commands share, and what they stand for."""

import re
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter, Token

from reverie.errors import ConfigError

if TYPE_CHECKING:
    from reverie.models import Network
    from reverie.recipe import Recipe

Json = Annotated[bool, Parameter(show_default=False)]


def _numbers(_: object, tokens: Sequence[Token]) -> tuple[float, ...]:
    return tuple(float(number) for number in tokens[0].value.split(","))


def _check_pair(_: object, value: object) -> None:
    for pair in value if isinstance(value, tuple) else ():
        if not re.fullmatch(r"\s*[\w.]+\s*=.*", pair, re.DOTALL):
            raise ValueError("It must be KEY=VALUE.")


Numbers = Annotated[tuple[float, ...] | None, Parameter(converter=_numbers, n_tokens=1)]
Target = Annotated[str, Parameter(name="--for")]
Settings = Annotated[tuple[str, ...] | None, Parameter(name="--set", validator=_check_pair)]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """What a network from a Python or ONNX file does not say itself.

    Args:
        weights: Of a network from a Python file: state dict, .safetensors, .pt or .pth; only read, code in it is refused without --execute-weights.
        execute_weights: Run the code that a pickled --weights file holds, as a program with all your rights (a whole saved model, for one); for
            files alone that you would also run. A run's directory never asks for it: `resume` and its like want both options again.
        input_size: Of a network from a file: side of its square input, pixels; an ONNX file may say it.
        mean: Of a network from a file: means of pixels in 0..1, such as 0.485,0.456,0.406.
        std: Of a network from a file: standard deviations of pixels in 0..1, such as 0.229,0.224,0.225.
        classes: Of a network from a file: number of classes; an ONNX file says it.
        resize: Of a network from a file: shorter side of image files before the centre crop, pixels.
        interpolation: Of a network from a file: how image files are resized: nearest, bilinear, bicubic, lanczos.
    """

    weights: Path | None = None
    execute_weights: bool = False
    input_size: int | None = None
    mean: Numbers = None
    std: Numbers = None
    classes: int | None = None
    resize: int | None = None
    interpolation: str | None = None

    def given(self) -> dict[str, Any]:
        """Those that were given."""
        return {key: value for key, value in asdict(self).items() if value is not None and value is not False}

    def load(self, name: str) -> "Network":
        """The network `name`; only the options that were given are handed to its source."""
        from reverie import models

        return models.load(name, **self.given())


def check_trained(name: str, network: "Network", options: NetworkOptions) -> None:
    """Refuses a network whose weights are drawn anew each time that its file makes it: nobody could go on with it, or compare anything with it.

    Args:
        name, options: What it was loaded by.
    """
    made = options.weights is None and name.rpartition(":")[0].endswith(".py")
    if made and options.load(name).fingerprint != network.fingerprint:
        raise ConfigError(
            f"{name}: must have trained weights, got other ones each time that it is made; give them with --weights, or load them in {name}"
        )


NO_OPTIONS = NetworkOptions()


def read_recipe(name_or_file: str, settings: Settings, **flags: Any) -> "Recipe":
    """The recipe with what the command line says instead; arguments as for `overrides`."""
    from reverie import recipes

    return recipes.read(name_or_file, overrides(settings, **flags))


def overrides(settings: Settings, **flags: Any) -> dict[str, Any]:
    """What the command line says, by dotted key.

    Args:
        settings: KEY=VALUE; they win over `flags`.
        flags: Values by key, a double underscore for the dot; None where the flag was not given.
    """
    return {key.replace("__", "."): value for key, value in flags.items() if value is not None} | as_overrides(settings)


def as_overrides(settings: Settings) -> dict[str, Any]:
    """The values by key: TOML literals where they are, bare words as text."""
    pairs = (setting.split("=", 1) for setting in settings or ())
    return {key.strip(): _value(text.strip()) for key, text in pairs}


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
