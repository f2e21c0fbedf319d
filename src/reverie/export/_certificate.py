"""The parity certificate: what every installed runtime makes of an exported file, beside what the student computes.

Under `reference` stands a third opinion that no runtime and no float has a part in: the reference interpreter executes the
checkpoint in integers, freely, and its codes are compared with those of the runtime that the file is made for.

It stands in the file's own metadata under `reverie.parity`, as JSON, and in `metrics.json`. Hashes say what it is about: the
packed checkpoint that the student was read from, the content of the file (`_metadata.content_hash`: all but the metadata) and the
images that were compared (their values as the network reads them).
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from reverie import received, runtimes
from reverie.errors import ConfigError, ExportError
from reverie.export import _verify as verify
from reverie.export._metadata import add_facts, content_hash, read_facts
from reverie.export._reference import Answer, Reference
from reverie.files import file_hash
from reverie.graph.quantized import QuantizedNetwork
from reverie.plugins import name_of
from reverie.runtimes import Runtime

FACT = "reverie.parity"
# 64 images of 64 x 64, 5 of 224 x 224: seconds each way, as integers have no fast kernels in PyTorch.
_REFERENCE_PIXELS = 2**18
_BATCH = 64


@dataclass(frozen=True)
class Proof:
    """What one runtime made of one file.

    Args:
        version: Of the runtime's library.
        parity: None if the runtime could not execute the file.
        layers: How many there are.
        float_layers: Those that did not run as integers, by the modules that held their weights.
        failure: Why this is no parity; None where it is.
    """

    version: str
    parity: verify.Parity | None
    layers: int
    float_layers: tuple[str, ...]
    failure: str | None

    def summary(self) -> dict[str, Any]:
        """What JSON can hold: all numbers, and of each tensor the largest difference in steps and the share of codes that differ."""
        found: dict[str, Any] = {
            "version": self.version,
            "failure": self.failure,
            "layers": self.layers,
            "float_layers": list(self.float_layers),
        }
        if self.parity is not None:
            found |= {key: value for key, value in asdict(self.parity).items() if key not in ("runtime", "per_tensor")}
            found["codes"] = {
                name: [tensor.max_code_difference, float(f"{tensor.differing_share:.3g}")]
                for name, tensor in self.parity.per_tensor.items()
            }
        return found


@dataclass(frozen=True)
class Opinion:
    """The reference interpreter beside a runtime, both run freely on the same images.

    Args:
        runtime: Its name.
        images: How many.
        max_code_difference: The largest of any tensor that the runtime rounds, in steps of its grid.
        differing_share: Of all values of these tensors, 0 to 1.
        top1_agreement: Share of images with the same class.
        layers: How many there are.
        float_layers: Those that are no integers in the model itself, by the modules that held their weights.
    """

    runtime: str
    images: int
    max_code_difference: int
    differing_share: float
    top1_agreement: float
    layers: int
    float_layers: tuple[str, ...]


def refer(quantized: QuantizedNetwork, images: Float[Tensor, "n *shape"]) -> Answer:
    """What integer arithmetic alone makes of the first images, as many as take seconds.

    Raises:
        ExportError: As for `Reference`.
    """
    return Reference(quantized)(images[: max(1, _REFERENCE_PIXELS // images[0, 0].numel())])


def oppose(
    answer: Answer,
    quantized: QuantizedNetwork,
    path: Path,
    images: Float[Tensor, "n *shape"],
    runtime: Runtime,
    *,
    threads: int = 1,
) -> Opinion:
    """Compares what `refer` answered for `images` with what a runtime makes of the file.

    Raises:
        ExportError: The runtime cannot execute the file, or the file lacks a quantized tensor.
    """
    seen = images[: len(answer.logits)].cpu()
    # In the batches that were found to be undisturbed: in others a runtime may choose other kernels.
    probe = verify.probes_of(quantized, path, seen, runtime=runtime, batch=_BATCH, threads=threads)
    worst = unequal = count = same = 0
    for start in range(0, len(seen), _BATCH):
        here = slice(start, start + _BATCH)
        logits, codes = probe(seen[here].numpy())
        same += int((answer.logits[here].argmax(1) == torch.from_numpy(logits).argmax(1)).count_nonzero())
        for name, theirs in codes.items():
            ours = answer.codes[name][here]
            shifted = torch.from_numpy(theirs).int() + verify.code_offset(quantized.activations[name], theirs.dtype)
            apart = (ours - shifted.reshape(ours.shape)).abs()
            worst, unequal, count = max(worst, int(apart.max())), unequal + int(apart.count_nonzero()), count + apart.numel()
    return Opinion(
        runtime=name_of(runtime),
        images=len(seen),
        max_code_difference=worst,
        differing_share=unequal / max(1, count),
        top1_agreement=same / len(seen),
        layers=len(quantized.layers),
        float_layers=tuple(quantized.layers[node].path for node in answer.float_nodes if node in quantized.layers),
    )


def prove(
    quantized: QuantizedNetwork,
    path: Path,
    images: Float[Tensor, "n *shape"],
    asked: Mapping[str, Runtime],
    *,
    threads: int = 1,
) -> dict[str, Proof]:
    """Compares the file with the student in each of the runtimes, by name; a runtime that fails is no error here."""
    proofs = {}
    for name, runtime in asked.items():
        parity, left, failure = None, [], None
        try:
            parity = verify.measure_parity(quantized, path, images, runtime=runtime, threads=threads)
            left = runtime.float_layers(path, quantized.layers)
            verify.assert_parity(parity)
        except ExportError as error:
            # A certificate goes where its file goes, whatever that was called when it was proven.
            failure = str(error).replace(str(path), "this file")
        paths = tuple(quantized.layers[layer].path for layer in left)
        proofs[name] = Proof(runtimes.version(runtime), parity, len(quantized.layers), paths, failure)
    return proofs


def certify(
    quantized: QuantizedNetwork,
    path: Path,
    images: Float[Tensor, "n *shape"],
    runtime: str,
    *,
    checkpoint: Path,
    threads: int = 1,
) -> tuple[verify.Parity, dict[str, Any]]:
    """Proves a new file in the runtime that it is made for, asks every other installed one that reads it, and attaches what they say.

    Args:
        runtime: The name of the one that has to agree; what the others say is written down, and no error.
        checkpoint: The packed checkpoint of the student.

    Returns:
        The parity in `runtime`, and the certificate.

    Raises:
        ConfigError: `runtime` is not installed.
        ExportError: It does not compute what the student does, or the sum of a layer's products does not fit an int32 accumulator.
    """
    own = runtimes.load(runtime)
    parity = verify.measure_parity(quantized, path, images, runtime=own, threads=threads)
    verify.assert_parity(parity)
    left = tuple(quantized.layers[layer].path for layer in own.float_layers(path, quantized.layers))
    proofs = {runtime: Proof(runtimes.version(own), parity, len(quantized.layers), left, None)}
    others = {name: other for name, other in runtimes.installed(path.suffix).items() if name != runtime}
    issued = certificate(
        proofs | prove(quantized, path, images, others, threads=threads),
        path,
        runtime=runtime,
        checkpoint=checkpoint,
        images=images,
        opinion=oppose(refer(quantized, images), quantized, path, images, own, threads=threads),
    )
    attach(path, issued)
    return parity, issued


def certificate(
    proofs: Mapping[str, Proof],
    path: Path,
    *,
    runtime: str,
    checkpoint: Path,
    images: Float[Tensor, "n *shape"],
    opinion: Opinion | None,
) -> dict[str, Any]:
    """What the proofs say, and the hashes of what they are about.

    Args:
        path: The file that was proven.
        runtime: The one that it is made for.
        checkpoint: The packed checkpoint of the student.
        images: Those that were compared.
        opinion: None where no runtime was there to compare the reference with.
    """
    return {
        "runtime": runtime,
        "runtimes": {name: proof.summary() for name, proof in proofs.items()},
        "reference": None if opinion is None else asdict(opinion) | {"float_layers": list(opinion.float_layers)},
        "torch": str(torch.__version__),
        "sha256": {"checkpoint": file_hash(checkpoint), "content": content_hash(path), "images": images_hash(images)},
    }


@dataclass(frozen=True, kw_only=True)
class _Hashes:
    checkpoint: str
    content: str
    images: str


@dataclass(frozen=True, kw_only=True)
class _Issued:
    """What is read of a certificate."""

    runtime: str
    sha256: _Hashes


def attach(path: Path, issued: dict[str, Any]) -> None:
    """Stores a certificate in the file that it was issued for."""
    add_facts(path, {FACT: json.dumps(issued, allow_nan=False)})


def attached(path: Path) -> dict[str, Any] | None:
    """The certificate in a file, if there is one.

    Raises:
        ExportError: The file is not whole, or its content is not the one that the certificate was issued for.
    """
    text = read_facts(path).get(FACT)
    if text is None:
        return None
    try:
        issued: dict[str, Any] = received.parse_json(text, _Issued, "export it again")
    except ConfigError as error:
        raise ExportError(f"{path}: certificate: {error}") from None
    expected, found = issued["sha256"]["content"], content_hash(path)
    if found != expected:
        raise ExportError(
            f"{path}: must hold what its certificate was issued for (sha256 {expected[:12]}), got other content ({found[:12]}); "
            "export it again"
        )
    return issued


def images_hash(images: Float[Tensor, "n *shape"]) -> str:
    """SHA-256 of shape and values, float32 in little-endian order."""
    values = np.ascontiguousarray(images.detach().cpu().numpy(), "<f4")
    return hashlib.sha256(str(tuple(values.shape)).encode() + values.tobytes()).hexdigest()
