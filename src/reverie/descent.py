"""One step of gradient descent, watched: a loss that is lost stops the run and says which of its terms went wrong.

Generators, reconstruction and distillation all go down by this step. A loss is lost when it is not finite, or when one of its
terms stands a thousand times above the largest of that term's first twenty values (among those: a million times, and above a
thousand).
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from reverie.errors import DivergenceError

_FIRST, _EXPLODED = 20, 1000.0


class Descent:
    """An optimizer and the watch over the loss it goes down.

    Args:
        optimizer: Steps on the parameters that the loss depends on.
        place: What is being trained, for the error.
        cure: What to try when it diverges.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, place: str, cure: str) -> None:
        self.optimizer = optimizer
        self._place, self._cure = place, cure
        # Of each term: how many values were looked at, and the largest of them.
        self._seen: dict[str, tuple[int, float]] = {}

    def step(self, number: int, terms: Mapping[str, Tensor]) -> float:
        """Goes one step down the sum of `terms`, weighted scalars; the sum before the step.

        Args:
            number: Of the step, for the error.

        Raises:
            DivergenceError: The sum is lost; nothing has been changed by this step.
        """
        parts = torch.stack(list(terms.values()))
        loss = parts.sum()
        # All at once: on a GPU each number that is read waits for everything before it.
        value = self._check(number, dict(zip(terms, parts.detach().tolist(), strict=True)))
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return value

    def _check(self, number: int, terms: Mapping[str, float]) -> float:
        """The sum of the terms, if it is not lost."""
        exploded = False
        for name, term in terms.items():
            seen, largest = self._seen.get(name, (0, 0.0))
            # A term may begin late (a penalty after a warm start), so each counts its own first values.
            if seen < _FIRST and term != 0:
                # Early on only what is large in itself counts: a reconstruction may begin at rounding noise.
                exploded |= abs(term) > _EXPLODED * max(_EXPLODED * largest, 1.0) and seen > 0
                self._seen[name] = (seen + 1, max(largest, abs(term)))
            elif abs(term) > _EXPLODED * largest > 0:
                exploded = True
        value = sum(terms.values())
        if math.isfinite(value) and not exploded:
            return value
        parts = ", ".join(f"{name} {term:.3g}" for name, term in terms.items())
        must = f"stay below {_EXPLODED:g} times where it began" if math.isfinite(value) else "stay finite"
        raise DivergenceError(f"{self._place}: the loss must {must}, got {value:.3g} at step {number} ({parts}); {self._cure}")

    def state(self) -> dict[str, Tensor]:
        """Copies of the optimizer's memory and the watch's, by name."""
        found = {f"watch.{name}": torch.tensor(pair, dtype=torch.float64) for name, pair in self._seen.items()}
        return found | optimizer_state(self.optimizer)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Puts both back."""
        for name, value in under("watch", state).items():
            self._seen[name] = (int(value[0]), float(value[1]))
        restore_optimizer(self.optimizer, {name: value for name, value in state.items() if not name.startswith("watch.")})


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies of what an optimizer remembers of each parameter, by the parameter's number and the name."""
    found = {}
    for index, memory in optimizer.state_dict()["state"].items():
        for name, value in memory.items():
            # A momentum that has not begun is None.
            if value is not None:
                found[f"{index}.{name}"] = torch.as_tensor(value).clone()
    return found


def restore_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
    """Puts that back; rates stay as they are."""
    memories: dict[int, dict[str, Tensor]] = {}
    for key, value in state.items():
        index, _, name = key.partition(".")
        # An optimizer takes over what it is given and goes on in it.
        memories.setdefault(int(index), {})[name] = value.clone()
    optimizer.load_state_dict({"state": memories, "param_groups": optimizer.state_dict()["param_groups"]})


def under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of `state` below `prefix.`, by the rest of their names."""
    return {name.removeprefix(f"{prefix}."): value for name, value in state.items() if name.startswith(f"{prefix}.")}


def below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` with `prefix.` before each name, so that several states fit into one."""
    return {f"{prefix}.{name}": value for name, value in state.items()}
