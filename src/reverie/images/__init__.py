"""A set of images in the network's own input units, and what is known about each."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor


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
