import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from fffexp.data import Text
from fffexp.errors import UserError

WORDS = b"the cat sat on the mat and the dog \xc3\xa4te the cat's food.\n\n   A line.\n".split(b" ")


@pytest.fixture(autouse=True)
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the cache goes."""
    monkeypatch.setenv("FFFEXP_OUTPUTS", str(tmp_path / "outputs"))
    return tmp_path / "outputs"


def prose(words: int = 2000) -> bytes:
    order = np.random.default_rng(0).integers(0, len(WORDS), words)
    return b" ".join(WORDS[place] for place in order)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(prose())
    return path


def text(path: Path, **options: Any) -> Text:
    data = Text(str(path), **({"context": 16, "batch_size": 4} | options))
    data.setup()
    return data


def error(path: Path | str, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        text(Path(path) if isinstance(path, Path) else path, **options)  # type: ignore[arg-type] # a URL as it is
    assert "\n" not in str(caught.value)
    return str(caught.value)


def parts(data: Text) -> list[list[int]]:
    return [part.tokens.tolist() for part in (data.train_data, data.val_data, data.test_data)]


def test_split_by_position(file: Path) -> None:
    content = file.read_bytes()
    train, val, test = map(bytes, parts(text(file)))
    assert train + val + test == content
    assert [len(val), len(test)] == [pytest.approx(len(content) * 0.05, abs=1)] * 2
    wide = parts(text(file, val_share=0.2, test_share=0.3))
    assert [len(part) / len(content) for part in wide] == pytest.approx([0.5, 0.2, 0.3], abs=1e-3)


def test_shape_and_vocabulary(file: Path) -> None:
    data = Text(str(file), context=16)
    assert (data.in_shape, data.vocab_size) == ((16,), 256)
    assert not hasattr(data, "num_classes")
    assert not hasattr(data, "num_outputs")


@pytest.mark.parametrize("bpe", [None, 300])
def test_evaluation_takes_all_whole_windows_in_order(file: Path, bpe: int | None) -> None:
    data = text(file, bpe_vocab_size=bpe, val_share=0.2)
    tokens = data.val_data.tokens.tolist()
    batches = list(data.val_dataloader())
    assert len(batches) == len(data.val_dataloader())
    inputs, targets, num_bytes = (torch.cat(each) for each in zip(*batches, strict=True))
    windows = (len(tokens) - 1) // 16
    assert inputs.dtype == targets.dtype == num_bytes.dtype == torch.int64
    assert inputs.flatten().tolist() == tokens[: 16 * windows]
    assert targets.flatten().tolist() == tokens[1 : 16 * windows + 1]
    lengths = [len(b"".join(data.token_bytes[token] for token in row)) for row in targets.tolist()]
    assert num_bytes.tolist() == lengths
    assert bpe or set(lengths) == {16}


@pytest.mark.parametrize("length", [36, 37, 47, 48, 63, 64, 65, 500])
def test_an_epoch_takes_each_window_of_training_once(tmp_path: Path, length: int) -> None:
    content = np.arange(length * 2).astype("<u2").view(np.uint8)[:length]
    content.tofile(tmp_path / "numbers")
    data = Text(str(tmp_path / "numbers"), context=8, batch_size=3, val_share=10 / length, test_share=10 / length)
    data.setup()
    train = bytes(data.train_data.tokens)
    loader = data.train_dataloader()
    starts = set()
    for epoch in range(40):
        loader.progress = lambda epoch=epoch: (epoch, 0)  # type: ignore[misc] # bound at once
        batches = list(loader)
        assert len(batches) == len(loader)
        windows = [bytes([*x, y[-1]]) for xs, ys, _ in batches for x, y in zip(xs.tolist(), ys.tolist(), strict=True)]
        assert len(windows) == (len(train) - 8) // 8
        positions = sorted(train.index(window) for window in windows)
        # as the bytes are, no window is there twice
        assert [position - positions[0] for position in positions] == [8 * number for number in range(len(windows))]
        starts.add(positions[0])
    assert starts == set(range(8))  # from each start, the last one too


def test_order_is_a_function_of_seed_and_epoch(file: Path) -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        loader = text(file, seed=seed).train_dataloader()
        loader.progress = lambda: (epoch, 0)
        return tuple(torch.cat([inputs for inputs, _, _ in loader]).flatten().tolist())

    orders = {(seed, epoch): order(seed, epoch) for seed in range(3) for epoch in range(3)}
    assert len(set(orders.values())) == 9
    assert all(order(*key) == value for key, value in orders.items())


class Recorder(LightningModule):
    """Records every training batch and changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        self.seen.append(batch[0].flatten().tolist())
        return self.weight.square()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("steps", [3, 10, 13])
