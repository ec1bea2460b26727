"""Value of a coefficient as a function of training progress (0 at the first step, 1 after the last)."""

import bisect
from abc import ABC, abstractmethod
from collections.abc import Sequence


class Schedule(ABC):
    """A coefficient that changes during training."""

    @abstractmethod
    def __call__(self, progress: float) -> float:
        """Value at this share of the training, in [0, 1]."""

    def bounds(self) -> tuple[float, float]:
        values = [self(step / 100) for step in range(101)]
        return min(values), max(values)


class Constant(Schedule):
    """The same value at any progress."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self, progress: float) -> float:
        return self.value


class Linear(Schedule):
    """From start to end in equal steps."""

    def __init__(self, start: float, end: float) -> None:
        self.start, self.end = start, end

    def __call__(self, progress: float) -> float:
        return self.start + (self.end - self.start) * progress


class Exponential(Schedule):
    """From start to end by equal factors; both above 0, or ValueError is raised."""

    def __init__(self, start: float, end: float) -> None:
        if start <= 0 or end <= 0:
            raise ValueError(f"an exponential schedule from {start} to {end}: both must be above 0")
        self.start, self.end = start, end

    def __call__(self, progress: float) -> float:
        return float(self.start * (self.end / self.start) ** progress)


class Step(Schedule):
    """Phases: values[i] from milestones[i - 1] up to milestones[i], shares of the training that rise within (0, 1).

    ValueError if the milestones do not rise, or there is not one value more.
    """

    def __init__(self, values: Sequence[float], milestones: Sequence[float]) -> None:
        if len(values) != len(milestones) + 1:
            raise ValueError(f"{len(values)} values and {len(milestones)} milestones: give one value more")
        if list(milestones) != sorted(set(milestones)) or any(not 0 < m < 1 for m in milestones):
            raise ValueError(f"milestones {list(milestones)} must rise within 0 and 1, both excluded")
        self.values, self.milestones = values, milestones

    def __call__(self, progress: float) -> float:
        return self.values[bisect.bisect_right(self.milestones, progress)]

    def bounds(self) -> tuple[float, float]:
        return min(self.values), max(self.values)


class Adaptive(Constant):
    """Raised by a factor, up to a maximum, after every epoch whose mean choice entropy is above the target, in nats.

    Below 0.10 rounding the choices changes predictions very little (arXiv 2308.14711, section 3). ValueError if start
    is not above 0, factor not above 1, or maximum below start.
    """

    def __init__(self, start: float, factor: float, maximum: float, target: float = 0.10) -> None:
        if start <= 0 or factor <= 1:
            raise ValueError(f"start {start} must be above 0 and factor {factor} above 1, or nothing is raised")
        if maximum < start:
            raise ValueError(f"maximum {maximum} is below start {start}: the value would fall where it should rise")
        super().__init__(start)
        self.factor, self.maximum, self.target = factor, maximum, target

    def bounds(self) -> tuple[float, float]:
        return self.value, self.maximum

    def observe(self, entropy: float) -> None:  # the mean of an epoch
        if entropy > self.target:
            self.value = min(self.value * self.factor, self.maximum)
