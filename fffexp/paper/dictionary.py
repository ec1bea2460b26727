"""A dictionary as a retrieval test, definitions against headwords, and as text that shares no entry with the test.

Made for the GCIDE as dictd prints it: an entry begins at the left margin with its headword and, between backslashes,
how that is spoken; its paragraphs are indented.
"""

import random
import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

HEAD = re.compile(r"^(\S[^\\\n]*?) +\\", re.M)
# what follows a definition in its paragraph: examples, citations, references
AFTER = re.compile(r"[;,:]? as[,:] |(?<=[.;:,]) \"|\s?--\s?[A-Z]| See |\bCf\. |\(See ")
# paragraphs that define nothing by themselves: references, and forms of a word ("p. pr. & vb. n. of Climb")
REFERENCE = re.compile(r"(Same as|See|(a|n|v|p|vb|pl|imp|obs)\.? (&|of|pr\.|p\.|n\.|t\.|i\.)) ")
LEAST_WORDS = 6  # of a definition that can be searched for
LONGEST = 400  # characters of a text


class Retrieval(NamedTuple):
    """The definition at each place belongs to the headword at the same place of the documents; text is of others."""

    queries: list[str]
    documents: list[str]
    text: list[str]


def entries(text: str) -> dict[str, list[str]]:
    """Paragraphs by headword, in lower case; entries of one spelling are one."""
    found: dict[str, list[str]] = {}
    starts = [*HEAD.finditer(text)]
    for start, end in zip(starts, [*(each.start() for each in starts[1:]), len(text)], strict=True):
        head, *others = re.split(r"\n\s*\n", text[start.end() : end])
        # sources and origins stand in brackets, over several lines; a letter with its accent does, too
        head = _without_brackets(head)
        _, _, first = head.partition("\n")
        found.setdefault(start[1].lower(), []).extend(map(_plain, [first, *map(_without_brackets, others)]))
    return {head: [each for each in paragraphs if each] for head, paragraphs in found.items()}


def definition(head: str, paragraphs: list[str]) -> str | None:
    """The first sense without its examples; None where it only refers to another entry or names the headword."""
    first = AFTER.split(paragraphs[0] if paragraphs else "")[0].strip(" ;,:")
    named = head[: max(4, len(head) - 2)] in first.lower()
    return None if named or len(first.split()) < LEAST_WORDS or REFERENCE.match(first) else first[:LONGEST]


def retrieval(text: str, pairs: int, known: Collection[str]) -> Retrieval:
    """A test of so many pairs, drawn at random from the headwords that are known, and the text of all other entries.

    A known headword is one of at least three letters. The text, in random order, has the headwords, definitions and
    other paragraphs of the entries that are not tested. Fewer pairs in the dictionary are a ValueError.
    """
    found, generator = entries(text), random.Random(0)
    defined = {head: each for head, paragraphs in found.items() if (each := definition(head, paragraphs))}
    heads = sorted(head for head in defined.keys() & set(known) if len(head) > 2 and head.isalpha())
    if len(heads) < pairs:
        raise ValueError(f"it has {len(heads)} words with a definition, not {pairs}")
    tested = generator.sample(heads, pairs)
    return Retrieval([defined[head] for head in tested], tested, _others(found, defined, {*tested}, generator))


def _others(
    found: Mapping[str, list[str]], defined: Mapping[str, str], tested: set[str], generator: random.Random
) -> list[str]:
    seen = tested | {defined[head] for head in tested}
    text: list[str] = []
    for head, paragraphs in found.items():
        if head not in tested:
            own = [head, defined.get(head, ""), *paragraphs[1:]]
            text += [each[:LONGEST] for each in own if each and each[:LONGEST] not in seen]
    generator.shuffle(text)
    return text


def _without_brackets(text: str) -> str:
    text = re.sub(r"\[[^\w\s{}\]]*([A-Za-z]{1,2})[^\w\s{}\]]*\]", r"\1", text)
    while "[" in text and text != (text := re.sub(r"\[[^][]*\]", "", text)):  # the inner ones first
        pass
    return text


def _plain(paragraph: str) -> str:
    # one line, without the number of the sense, its field in parentheses and the marks of references
    line = " ".join(re.sub(r"[{}]", "", paragraph).split())
    return re.sub(r"^(\d+\. |\([a-z]\) |\([A-Z][^)]*\) )+", "", line)