def test_resumed_run_sees_the_windows_of_the_uninterrupted_run(tmp_path: Path, file: Path, steps: int) -> None:
    options: dict[str, Any] = {
        "max_epochs": 2, "limit_train_batches": 10, "limit_val_batches": 0, "accelerator": "cpu",
        "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=steps, save_top_k=-1)
    whole, resumed = Recorder(), Recorder()
    Trainer(callbacks=[saving], **options).fit(whole, text(file))
    path = str(tmp_path / f"step={steps}.ckpt")
    Trainer(enable_checkpointing=False, **options).fit(resumed, text(file), ckpt_path=path)
    assert len(whole.seen) == 20
    assert resumed.seen == whole.seen[steps:]


def test_a_packed_file_is_unpacked_once(tmp_path: Path, outputs: Path) -> None:
    packed = tmp_path / "text.dict.dz"
    packed.write_bytes(gzip.compress(prose()))
    for _ in range(2):
        assert b"".join(map(bytes, parts(text(packed)))) == prose()
    (kept,) = (outputs / "cache").glob("text-*[!k]")
    before = kept.stat().st_mtime_ns
    text(packed)
    assert kept.stat().st_mtime_ns == before
    packed.write_bytes(gzip.compress(b"x" * 1000))
    assert {*map(bytes, parts(text(packed)))} <= {b"x" * length for length in range(1000)}


def test_a_plain_file_is_mapped_as_it_is(file: Path, outputs: Path) -> None:
    text(file)
    assert not outputs.exists()


def test_a_folder_is_its_files_in_the_order_of_their_paths(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for name, content in (("b.txt", b"b" * 500), ("a/z.gz", gzip.compress(b"z" * 500)), (".hidden/x", b"hidden")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    assert b"".join(map(bytes, parts(text(folder)))) == b"z" * 500 + b"b" * 500


def test_bpe_loses_nothing_and_crosses_no_border(tmp_path: Path) -> None:
    content = prose() + b"\xff\x92 not UTF-8 \xc3" + prose(200) + b"x" * 70_000 + b"\x00\x80" + prose(3000)
    (tmp_path / "text").write_bytes(content)
    data = text(tmp_path / "text", bpe_vocab_size=300)
    assert 256 < data.vocab_size <= 300
    train, val, test = (b"".join(data.token_bytes[token] for token in part) for part in parts(data))
    assert train + val + test == content
    assert [len(val), len(test)] == [pytest.approx(len(content) * 0.05, abs=5)] * 2
    assert len(data.train_data.tokens) < 0.7 * len(train)


def test_bpe_is_trained_on_the_training_part_alone(tmp_path: Path) -> None:
    vocabularies = []
    for last in (b"q" * 400, b"zebra " * 67):
        (tmp_path / "text").write_bytes(prose() + last[:400])
        data = text(tmp_path / "text", bpe_vocab_size=300, val_share=0.01, test_share=0.07)
        vocabularies.append(data.token_bytes)
    assert vocabularies[0] == vocabularies[1]
    assert b" the" in vocabularies[0]


def test_bpe_is_kept_and_the_same_when_made_anew(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = text(file, bpe_vocab_size=300)
    assert "training a BPE" in capsys.readouterr().err
    again = text(file, bpe_vocab_size=300)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("FFFEXP_OUTPUTS", str(tmp_path / "elsewhere"))
    anew = text(file, bpe_vocab_size=300)
    assert first.token_bytes == again.token_bytes == anew.token_bytes
    assert parts(first) == parts(again) == parts(anew)


def test_no_character_is_cut_at_a_border(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes("ä€𝄞".encode() * 500)
    for shift in range(9):
        data = text(tmp_path / "text", bpe_vocab_size=270, val_share=0.05 + shift / 4500)
        for part in parts(data):
            b"".join(data.token_bytes[token] for token in part).decode()  # raises where one is cut


@pytest.mark.parametrize("bpe", [None, 300])
def test_encode_and_decode(file: Path, bpe: int | None) -> None:
    data = text(file, bpe_vocab_size=bpe)
    for prompt in ("the cat's\n\n  föod", "", "\n", "𝄞"):
        assert data.decode(data.encode(prompt)) == prompt
        assert all(0 <= token < data.vocab_size for token in data.encode(prompt))
    assert len(data.encode("the cat")) == (7 if bpe is None else len(data.encode("the")) + len(data.encode(" cat")))
    # a part of a character
    assert data.decode(data.encode("aä")[:-1])[0] == "a"
    assert bpe or data.decode([0xC3]) == "\N{REPLACEMENT CHARACTER}"


def test_a_text_is_encoded_as_the_file_is(file: Path) -> None:
    data = text(file, bpe_vocab_size=300)
    end = len(data.train_data.tokens)
    train = b"".join(data.token_bytes[token] for token in data.train_data.tokens)
    assert data.encode(train.decode()) == data.train_data.tokens.tolist()
    assert end > 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 0}, "context is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "is -1"),
        ({"bpe_vocab_size": 256}, "bpe_vocab_size is 256: give at least 257"),
        ({"val_share": 0}, "val_share is 0 and test_share 0.05"),
        ({"test_share": 0.97}, "leave something for training"),
        ({"context": 5000}, "its training part has"),
        ({"context": 500}, "its validation part has"),
    ],
)
def test_bad_arguments(file: Path, options: dict[str, Any], message: str) -> None:
    assert message in error(file, **options)


def test_bad_files(tmp_path: Path) -> None:
    assert "absent is not there: give a file" in error(tmp_path / "absent")
    assert "make data" in error(tmp_path / "absent")
    (tmp_path / "folder").mkdir()
    assert "folder has no files in it" in error(tmp_path / "folder")
    (tmp_path / "empty").write_bytes(b"")
    assert "empty is empty" in error(tmp_path / "empty")
    packed = gzip.compress(prose())
    (tmp_path / "cut.gz").write_bytes(packed[:-100])
    assert "cut.gz is truncated" in error(tmp_path / "cut.gz")
    (tmp_path / "bad.gz").write_bytes(packed[:50] + b"\x00" * 50 + packed[100:])
    assert "bad.gz is damaged" in error(tmp_path / "bad.gz")
    (tmp_path / "empty.gz").write_bytes(gzip.compress(b""))
    assert "empty.gz is empty" in error(tmp_path / "empty.gz")
    # what could not be made leaves nothing that a second try would take for whole
    assert "cut.gz is truncated" in error(tmp_path / "cut.gz")


def test_a_file_on_the_hub(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="the extra hub is not installed")
    asked = []

    def found(repository: str, name: str, repo_type: str) -> str:
        asked.append((repository, name, repo_type))
        return str(file)

    monkeypatch.setattr(hub, "hf_hub_download", found)
    data = Text("hf://datasets/owner/name/folder/file.txt", context=16)
    assert asked == [("owner/name", "folder/file.txt", "dataset")]
    assert len(data.token_bytes) == 256

    def unreachable(*_: object, **__: object) -> str:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(hub, "hf_hub_download", unreachable)
    for path, message in (("owner/name/f", "cannot be fetched"), ("owner/name", "give hf://datasets/OWNER/NAME/FILE")):
        with pytest.raises(UserError, match=message):
            Text(f"hf://datasets/{path}")


@pytest.mark.parametrize("bpe", [None, 300])
def test_bytes_of_a_command_line_that_are_not_utf8(file: Path, bpe: int | None) -> None:
    data = text(file, bpe_vocab_size=bpe)
    tokens = data.encode(b"caf\xe9 and".decode(errors="surrogateescape"))
    assert b"".join(data.token_bytes[token] for token in tokens) == b"caf\xe9 and"
