"""What real images told about the batch norms, class by class: one centre a class, shipped instead of the images.

For class k with images 1..n and a batch norm whose input has, for image i, the mean m_i and the biased variance v_i of
each channel over its positions:

    M_k = mean_i m_i        V_k = mean_i v_i + mean_i (m_i - M_k)^2 = mean_i (v_i + m_i^2) - M_k^2

the mean and variance of all positions of the class's images taken together (law of total variance: every image has as
many positions as the next). With one image they are its own statistics.

Reference: Zhong et al. 2022, arXiv:2109.04186 (FDDA), whose released code draws one image a class, and so has M = m_1,
V = v_1 (algorithms 2.1). Several images a class, and classes without any, are ours.

The file holds `count`, `correct` and, for each batch norm B, `B.mean` and `B.variance`; its metadata has one entry,
`reverie`, a JSON object with `format`, `names` and `fingerprint`. Equal capsules give equal bytes.

Of a network whose batch norms were folded, the centres are those of its convolutions' outputs (`graph/unfold.py`), and taken together
they give it back what synthesis matches.

Not here: centres that serve two networks. They are statistics of one network's inner values, for its weights alone.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, fx

from reverie import received
from reverie.errors import ConfigError, ModelError, at
from reverie.files import atomic_write
from reverie.graph.batch_norm import Observed, batch_norms
from reverie.graph.unfold import unfold
from reverie.images import Images
from reverie.progress import Progress, Silent

if TYPE_CHECKING:
    from reverie.synthesis import Teacher

_FORMAT = "reverie capsule 1"
# One key: safetensors writes several in an order that changes from process to process.
_KEY = "reverie"
_AGAIN = "make one with `reverie capsule`"


@dataclass(frozen=True, kw_only=True)
class _About:
    """What the metadata says."""

    format: str
    names: tuple[str, ...]
    fingerprint: str


@dataclass(frozen=True)
class Capsule:
    """Statistics of real images at the inputs of all batch norms, class by class.

    Args:
        mean, variance: One tensor a batch norm, in execution order; zeros for a class without images.
        count: Images of each class that they were read from.
        correct: Whether the network takes more than half of the class's images for what they are.
        names: The batch norms' nodes.
        fingerprint: Of the network's weights.
    """

    mean: tuple[Float[Tensor, "classes _"], ...]
    variance: tuple[Float[Tensor, "classes _"], ...]
    count: Int[Tensor, " classes"]
    correct: Bool[Tensor, " classes"]
    names: tuple[str, ...]
    fingerprint: str

    @property
    def classes(self) -> int:
        """Number of classes, those without images too."""
        return self.count.shape[0]

    @property
    def missing(self) -> list[int]:
        """The classes without an image."""
        return _places(self.count == 0)

    @property
    def wrong(self) -> list[int]:
        """The classes with images of which the network recognizes at most half."""
        return _places((self.count > 0) & ~self.correct)

    def overall(self) -> tuple[list[Float[Tensor, " _"]], list[Float[Tensor, " _"]]]:
        """Mean and variance at each batch norm over all classes that have images, each of the same weight.

        m = mean_k M_k        v = mean_k V_k + mean_k (M_k - m)^2
        """
        present = self.count > 0
        mean, variance = ([part[present] for part in parts] for parts in (self.mean, self.variance))
        return (
            [centre.mean(0) for centre in mean],
            [spread.mean(0) + centre.var(0, correction=0) for centre, spread in zip(mean, variance, strict=True)],
        )

    def to(self, device: torch.device | str) -> "Capsule":
        """The same on `device`."""
        return replace(
            self,
            mean=tuple(mean.to(device) for mean in self.mean),
            variance=tuple(variance.to(device) for variance in self.variance),
            count=self.count.to(device),
            correct=self.correct.to(device),
        )


# `Teacher` has a field of the type `Capsule` and so is defined later: here its name is for mypy alone.
@torch.no_grad()
def capsule_of(teacher: "Teacher", images: Images, batch: int = 64, *, progress: Progress | None = None) -> Capsule:
    """The centres of the labelled `images`, in one pass; on the CPU, wherever the teacher is.

    Args:
        teacher: Its batch norms are read, and its answers.
        images: Real images with their true classes; any number of each.
        batch: Images looked at together; changes nothing but time and memory.

    Raises:
        ConfigError: No images, no labels or some outside the classes, or images that the network does not take.
        ModelError: The network has no batch norm.
    """
    graph = _with_batch_norms(teacher)
    norms = batch_norms(graph)
    if not norms:
        raise ModelError(
            f"{teacher.name}: a capsule needs a batch norm with running statistics, got none in the network; "
            "use the images themselves, with --calibration"
        )
    with at(teacher.name):
        if batch < 1:
            raise ConfigError(f"batch must be at least 1, got {batch}")
        labels = _checked(images, teacher.classes, teacher.input.shape)
    widths = [len(norm.mean) for norm in norms]
    # In float64, where the difference of two moments loses nothing that a float32 can hold; and on the CPU, where a sum
    # has one order: equal images give equal capsules.
    first, second = torch.zeros(2, teacher.classes, sum(widths), dtype=torch.float64)
    hits = torch.zeros(teacher.classes, dtype=torch.long)
    observed = Observed(graph, "sample")
    parts = list(zip(torch.split(images.inputs, batch), torch.split(labels, batch), strict=True))
    with (progress or Silent()).stage("capsule", total=len(parts)) as step:
        for inputs, targets in parts:
            logits, statistics = observed(inputs.to(teacher.device))
            mean = torch.cat(statistics.mean, dim=1).cpu().double()
            variance = torch.cat(statistics.variance, dim=1).cpu().double()
            first.index_add_(0, targets, mean)
            second.index_add_(0, targets, variance.addcmul_(mean, mean))
            hits.index_add_(0, targets, (logits.argmax(dim=1).cpu() == targets).long())
            step()
    count = labels.bincount(minlength=teacher.classes)
    # A class without images divides zeros by one.
    divisor = count.clamp(min=1).unsqueeze(1)
    mean = first.div_(divisor)
    variance = second.div_(divisor).addcmul_(mean, mean, value=-1).clamp_(min=0)
    return Capsule(
        mean=tuple(part.float().contiguous() for part in torch.split(mean, widths, dim=1)),
        variance=tuple(part.float().contiguous() for part in torch.split(variance, widths, dim=1)),
        count=count,
        correct=2 * hits > count,
        names=tuple(norm.name for norm in norms),
        fingerprint=teacher.fingerprint,
    )


def save_capsule(capsule: Capsule, path: Path) -> None:
    """Writes `capsule` to the safetensors file `path`, whole or not at all.

    Raises:
        ConfigError: No space left, or `path` cannot be written.
    """
    tensors = {"count": capsule.count.long(), "correct": capsule.correct}
    for name, mean, variance in zip(capsule.names, capsule.mean, capsule.variance, strict=True):
        tensors |= {f"{name}.mean": mean, f"{name}.variance": variance}
    about = {"format": _FORMAT, "names": capsule.names, "fingerprint": capsule.fingerprint}
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    atomic_write(path, save(whole, {_KEY: json.dumps(about, sort_keys=True)}))


def load_capsule(path: Path, teacher: "Teacher | None" = None) -> Capsule:
    """The capsule that `save_capsule` wrote to `path`; on the CPU.

    Args:
        teacher: The network it must be of; None leaves that open (see `check_capsule`).

    Raises:
        ConfigError: No such file, not one that `save_capsule` wrote, or not of `teacher`.
    """
    with at(str(path)):
        try:
            capsule = _read(path)
        except FileNotFoundError as error:
            raise ConfigError("must be a file that `reverie capsule` wrote, got no such file; check the path") from error
        except (OSError, SafetensorError, LookupError) as error:
            raise ConfigError(f"must be a file that `reverie capsule` wrote, got another or a damaged one; {_AGAIN}") from error
        if teacher is not None:
            check_capsule(capsule, teacher)
    return capsule


def check_capsule(capsule: Capsule, teacher: "Teacher") -> None:
    """Refuses a capsule that was not made from `teacher`.

    Raises:
        ConfigError: Other weights, another number of classes, other batch norms.
    """
    if capsule.fingerprint != teacher.fingerprint:
        raise ConfigError(
            f"must be of {teacher.name} with these very weights ({teacher.fingerprint}), "
            f"got a capsule of others ({capsule.fingerprint}); {_AGAIN}"
        )
    if capsule.classes != teacher.classes:
        raise ConfigError(f"must have a centre for each of the {teacher.classes} classes, got {capsule.classes}; {_AGAIN}")
    expected = {norm.name: len(norm.mean) for norm in batch_norms(_with_batch_norms(teacher))}
    got = {name: mean.shape[1] for name, mean in zip(capsule.names, capsule.mean, strict=True)}
    # As lists, because their order is that of execution.
    if list(got.items()) != list(expected.items()):
        raise ConfigError(f"must have {_norms(expected)} of {teacher.name}, got {_norms(got)}; {_AGAIN}")


def _with_batch_norms(teacher: "Teacher") -> fx.GraphModule:
    """The teacher's graph, with batch norms put back if they were folded."""
    return teacher.graph if teacher.batch_norms else unfold(teacher.graph)


