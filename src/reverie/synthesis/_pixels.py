"""What the methods share that optimise images batch by batch: checkpoints, the teacher's statistics, priors, Adam on pixels.

A batch of pixels starts as noise. The rate falls by a half cosine from `learning_rate` to zero, so a run
ends after a known number of steps, and not when a plateau is noticed.

Pixels, rates and priors are in units in which photographs have about mean 0 and deviation 1: those of the network's inputs where their
normalization was made of data statistics, and others where it was not (`_photographs.to_inputs`). In raw pixels of 0 to 255 a
step of 0.1 would be nothing, and white noise black.

A method is a frozen dataclass derived from `PixelMethod`, or from `BatchMethod` where something else than pixels is optimised, whose
`alignment` is its loss on the statistics at the batch norms. See `zeroq.py`, the smallest.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from reverie.checkpoints import Checkpoints, Unfinished
from reverie.descent import below, optimizer_state, restore_optimizer, under
from reverie.errors import ConfigError, DivergenceError, check_range
from reverie.graph.batch_norm import Level, Observed, Statistics
from reverie.graph.swing import swing
from reverie.images import Images
from reverie.images.contract import InputContract
from reverie.images.store import thumbnails
from reverie.plugins import name_of
from reverie.progress import Progress, loss_note
from reverie.randomness import Seed
from reverie.synthesis import Teacher, batches, lacks_batch_norm
from reverie.synthesis._leaves import dead_leaves
from reverie.synthesis._losses import total_variation
from reverie.synthesis._photographs import natural_noise, to_inputs

# How often the loss is told.
_STEPS_BETWEEN_NOTES = 10

Alignment = Callable[[Tensor, Statistics], Tensor]
Start = Literal["natural", "white", "leaves"]


@dataclass(frozen=True, kw_only=True)
class BatchMethod(ABC):
    """Gradient descent on images, each batch by itself.

    Args:
        batch: Images optimised together.
        steps: Adam steps for each batch.
        swing: Whether convolutions with a stride read their inputs a little shifted, anew at each step (`graph/swing.py`).
        input_weight: Of the term on the image's own mean and standard deviation.
        class_weight: Of the cross-entropy to a random label; 0 leaves labels out.
        variation_weight: Of the total variation.
    """

    batch: int = 32
    steps: int = 100
    swing: bool = True
    input_weight: float = 0.1
    class_weight: float = 0.0
    variation_weight: float = 0.0

    needs_batch_norm: ClassVar[bool] = True
    needs_capsule: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_range(
            self,
            batch=(1, math.inf),
            steps=(1, math.inf),
            input_weight=(0, math.inf),
            class_weight=(0, math.inf),
            variation_weight=(0, math.inf),
        )

    @abstractmethod
    def statistics_level(self) -> Level:
        """Whose statistics the loss reads: the batch's or each sample's."""

    @abstractmethod
    def alignment(
        self, teacher: Teacher, observed: Observed, noise: Tensor, offset: int, generator: torch.Generator
    ) -> Alignment:
        """The loss on inputs and their statistics, for a batch.

        Args:
            noise: Gaussian images, as many as the batch has, as network inputs.
            offset: Images made before this batch.
            generator: What the loss draws from, if it draws.
        """

    @abstractmethod
    def optimise(
        self,
        teacher: Teacher,
        noise: Tensor,
        loss: Callable[[Tensor], Tensor],
        seed: Seed,
        step: Callable[..., None],
        unfinished: Unfinished,
    ) -> Float[Tensor, "size channels height width"]:
        """The batch, on the CPU, after `steps` steps down `loss`.

        Args:
            noise: Gaussian images, as many as the batch has, on the teacher's device.
            loss: Of the images, as network inputs; to be called once each step.
            seed: The batch's.
            step: To be called after each step.
            unfinished: Where the batch's state is kept before that.
        """

    def __call__(self, teacher: Teacher, count: int, *, seed: Seed, checkpoints: Checkpoints, progress: Progress) -> Images:
        """`count` images, batch by batch; finished batches are checkpoints."""
        name = name_of(self)
        if not teacher.batch_norms:
            raise lacks_batch_norm(teacher.name, name)
        made = in_batches(
            lambda number, size, step, part: self._batch(teacher, number * self.batch, size, seed.at(number), step, part),
            batches(count, self.batch),
            teacher.input,
            steps=self.steps,
            checkpoints=checkpoints,
            progress=progress,
        )
        return Images(
            inputs=made["inputs"],
            labels=made["labels"] if self.class_weight else None,
            sources=(name,) * count,
        )

    def _batch(
        self, teacher: Teacher, offset: int, size: int, seed: Seed, step: Callable[..., None], unfinished: Unfinished
    ) -> dict[str, Tensor]:
        generator, swinging = seed.generator(), seed.at("swing").generator()
        unfinished.draws_from(generator, swinging)
        noise, labels = drawn(teacher.input.shape, teacher.classes, size, generator)
        noise, targets = noise.to(teacher.device), labels.to(teacher.device)
        graph = swing(teacher.graph, swinging) if self.swing else teacher.graph
        observed = Observed(graph, self.statistics_level())
        gain, shift = (part.to(noise) for part in to_inputs(teacher.input))
        align = self.alignment(teacher, observed, noise * gain + shift, offset, generator)
        priors = Priors(self.input_weight, self.class_weight, self.variation_weight)

        def loss(inputs: Tensor) -> Tensor:
            logits, statistics = observed(inputs)
            return align(inputs, statistics) + priors((inputs - shift) / gain, logits, targets)

        return {"inputs": self.optimise(teacher, noise, loss, seed, step, unfinished), "labels": labels}


@dataclass(frozen=True, kw_only=True)
class PixelMethod(BatchMethod):
    """Gradient descent on pixels.

    Args:
        learning_rate: Of the first step, where photographs deviate by 1.
        start: What pixels are at first: "natural", noise with the spectrum and colours of photographs; "leaves", things of all sizes
            before each other, which have edges too (`_leaves.py`); or "white" noise.
        clamp: Keep pixels valid (between black and white) after each step.
    """

    learning_rate: float = 0.1
    start: Start = "natural"
    clamp: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, learning_rate=(1e-9, math.inf))
        if self.start not in get_args(Start):
            raise ConfigError(f"start must be one of {', '.join(get_args(Start))}, got {self.start!r}")

    def optimise(
        self,
        teacher: Teacher,
        noise: Tensor,
        loss: Callable[[Tensor], Tensor],
        seed: Seed,
        step: Callable[..., None],
        unfinished: Unfinished,
    ) -> Float[Tensor, "size channels height width"]:
        """From noise on, by `descend`."""
        if self.start == "natural":
            noise = natural_noise(noise)
        elif self.start == "leaves":
            noise = dead_leaves(noise, seed.at("leaves").generator())
        return descend(
            noise,
            loss,
            teacher.input,
            steps=self.steps,
            learning_rate=self.learning_rate,
            clamp=self.clamp,
            step=step,
            unfinished=unfinished,
        )


def in_batches(
    make: Callable[[int, int, Callable[..., None], Unfinished], dict[str, Tensor]],
    sizes: Sequence[int],
    contract: InputContract,
    *,
    steps: int,
    stage: str = "synthesize",
    part_name: str = "images",
    checkpoints: Checkpoints,
    progress: Progress,
) -> dict[str, Tensor]:
    """The parts of all batches, joined; a finished batch is a checkpoint, unless it took less time than writing one is worth.

    Args:
        make: Makes a batch, given its number, its size, what to call after each of its `steps`, and where to keep its state before that.
        sizes: Images of each batch.
        contract: Of the images, to show them.
        stage: What progress calls it.
        part_name: What checkpoints call a batch, before its number.
    """
    parts = []
    with progress.stage(stage, total=steps * len(sizes)) as step:
        for number, size in enumerate(sizes):
            name = f"{part_name}-{number}"
            part = checkpoints.load(name)
            if part is None:
                part = make(number, size, step, Unfinished(checkpoints, name))
                if checkpoints.due():
                    checkpoints.save(name, part)
            else:
                step(steps, skipped=True)
            parts.append(part)
            progress.show(partial(thumbnails, part["inputs"], contract))
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def drawn(
    shape: tuple[int, int, int], classes: int, size: int, generator: torch.Generator
) -> tuple[Float[Tensor, "size channels height width"], Int[Tensor, " size"]]:
    """Noise with unit variance, and a random label for each image."""
    return torch.randn(size, *shape, generator=generator), torch.randint(classes, (size,), generator=generator)


def descend(
    pixels: Float[Tensor, "size channels height width"],
    loss: Callable[[Tensor], Tensor],
    contract: InputContract,
    *,
    steps: int,
    learning_rate: float,
    clamp: bool = True,
    step: Callable[..., None],
    unfinished: Unfinished,
    setting: str = "synthesis.learning_rate",
) -> Float[Tensor, "size channels height width"]:
    """Network inputs, on the CPU, after `steps` of Adam on `loss` from `pixels`.

    Args:
        pixels: With about mean 0 and deviation 1, see above.
        loss: Of the network inputs that they stand for; called once each step.
        clamp: Keep pixels valid after each step.
        step: Called after each step.
        unfinished: Where the state is kept before that; begun ones go on from there.
        setting: The key of the learning rate, for the error.

    Raises:
        DivergenceError: A pixel is infinite or undefined at the end.
    """
    # Channels-last makes a step 1.3 (32 px) to 1.8 (224 px) times faster on a CPU.
    pixels = pixels.clone().contiguous(memory_format=torch.channels_last).requires_grad_()
    gain, offset = (part.to(pixels) for part in to_inputs(contract))
    ends = contract.bounds(pixels)
    optimizer = torch.optim.Adam([pixels], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    done, saved = 0, unfinished.load()
    if saved is not None:
        done = restore_scheduled(optimizer, schedule, saved)
        with torch.no_grad():
            pixels.copy_(saved["pixels"])
        step(done, skipped=True)
    for number in range(done, steps):
        value = loss(pixels * gain + offset)
        (pixels.grad,) = torch.autograd.grad(value, pixels)
        optimizer.step()
        schedule.step()
        if clamp:
            with torch.no_grad():
                torch.clamp(pixels, *((end - offset) / gain for end in ends), out=pixels)
        unfinished.keep(partial(_state, pixels, optimizer, number + 1))
        # Reading a number waits for a GPU, so not at every step.
        step(note="" if number % _STEPS_BETWEEN_NOTES else loss_note(value.item()))
    if not bool(torch.isfinite(pixels).all()):
        raise DivergenceError(
            f"synthesis: pixels must stay finite, got others after {steps} steps; "
            f"try --set {setting}={learning_rate / 4:g} with another --output"
        )
    inputs = pixels.detach() * gain + offset
    return (torch.clamp(inputs, *ends) if clamp else inputs).cpu().contiguous()


def _state(pixels: Tensor, optimizer: torch.optim.Optimizer, done: int) -> dict[str, Tensor]:
    return {"pixels": pixels.detach(), **scheduled(optimizer, done)}


def scheduled(optimizer: torch.optim.Optimizer, done: int) -> dict[str, Tensor]:
    """The memory of an optimizer whose rates a schedule has changed `done` times."""
    rates = torch.tensor([group["lr"] for group in optimizer.param_groups], dtype=torch.float64)
    return {"done": torch.tensor(done), "rates": rates, **below("optimizer", optimizer_state(optimizer))}


def restore_scheduled(
    optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler, state: dict[str, Tensor]
) -> int:
    """Puts both back to where `scheduled` told of them; the steps done."""
    done, rates = int(state["done"]), state["rates"].tolist()
    restore_optimizer(optimizer, under("optimizer", state))
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    # The schedule computes each rate from the last one, in floats that a formula would not meet.
    schedule.load_state_dict({"last_epoch": done, "_step_count": done + 1, "_last_lr": rates})
    return done


@dataclass(frozen=True)
class Priors:
    """Weights of the terms that look at the pixels and at the answers; a weight of 0 leaves its term out.

    Args:
        input: Of the squared deviation of each image's channels from mean 0 and standard deviation 1, as photographs have.
        label: Of the cross-entropy to the label.
        variation: Of the total variation.
    """

    input: float
    label: float
    variation: float

    def __call__(
        self,
        pixels: Float[Tensor, "size channels height width"],
        logits: Float[Tensor, "size classes"],
        labels: Int[Tensor, " size"],
    ) -> Float[Tensor, ""]:
        """The weighted sum of the terms."""
        total = logits.new_zeros(())
        if self.input:
            deviation, mean = torch.std_mean(pixels.flatten(2), dim=2, correction=0)
            total = total + self.input * (mean.square() + (deviation - 1).square()).mean()
        if self.label:
            total = total + self.label * functional.cross_entropy(logits, labels)
        if self.variation:
            total = total + self.variation * total_variation(pixels)
        return total
