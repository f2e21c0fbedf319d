"""A generator in training, as a source of images: what GDFQ, FDDA, ClusterQ and DSG's generator share.

The generator's loss needs the teacher alone, so a stream can be trained by itself (the warm-up, after which it gives the
fixed set of images that every synthesis method gives), and it can go on training while a student consumes the very
batches it is trained on, together with the logits that the teacher gave them.

    warm-up       `steps` steps of the generator, learning rate constant
    kept images   the generator's, and `refine_steps` steps of gradient descent on their pixels; what a student learns from by default
    fresh images  one more step for each batch drawn, learning rate x `decay` after each quarter (all repositories of the
                  family: after 100, 200 and 300 of 400 epochs, warm-up included)

The refinement is ours: after hundreds of steps, where the papers take ten thousands, a generator knows the classes, and its images
are too much alike; fifty steps on the pixels undo that (docs/log.md).

Refinement asks for the class and the statistics alone. What pulls images of a class together (ClusterQ's centroids, FDDA's
centres) has formed the generator; on pixels it takes the spread from them that the student needs.

A method is a frozen dataclass derived from `GeneratorMethod`; where its loss is more than what all have in common, its `stream_type`
is a class derived from `GeneratorStream`. See `gdfq.py`, which needs none, and `dsg_generator.py`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from reverie.checkpoints import Checkpoints, Unfinished
from reverie.descent import Descent, below, under
from reverie.errors import ConfigError, check_range
from reverie.graph.batch_norm import Level, Observed, Statistics
from reverie.images import Images
from reverie.images.source import Batch
from reverie.plugins import name_of
from reverie.progress import Progress, loss_note
from reverie.randomness import Seed
from reverie.synthesis import Teacher, even_batches, lacks_batch_norm
from reverie.synthesis._generator import CONDITIONINGS, Conditioning, Generator
from reverie.synthesis._losses import matching_loss, pooled, running, statistics_distance
from reverie.synthesis._photographs import to_inputs
from reverie.synthesis._pixels import descend, in_batches

# From so many parameters on, a narrower generator is worth a hint.
_LARGE = 10_000_000


class GeneratorStream(nn.Module):
    """A generator, its optimizer and its teacher; it learns by `common_terms` unless a subclass says by what else.

    Args:
        settings: The method.
        seed: Of weights, noise and labels.
    """

    level: ClassVar[Level] = "batch"

    def __init__(self, settings: "GeneratorMethod", teacher: Teacher, seed: Seed) -> None:
        super().__init__()
        self.name = name_of(settings)
        self.input = teacher.input
        self.settings, self.seed, self.classes = settings, seed, teacher.classes
        self.norms, self.device = teacher.batch_norms, teacher.device
        self.observed = Observed(teacher.graph, self.level)
        self.generator = Generator(
            teacher.input,
            teacher.classes,
            latent=settings.latent,
            width=settings.width,
            conditioning=settings.conditioning,
            seed=seed.at("weights"),
        ).to(self.device)
        self.generator.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._descent = Descent(
            torch.optim.Adam(self.generator.parameters(), lr=settings.learning_rate, betas=(0.5, 0.999)),
            place=f"{self.name}: generator",
            cure=f"try --set synthesis.learning_rate={settings.learning_rate / 4:g} with another --output",
        )
        self.trained = 0

    def judge(
        self, inputs: Float[Tensor, "batch *shape"], labels: Int[Tensor, " batch"], place: int, random: torch.Generator
    ) -> tuple[dict[str, Tensor], Float[Tensor, "batch classes"]]:
        """The weighted terms that images are refined by, and the teacher's answers: cross-entropy and statistics unless overridden.

        Args:
            place: Of the first image among all that were made so far.
            random: For what the loss draws; on the CPU, so that every device sees the same.
        """
        logits, statistics = self.observed(inputs)
        return self.common_terms(labels, logits, statistics), logits

    def common_terms(self, labels: Tensor, logits: Tensor, statistics: Statistics) -> dict[str, Tensor]:
        """What all methods ask of images: the class, and the batch-norm statistics of the batch, weighted."""
        whole = pooled(statistics) if self.level == "sample" else statistics
        if self.settings.relative:
            distance = matching_loss(whole, self.norms)
        else:
            distance = statistics_distance(whole, *running(self.norms), range(len(self.norms)))
        return {
            "class": self.settings.class_weight * functional.cross_entropy(logits, labels),
            "statistics": self.settings.statistics_weight * distance,
        }

    def terms(self, number: int, random: torch.Generator) -> tuple[dict[str, Tensor], Batch]:
        """The weighted terms of the loss at step `number`, and the batch of mixed classes that they were computed on."""
        labels = self.random_labels(self.settings.batch, random)
        inputs = self.make(labels, random)
        terms, logits = self.judge(inputs, labels, number * self.settings.batch, random)
        return terms, Batch(inputs.detach(), labels, logits.detach())

    def make(self, labels: Int[Tensor, " batch"], random: torch.Generator) -> Tensor:
        """Images of the classes asked for, with gradients to the generator."""
        noise = torch.randn(len(labels), self.generator.latent, generator=random).to(self.device)
        images: Tensor = self.generator(noise, labels.to(self.device))
        return images

    def random_labels(self, count: int, random: torch.Generator) -> Int[Tensor, " batch"]:
        """`count` classes, uniform."""
        return torch.randint(self.classes, (count,), generator=random).to(self.device)

    def train_step(self, rate: float) -> tuple[Batch, float]:
        """One step of the generator at learning rate `rate`: the batch as it was before the step, and its loss."""
        for group in self._descent.optimizer.param_groups:
            group["lr"] = rate
        terms, batch = self.terms(self.trained, self.seed.at("step", self.trained).generator())
        loss = self._descent.step(self.trained, terms)
        self.trained += 1
        return batch, loss

    def draw(self, number: int, progress: float) -> Batch:
        """One more step of the generator, and the batch it was made on."""
        return self.train_step(self.settings.learning_rate * self.settings.decay ** int(4 * progress))[0]

    def sample(self, count: int, seed: Seed, *, checkpoints: Checkpoints, progress: Progress) -> Images:
        """`count` images by the generator as it is now, classes in turn, refined; refined batches are checkpoints."""
        inputs, labels = self._generated(count, seed)
        if self.settings.refine_steps:
            inputs = self._refined(inputs, labels, seed, checkpoints, progress)
        return Images(inputs=inputs, labels=labels, sources=(self.name,) * count)

    def _refined(
        self,
        inputs: Float[Tensor, "count *shape"],
        labels: Int[Tensor, " count"],
        seed: Seed,
        checkpoints: Checkpoints,
        progress: Progress,
    ) -> Float[Tensor, "count *shape"]:
        settings = self.settings
        # As even as can be, since the loss reads a batch's statistics.
        sizes = even_batches(len(inputs), settings.batch)
        parts = torch.split(torch.arange(len(inputs)), sizes)

        def refine(number: int, size: int, step: Callable[..., None], unfinished: Unfinished) -> dict[str, Tensor]:
            chosen, random = parts[number], seed.at("refine", number).generator()
            unfinished.draws_from(random)
            place = int(chosen[0])
            asked = labels[chosen].to(self.device)

            def loss(images: Tensor) -> Tensor:
                return torch.stack(list(self.judge(images, asked, place, random)[0].values())).sum()

            start = inputs[chosen].to(self.device)
            gain, offset = (part.to(start) for part in to_inputs(self.input))
            refined = descend(
                (start - offset) / gain,
                loss,
                self.input,
                steps=settings.refine_steps,
                learning_rate=settings.refine_rate,
                step=step,
                unfinished=unfinished,
                setting="synthesis.refine_rate",
            )
            return {"inputs": refined}

        refined = in_batches(
            refine,
            sizes,
            self.input,
            steps=settings.refine_steps,
            checkpoints=checkpoints,
            progress=progress,
            stage="refine",
            part_name="refined",
        )
        return refined["inputs"]

    @torch.no_grad()
    def _generated(self, count: int, seed: Seed) -> tuple[Float[Tensor, "count *shape"], Int[Tensor, " count"]]:
        size = self.settings.batch
        # Fewer images than classes: evenly from all of them.
        parts, labels = [], torch.arange(count) * max(self.classes // max(count, 1), 1) % self.classes
        # Norms read the statistics of their batch, so all batches are whole and mix the classes as in training.
        order = torch.randperm(-(-count // size) * size, generator=seed.at("order").generator())
        asked = labels[order % count]
        kept = {name: value.clone() for name, value in self.generator.state_dict().items()}
        for number, chosen in enumerate(torch.split(asked, size)):
            parts.append(self.make(chosen, seed.at("sample", number).generator()).cpu().contiguous())
        # In training mode a norm also remembers, which nobody reads, but which a checkpoint would tell.
        self.generator.load_state_dict(kept)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        return torch.cat(parts)[place[:count]], labels

    def state(self) -> dict[str, Tensor]:
        """A copy of everything that decides the batches to come."""
        weights = {name: value.clone() for name, value in self.generator.state_dict().items()}
        return {
            "trained": torch.tensor(self.trained),
            **below("generator", weights),
            **below("descent", self._descent.state()),
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """Goes back to where `state` was taken."""
        self.trained = int(state["trained"])
        self.generator.load_state_dict(under("generator", state))
        self._descent.restore(under("descent", state))


@dataclass(frozen=True, kw_only=True)
class GeneratorMethod:
    """What all methods with a generator have; each says what the others mean, and its own.

    Args:
        steps: Of the generator alone, before a student sees its images.
        batch: Images of mixed classes in each step.
        latent: Length of the noise vector.
        width: Channels of the generator's widest layers.
        conditioning: How the class enters: "norms", "embedding", or "auto" by the image's size.
        class_weight: Of the cross-entropy to the class asked for.
        statistics_weight: Of the distance of the batch-norm statistics. 0.1 in the released codes of GDFQ and ClusterQ, 0.2 in FDDA's, all of
            absolute distances; of relative ones 1 and 20 taught a student less than 5 (one seed, docs/log.md).
        relative: That distance in units of the running standard deviation, as in `zeroq`; else absolute, as in the papers, where layers
            with large values rule (docs/log.md).
        learning_rate: Of Adam with betas 0.5 and 0.999; 1e-3 in all repositories of the family, for 80,000 steps.
        decay: Factor on the learning rate after each quarter of the student's steps.
        refine_steps: Adam steps on the pixels of the images that are kept; 0, as in the papers, keeps them as they are generated.
        refine_rate: Learning rate of the first of these steps, where photographs deviate by 1.
    """

    steps: int = 400
    batch: int = 64
    latent: int = 100
    width: int = 64
    conditioning: Conditioning = "auto"
    class_weight: float = 1.0
    statistics_weight: float = 5.0
    relative: bool = True
    learning_rate: float = 3e-3
    decay: float = 0.1
    refine_steps: int = 50
    refine_rate: float = 0.05

    needs_batch_norm: ClassVar[bool] = True
    needs_capsule: ClassVar[bool] = False
    stream_type: ClassVar[type[GeneratorStream]] = GeneratorStream

    def __post_init__(self) -> None:
        check_range(
            self,
            steps=(1, math.inf),
            batch=(2, math.inf),
            latent=(1, math.inf),
            width=(1, math.inf),
            class_weight=(0, math.inf),
            statistics_weight=(0, math.inf),
            learning_rate=(1e-9, math.inf),
            decay=(0, 1),
            refine_steps=(0, math.inf),
            refine_rate=(1e-9, math.inf),
        )
        if self.conditioning not in CONDITIONINGS:
            raise ConfigError(f"conditioning must be one of {', '.join(CONDITIONINGS)}, got {self.conditioning!r}")

    def stream(self, teacher: Teacher, *, seed: Seed, checkpoints: Checkpoints, progress: Progress) -> GeneratorStream:
        """The generator after its warm-up, ready to be drawn from; what a checkpoint holds of it is not trained again."""
        name = name_of(self)
        if not teacher.batch_norms:
            raise lacks_batch_norm(teacher.name, name)
        stream = self.stream_type(self, teacher, seed)
        saved = checkpoints.load("generator")
        if saved is not None:
            stream.restore(saved)
        if stream.trained < self.steps:
            progress.say(f"{name}: {self._size_text(stream.generator.parameter_count)}")
            with progress.stage("synthesize", total=self.steps, done=stream.trained) as step:
                while stream.trained < self.steps:
                    _, loss = stream.train_step(self.learning_rate)
                    # At its end it is read twice: for the images, and for the student.
                    if stream.trained == self.steps or checkpoints.due():
                        checkpoints.save("generator", stream.state())
                    step(note=loss_note(loss))
        return stream

    def _size_text(self, parameters: int) -> str:
        """What the generator takes: each number with its gradient and the two moments that Adam keeps of it, in float32."""
        size = 16 * parameters
        memory = f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
        lighter = f"; synthesis.width={self.width // 2} is lighter" if parameters >= _LARGE and self.width > 1 else ""
        return (
            f"generator with {parameters / 1e6:.3g} M parameters, about {memory} with gradients and Adam's moments "
            f"(width {self.width}{lighter})"
        )

    def __call__(self, teacher: Teacher, count: int, *, seed: Seed, checkpoints: Checkpoints, progress: Progress) -> Images:
        """`count` images of the generator after its warm-up."""
        stream = self.stream(teacher, seed=seed, checkpoints=checkpoints, progress=progress)
        return stream.sample(count, seed, checkpoints=checkpoints, progress=progress)
