"""The model card of a run: `README.md` as the Hugging Face Hub reads it, with YAML in front.

It says what the network is, how it was made, from which real images or that from none, what was lost, how the files are
loaded, and the command that makes them again. The words for the numbers come from `outcome.py`. Names of networks may be
anything, so every string is escaped for where it stands; folders of the machine that made it are left out.

Reference: huggingface.co/docs/hub/model-cards, "Model card metadata".
"""

import json
import re
import shlex
from collections.abc import Mapping
from importlib import resources
from pathlib import PurePath
from typing import Any

import jinja2

from reverie import flags
from reverie.models import Network
from reverie.plugins import name_of
from reverie.recipe import Recipe
from reverie.report import outcome

# What Markdown or HTML may take for markup.
_MARKUP = re.compile(r"([\\`*_{}\[\]<>()#+!|~$&-])")
# Kinds of real images, as a run identifies them, and what they were for.
_USES = {
    "calibration": "learned from",
    "evaluation": "only looked at, to measure accuracy; nothing was tuned on them",
    "unlabelled": "only looked at, to measure agreement with full precision",
}

UNPACK = """\
import json, math, torch
from safetensors import safe_open

with safe_open("network.safetensors", framework="pt") as file:
    header, stored = json.loads(file.metadata()["reverie"]), {name: file.get_tensor(name) for name in file.keys()}
weights = {}
for name, bits, shape in ((layer["weight"], layer["bits"], layer["shape"]) for layer in header["layers"].values()):
    stream = (stored[f"{name}.codes"][:, None] >> torch.arange(8) & 1).flatten()[: math.prod(shape) * bits]
    codes = (stream.view(-1, bits) << torch.arange(bits)).sum(1)
    codes = ((codes ^ 1 << bits - 1) - (1 << bits - 1)).view(shape[0], -1) - stored[f"{name}.zero_point"][:, None]
    weights[name] = (codes * stored[f"{name}.scale"][:, None]).view(shape)"""


def render(network: Network, metrics: dict[str, Any], recipe: Recipe, record: dict[str, Any]) -> str:
    """The card as Markdown.

    Args:
        network: In full precision.
        metrics: As in `metrics.json`.
        record: As in `run.json`.
    """
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"md": markdown, "yaml": yaml}
    template = environment.from_string((resources.files("reverie.report") / "card.md.j2").read_text(encoding="utf-8"))
    name, file = _without_folders(network.name), recipe.export.filename if recipe.export else None
    return template.render(
        name=name,
        title=f"{name} at {outcome.bits_text(metrics)}",
        headline=outcome.headline(metrics).replace(network.name, name),
        hub_name=_hub_name(network.name),
        tags=_tags(metrics, file),
        measured=_measured(metrics),
        table=_table(*outcome.table(metrics)),
        methods=_methods(recipe),
        notes=outcome.learning_notes(metrics),
        data=_data(metrics, record),
        limits=_limits(metrics),
        versions={key: record["versions"][key] for key in ("reverie", "torch", "onnxruntime") if key in record["versions"]},
        fingerprint=network.fingerprint,
        classes=network.classes,
        input=network.input,
        mode='"RGB"' if network.input.channels == 3 else '"L"',
        exported=json.dumps(file) if file and file.endswith(".onnx") and network.input.channels in (1, 3) else "",
        runtime=outcome.runtime_name(metrics),
        unpack=UNPACK,
        command=_command(name, network.options, record),
    )


def markdown(text: str) -> str:
    """`text` as it is, in one line of Markdown."""
    return _MARKUP.sub(r"\\\1", _printable(text)).replace("\\&", "&amp;").replace("\\<", "&lt;")


def yaml(text: str) -> str:
    """`text` as a string in double quotes, which YAML takes as JSON does."""
    return json.dumps(_printable(text), ensure_ascii=False)


