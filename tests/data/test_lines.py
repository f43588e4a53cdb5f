"""Lines of a response, by the tokens of a real tokenizer."""

import numpy as np
import tiny

from gift.data.encoding import Example
from gift.data.lines import line_starts


def test_a_line_begins_after_a_break_and_blank_lines_belong_to_the_one_before():
    tokenizer = tiny.make_tokenizer()
    text = "The sum is 5.\n\nThe answer\nis 5.\n"
    ids = np.array(tokenizer(text)["input_ids"], np.int32)
    prompt = np.array(tokenizer("Add\n")["input_ids"], np.int32)
    example = Example(
        0, np.concatenate([prompt, ids]), np.arange(len(prompt) + len(ids)) >= len(prompt)
    )
    (starts,) = line_starts([example], tokenizer)
    lines = np.split(ids, np.flatnonzero(starts))
    assert [tokenizer.decode(line) for line in lines] == [
        "The sum is 5.\n\n",
        "The answer\n",
        "is 5.\n",
    ]
