"""Distillation: the whole network as one unit, its answers fitted to the teacher's on batch after batch of images.

It comes before weights are rounded, or after: then it is the network-level pass behind a reconstruction unit by unit, which has
brought every unit near its own and knows nothing of what the others left over.

    loss = kl_weight * temperature^2 * KL( softmax(t / temperature) || softmax(o / temperature) ) + class_weight * CE(o, y)

t and o are the teacher's and the student's logits, y the label; KL is the mean over the batch of sums over classes. Learned
are the weights (rounded to nearest at every step, straight-through; or they stay), biases, gains and biases of batch norms, and, if
asked, the scales of grids (Esser et al. 2020, LSQ). Running statistics stay.

Reference: the student's side of GDFQ, ClusterQ, DSG and FDDA (algorithms 1.6, 2.4): temperature 20; kl_weight 1 in
ClusterQ, 20 in FDDA; GDFQ and DSG divide the KL by the number of classes as well, which makes its weight depend on the data set:
we do not. Their class weight is 1, their optimizer SGD with Nesterov momentum 0.9 and weight decay 1e-4 at 1e-4 (CIFAR) or 1e-6
(ImageNet) for 70,000 steps, and their gradient passes clipped values too; ours are Adam, learned scales, one half cosine, and no
gradient where a value is clipped, for hundreds of steps (docs/log.md). All but the last is a matter of settings.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, fx
from torch.nn import functional

from reverie.checkpoints import Checkpoints
from reverie.descent import Descent, below, under
from reverie.errors import ConfigError, check_range
from reverie.graph.operators import BATCH_NORM, arguments, attribute, layers
from reverie.graph.placement import Student
from reverie.images.augment import Augmentation
from reverie.images.source import Source
from reverie.observers import weight_qparams
from reverie.observers.minmax import MinMax
from reverie.progress import Progress, loss_note
from reverie.recovery.ranges import keep_biases_in_range

WeightRanges = Literal["minmax", "fixed", "learned"]
Optimizer = Literal["adam", "sgd"]
Synthetic = Literal["kept", "fresh", "both"]
After = Literal["calibration", "rounding"]


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """How the student learns from the teacher; with `steps` 0 it does not.

    Args:
        steps: Batches.
        after: "calibration", and weights are rounded when it is done, by the recipe's method; or "rounding": it starts from the weights
            that the method rounded, moves them, and leaves them rounded to nearest.
        batch: Kept images in each; of fresh ones a generator makes its own number.
        synthetic: Of a method with a generator: its "kept" images, which are refined; "fresh" ones, made anew at each step
            by the generator, which goes on training on them (the papers); or "both". Other methods have kept ones only.
        optimizer: "adam" or "sgd" (Nesterov momentum 0.9).
        learning_rate: Of weights, biases and norms at the first step; it falls by a half cosine to 0.
        weight_decay: Of the same.
        temperature: Of the softmax on both sides.
        kl_weight: Of KL, which is multiplied by the square of the temperature besides.
        class_weight: Of the cross-entropy to the labels.
        weight_ranges: "minmax" follows the weights at every step (the literature), "fixed" keeps what calibration found,
            "learned" learns scales.
        learned_ranges: Whether the scales of activations are learned, or stay frozen (the literature).
        scale_rate: Learning rate of scales, relative to themselves.
        learned_weights: Whether weights are learned, or stay what they are and only biases, norms and scales are: few numbers, which a few
            hundred photographs teach better than all of them.
        smallest_crop: Least share of its area that a crop of a synthetic image shows, 1 for no crops; 0.5 in FDDA.
        smallest_real_crop: The same for a real image; 0.08 in FDDA.
        flip: Whether images are mirrored where they are changed at all; off for digits, signs and the like.
        colour: How much their colours are changed, in deviations (`images/augment.py`).
        cut_mix: The share of images with a patch of another one; only without a class term.
    """

    steps: int = 0
    after: After = "calibration"
    batch: int = 64
    synthetic: Synthetic = "kept"
    optimizer: Optimizer = "adam"
    learning_rate: float = 5e-4
    weight_decay: float = 0.0
    temperature: float = 20.0
    kl_weight: float = 1.0
    class_weight: float = 0.0
    weight_ranges: WeightRanges = "learned"
    learned_ranges: bool = True
    scale_rate: float = 1e-3
    learned_weights: bool = True
    smallest_crop: float = 1.0
    smallest_real_crop: float = 0.5
    flip: bool = True
    colour: float = 0.0
    cut_mix: float = 0.0

    def __post_init__(self) -> None:
        check_range(
            self,
            steps=(0, math.inf),
            batch=(1, math.inf),
            learning_rate=(1e-12, math.inf),
            weight_decay=(0, math.inf),
            temperature=(1e-3, math.inf),
            kl_weight=(0, math.inf),
            class_weight=(0, math.inf),
            scale_rate=(0, math.inf),
            smallest_crop=(0.01, 1),
            smallest_real_crop=(0.01, 1),
            colour=(0, 1),
            cut_mix=(0, 1),
        )
        if self.cut_mix and self.class_weight:
            raise ConfigError(
                f"cut_mix must be 0 with a class_weight, got {self.cut_mix:g} and {self.class_weight:g}; an image with a patch of another "
                "has no one label: use --set distillation.cut_mix=0"
            )
        choices = {"after": After, "synthetic": Synthetic, "optimizer": Optimizer, "weight_ranges": WeightRanges}
        for name, kind in choices.items():
            if getattr(self, name) not in get_args(kind):
                raise ConfigError(f"{name} must be one of {', '.join(get_args(kind))}, got {getattr(self, name)!r}")

    def augmentation(self, *, real: bool) -> Augmentation | None:
        """What happens to every image that is real, or is not; None if nothing."""
        smallest = self.smallest_real_crop if real else self.smallest_crop
        if smallest == 1 and not self.colour and not self.cut_mix:
            return None
        return Augmentation(smallest, self.flip, self.colour, self.cut_mix)


def distil(
    teacher: fx.GraphModule,
    student: Student,
    source: Source,
    settings: Distillation,
    *,
    checkpoints: Checkpoints,
    progress: Progress,
) -> None:
    """Trains the student in place; afterwards its tensors are buffers again, and its grids fixed.

    Args:
        teacher: Full precision; asked for logits only where a batch does not bring them.
        student: Calibrated; where codes are decided, they are where it starts.
        source: Of `settings.steps` batches.

    Raises:
        ConfigError: Labels are asked for, and a batch has none; or there is nothing to learn.
        DivergenceError: The loss is lost; the last checkpoint is from before.
    """
    check_learns(student, settings)
    weights, scales = _learn(student, settings)
    gains = _gains(teacher, student) if settings.learned_weights else {}
    groups: list[dict[str, Any]] = [
        {"params": list(weights.values()), "lr": settings.learning_rate, "weight_decay": settings.weight_decay},
        {"params": list(scales.values()), "lr": settings.scale_rate, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    learned = weights | scales
    optimizer = (
        torch.optim.Adam(groups) if settings.optimizer == "adam" else torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    )
    cure = f"try --set distillation.learning_rate={settings.learning_rate / 4:g} with another --output"
    descent = Descent(optimizer, place="distillation", cure=cure)
    first = [group["lr"] for group in groups]
    done = 0
    saved = checkpoints.load("distillation")
    if saved is not None:
        done = int(saved["done"])
        with torch.no_grad():
            for name, value in under("learned", saved).items():
                learned[name].copy_(value)
        descent.restore(under("descent", saved))
        if done < settings.steps:
            source.restore(under("source", saved))
    with progress.stage("distil", total=settings.steps, done=done) as step:
        for number in range(done, settings.steps):
            share = number / settings.steps
            for group, rate in zip(optimizer.param_groups, first, strict=True):
                group["lr"] = rate * (1 + math.cos(math.pi * share)) / 2
            batch = source.draw(number, share)
            known = batch.logits
            if known is None:
                with torch.no_grad():
                    known = teacher(batch.inputs)
            answers = student.graph(batch.inputs)
            terms = {"KL": settings.kl_weight * divergence(answers, known, settings.temperature)}
            if settings.class_weight:
                if batch.labels is None:
                    raise ConfigError(
                        f"distillation.class_weight must be 0 where images have no labels, got {settings.class_weight}; "
                        "give labelled images, or leave the weight out"
                    )
                terms["class"] = settings.class_weight * functional.cross_entropy(answers, batch.labels)
            before = {name: weights[name].detach().clone() for name in gains}
            loss = descent.step(number, terms)
            with torch.no_grad():
                for name, gain in gains.items():
                    weights[name].copy_(torch.lerp(before[name], weights[name], gain))
            if number + 1 == settings.steps or checkpoints.due():
                state = {name: value.detach() for name, value in learned.items()}
                checkpoints.save(
                    "distillation",
                    {
                        "done": torch.tensor(number + 1),
                        **below("learned", state),
                        **below("descent", descent.state()),
                        # Nothing is drawn after the last step, and a generator is large.
                        **(below("source", source.state()) if number + 1 < settings.steps else {}),
                    },
                )
            step(note=loss_note(loss))
    _settle(student, weights)


def divergence(
    answers: Float[Tensor, "batch classes"], known: Float[Tensor, "batch classes"], temperature: float
) -> Float[Tensor, ""]:
    """temperature^2 * KL(softmax(known / temperature) || softmax(answers / temperature)), mean over the batch."""
    ours = functional.log_softmax(answers / temperature, dim=1)
    theirs = functional.log_softmax(known / temperature, dim=1)
    return temperature**2 * functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def check_learns(student: Student, settings: Distillation) -> None:
    """Refuses settings that leave nothing to learn.

    Raises:
        ConfigError: There is nothing; with the cure.
    """
    scales = settings.weight_ranges == "learned" or (settings.learned_ranges and student.activations)
    if not scales and not _learned_tensors(student, settings):
        raise ConfigError(
            "distillation.learned_weights must be true for a network without biases where no scale is learned, got false; leave it out, "
            "or use --set distillation.weight_ranges=learned"
        )


def _learned_tensors(student: Student, settings: Distillation) -> set[str]:
    """Names of the graph's tensors that are learned: biases and those of batch norms, and weights unless they stay what they are."""
    names = {layer.bias for layer in student.layers.values() if layer.bias is not None}
    if settings.learned_weights:
        names |= {layer.weight for layer in student.layers.values()}
    for node in student.graph.graph.nodes:
        if node.op == "call_function" and node.target is BATCH_NORM:
            named = arguments(node)
            names |= {str(named[key].target) for key in ("weight", "bias") if named[key] is not None}
    return names


