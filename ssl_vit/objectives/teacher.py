"""Teachers: exponential moving averages of modules."""

import copy
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn


class MovingAverage:
    """average = momentum x average + (1 - momentum) x model, for every parameter; buffers are copied.

    The constructor collects the tensors, so both modules must already be on their device, and sharded if they will be.

    Raises:
        ValueError: the two modules do not have the same parameters.
    """

    def __init__(self, average: nn.Module, model: nn.Module) -> None:
        averages, values = dict(average.named_parameters()), dict(model.named_parameters())
        if averages.keys() != values.keys():
            difference = sorted(averages.keys() ^ values.keys())[:3]
            raise ValueError(f"cannot average {type(model).__name__}: {difference} differ")
        self._averages, self._values = list(averages.values()), [values[name] for name in averages]
        saved = average.state_dict().keys()
        buffers = dict(model.named_buffers())
        self._buffers = [(buffer, buffers[name]) for name, buffer in average.named_buffers() if name in saved]

    @torch.no_grad()
    def update(self, momentum: float, taken: Bool[Tensor, ""] | None = None) -> None:
        """Move the averages by one step.

        Args:
            taken: scalar on the device; if False nothing moves.
        """
        foreach: Any = torch
        if self._averages:
            share: float | Tensor = 1 - momentum if taken is None else taken * (1 - momentum)
            steps = foreach._foreach_sub(self._values, self._averages)
            foreach._foreach_mul_(steps, share)  # torch's averaging functions accept no tensor as factor
            foreach._foreach_add_(self._averages, steps)
        for buffer, value in self._buffers:
            buffer.copy_(value if taken is None else torch.where(taken, value, buffer))


class Teacher:
    """Copies of an objective's modules that follow them as moving averages and receive no gradient.

    The copy of `objective.NAME` becomes `objective.PREFIXNAME`, its name in checkpoints. It stays in eval mode, without
    drop path.
    """

    def __init__(self, objective: nn.Module, prefix: str, *names: str) -> None:
        self._objective, self._prefix, self._names = objective, prefix, []
        self._averages: list[MovingAverage] = []
        self.add(*names)

    def add(self, *names: str) -> None:
        """Copy further modules of the objective."""
        for name in names:
            module = copy.deepcopy(self._objective.get_submodule(name))
            setattr(self._objective, self._prefix + name, module.requires_grad_(False).eval())
        self._names += names

    def modules(self) -> list[nn.Module]:
        """The copies, in the order in which they were made."""
        return [self._objective.get_submodule(self._prefix + name) for name in self._names]

    def update(self, momentum: float, taken: Bool[Tensor, ""] | None = None) -> None:
        """Move the copies by a step; see `MovingAverage.update`."""
        if not self._averages:  # collected after modules moved to their device and were sharded
            followed = [self._objective.get_submodule(name) for name in self._names]
            self._averages = [MovingAverage(*pair) for pair in zip(self.modules(), followed, strict=True)]
        for average in self._averages:
            average.update(momentum, taken)
