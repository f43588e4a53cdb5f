"""Whether two tokenizers give the same tokens the same ids."""

from collections.abc import Mapping
from pathlib import Path

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from gift.errors import InputError
from gift.models import load_tokenizer, resolve_model


def tokenizer_for(folder: Path, name: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer of the model `name`, by default the folder's own, with the folder's ids."""
    if name is None:
        return load_tokenizer(folder)
    tokenizer = load_tokenizer(resolve_model(name))
    require_same_ids("--tokenizer", folder, tokenizer.get_vocab(), name)
    return tokenizer


def own_ids(folder: Path) -> dict[str, int]:
    """Ids by token of the folder's `tokenizer.json`; empty where it has none."""
    path = folder / "tokenizer.json"
    if not path.exists():
        return {}
    try:
        return Tokenizer.from_file(str(path)).get_vocab()
    except Exception as error:  # the library raises nothing more exact
        raise InputError(f"{path}: not a tokenizer ({error})") from error


def require_same_ids(option: str, folder: Path, ids: Mapping[str, int], whose: str) -> None:
    """InputError where a model folder's own tokenizer has other ids for tokens that `ids` has.

    Tokens that only one of them knows are no matter: a base model may lack those of chats. A folder
    without `tokenizer.json` is not compared.
    """
    other = [token for token, number in own_ids(folder).items() if ids.get(token, number) != number]
    if other:
        token = min(other, key=ids.__getitem__)
        raise InputError(
            f"{option}: {len(other)} tokens have another id in {folder} than in {whose}, as "
            f"{token!r}: {own_ids(folder)[token]} and {ids[token]}; the model would read other "
            "words; use models whose tokens have the same ids"
        )
