"""Checks that two tokenizers give the same tokens the same ids.

Only tokens that a model's own `tokenizer.json` knows can differ: a base model may lack those of
chats, and a folder without the file is not compared. An added token may have another name at the
same id, as where a chat model names a reserved one.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from gift.data.encoding import Example
from gift.errors import InputError
from gift.models.loading import resolve_model
from gift.models.tokenizer import load_tokenizer

SHARED = 0.5  # least share of plain tokens that two models of one family have in common


def tokenizer_for(folder: Path, name: str | None) -> tuple[PreTrainedTokenizerBase, dict[int, str]]:
    """The tokenizer of the model `name`, and its `other_tokens`; by default the folder's own."""
    if name is None:
        return load_tokenizer(folder), {}
    tokenizer = load_tokenizer(resolve_model(name))
    return tokenizer, other_tokens(folder, tokenizer)


def own_ids(folder: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Ids by token in `tokenizer.json`: of all tokens, and of those that are not added ones."""
    path = folder / "tokenizer.json"
    if not path.exists():
        return {}, {}
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library has no type of its own
        raise InputError(f"{path}: not a tokenizer ({error})") from error
    ids, added = tokenizer.get_vocab(), tokenizer.get_added_tokens_decoder()
    return ids, {token: number for token, number in ids.items() if number not in added}


def other_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Ids of `tokenizer` that are other tokens in the folder, each with a description."""
    ids, plain = own_ids(folder)
    named = {number: token for token, number in plain.items()}
    differing = {}
    for token, number in tokenizer.get_vocab().items():
        if ids.get(token, number) != number:
            differing[number] = f"{token!r}: {ids[token]} and {number}"
        elif named.get(number, token) != token:
            differing[number] = f"{number}: {named[number]!r} and {token!r}"
    return differing


def require_same_tokens(
    option: str, folder: Path, other: Mapping[int, str], rows: Sequence[Example], whose: str | None
) -> None:
    """InputError where rows have one of the `other_tokens` of the folder."""
    used = np.unique(np.concatenate([row.input_ids for row in rows])).tolist() if rows else []
    if differing := [other[number] for number in used if number in other]:
        raise InputError(
            f"{option}: {len(differing)} tokens of the data have another id in {folder} than in "
            f"{whose}, as {differing[0]}; the model would read other words; use models whose "
            "tokens have the same ids"
        )


def require_same_ids(option: str, folder: Path, other: Path) -> None:
    """InputError where the folders' plain tokens have other ids, or few of them are the same."""
    (_, plain), (_, expected) = own_ids(folder), own_ids(other)
    if not (plain and expected):
        return
    shared = plain.keys() & expected.keys()
    if moved := [token for token in shared if plain[token] != expected[token]]:
        token = min(moved, key=expected.__getitem__)
        problem = (
            f"{len(moved)} tokens have another id in {folder} than in {other}, as {token!r}: "
            f"{plain[token]} and {expected[token]}"
        )
    elif len(shared) < SHARED * min(len(plain), len(expected)):
        problem = f"{folder} and {other} have only {len(shared)} tokens in common"
    else:
        return
    raise InputError(
        f"{option}: {problem}; the model would read other words; use models whose tokens have the "
        "same ids"
    )
