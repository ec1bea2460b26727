"""What README and docs/ say to type works: shell lines name what exists, YAML is accepted, Python runs."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from idx_files import write_fashion
from processes import ROOT
from torch import nn

from fffexp.cli import main
from fffexp.training.experiment import build

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.S | re.M)
INLINE = re.compile(r"(?<!`)`((?:fffexp|make|python|pip) [^`]+)`(?!`)")


def blocks(page: Path, *languages: str) -> list[str]:
    return [text for language, text in FENCED.findall(page.read_text()) if language in languages]


def commands() -> Iterator[Any]:
    """Every line for a shell: in a block of one, or a command between backticks."""
    for page in PAGES:
        lines = "\n".join(blocks(page, "sh", "bash")).replace("\\\n", " ").splitlines()
        lines += [" ".join(each.split()) for each in INLINE.findall(FENCED.sub("", page.read_text()))]
        for line in dict.fromkeys(lines):
            if words := shlex.split(line, comments=True):
                yield pytest.param(words, id=f"{page.stem}: {' '.join(words)[:80]}")


@cache
def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))


@cache
def help_of(*words: str) -> str:
    with redirect_stdout(StringIO()) as text, suppress(SystemExit):
        assert main([*words, "--help"]) == 0
    return text.getvalue()


@pytest.fixture
def at_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with what a clone has after `make data`, but less text."""
    for name in ("configs", "studies", "examples", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    write_fashion(tmp_path)
    (tmp_path / "data/gcide").mkdir(parents=True)
    (tmp_path / "data/gcide/gcide.txt").write_text("The word after the word before. " * 1000)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("at_root")
@pytest.mark.parametrize("words", commands())
def test_a_shell_line(words: list[str]) -> None:
    while re.fullmatch(r"\w+=\S*", words[0]):
        words = words[1:]  # a variable before the command
    program, rest = words[0].removeprefix(".venv/bin/"), words[1:]
    if program == "make":
        assert {word for word in rest if "=" not in word and word != "-j"} <= targets()
    elif program == "pip":
        check_pip(rest)
    elif program == "python" and rest[:2] != ["-m", "fffexp"]:
        assert Path(rest[0]).is_file()
    elif program in ("fffexp", "python"):
        check_fffexp(rest if program == "fffexp" else rest[2:])
    else:
        assert program in ("git", "cd", "mkdir"), f"teach this test what {program} is"


def check_pip(words: list[str]) -> None:
    """Extras exist."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert words[0] == "install"
    named = [name for word in words for group in re.findall(r"\[([\w,]+)\]", word) for name in group.split(",")]
    assert set(named) <= extras.keys()


def check_fffexp(words: list[str]) -> None:
    """Configs are accepted; of other commands the options exist, and files that are named."""
    if "..." in words:
        words = words[: words.index("...")]
    leading = [word for word in words[:2] if word.isidentifier()]
    if leading[0] in ("fit", "validate", "test", "predict"):
        if "--config" in words:
            of_fit, rest = ["fit"], words[1:]
            while rest:  # all but what belongs to the other commands
                option, *rest = rest
                left_out = option in ("--ckpt_path", "--prompt", "--new_tokens", "--out")
                of_fit, rest = (of_fit, rest[1:]) if left_out else ([*of_fit, option], rest)
            build(of_fit)
        return
    text = help_of(*leading)
    for word in words[len(leading) :]:
        name = word.split("=")[0]
        if name.startswith("--"):
            assert re.search(rf"{name}\b", text), f"fffexp {' '.join(leading)} has no option {name}"
        elif re.match(r"(studies|configs|docs)/.*\.(yaml|json)$", word):
            assert Path(word).is_file(), word


@pytest.mark.usefixtures("at_root")
@pytest.mark.parametrize("text", [text for page in PAGES for text in blocks(page, "yaml")])
def test_a_config(text: str) -> None:
    content = yaml.safe_load(text)
    if not {"model", "data", "trainer"} & content.keys():
        return
    Path("block.yaml").write_text(text)
    build(["fit", "--config=configs/data/digits.yaml", "--config=configs/layer/fff.yaml", "--config=block.yaml"])


def standins() -> dict[str, Any]:
    """What a snippet takes for granted, small."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
    batches = [torch.randn(20, 3, 16), torch.randn(20, 3, 16)]
    return {
        "model": model,
        "batches": batches,
        "steps": 2,
        "optimizer": torch.optim.AdamW(model.parameters()),
        "my_loss": lambda model: model(batches[0]).square().mean(),
        "nn": nn,
        "torch": torch,
    }


@pytest.mark.parametrize("text", [text for page in PAGES for text in blocks(page, "python")])
def test_a_snippet(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(text, "README.md", "exec"), standins())  # the page is ours


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_resolve(page: Path) -> None:
    """Files exist, and so do the headings that an anchor names, as GitHub spells them."""
    text = re.sub(r"`[^`]*`", "", FENCED.sub("", page.read_text()))
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
        path = page.parent / target if target else page
        assert path.exists(), f"{page.name} points to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", FENCED.sub("", path.read_text()), re.M)
            spelled = {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}
            assert anchor in spelled, f"{page.name} points to {target}#{anchor}"


def test_each_kind_of_block_is_tested() -> None:
    known = {"sh", "bash", "yaml", "python", "text", "json", "bibtex"}
    assert {language for page in PAGES for language, _ in FENCED.findall(page.read_text())} <= known
