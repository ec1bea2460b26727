"""A byte-level BPE of `tokenizers` that loses nothing: the bytes of its tokens are the bytes of the text."""

import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

LINE = re.compile(rb"[^\n]{0,65535}\n?")  # each is encoded for itself, so that a text is encoded as its lines are
LINES = 8192  # that are encoded at once, on all cores
# printable stand-ins for bytes, as GPT-2 has them: those that are printable themselves, then others in order
PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
STAND_INS = [chr(byte) for byte in PRINTABLE] + [chr(256 + n) for n in range(256 - len(PRINTABLE))]
BYTES = dict(zip(STAND_INS, (*PRINTABLE, *sorted(set(range(256)) - set(PRINTABLE))), strict=True))


def train(text: Any, vocab_size: int) -> Tokenizer:
    """A tokenizer with at most so many tokens, at least the 256 bytes, trained on bytes (any buffer).

    It splits words as GPT-2's does (Radford et al. 2019). Equal texts give equal tokenizers.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator((piece for piece in _pieces(text) if isinstance(piece, str)), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, text: Any) -> Iterator[np.ndarray[Any, Any]]:
    """The tokens of bytes (any buffer), in order, some at a time."""
    bytes_ids = {byte: tokenizer.token_to_id(stand_in) for stand_in, byte in BYTES.items()}
    pieces = _pieces(text)
    while some := list(islice(pieces, LINES)):
        encoded = iter(tokenizer.encode_batch_fast([piece for piece in some if isinstance(piece, str)]))
        ids = (next(encoded).ids if isinstance(piece, str) else [bytes_ids[piece]] for piece in some)
        yield np.fromiter((token for each in ids for token in each), np.uint32)


def bytes_of_tokens(tokenizer: Tokenizer) -> list[bytes]:
    """For each token what it stands for."""
    tokens = (tokenizer.id_to_token(token) for token in range(tokenizer.get_vocab_size()))
    return [bytes(BYTES[character] for character in token or ()) for token in tokens]


def _pieces(text: Any) -> Iterator[str | int]:
    # the lines of a text, and by itself each byte that is not UTF-8
    for line in LINE.finditer(text):
        if decoded := line.group().decode(errors="surrogateescape"):
            if decoded.isascii() or not re.search("[\udc80-\udcff]", decoded):
                yield decoded
            else:
                parts = re.split("([\udc80-\udcff])", decoded)
                for valid, invalid in zip(parts[::2], [*parts[1::2], ""], strict=True):
                    if valid:
                        yield valid
                    if invalid:
                        yield ord(invalid) - 0xDC00
