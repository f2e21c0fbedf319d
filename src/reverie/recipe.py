"""A recipe decides a result completely: which images, which grids, which rounding, with every number.

It is a TOML file of flat tables. A table with a `method` key chooses a plug-in, and its other keys are that method's own
settings: a method is its own configuration, so defaults stand once, in its class.

    seed = 0
    images = 64

    [synthesis]                    [quantization]              [rounding]
    method = "zeroq"               weight_bits = 4             method = "adaround"
    steps = 200                    activation_bits = 8
"""

import dataclasses
import hashlib
import math
import tomllib
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

from pydantic import TypeAdapter, ValidationError

from reverie import export, observers, plugins, received, recipes, rounding, synthesis
from reverie.errors import ConfigError, at, check_range, nearest, unknown
from reverie.export import Exporter
from reverie.graph.placement import Bits, PlacementKind
from reverie.grid import MAX_BITS, MIN_BITS
from reverie.images.mosaic import mosaic_count
from reverie.observers import Observer
from reverie.observers.mse import Mse
from reverie.observers.percentile import Percentile
from reverie.recovery.clipping import Clipping
from reverie.recovery.distillation import After, Distillation
from reverie.recovery.mixed_precision import MixedPrecision
from reverie.recovery.reconstruction import Reconstruction
from reverie.rounding import Rounding
from reverie.rounding.nearest import Nearest
from reverie.synthesis import Synthesis
from reverie.synthesis.zeroq import ZeroQ

