"""What organs and lesions look like, in one sentence each, shipped with the package.

Konwer et al. (arXiv 2503.04639) ask a large language model for a generic description of each class. Its
sentences and their exact request are not known. Those shipped here were written for this project, so that
nothing is asked of anyone: shape, margins, texture or density, and place; no measurement, no treatment, no
patient.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

SIDES = ("left", "right")
_FILE = Path(__file__).with_name("descriptions.yaml")
#: Words that do not tell one label from another.
_SMALL = {"a", "an", "and", "in", "of", "the"}
#: Running numbers, and levels of the spine.
_NUMBER = re.compile(r"\d+|[ctls]\d{1,2}")


@dataclass(frozen=True, kw_only=True)
class Shipped:
    """The descriptions that come with the package.

    Args:
        texts: The sentence of each entry, by its name; {side} stands where a side may be named.
        names: The entry of each name and alias, by its words in alphabetical order.
        spellings: What a word is read as.
    """

    texts: Mapping[str, str]
    names: Mapping[tuple[str, ...], str]
    spellings: Mapping[str, str]


@cache
def shipped() -> Shipped:
    """The shipped descriptions, read once."""
    content = yaml.safe_load(_FILE.read_text("utf-8"))
    spellings = content["spellings"]
    texts: dict[str, str] = {}
    names: dict[tuple[str, ...], str] = {}
    for entry in content["entries"]:
        texts[entry["name"]] = entry["text"]
        for name in (entry["name"], *entry.get("aliases", ())):
            key = _key(_words(name, spellings))
            if names.setdefault(key, entry["name"]) != entry["name"]:
                raise ValueError(f"{name!r} names both {names[key]!r} and {entry['name']!r}")
    return Shipped(texts=texts, names=names, spellings=spellings)


def describe(label: str) -> str | None:
    """The shipped sentence about a label; None where there is none.

    Case, underscores, the order of the words, British or American spelling, a plural and a running number
    make no difference. A side (left, right) is named in the sentence where the object is one of a pair, and
    told apart from a name's own (left atrium).

    Args:
        label: A label's name, such as "kidney_left" or "Liver Tumor".
    """
    known = shipped()
    words = _words(label, known.spellings)
    plain = [word for word in words if not _NUMBER.fullmatch(word)]
    sides = [word for word in plain if word in SIDES]
    bare = [word for word in plain if word not in SIDES]
    for candidate in (words, plain, _singular(plain)):
        if (name := known.names.get(_key(candidate))) is not None:
            return known.texts[name].replace("{side}", "")
    for candidate in (bare, _singular(bare)):
        if (name := known.names.get(_key(candidate))) is not None:
            side = f"{sides[0]} " if len(set(sides)) == 1 else ""
            return _with_article(known.texts[name].replace("{side}", side))
    return None


def spoken(label: str) -> str:
    """A label's name as one says it: "kidney_left" becomes "left kidney"; it is never empty.

    Args:
        label: A label's name.
    """
    words = re.split(r"[\s_]+", label.strip(" _")) if label.strip(" _") else [label]
    sides = [word for word in words if word.lower() in SIDES]
    return " ".join([*sides, *(word for word in words if word.lower() not in SIDES)])


def _words(name: str, spellings: Mapping[str, str]) -> list[str]:
    """The words of a name, as the descriptions spell them."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", " ", name).lower()
    return [spellings.get(word, word) for word in re.findall(r"\w+", apart.replace("_", " "))]


def _key(words: list[str]) -> tuple[str, ...]:
    return tuple(sorted(word for word in words if word not in _SMALL))


def _singular(words: list[str]) -> list[str]:
    return [word[:-1] if word.endswith("s") and not word.endswith("ss") else word for word in words]


def _with_article(text: str) -> str:
    """The article that goes with the word after it, once a side stands between."""
    return re.sub(r"^An (?=left|right)", "A ", text)