def _printable(text: str) -> str:
    """Without line breaks and control characters, which neither YAML nor a line of Markdown can hold."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def _without_folders(name: str) -> str:
    """`nets.py:resnet20` of `/home/someone/nets.py:resnet20`; names that are no paths stay."""
    source, colon, rest = name.rpartition(":")
    if source.endswith(".py"):
        return f"{PurePath(source).name}:{rest}"
    return PurePath(rest).name if rest.endswith(".onnx") else f"{source}{colon}{rest}"


def _hub_name(name: str) -> str | None:
    """Where the base network is on the Hub, if its name says so: timm keeps each under its name and tag."""
    found = re.fullmatch(r"timm:([\w-]+\.[\w-]+)", name, re.ASCII)
    return f"timm/{found[1]}" if found else None


def _tags(metrics: dict[str, Any], file: str | None) -> list[str]:
    bits = outcome.bits_text(metrics).partition(" (")[0].replace("mixed ", "mixed-").lower()
    return ["quantized", "data-free-quantization", bits, *(["onnx"] if file and file.endswith(".onnx") else [])]


def _measured(metrics: dict[str, Any]) -> dict[str, Any] | None:
    """Accuracy, and its difference from full precision, of the best form that was measured."""
    best = "quantized" if metrics["exported"]["top1"] is None else "exported"
    if metrics[best]["top1"] is None:
        return None
    interval = metrics["difference"][best]
    low, high = (f"{100 * interval[end]:+.2f}" for end in ("low", "high"))
    name = f"points of top-1 accuracy from full precision, 95 % interval {low} to {high}"
    return {**metrics[best], "difference": interval["difference"], "interval_name": name}


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell if line is lines[1] else markdown(cell) for cell in line) + " |" for line in lines)


def _methods(recipe: Recipe) -> str:
    """Such as `128 images by zeroq, rounding by adaround, seed 0`."""
    parts = [f"{recipe.images} images by {name_of(recipe.synthesis)}"] if recipe.images else []
    parts += [f"distillation of {recipe.distillation.steps} steps"] if recipe.distillation.steps else []
    return ", ".join([*parts, f"rounding by {name_of(recipe.rounding)}", f"seed {recipe.seed}"])


def _data(metrics: dict[str, Any], record: dict[str, Any]) -> list[str]:
    """Which real images were read, and what for; or that none was."""
    digests, made = record["identity"], metrics["images"]["source"]
    lines = [f"{count} images, made by {kind} out of the network itself" for kind, count in made.items() if kind != "real"]
    counts = {
        "calibration": made.get("real"),
        "evaluation": metrics["full_precision"].get("images"),
        "unlabelled": metrics["agreement"].get("unlabelled", {}).get("images"),
    }
    read = {kind: digests[kind] for kind in _USES if digests.get(kind, "none") != "none"}
    for kind, digest in read.items():
        number = f"{counts[kind]} " if counts[kind] is not None else ""
        lines.append(f"{number}real images (sha256 of their inputs {digest}...): {_USES[kind]}")
    if digests.get("capsule", "none") != "none":
        lines.append(
            f"a capsule ({digests['capsule']}): statistics of real images, class by class, without the images themselves"
        )
    if "calibration" not in read and digests.get("capsule", "none") == "none":
        lines.append("no real image had a part in making it")
    return lines


def _limits(metrics: dict[str, Any]) -> list[str]:
    lines = ["made for images like those that the base network was trained on; what it does on others was not looked at"]
    if metrics["full_precision"]["top1"] is None:
        lines.append("accuracy was not measured, for want of labelled images; what is said of it is an estimate")
    if metrics["latency_ms"] is None:
        lines.append("nothing was exported: the numbers are those of a simulation in PyTorch")
    else:
        lines.append(
            f"proven in {outcome.runtime_name(metrics)} on one machine's CPU; other runtimes round and fuse in their own ways, and "
            "other processors have other speeds"
        )
    return lines


def _command(name: str, options: Mapping[str, Any], record: dict[str, Any]) -> str:
    """The command as a block of code, whatever is in it."""
    words = ["reverie", "quantize", name]
    # Of a file, the name alone: whose folders they are is nobody's business. Nor does a card tell strangers to execute anything.
    shown = {key: value for key, value in options.items() if value is not None and key != "execute_weights"}
    words += flags.words(shown | ({"weights": PurePath(shown["weights"]).name} if "weights" in shown else {}))
    words += ["--recipe", "recipe.toml", "--output", "again"]
    given = {"calibration": "--calibration", "evaluation": "--evaluate", "unlabelled": "--unlabelled", "capsule": "--capsule"}
    for kind, flag in given.items():
        if record["identity"].get(kind, "none") != "none":
            words += [flag, kind.upper()]
    line = _printable(shlex.join(words))
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", line)), default=0))
    return f"{fence}sh\n{line}\n{fence}"