# Fewer images do not tell how much they differ.
_LEAST_TO_ESTIMATE_ON = 8


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """What is put on which grid.

    Args:
        placement: "integer" (what an integer runtime executes) or "literature" (for comparison with papers).
        weight_bits, activation_bits: 2 to 8; not read where `mixed_precision` chooses.
        end_bits: Bits of the first and last layer and of what they read; ignored by the literature placement.
        stem_bits: Bits of what the first layer writes; likewise. BRECQ, QDrop and Genie count it among the ends.
        sum_bits: Bits of what sums and averages read, such as the stream of a residual network; likewise. Layers that read the same tensor read
            it through a grid of `activation_bits`, if those are fewer.
        symmetric: Activations on signed grids whose zero point is 0, for targets without zero points (`tensorrt`); what follows a ReLU
            then has half of the codes.
        equalize: Cross-layer equalization before anything else.
        bias_correction: Give every channel its mean back after rounding.
        batch_norm_adaptation: Give every channel its mean and deviation back, after rounding, or before distillation, which
            then starts from there (ACQ's, reconstructed).
    """

    placement: PlacementKind = "integer"
    weight_bits: int = 8
    activation_bits: int = 8
    end_bits: int = 8
    stem_bits: int = 8
    sum_bits: int = 8
    symmetric: bool = False
    equalize: bool = False
    bias_correction: bool = True
    batch_norm_adaptation: bool = False

    def __post_init__(self) -> None:
        if self.bias_correction and self.batch_norm_adaptation:
            raise ConfigError(
                "bias_correction must be false with batch_norm_adaptation, got both; adaptation corrects biases too: use "
                "--set quantization.bias_correction=false"
            )
        if self.symmetric and self.placement == "literature":
            raise ConfigError(
                "symmetric must be false with the literature placement, got true; it is for targets without zero points: use "
                "--placement integer"
            )
        bits = (MIN_BITS, MAX_BITS)
        check_range(self, weight_bits=bits, activation_bits=bits, end_bits=bits, stem_bits=bits, sum_bits=bits)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a result but the network and the user's own images.

    Args:
        seed: Of everything random.
        images: Synthetic images; 0 means only the real ones given.
        image_scale: Their height and width, in shares of what the network expects, up to 1. A network that takes any size learns as
            much from images of half the side, four of which cost what one does; real images beside them are scaled down, too.
        mosaic: With an `image_scale` of 1/n, whether the student learns from the synthetic images joined n x n to whole ones, each of
            them twice, and from real images whole; few bits of activations are else fitted to borders that whole images do not have.
        calibration_images: At most so many of the synthetic and of the real images, evenly from all, decide ranges, adaptation, rounding and
            bias correction, which hold in memory what the network computes of them; distillation sees all.
        held_out: Synthetic images, from another seed, on which agreement is measured.
        estimate_images: Synthetic images, made otherwise and from another seed, on which the drop of accuracy is estimated where there
            are no labels; 0 for no estimate.
        real_share: Share of real images in what is learned from, where there are real and synthetic ones, up to 0.9, or 1; 0 means
            in proportion to their numbers, but at most half of a batch of distillation.
        real_apart: Whether ranges and codes are learned from the synthetic images alone, and the whole network distilled on the real ones
            alone, where there are both: images that codes were fitted to have little to say about what is left over.
        synthesis, activations, weights, rounding, export: The methods.
        quantization, mixed_precision, clipping, reconstruction, distillation: The numbers of the stages.
        bits: Of single tensors by name, such as `weights = {fc = 8}`; they win over all else.
    """

    seed: int = 0
    images: int = 64
    image_scale: float = 1.0
    mosaic: bool = False
    calibration_images: int = 256
    held_out: int = 32
    estimate_images: int = 32
    real_share: float = 0.0
    real_apart: bool = False
    synthesis: Synthesis = field(default_factory=ZeroQ)
    quantization: Quantization = field(default_factory=Quantization)
    bits: Bits = field(default_factory=Bits)
    mixed_precision: MixedPrecision = field(default_factory=MixedPrecision)
    activations: Observer = field(default_factory=Percentile)
    weights: Observer = field(default_factory=Mse)
    rounding: Rounding = field(default_factory=Nearest)
    reconstruction: Reconstruction = field(default_factory=Reconstruction)
    clipping: Clipping = field(default_factory=Clipping)
    distillation: Distillation = field(default_factory=Distillation)
    export: Exporter | None = None

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("images", "held_out", "estimate_images"), (0, math.inf))
        check_range(self, **counts, calibration_images=(1, math.inf), image_scale=(1e-2, 1), real_share=(0, 1))
        if 0 < self.estimate_images < _LEAST_TO_ESTIMATE_ON:
            raise ConfigError(
                f"estimate_images must be at least {_LEAST_TO_ESTIMATE_ON}, or 0, got {self.estimate_images}; fewer do not tell how much they differ"
            )
        if self.mosaic and (self.tiles == 1 or not math.isclose(self.tiles * self.image_scale, 1, abs_tol=5e-3)):
            raise ConfigError(
                f"mosaic must be false with image_scale = {self.image_scale:g}, which is not 1/n of a whole n above 1, got true; use "
                "--set image_scale=0.5, or --set mosaic=false"
            )
        if self.mosaic and self.distillation.class_weight:
            raise ConfigError(
                f"distillation.class_weight must be 0 with mosaic, got {self.distillation.class_weight:g}; an image joined of several "
                "has no one label: use --set mosaic=false"
            )
        if self.real_apart and (self.real_share or not self.distillation.steps):
            raise ConfigError(
                f"real_apart must be false with real_share = {self.real_share:g} and distillation.steps = {self.distillation.steps}, got true; "
                "it distils on real images alone: use --set real_share=0 and at least one step, or --set real_apart=false"
            )
        if self.real_apart and self.quantization.bias_correction:
            raise ConfigError(
                "quantization.bias_correction must be false with real_apart, got true; it would correct on synthetic images what was learned "
                "on real ones: use --set quantization.bias_correction=false"
            )
        if 0.9 < self.real_share < 1:
            raise ConfigError(
                f"real_share must be at most 0.9, or 1, got {self.real_share}; beside a fixed number of synthetic images a batch "
                "would grow without bound"
            )

    @property
    def tiles(self) -> int:
        """How many synthetic images are side by side in what the student learns from; 1 where they are not joined."""
        return round(1 / self.image_scale) if self.mosaic else 1

    @property
    def learned_images(self) -> int:
        """How many images the student learns from that are synthetic, or joined of synthetic ones."""
        return mosaic_count(self.images, self.tiles) if self.mosaic else self.images

    def share_of_real(self, synthetic: int, real: int) -> float:
        """The share of real images in a batch of distillation, where there are `synthetic` and `real` images in all."""
        if not synthetic or not real:
            return float(not synthetic)
        if self.keeps_apart(synthetic, real):
            return 1.0
        # In proportion, a thousand photographs beside 64 synthetic images would be a batch of a thousand.
        return self.real_share or min(real / (real + synthetic), 0.5)

    def keeps_apart(self, synthetic: int, real: int) -> bool:
        """Whether ranges and codes are learned without the real images, where there are `synthetic` and `real` ones in all."""
        return self.real_apart and bool(synthetic and real)

    def distils_after(self, stage: After) -> bool:
        """Whether there is a distillation, and it follows that stage."""
        return self.distillation.steps > 0 and self.distillation.after == stage

    @property
    def mean_bits(self) -> tuple[float, float]:
        """Bits of weights and of activations; where they are chosen, their mean."""
        settings, mixed = self.quantization, self.mixed_precision
        weights = mixed.effective_bits or settings.weight_bits
        return float(weights), float(mixed.effective_activation_bits or settings.activation_bits)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the resolved recipe, 16 hex digits."""
        return hashlib.sha256(to_toml(self).encode()).hexdigest()[:16]


