"""A set of images in the network's own input units, and what is known about each."""

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, kw_only=True)
class Images:
    """Images with labels, the teacher's logits and their provenance.

    Args:
        inputs: Network inputs (already normalized), float32.
        labels: The class each image shows (true class of a real image, asked-for class of a synthetic one), if any.
        logits: The teacher's answer to each image, if computed: the soft labels.
        sources: One entry an image: the synthesis method's name, or the file a real image came from.
        provenance: What made the set: method, recipe, seed, network fingerprint.
    """

    inputs: Float[Tensor, "count channels height width"]
    labels: Int[Tensor, " count"] | None = None
    logits: Float[Tensor, "count classes"] | None = None
    sources: tuple[str, ...] = ()
    provenance: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.inputs.shape[0]

    def evenly(self, most: int) -> "Images":
        """At most so many of the images, evenly spaced, since a set may be sorted by class."""
        chosen = evenly(len(self), most)
        return replace(
            self,
            inputs=self.inputs[chosen],
            labels=None if self.labels is None else self.labels[chosen],
            logits=None if self.logits is None else self.logits[chosen],
            sources=tuple(self.sources[index] for index in chosen.tolist()) if self.sources else (),
        )

    def resized(self, height: int, width: int) -> "Images":
        """The same images in another size; logits are not theirs any more and left out, unless the size is the same."""
        if self.inputs.shape[2:] == (height, width):
            return self
        inputs = functional.interpolate(self.inputs, (height, width), mode="bilinear", antialias=True)
        return replace(self, inputs=inputs, logits=None)

    @staticmethod
    def concatenate(parts: "list[Images]") -> "Images":
        """All images of `parts`, in order. Labels and logits are kept only if every part has them."""
        labels = [part.labels for part in parts if part.labels is not None]
        logits = [part.logits for part in parts if part.logits is not None]
        return Images(
            inputs=torch.cat([part.inputs for part in parts]),
            labels=torch.cat(labels) if len(labels) == len(parts) else None,
            logits=torch.cat(logits) if len(logits) == len(parts) else None,
            sources=tuple(source for part in parts for source in part.sources),
            provenance=parts[0].provenance,
        )


def evenly(count: int, most: int) -> Int[Tensor, " chosen"]:
    """At most `most` of the indices 0 to `count` - 1, first and last among them, evenly spaced."""
    return torch.linspace(0, count - 1, min(count, most), dtype=torch.float64).round().long()
