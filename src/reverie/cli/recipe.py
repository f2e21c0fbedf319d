"""`reverie recipe`: what decides a result, every number of it."""

from reverie.cli._options import Settings, read_recipe
from reverie.cli._output import say


def recipe(name: str | None = None, /, *, settings: Settings = None) -> None:
    """Print a recipe as TOML, every setting of every method resolved; without a name, list the presets.

    Example: reverie recipe adaround --set quantization.weight_bits=3 > mine.toml

    Args:
        name: A preset or a .toml file.
        settings: KEY=VALUE overrides any recipe key, such as synthesis.steps=100; repeatable.
    """
    from reverie import recipes

    if name is None:
        for preset in recipes.presets():
            say(f"{preset}: {recipes.about(preset)}")
    else:
        say(recipes.to_toml(read_recipe(name, settings)).rstrip())
