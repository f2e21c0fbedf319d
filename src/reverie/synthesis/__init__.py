"""Making images out of a trained network. Each file is one paper, or one baseline.

A method gets the captured teacher and answers with `Images` in the network's input units, whose labels are what it asked
the network for (if it asked for a class) and whose `sources` carry its name. It leaves the teacher as it found it: same
weights, buffers and modes.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, fx

from reverie.checkpoints import Checkpoints
from reverie.errors import ConfigError, ModelError
from reverie.graph.batch_norm import BatchNorm, batch_norms
from reverie.images import Images
from reverie.images.contract import InputContract
from reverie.images.source import Source
from reverie.progress import Progress
from reverie.randomness import Seed
from reverie.synthesis._capsule import Capsule


@dataclass(frozen=True)
class Teacher:
    """The full-precision network as synthesis sees it.

    Args:
        graph: Captured, batch norms not folded.
        input: What it expects of an image.
        classes: Number of classes.
        name: What the user called it.
        fingerprint: Of its weights, for the images' provenance.
        capsule: Per-class statistics, if real images gave them.
        whole: What it expects of an image where `input` is smaller (`image_scale`).
    """

    graph: fx.GraphModule
    input: InputContract
    classes: int
    name: str
    fingerprint: str = ""
    capsule: Capsule | None = None
    whole: InputContract | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next((tensor.device for tensor in self.graph.state_dict().values()), torch.device("cpu"))

    @property
    def batch_norms(self) -> list[BatchNorm]:
        """What its batch norms remember, in execution order."""
        return batch_norms(self.graph)

    @torch.no_grad()
    def logits(self, inputs: Float[Tensor, "count *shape"], batch: int = 64) -> Float[Tensor, "count classes"]:
        """Its answers, on the CPU, a batch at a time."""
        parts = [self.graph(part.to(self.device)).cpu() for part in torch.split(inputs, batch)]
        return torch.cat(parts)


@runtime_checkable
class Synthesis(Protocol):
    """Makes images; the object is its own configuration.

    `needs_batch_norm` is a class constant: whether the method reads batch-norm statistics, so that a network without any
    can be refused before anything else is done. `needs_capsule` is another: whether it reads per-class statistics of real
    images, so that a run without labelled calibration images can be refused first.
    """

    needs_batch_norm: ClassVar[bool]
    needs_capsule: ClassVar[bool]

    def __call__(self, teacher: Teacher, count: int, *, seed: Seed, checkpoints: Checkpoints, progress: Progress) -> Images:
        """`count` images; the same for the same teacher, seed and settings, interrupted or not.

        Raises:
            ModelError: The network lacks what the method reads.
        """
        ...


@runtime_checkable
class ImageStream(Source, Protocol):
    """A source of batches that a generator makes while it goes on training."""

    def sample(self, count: int, seed: Seed, *, checkpoints: Checkpoints, progress: Progress) -> Images:
        """`count` images by the generator as it is now, and what the method does to them then; leaves the generator alone."""
        ...


@runtime_checkable
class Streaming(Synthesis, Protocol):
    """A method with a generator, which gives a stream, `batch` images at a time, as well as a set."""

    batch: int

    def stream(self, teacher: Teacher, *, seed: Seed, checkpoints: Checkpoints, progress: Progress) -> ImageStream:
        """The generator after its warm-up; called again with the same checkpoints, it is not trained again."""
        ...


def lacks_batch_norm(network: str, method: str, folded: int = 0) -> ModelError:
    """The error for a network without batch norms given to a method that reads them.

    Args:
        folded: How many of its convolutions may hold one (`graph/unfold.py`).
    """
    if folded:
        return ModelError(
            f"{network}: {method} needs a batch norm with running statistics, got none but {folded} convolutions with a bias, into "
            "which exporters fold them, and then what images are made from is lost; export it with batch norms "
            "(torch.onnx.export(..., optimize=False)), or give --capsule with a file that `reverie capsule` made of this network where "
            "labelled images are, or real images with --calibration --images 0 --set held_out=0, of which --recipe squant needs a few"
        )
    return ModelError(
        f"{network}: {method} needs a batch norm with running statistics, got none in the network; "
        "use --calibration with a folder of images and --images 0 --set held_out=0, or --set synthesis.method=noise as a baseline"
    )


def lacks_capsule(network: str, method: str) -> ConfigError:
    """The error for a run without labelled real images whose method reads per-class statistics."""
    return ConfigError(
        f"{network}: {method} needs labelled real images, one for each class, got none; give --calibration with a folder of "
        "them (one sub-folder a class) or --capsule with a file that `reverie capsule` wrote"
    )


def batches(count: int, size: int) -> list[int]:
    """How many of `count` images each batch holds: all `size` but the last."""
    return [min(size, count - start) for start in range(0, count, size)]


def even_batches(count: int, size: int) -> list[int]:
    """How many of `count` images each batch holds, at most `size`: as even as can be, so they differ by one at most."""
    number = -(-count // size)
    return [count // number + (place < count % number) for place in range(number)]