def _checked(images: Images, classes: int, shape: tuple[int, int, int]) -> Int[Tensor, " count"]:
    """The labels of `images`, once all is known to be well."""
    if not len(images):
        raise ConfigError(f"must have labelled images of its {classes} classes, got none; give at least one")
    if images.labels is None:
        raise ConfigError(f"images must have labels 0 to {classes - 1}, got none; give the true class of each")
    if images.inputs.shape[1:] != shape:
        raise ConfigError(f"images must have shape {shape}, got {tuple(images.inputs.shape[1:])}; make them anew")
    labels = images.labels.cpu().long()
    outside = _places((labels < 0) | (labels >= classes))
    if outside:
        more = f" and {len(outside) - 1} more outside" if len(outside) > 1 else ""
        raise ConfigError(
            f"labels must be 0 to {classes - 1}, got {int(labels[outside[0]])} for image {outside[0]}{more}; "
            "check that these images belong to this network"
        )
    broken = _places(~images.inputs.flatten(1).isfinite().all(dim=1))
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise ConfigError(f"images must be finite, got NaN or infinite values in image {broken[0]}{more}; remove them")
    return labels


def _read(path: Path) -> Capsule:
    """What `path` holds; any of several errors if that is no capsule."""
    about = _about(path)
    with safe_open(path, framework="pt") as file:
        if about["format"] != _FORMAT:
            raise ConfigError(f"must have the format {_FORMAT!r}, got {about['format']!r}; {_AGAIN}")
        names = tuple(about["names"])
        count, correct = _tensor(file, "count", torch.long, 1), _tensor(file, "correct", torch.bool, 1)
        mean = tuple(_tensor(file, f"{name}.mean", torch.float32, 2) for name in names)
        variance = tuple(_tensor(file, f"{name}.variance", torch.float32, 2) for name in names)
    shapes = [(len(count), centre.shape[1]) for centre in mean]
    if [*map(tuple, (correct.shape, *(part.shape for part in (*mean, *variance))))] != [(len(count),), *shapes, *shapes]:
        raise LookupError("tensors of different numbers of classes or channels")
    if not all(bool(part.isfinite().all()) for part in (*mean, *variance)):
        raise ConfigError(f"means and variances must be finite, got NaN or infinite values; {_AGAIN}")
    if any(bool((part < 0).any()) for part in (*variance, count)):
        raise ConfigError(f"variances and counts must be at least 0, got negative ones; {_AGAIN}")
    return Capsule(mean, variance, count, correct, names, about["fingerprint"])


def _about(path: Path) -> dict[str, Any]:
    """What the metadata says; any of several errors if that is no capsule's."""
    try:
        if path.exists():
            received.check_file(path)
        with safe_open(path, framework="pt") as file:
            about: dict[str, Any] = received.parse_json((file.metadata() or {})[_KEY], _About, _AGAIN)
    except ConfigError as error:
        raise LookupError(str(error)) from error
    return about


def _tensor(file: Any, name: str, kind: torch.dtype, dimensions: int) -> Tensor:
    tensor: Tensor = file.get_tensor(name)
    if tensor.dtype != kind or tensor.dim() != dimensions:
        raise LookupError(f"{name} of another kind")
    return tensor


def _places(flags: Bool[Tensor, " count"]) -> list[int]:
    return [int(place) for place in flags.nonzero()]


def _norms(widths: dict[str, int]) -> str:
    """Such as `20 batch norms with 4800 channels from 'batch_norm' to 'batch_norm_19'`."""
    names = list(widths)
    return f"{len(names)} batch norms with {sum(widths.values())} channels" + (
        f" from {names[0]!r} to {names[-1]!r}" if names else ""
    )