# Which plug-in package a table's `method` is looked up in.
_PACKAGES: dict[str, ModuleType] = {
    "synthesis": synthesis,
    "activations": observers,
    "weights": observers,
    "rounding": rounding,
    "export": export,
}
_TABLES: dict[str, type[Any]] = {
    "quantization": Quantization,
    "bits": Bits,
    "mixed_precision": MixedPrecision,
    "reconstruction": Reconstruction,
    "clipping": Clipping,
    "distillation": Distillation,
}


def presets() -> list[str]:
    """Names of the recipes that come with Reverie."""
    files = resources.files(recipes).iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def about(preset: str) -> str:
    """What a preset is for: the comment at the top of its file."""
    first = (resources.files(recipes) / f"{preset}.toml").read_text().partition("\n")[0]
    return first.removeprefix("#").strip()


def read(name_or_file: str, overrides: dict[str, Any] | None = None) -> Recipe:
    """A preset by its name, or a recipe file by its path.

    Args:
        overrides: Values by dotted key, such as `{"quantization.weight_bits": 4}`; they win over the file. A new
            `X.method` drops the other settings of table X, which belonged to another method.

    Raises:
        ConfigError: No such recipe; or an unknown key, method or value in it, named together with the choices.
    """
    path = Path(name_or_file)
    if name_or_file == "best":
        raise ConfigError(
            "recipe best must be chosen for a network, got none; use `reverie quantize NETWORK --recipe best`, or reverie.choose_recipe"
        )
    if path.suffix == ".toml":
        if not path.is_file():
            raise ConfigError(
                f"{path}: a recipe file must exist, got none; `reverie recipe {presets()[0]}` prints one to start from"
            )
        with at(str(path)):
            text = _utf8(received.read_bytes(path, received.MOST_RECIPE_BYTES))
    elif name_or_file in presets():
        text = (resources.files(recipes) / f"{name_or_file}.toml").read_text()
    else:
        raise unknown("recipe", name_or_file, [*presets(), "best"])
    with at(str(path) if path.suffix == ".toml" else f"recipe {name_or_file}"):
        try:
            tables = tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            # Besides its own error: integers of thousands of digits, and brackets in brackets in brackets.
            raise ConfigError(f"must be TOML, got {str(error)!r}") from None
        return from_tables(tables, overrides)


