"""Proof that a runtime executes a file as integers, and that it computes what the student computes.

What is proven is the session that users get: default options, all optimizations. Two notions of parity:

*Local*: every quantized tensor, one at a time. The student, on codes (`graph.integer`), computes it from the runtime's own
preceding codes, so what differs is this one step's arithmetic and not what came before. In ONNX Runtime that is nothing
where all is integers; float and fixed-point rounding of one accumulator part company by at most one step of the grid, and
rarely; more is a wrong scale, a wrong bound or a wrong kernel. What stays below that passes: at W8A8 a bias can be some tens
of the accumulator's steps off, which are hundredths of one code.

The logits, which stay in float, are compared in the same way and must be equal up to the rounding of float32.

*End to end*: the logits of both, run freely on the same images. Convolutions and
linear layers are then equal to the last bit; what other operators round differently can spread through a network (through
4-bit activations visibly). What must agree is the class. How far rounding alone spreads, the student says without the file: run
freely, on codes and in float, with what the runtime leaves unrounded left so. Where the student gives a runtime's class a logit
that is closer to its own best one than twice that, the image is a tie: neither answer is wrong, so a disagreement there does not
count as a failure. It does count in `top1_agreement`, which is what is reported.

To see inside, probes give the codes out as well, and their logits have to equal the default session's bit for bit (`_probe.py`).
A tensor that a runtime merges into the kernel behind it and leaves `unrounded` is only bounded in the student's local step too, and
the student runs in float, since what follows is no code: it is compared with what really happens. Where a tensor is `unseen`,
because asking for its codes would change them, the student goes on with its own: what reads it is compared over both steps.

Not here: how a runtime is asked (`runtimes/`), accuracy on labelled images and latency (`report.measure`).
"""

import copy
import math
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, fx

from reverie import runtimes
from reverie.errors import ExportError
from reverie.export._probe import Undisturbed, undisturbed
from reverie.graph.integer import End, as_integers
from reverie.graph.operators import SUMS
from reverie.graph.quantized import QuantizedNetwork
from reverie.graph.quantizers import ActivationQuantizer
from reverie.grid import dequantize, quantize
from reverie.plugins import name_of
from reverie.runtimes import Runtime, Session

_DEFAULT = "onnxruntime"
# Images that are compared together, and pixels: the codes of 16 images of 224 x 224, and what is computed from them, take a GiB.
_BATCH, _PIXELS = 64, 16 * 224 * 224
MAX_CODE_DIFFERENCE = 1
# Rounding tips 0.007 % of a tensor's values at most (resnet20, MLPerf Tiny's resnet8); a bias that is three steps of the
# accumulator off, 5 % at W4A4. Of fewer values than so many, a single one would be too large a share.
MAX_DIFFERING_SHARE = 0.01
_MIN_VALUES = 1000
# A value this close to the middle between two codes is a tie, whichever code it gets: 255 steps computed in float32 are known
# to 1e-4. Means over four pixels of a tensor whose grid they share are halves in one of four.
TIE = 2.0**-12
# A sum of 2^13 float32 products, rounded as badly as can be, is wrong by 2^-11 of the sum of their sizes; logits are sums
# of fewer, and of the other sign too.
MAX_LOGIT_ERROR = 2.0**-10
MAX_UNTIED_SHARE = 0.05
# MobileNetV2 hides 2 of 64 in OpenVINO. Where most are hidden, so is what the others would prove.
MAX_UNSEEN_SHARE = 0.5

_REPORT = "the file does not say what was quantized, please report it"


@dataclass(frozen=True)
class TensorParity:
    """How one tensor's codes compare.

    Args:
        max_code_difference: In steps of its grid.
        differing_share: Of all its values, ties left out, 0 to 1.
        values: How many were compared.
    """

    max_code_difference: int
    differing_share: float
    values: int


@dataclass(frozen=True)
class Parity:
    """What a runtime and the student say on the same images.

    Args:
        runtime: Its name.
        max_code_difference: The largest of any tensor, in steps of its grid, computed locally.
        differing_share: Of all values of all quantized tensors, ties left out, 0 to 1.
        logit_error: Largest difference of a logit computed locally, relative to the largest logit.
        top1_agreement: Share of images with the same class, run freely.
        untied_disagreements: Images with another class that are not ties, as the student's own spread of rounding tells them.
        max_logit_difference: Run freely.
        images: How many.
        per_tensor: By the name of the tensor.
        unrounded: Tensors that the runtime does not put on their grids, because it computes on inside one kernel.
        unseen: Tensors whose codes cannot be asked for without changing them.
    """

    runtime: str
    max_code_difference: int
    differing_share: float
    logit_error: float
    top1_agreement: float
    untied_disagreements: int
    max_logit_difference: float
    images: int
    per_tensor: dict[str, TensorParity]
    unrounded: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()