def _learn(student: Student, settings: Distillation) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What is learned, by name: tensors of the graph, which become leaves with gradients; and the gains of scales."""
    graph = student.graph
    for name, layer in student.layers.items():
        student.weights[name].release(graph.get_buffer(layer.weight))
    weights = {name: graph.get_buffer(name).requires_grad_() for name in sorted(_learned_tensors(student, settings))}
    scales: dict[str, Tensor] = {}
    for name, quantizer in student.weights.items():
        if settings.weight_ranges == "minmax":
            ends = partial(weight_qparams, observer=MinMax(), grid=quantizer.grid, symmetric=student.kind == "integer")
            quantizer.follow(ends)
        elif settings.weight_ranges == "learned":
            scales[f"weight {name}"] = quantizer.learn_scale()
    if settings.learned_ranges:
        scales |= {f"activation {name}": quantizer.learn_scale() for name, quantizer in student.activations.items()}
    return weights, scales


def _gains(teacher: fx.GraphModule, student: Student) -> dict[str, Tensor]:
    """By what each channel of a stored weight is larger in the student than in the teacher, where it is not the same.

    A weight that a batch norm was folded into has its channels multiplied, by 0.05 to 5 on a ResNet-20, while Adam's steps
    know no units: at a rate that suits the teacher's weights, W4A4 fell from 92.8 to 54.6 % in 100 steps. A step that is
    multiplied likewise is the step that the weight would have made before it was folded.
    """
    originals = {node.name: attribute(teacher, arguments(node)["weight"]) for node in layers(teacher)}
    gains = {}
    for name, layer in student.layers.items():
        original, weight = originals[name], student.graph.get_buffer(layer.weight)
        assert original is not None
        if not torch.equal(original, weight):
            sizes = (part.detach().flatten(1).abs().amax(dim=1) for part in (weight, original))
            new, old = sizes
            gain = torch.where((new > 0) & (old > 0), new / old, 1.0)
            gains[layer.weight] = gain.view(-1, *[1] * (weight.dim() - 1))
    return gains


def _settle(student: Student, weights: dict[str, Tensor]) -> None:
    """Turns what was learned back into buffers, and fixes the grids."""
    for value in weights.values():
        value.requires_grad_(False)
        value.grad = None
    for quantizer in student.activations.values():
        quantizer.settle()
    for name, layer in student.layers.items():
        student.weights[name].settle(student.graph.get_buffer(layer.weight))
    keep_biases_in_range(student)
