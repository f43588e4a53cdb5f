"""The tokens of a response at which its lines begin."""

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from gift.data.encoding import Example


def line_starts(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
) -> list[np.ndarray]:
    """Which targets bool [targets] of each example come first after a line break.

    A token with a line break belongs to the line that it ends, and blank lines to the one before.
    """
    used = np.unique(np.concatenate([example.input_ids for example in examples]))
    texts = {int(token): token_text(tokenizer, int(token)) for token in used}
    breaks = {token for token, text in texts.items() if "\n" in text}
    blank = {token for token in breaks if not texts[token].strip()}
    found = []
    for example in examples:
        tokens = example.input_ids[example.is_target].tolist()
        after = [False, *(token in breaks for token in tokens[:-1])]
        found.append(
            np.array([a and token not in blank for a, token in zip(after, tokens, strict=True)])
        )
    return found


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """One token's text; incomplete UTF-8 becomes U+FFFD."""
    text = tokenizer.decode([token])
    assert isinstance(text, str), "one sequence decodes to one text"
    return text
