"""Text for language models: files as bytes, or as tokens of a BPE; split by position, mapped from the disk."""

import gzip
import hashlib
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from io import BufferedReader
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from typing_extensions import override

from fffexp import paths
from fffexp.data.base import Batches, Data
from fffexp.data.hub import HUB_FILES, download
from fffexp.errors import UserError, refuse

PARTS = ("training", "validation", "test")


@dataclass(frozen=True)
class Windows:
    """A part of a text.

    Args:
        tokens: (tokens,) of any unsigned dtype, which may lie on the disk.
        context: tokens of a window, without the one that follows it.
        num_bytes: (vocab_size,) int64, the bytes that each token stands for.
    """

    tokens: np.ndarray[Any, Any]
    context: int
    num_bytes: np.ndarray[Any, Any]


class WindowBatches(Batches):
    """Windows that do not overlap, as (inputs, targets, num_bytes): in order, or shuffled and from a random start.

    Args:
        windows: where from.
        batch_size: windows of a batch, at least 1.
        options: see Batches.
    """

    def __init__(self, windows: Windows, batch_size: int, **options: Any) -> None:
        super().__init__((), batch_size, **options)
        self.windows = windows

    @property
    @override
    def count(self) -> int:
        # a shuffled pass has as many from its last possible start as from the first
        spare = 1 if self.seed is None else self.windows.context
        return (len(self.windows.tokens) - spare) // self.windows.context

    @override
    def order(self, generator: torch.Generator) -> Tensor:
        """The first tokens of the windows, (count,)."""
        start = torch.randint(self.windows.context, (), generator=generator)
        return start + self.windows.context * torch.randperm(self.count, generator=generator)

    @override
    def batch(self, rows: slice | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        context = self.windows.context
        if isinstance(rows, slice):
            rows = context * torch.arange(*rows.indices(self.count))
        read = self.windows.tokens[rows.numpy()[:, None] + np.arange(context + 1)]
        tokens = torch.from_numpy(read.astype(np.int64)).to(self.device)
        num_bytes = torch.from_numpy(self.windows.num_bytes[read[:, 1:]].sum(1)).to(self.device)
        return tokens[:, :-1], tokens[:, 1:], num_bytes


class Text(Data):
    """A file or a folder of text for a language model, in windows of tokens.

    Split by position: first the training part, then validation, the last bytes are the test; no window crosses a
    border. A batch is (inputs, targets, num_bytes): int64 (windows, context) tokens, the token that follows each, and
    int64 (windows,) bytes of the text that the targets stand for. Training takes every window of its part once an
    epoch, in an order and from a start that are functions of (seed, epoch) alone; validation and test take theirs in
    order. What does not fill a window is left out.

    Files are bytes, of any encoding, and may be gzipped, by content whatever their names. Those of a folder follow
    each other in the order of their paths. A plain file is mapped from the disk as it is; what is unpacked, joined or
    tokenized is kept in `cache/` of the outputs.

    Args:
        path: The file or folder; hf://datasets/OWNER/NAME/FILE for a file on the Hugging Face hub.
        context: Tokens of a window.
        batch_size: Windows of a batch.
        seed: Of the order and starts of the windows.
        bpe_vocab_size: Tokens are those of a byte-level BPE with at most so many, trained on the training part alone;
            left out, they are the 256 bytes.
        val_share: Share of the bytes for validation.
        test_share: Share of the bytes for the test.

    Attributes:
        vocab_size: number of different tokens.
        token_bytes: what each token stands for.
        train_data: tokens of the training part; `val_data` and `test_data` likewise, after `setup`.

    Raises:
        UserError: an argument or a file cannot be used.
    """

    batches = WindowBatches
    train_data: Windows
    val_data: Windows
    test_data: Windows

    def __init__(
        self,
        path: str,
        context: int = 256,
        batch_size: int = 16,
        seed: int = 0,
        bpe_vocab_size: int | None = None,
        val_share: float = 0.05,
        test_share: float = 0.05,
    ) -> None:
        super().__init__(batch_size, seed)
        small = bpe_vocab_size is not None and not 256 < bpe_vocab_size <= 2**32
        shares = val_share > 0 and test_share > 0 and val_share + test_share < 1
        given = f"val_share is {val_share} and test_share {test_share}"
        refuse(
            (context < 1, f"context is {context}: give at least 1"),
            (small, f"bpe_vocab_size is {bpe_vocab_size}: give at least 257, or leave it out for bytes"),
            (not shares, f"{given}: give two above 0 that leave something for training"),
        )
        self.path, self.context, self.in_shape = path, context, (context,)
        text = _mapped(path)
        count = len(text)
        ends = [0, count - round((val_share + test_share) * count), count - round(test_share * count), count]
        self.token_bytes = [bytes([byte]) for byte in range(256)]
        self._encode: Callable[[bytes], Sequence[int]] = list
        self._parts = [text[start:end] for start, end in pairwise(ends)]
        if bpe_vocab_size is not None:
            self._tokenize(text, ends, bpe_vocab_size)
        self.vocab_size = len(self.token_bytes)
        for name, tokens, least in zip(PARTS, self._parts, (2 * context, context + 1, context + 1), strict=True):
            short = f"{path}: its {name} part has {len(tokens)} tokens, too few for windows of {context}"
            fix = "give a longer text, a smaller --data.context, or other shares"
            refuse((len(tokens) < least, f"{short}: {fix}"))

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""
        # a command line holds what is not UTF-8 as lone surrogates
        return [int(token) for token in self._encode(text.encode(errors="surrogateescape"))]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens; bytes that are not UTF-8 are replaced."""
        return b"".join(self.token_bytes[token] for token in tokens).decode(errors="replace")

    @override
    def setup(self, stage: str | None = None) -> None:
        num_bytes = np.array([len(each) for each in self.token_bytes])
        parts = (Windows(tokens, self.context, num_bytes) for tokens in self._parts)
        self.train_data, self.val_data, self.test_data = parts

    def _tokenize(self, text: np.ndarray[Any, Any], ends: Sequence[int], vocab_size: int) -> None:
        from tokenizers import Tokenizer, __version__

        from fffexp.data import bpe

        ends = [_character_start(text, end) for end in ends]
        key = f"{hashlib.sha256(cast(Any, text)).hexdigest()} {ends} {vocab_size} {__version__}"
        folder = paths.outputs("cache", f"bpe-{hashlib.sha256(key.encode()).hexdigest()[:16]}")
        if not (folder / "tokenizer.json").exists():
            print(f"{self.path}: training a BPE and encoding the text, once: it is kept in {folder}", file=sys.stderr)
        path = _kept(folder / "tokenizer.json", lambda path: bpe.train(text[: ends[1]], vocab_size).save(str(path)))
        tokenizer = Tokenizer.from_file(str(path))
        self.token_bytes = bpe.bytes_of_tokens(tokenizer)
        dtype = np.min_scalar_type(len(self.token_bytes) - 1)

        def write(path: Path, part: np.ndarray[Any, Any]) -> None:
            with path.open("wb") as file:
                np.save(file, np.concatenate([np.empty(0, dtype), *bpe.encode(tokenizer, part)], dtype=dtype))

        parts = (text[start:end] for start, end in pairwise(ends))
        named = zip(PARTS, parts, strict=True)
        kept = [_kept(folder / f"{name}.npy", partial(write, part=part)) for name, part in named]
        self._parts = [np.asarray(np.load(path, mmap_mode="r")) for path in kept]
        self._encode = lambda text: [token for some in bpe.encode(tokenizer, text) for token in some]


def _mapped(path: str) -> np.ndarray[Any, Any]:
    # the bytes of a file or a folder, on the disk
    place = download(path) if path.startswith(HUB_FILES) else Path(path)
    inside = (each for each in sorted(place.rglob("*")) if not any(p[0] == "." for p in each.relative_to(place).parts))
    files = [each for each in inside if each.is_file()] if place.is_dir() else [place]
    fix = "give a file or folder of text by --data.path (make data brings GCIDE to data/gcide)"
    refuse(
        (not place.exists(), f"{path} is not there: {fix}"),
        (not files, f"{path} has no files in it: {fix}"),
    )
    if len(files) > 1 or _is_packed(files[0]):
        digest = hashlib.sha256()
        for each in files:
            with _opened(each) as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
        files = [_kept(paths.outputs("cache", f"text-{digest.hexdigest()[:16]}"), partial(_join, files))]
    refuse((not files[0].stat().st_size, f"{path} is empty: {fix}"))
    return np.asarray(np.memmap(files[0], np.uint8, "r"))


def _is_packed(path: Path) -> bool:
    with _opened(path) as file:
        return file.read(2) == b"\x1f\x8b"


def _join(files: Sequence[Path], into: Path) -> None:
    with into.open("wb") as target:
        for path in files:
            with _opened(path) as raw:
                try:
                    shutil.copyfileobj(gzip.GzipFile(fileobj=raw) if _is_packed(path) else raw, target)
                except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                    problem = "truncated" if isinstance(error, EOFError) else "damaged"
                    raise UserError(f"{path} is {problem}, its gzip stream cannot be read: fetch it again") from error


def _opened(path: Path) -> BufferedReader:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): fix its permissions, or give another") from error


def _kept(path: Path, make: Callable[[Path], None]) -> Path:
    # a file of the cache, made by whoever comes first
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists():
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            try:
                make(temporary)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
    return path


def _character_start(text: np.ndarray[Any, Any], at: int) -> int:
    # this place, or just before it, where no character of UTF-8 is cut
    following = text[at : at + 1]
    back = next((n for n in range(1, 4) if at >= n and text[at - n] & 0xC0 == 0xC0), 0)
    return at - back if len(following) and following[0] & 0xC0 == 0x80 else at
