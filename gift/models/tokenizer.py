"""Loads tokenizers, and identifies them and their chat templates by hashes."""

import json
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gift.errors import InputError
from gift.storage.files import hash_bytes, hash_json


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder; InputError where it or its chat template is missing."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        # The tokenizers library raises plain Exception where tokenizer.json is damaged.
        first_line = (str(error).splitlines() or [repr(error)])[0]
        raise InputError(f"{folder}: no tokenizer can be loaded ({first_line})") from error
    if not tokenizer.chat_template:
        raise InputError(
            f"{folder}: the tokenizer has no chat template; use the instruct model's tokenizer"
        )
    return tokenizer


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of everything that decides token ids; padding and truncation settings do not count."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        content.pop("padding", None)
        content.pop("truncation", None)
    else:
        content = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    return hash_json([content, tokenizer.eos_token, tokenizer.bos_token])


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the chat template's text."""
    return hash_bytes(tokenizer.get_chat_template().encode())
