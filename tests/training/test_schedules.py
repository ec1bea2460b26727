import pytest

from fffexp.training.schedules import Adaptive, Constant, Exponential, Linear, Schedule, Step


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Constant(3), (3, 3, 3)),
        (Linear(1, 4), (1, 2.5, 4)),
        (Linear(4, 1), (4, 2.5, 1)),
        (Exponential(1, 100), (1, 10, 100)),
        (Exponential(8, 2), (8, 4, 2)),
        (Step([1, 2, 3], [0.25, 0.5]), (1, 3, 3)),
        (Step([5], []), (5, 5, 5)),
        (Adaptive(2, 1.5, 10), (2, 2, 2)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Schedule) else None,
)
def test_at_the_start_the_middle_and_the_end(schedule: Schedule, expected: tuple[float, ...]) -> None:
    assert [schedule(progress) for progress in (0, 0.5, 1)] == pytest.approx(expected, rel=1e-12)


def test_step_changes_at_its_milestones() -> None:
    step = Step([1, 2, 3], [0.25, 0.5])
    assert [step(p) for p in (0.2499, 0.25, 0.4999, 0.5)] == [1, 2, 2, 3]


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda: Exponential(0, 1), "from 0 to 1: both must be above 0"),
        (lambda: Exponential(1, -2), "from 1 to -2: both must be above 0"),
        (lambda: Step([1, 2], []), "2 values and 0 milestones: give one value more"),
        (lambda: Step([1], [0.5]), "1 values and 1 milestones"),
        (lambda: Step([1, 2, 3], [0.5, 0.5]), r"milestones \[0.5, 0.5\] must rise"),
        (lambda: Step([1, 2, 3], [0.6, 0.5]), "must rise"),
        (lambda: Step([1, 2], [0]), "within 0 and 1"),
        (lambda: Step([1, 2], [1.0]), "within 0 and 1"),
        (lambda: Adaptive(0, 2, 10), "start 0 must be above 0"),
        (lambda: Adaptive(1, 1, 10), "factor 1 above 1"),
        (lambda: Adaptive(5, 2, maximum=1), "maximum 1 is below start 5"),
    ],
)
def test_mistakes_are_named(mistake: object, message: str) -> None:
    assert callable(mistake)
    with pytest.raises(ValueError, match=message):
        mistake()


def test_adaptive_rises_only_above_the_target_and_never_above_the_maximum() -> None:
    schedule = Adaptive(start=1, factor=2, maximum=5, target=0.1)
    values = []
    for entropy in (0.6, 0.2, 0.1, 0.05, 0.1001, 0.3, 0.3):
        schedule.observe(entropy)
        values.append(schedule(0.5))
    assert values == [2, 4, 4, 4, 5, 5, 5]


@pytest.mark.parametrize(
    ("schedule", "bounds"),
    [
        (Constant(-5), (-5, -5)),
        (Linear(4, 1), (1, 4)),
        (Exponential(1, 100), (1, 100)),
        (Step([1, -2, 3], [0.251, 0.252]), (-2, 3)),
        (Adaptive(2, 1.5, 10), (2, 10)),
    ],
)
def test_bounds(schedule: Schedule, bounds: tuple[float, float]) -> None:
    assert schedule.bounds() == pytest.approx(bounds)