def _utf8(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise ConfigError("must be TOML in UTF-8, got other bytes") from None


def from_tables(tables: dict[str, Any], overrides: dict[str, Any] | None = None) -> Recipe:
    """A recipe from the nested dictionaries of a TOML file; arguments and errors as for `read`."""
    tables = {key: dict(value) if isinstance(value, dict) else value for key, value in tables.items()}
    # Methods first, since a new one drops the settings that stand in its table.
    for key, value in sorted((overrides or {}).items(), key=lambda item: not item[0].endswith(".method")):
        table, dot, leaf = key.partition(".")
        if not dot:
            tables[table] = value
        elif not isinstance(tables.get(table, {}), dict):
            raise ConfigError(f"{key} must be a key of a table, got the single value {table!r}; leave out {'.' + leaf!r}")
        elif leaf == "method" and tables.get(table, {}).get("method") != value:
            tables[table] = {"method": value}
        else:
            tables.setdefault(table, {})[leaf] = value
    names = [item.name for item in dataclasses.fields(Recipe)]
    resolved: dict[str, Any] = {}
    for key, value in tables.items():
        if key not in names:
            raise unknown("key", key, names, elsewhere=_settings(tables))
        if key in _PACKAGES or key in _TABLES:
            if not isinstance(value, dict):
                raise ConfigError(f"[{key}] must be a table, got {value!r}")
            with at(f"[{key}]"):
                resolved[key] = _table(key, value)
        else:
            resolved[key] = _valid(_hint(Recipe, key), value, key)
    return Recipe(**resolved)


def _settings(tables: dict[str, Any]) -> list[str]:
    """The dotted keys of all tables, with the methods that `tables` chooses."""
    chosen = {key: tables[key].get("method") for key in _PACKAGES if isinstance(tables.get(key), dict)}
    known = {key: name for key, name in chosen.items() if name in plugins.names(_PACKAGES[key])}
    kinds = _TABLES | {key: plugins.load(_PACKAGES[key], name) for key, name in known.items()}
    return [f"{table}.{item.name}" for table, kind in kinds.items() for item in dataclasses.fields(kind)]


def exporter(target: str, settings: dict[str, Any]) -> Exporter:
    """The exporter `target` with these settings, checked as those of a recipe's `[export]` are.

    Raises:
        ConfigError: No such target, or an unknown setting or value; names the choices.
    """
    kind = plugins.load(export, target)
    with at(f"target {target}"):
        found: Exporter = configure(kind, settings)
    return found


def _table(key: str, value: dict[str, Any]) -> Any:
    settings = dict(value)
    if key in _TABLES:
        kind = _TABLES[key]
    else:
        method = settings.pop("method", None)
        choices = plugins.names(_PACKAGES[key])
        if method is None:
            raise ConfigError(f"missing key 'method'; choose one of {', '.join(choices)}")
        if key == "export" and method == "none":
            return None
        kind = plugins.load(_PACKAGES[key], str(method))
    return configure(kind, settings)


def configure(kind: type[Any], settings: dict[str, Any]) -> Any:
    """The dataclass `kind` with the settings that a file or a command line gives.

    Raises:
        ConfigError: A setting that it does not have, or a value that is none.
    """
    names = [item.name for item in dataclasses.fields(kind)]
    for name in settings:
        if name not in names:
            if not names:
                raise ConfigError(f"unknown key {name!r}; {kind.__name__} has no settings")
            raise unknown("key", name, names)
    checked = {name: _valid(_hint(kind, name), setting, name) for name, setting in settings.items()}
    return kind(**checked)


def _hint(kind: type[Any], name: str) -> Any:
    return {item.name: item.type for item in dataclasses.fields(kind)}[name]


def _valid(hint: Any, value: Any, key: str) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key} must be finite, got {value!r}")
    if isinstance(value, list):
        # TOML has no tuples.
        value = tuple(value)
    try:
        return TypeAdapter(hint).validate_python(value, strict=not isinstance(value, int) or isinstance(value, bool))
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Input should be ").lower()
        near = nearest(str(value), (choice for choice in get_args(hint) if isinstance(choice, str)))
        raise ConfigError(f"{key} must be {reason}, got {value!r}{f'; did you mean {near!r}?' if near else ''}") from None


def tables(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe as nested dictionaries: every setting of every method is there."""
    found: dict[str, Any] = {}
    for item in dataclasses.fields(Recipe):
        value = getattr(recipe, item.name)
        if value is None:
            found[item.name] = {"method": "none"}
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            method = {"method": plugins.name_of(value)} if item.name in _PACKAGES else {}
            found[item.name] = method | dataclasses.asdict(value)
        else:
            found[item.name] = value
    return found


def to_toml(recipe: Recipe) -> str:
    """The resolved recipe as TOML; reading it gives the same recipe."""
    resolved = tables(recipe)
    lines = [f"{key} = {_literal(value)}" for key, value in resolved.items() if not isinstance(value, dict)]
    for key, value in resolved.items():
        if isinstance(value, dict):
            lines += ["", f"[{key}]", *(f"{name} = {_literal(setting)}" for name, setting in value.items())]
    return "\n".join(lines) + "\n"


def _literal(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_literal(item) for item in value) + "]"
    return repr(value)
