"""Prints rows as a model reads them, with their targets marked."""

from itertools import groupby

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from gift.console import console
from gift.data.encoding import EncodedData, Example


def show_rows(data: EncodedData, tokenizer: PreTrainedTokenizerBase) -> None:
    """Prints each row's text with its targets in brackets `[[...]]`, bold where there is colour."""
    lost_rows = {lost_row.row: lost_row for lost_row in data.lost}
    for row, example in enumerate(data.examples):
        lost_row = lost_rows.get(row)
        lost = f"{lost_row.action}: {lost_row.reason}" if lost_row else ""
        counts = f"{len(example.input_ids)} tokens, {example.targets} targets" if example else ""
        title = f"row {row}: {', '.join(filter(None, (counts, lost)))}; targets in [[ ]]"
        console.print(title, style="bold", markup=False, highlight=False, soft_wrap=True)
        if example is not None:
            console.print(_marked(example, tokenizer), highlight=False, soft_wrap=True)


def _marked(example: Example, tokenizer: PreTrainedTokenizerBase) -> Text:
    text, shown, end = Text(), "", 0
    for is_target, run in groupby(example.is_target.tolist()):
        end += len(list(run))
        # Decoded from the beginning: some tokenizers drop the space before a text's first token.
        decoded = tokenizer.decode(example.input_ids[:end].tolist())
        assert isinstance(decoded, str), "one sequence decodes to one text"
        piece = decoded[len(shown) :]
        text.append(f"[[{piece}]]" if is_target else piece, "bold green" if is_target else "")
        shown = decoded
    return text
