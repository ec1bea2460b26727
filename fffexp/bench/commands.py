"""`fffexp bench inference|training|model|overhead`: a command line to measurements to a table and JSON."""

import os

from fffexp.bench.setting import INFERENCE, MODEL, TRAINING, Setting
from fffexp.commandline import PositiveInt


def inference(setting: Setting = INFERENCE, peers: bool = False) -> None:
    """Time inference of layers of equal training width, interleaved, beside the machine's limits.

    Args:
        peers: also fastfeedforward from PyPI, where it is installed.
    """
    use_huge_pages()
    from fffexp.bench.measure import run

    run("inference", setting, peers)


def training(setting: Setting = TRAINING, peers: bool = False) -> None:
    """Time training steps of layers of equal training width, interleaved: forward, backward and optimizer.

    Args:
        peers: also fastfeedforward from PyPI, where it is installed.
    """
    from fffexp.bench.measure import run

    run("training", setting, peers)


def model(setting: Setting = MODEL) -> None:
    """Time an MLP and a transformer block with each layer: the layer's speedup is not the model's."""
    use_huge_pages()
    from fffexp.bench.measure import run

    run("model", setting)


def overhead(
    layers: list[str] | None = None, epochs: PositiveInt = 1, rounds: PositiveInt = 5, threads: PositiveInt = 1
) -> None:
    """Time a fit of Fashion-MNIST against a bare PyTorch loop, in turn, without validation and tracking.

    Args:
        layers: public names or class paths; all public ones by default.
        epochs: of one timing.
        rounds: timings of each.
        threads: of torch.
    """
    from fffexp.bench.overhead import compare
    from fffexp.report.tables import table

    print(table(compare(layers or [], epochs, rounds, threads), {"bare, s": ".3f", "fit, s": ".3f", "ratio": ".3f"}))


def use_huge_pages() -> None:
    """For all contenders and limits alike: else the time of a large layer is in part that of page tables.

    To be called before torch is imported, which looks at its first allocation. Training keeps torch's default, in which
    fresh memory is a part of a step.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
