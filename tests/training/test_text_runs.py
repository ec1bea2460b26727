"""A language model through the command line: fitted, several seeds at once, and asked to go on with a text."""

from pathlib import Path

import pytest
import torch
from processes import CONFIGS, enter, with_store

from fffexp.cli import main
from fffexp.training import vectorized
from fffexp.training.experiment import Context, run

SMALL = (
    "--data.path=text.txt", "--data.context=16", "--data.batch_size=8", "--trainer.max_epochs=2",
    "--trainer.limit_train_batches=6", "--trainer.limit_val_batches=2", "--model.network.features=16",
    "--model.network.num_blocks=1", "--model.network.heads=2",
)  # fmt: skip


@pytest.fixture(autouse=True)
def in_workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(with_store(tmp_path), monkeypatch)
    Path("text.txt").write_text("".join(f"{n} is the number after {n - 1}.\n" for n in range(500)))


def arguments(layer: str = "fff", *more: str) -> list[str]:
    return [f"--config={CONFIGS}/experiment/text_{layer}.yaml", *SMALL, *more]


def test_a_text_is_continued(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *arguments()]) == 0
    assert "test/bits_per_byte" in capsys.readouterr().out
    (checkpoint,) = Path("outputs/checkpoints").glob("*/last.ckpt")
    predict = ["predict", *arguments(), f"--ckpt_path={checkpoint}"]
    made = []
    for more in (["--temperature=0"], ["--temperature=0"], ["--new_tokens=3"]):
        assert main([*predict, "--prompt=7 is the", *more]) == 0
        made.append(capsys.readouterr().out.removesuffix("\n"))
    assert made[0] == made[1]
    assert all(text.startswith("7 is the") for text in made)
    assert len(made[0].encode()) >= len("7 is the") + 200
    assert len(made[2]) == len("7 is the") + 3
    torch.manual_seed(0)
    for mistake, named in (
        (["--prompt="], "prompt is empty"),
        (["--prompt=a", "--new_tokens=0"], "new_tokens is 0"),
        (["--prompt=a", "--temperature=-1"], "temperature is -1"),
        (["--prompt=a", "--out=found.csv"], "out is for a table"),
        ([], "give --prompt"),
    ):
        assert main([*predict, *mistake]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert named in line


def test_seeds_of_a_language_model_are_trained_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    seeds = list(vectorized.train_seeds(arguments(), [0, 5], test=True))
    assert "one after another" not in capsys.readouterr().err
    for made, number in zip(seeds, (0, 5), strict=True):
        alone = run(["fit", *arguments(), f"--seed_everything={number}"], Context(quiet=True))
        assert alone is not None
        shared = {name: value for name, value in alone.metrics.items() if not name.startswith("speed/")}
        assert {name: made.metrics[name] for name in shared} == pytest.approx(shared, rel=1e-5, abs=1e-5)


def test_a_prompt_is_for_language_models(capsys: pytest.CaptureFixture[str]) -> None:
    digits = [f"--config={CONFIGS}/experiment/digits_ff.yaml", "--trainer.max_epochs=1"]
    assert main(["fit", *digits, "--trainer.limit_train_batches=2"]) == 0
    (checkpoint,) = Path("outputs/checkpoints").glob("*/last.ckpt")
    capsys.readouterr()
    assert main(["predict", *digits, f"--ckpt_path={checkpoint}", "--prompt=a"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "MLP on Digits generates no text" in line
    assert main(["predict", *digits, f"--ckpt_path={checkpoint}", "--out=found.csv"]) == 0
    header, *rows = Path("found.csv").read_text().splitlines()
    assert len(rows) == 360
    assert set(rows) <= set("0123456789")
    assert main(["predict", *digits, f"--ckpt_path={checkpoint}"]) == 0
    assert capsys.readouterr().out.splitlines() == rows
    for option, named in (
        ("--temperature=0", "temperature is of a text"),
        ("--trainer.limit_predict_batches=0", "nothing is predicted"),
    ):
        assert main(["predict", *digits, f"--ckpt_path={checkpoint}", option]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert named in line
    assert header