@torch.inference_mode()
def predict(session: Session, images: Float[Tensor, "n *shape"], *, batch: int = 64) -> Float[Tensor, "n classes"]:
    """The logits for all images, `batch` at a time."""
    return torch.from_numpy(np.concatenate([session(part.numpy()) for part in torch.split(images.cpu(), batch)]))


def assert_integer(path: Path, quantized: QuantizedNetwork, *, runtime: Runtime | None = None) -> None:
    """Checks that every layer became an integer kernel.

    Args:
        runtime: Default: ONNX Runtime.

    Raises:
        ExportError: Some did not; the message names them.
    """
    runtime = runtime or runtimes.load(_DEFAULT)
    left = runtime.float_layers(path, quantized.layers)
    if left:
        name, paths = name_of(runtime), ", ".join(quantized.layers[layer].path for layer in left)
        raise ExportError(
            f"{name}: all {len(quantized.layers)} layers must run as integers, got {len(left)} in float: {paths}; "
            f"the file is right but slow, another version of {name} may fuse them"
        )


def images_together(shape: Sequence[int]) -> int:
    """How many images of a shape (channels, height, width) are compared at a time."""
    return max(1, min(_BATCH, _PIXELS // math.prod(shape[1:])))


def probes_of(
    quantized: QuantizedNetwork, path: Path, images: Float[Tensor, "n *shape"], *, runtime: Runtime, batch: int, threads: int
) -> Undisturbed:
    """What reads the codes of the student's tensors in a file; arguments and errors as for `measure_parity`."""
    calls = [
        node
        for node in quantized.graph.graph.nodes
        if node.op == "call_module" and any(user.target in SUMS for user in node.users)
    ]
    return undisturbed(
        runtime,
        path,
        list(quantized.activations),
        images.cpu().numpy(),
        suspects={str(call.target).rpartition(".")[2] for call in calls},
        batch=batch,
        threads=threads,
    )


def measure_parity(
    quantized: QuantizedNetwork,
    path: Path,
    images: Float[Tensor, "n *shape"],
    *,
    runtime: Runtime | None = None,
    batch: int | None = None,
    threads: int = 1,
) -> Parity:
    """Runs both on the images and compares every quantized tensor and the logits.

    Args:
        path: A file written from `quantized`, one that `runtime` reads.
        images: In the network's own input units.
        runtime: Default: ONNX Runtime.
        batch: Images at a time; None for as many as take a GiB.

    Raises:
        ExportError: The file lacks a quantized tensor, or none can be read without changing what the runtime computes.
    """
    runtime = runtime or runtimes.load(_DEFAULT)
    batch = batch or images_together(images.shape[1:])
    probe = probes_of(quantized, path, images, runtime=runtime, batch=batch, threads=threads)
    worst: Counter[str] = Counter()
    differing: Counter[str] = Counter()
    values: Counter[str] = Counter()
    exact, plain = as_integers(quantized).cpu(), copy.deepcopy(quantized.graph).cpu()
    grids = {name: copy.deepcopy(quantizer).cpu() for name, quantizer in quantized.activations.items()}
    ours, theirs, local, free = [], [], [], []
    with torch.no_grad():
        for part in torch.split(images.cpu(), batch):
            logits, codes = probe(part.numpy())
            # The order in which the student sums on codes is that of ONNX Runtime, with zero points as in uint8.
            modelled = name_of(runtime) == _DEFAULT and all(found.dtype == np.uint8 for found in codes.values())
            comparison = _LocalComparison(exact if modelled else plain, grids, codes, probe.unrounded)
            local.append(comparison.run(part))
            for name, (largest, unequal, count) in comparison.differences.items():
                worst[name] = max(worst[name], largest)
                differing[name] += unequal
                values[name] += count
            ours.append(exact(part))
            free.append(_LocalComparison(plain, grids, {}, probe.unrounded).run(part))
            theirs.append(torch.from_numpy(logits))
    expected, actual = torch.cat(ours), torch.cat(theirs)
    logit_difference = float((expected - actual).abs().max())
    logit_error = float((torch.cat(local) - actual).abs().max() / actual.abs().max().clamp(min=1e-30))
    best, chosen = expected.argmax(dim=1, keepdim=True), actual.argmax(dim=1, keepdim=True)
    disagree = (best != chosen).flatten()
    # Of two logits, each may be off by so much; and by what float32 sums are.
    spread = torch.maximum((torch.cat(free) - expected).abs().max(), MAX_LOGIT_ERROR * expected.abs().max())
    tied = (expected.gather(1, best) - expected.gather(1, chosen)).flatten() <= 2 * spread
    return Parity(
        runtime=name_of(runtime),
        max_code_difference=max(worst.values(), default=0),
        differing_share=sum(differing.values()) / max(1, sum(values.values())),
        logit_error=logit_error,
        top1_agreement=1 - float(disagree.double().mean()),
        untied_disagreements=int((disagree & ~tied).sum()),
        max_logit_difference=logit_difference,
        images=len(images),
        per_tensor={name: TensorParity(worst[name], differing[name] / max(1, values[name]), values[name]) for name in values},
        unrounded=tuple(name for name in quantized.activations if name in probe.unrounded),
        unseen=tuple(name for name in quantized.activations if name in probe.unseen),
    )


class _LocalComparison(fx.Interpreter):
    """Runs the student; at every quantizer, compares its codes with the runtime's and goes on with the runtime's.

    A tensor that the runtime leaves unrounded ends where its grid does, and that is all; one that is neither this nor among the codes is
    the student's own.
    """

    def __init__(
        self, graph: fx.GraphModule, grids: dict[str, ActivationQuantizer], codes: dict[str, Any], unrounded: Set[str]
    ) -> None:
        super().__init__(graph)
        self._grids, self._codes, self._unrounded = grids, codes, unrounded
        # Of each tensor: the largest, how many are not zero, of how many. The tensors themselves would fill the memory.
        self.differences: dict[str, tuple[int, int, int]] = {}

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(str(target))
        name = module.tensor if isinstance(module, End) else str(target).rpartition(".")[2]
        grid = self._grids[name]
        if name in self._unrounded:
            ends = torch.tensor([float(grid.grid.quant_min), float(grid.grid.quant_max)])
            return args[0].clamp(*dequantize(ends, grid.scale, grid.zero_point))
        values = super().call_module(target, args, kwargs)
        if name not in self._codes:
            return values
        ours = quantize(values, grid.scale, grid.zero_point, grid.grid)
        if isinstance(module, End):
            # In the runtime's own order: ties go where they go there.
            tied = torch.zeros_like(ours, dtype=torch.bool)
        else:
            steps = args[0] / grid.scale
            tied = (steps - steps.floor() - 0.5).abs() <= TIE
        # A pooling that the file keeps four-dimensional has the same values in the same order.
        stored = self._codes[name]
        theirs = torch.from_numpy(stored).to(ours.dtype).reshape(ours.shape) + code_offset(grid, stored.dtype)
        difference = (ours - theirs).abs()
        self.differences[name] = int(difference.max()), int(difference[~tied].count_nonzero()), difference.numel()
        return dequantize(theirs, grid.scale, grid.zero_point)


def code_offset(quantizer: ActivationQuantizer, stored: np.dtype[Any]) -> Tensor | int:
    """What makes a file's codes the student's: uint8 shifts signed grids by half a byte, int8 has its zero point at 0 (`_lowering`)."""
    if stored == np.int8:
        return quantizer.zero_point
    return -128 if quantizer.grid.signed else 0


def assert_parity(parity: Parity) -> None:
    """Checks that the differences are those of rounding.

    Raises:
        ExportError: Too few tensors are seen, some tensor is more than a step apart, or too often, the logits do not follow from
            the last codes, or too many classes differ.
    """
    tensors = len(parity.per_tensor) + len(parity.unrounded) + len(parity.unseen)
    if len(parity.unseen) > MAX_UNSEEN_SHARE * tensors:
        raise ExportError(
            f"codes: {parity.runtime} must show those of {1 - MAX_UNSEEN_SHARE:.0%} of the tensors without computing otherwise, got "
            f"{len(parity.unseen)} of {tensors} hidden; try another version of {parity.runtime}"
        )
    if parity.max_code_difference > MAX_CODE_DIFFERENCE:
        name, worst = max(parity.per_tensor.items(), key=lambda item: item[1].max_code_difference)
        raise ExportError(
            f"{name}: codes in {parity.runtime} and in the student must be at most {MAX_CODE_DIFFERENCE} step apart, got "
            f"{worst.max_code_difference} steps, {worst.differing_share:.2%} of the values differ; {_REPORT}"
        )
    counted = {name: tensor for name, tensor in parity.per_tensor.items() if tensor.values >= _MIN_VALUES}
    for name, tensor in counted.items():
        if tensor.differing_share > MAX_DIFFERING_SHARE:
            raise ExportError(
                f"{name}: at most {MAX_DIFFERING_SHARE:.0%} of the codes in {parity.runtime} and in the student must differ, got "
                f"{tensor.differing_share:.2%}; {_REPORT}"
            )
    # Not a number is an error too.
    if not parity.logit_error <= MAX_LOGIT_ERROR:
        raise ExportError(
            f"logits: {parity.runtime} must compute them from the last codes to {MAX_LOGIT_ERROR:.1e} of the largest, got "
            f"{parity.logit_error:.1e}; {_REPORT}"
        )
    if parity.untied_disagreements > max(1.0, MAX_UNTIED_SHARE * parity.images):
        raise ExportError(
            f"logits: {parity.runtime} and the student must give the same class on {1 - MAX_UNTIED_SHARE:.0%} of the images, "
            f"ties not counted, got {parity.untied_disagreements} other classes on {parity.images} images; {_REPORT}"
        )
