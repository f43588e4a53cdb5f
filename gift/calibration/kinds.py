"""The kind of a target token, from its text."""

import unicodedata
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from gift.data.encoding import Example
from gift.data.lines import token_text
from gift.weighting.targets import find_turn_ends

# Beside Unicode's mathematical symbols.
OPERATORS = "-*/^%·"


def token_kinds(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """The kind of every target [N], row after row, see `kind_of`; a turn's last one is an "end"."""
    used = np.unique(np.concatenate([example.input_ids for example in examples]))
    kinds = {int(token): kind_of(token_text(tokenizer, int(token))) for token in used}
    found = []
    for example in examples:
        tokens = example.input_ids[example.is_target].tolist()
        named = np.array([kinds[token] for token in tokens], dtype=object)
        named[find_turn_ends(example).numpy()] = "end"
        found.append(named)
    return np.concatenate(found)


def kind_of(text: str) -> str:
    """A token's kind: line break, number, operator, word or other.

    A line break contains one; a word has a letter, a number a digit and no letter, and an operator
    only mathematical signs.
    """
    stripped = text.strip()
    if "\n" in text:
        return "line break"
    if any(character.isalpha() for character in stripped):
        return "word"
    if any(character.isdigit() for character in stripped):
        return "number"
    if stripped and all(c in OPERATORS or unicodedata.category(c) == "Sm" for c in stripped):
        return "operator"
    return "other"
