"""What a person sees of a batch before a run."""

import io

import numpy as np
import pytest
from rich.console import Console

from relax.data.example_batches import validation_examples
from relax.data.examples import Examples
from relax.data.inspection import show_rows


def batch_of(documents, weights, *, context, packing, batch_size=1):
    examples = Examples(
        tokens=np.concatenate(documents),
        weights=np.concatenate(weights),
        offsets=np.cumsum([0, *map(len, documents)]),
        dropped=0,
        truncated=0,
    )
    settings = {"batch_size": batch_size, "context": context, "packing": packing}
    return next(iter(validation_examples(examples, **settings)))


def shown(batch, tokenizer, count=1, **console):
    file = io.StringIO()
    console = {"width": 20, "_environ": {}} | console
    show_rows(batch, tokenizer, Console(file=file, **console), count)
    return file.getvalue()


DOCUMENTS = [[256, *b"Hi\x1b", 257], [*b"[b]\n", 259, *"é".encode()]]
WEIGHTS = [[0, 0, 0, 0.5, 1], [0, 0, 1, 1, 1, 0, 0]]
ROW = """\
==== row 0: 12 tokens, 5 in the loss, 2 documents, 2 padding of 14 places ====
---- document 1: 7 tokens, 3 in the loss ----
[b⟦]↵
<|im_end|>⟧é
---- document 2: 5 tokens, 2 in the loss ----
<s>Hi⟦0.5: \\x1b⟧⟦</s>⟧
"""


def test_a_packed_row_without_a_terminal(special_bytes):
    batch = batch_of(DOCUMENTS, WEIGHTS, context=14, packing=True)
    assert shown(batch, special_bytes) == ROW


def test_a_packed_row_in_colours(special_bytes):
    batch = batch_of(DOCUMENTS, WEIGHTS, context=14, packing=True)
    text = shown(batch, special_bytes, force_terminal=True, color_system="standard")
    lines = text.splitlines()
    assert lines[2:4] == [
        "\x1b[2m[b\x1b[0m\x1b[1;32m]↵\x1b[0m",
        "\x1b[1;32m<|im_end|>\x1b[0m\x1b[2mé\x1b[0m",
    ]
    assert lines[5] == (
        "\x1b[2m<s>Hi\x1b[0m\x1b[1;33m\\x1b\x1b[0m\x1b[1;32m</s>\x1b[0m"
    )
    plain = shown(
        batch, special_bytes, force_terminal=True, color_system=None, no_color=True
    )
    assert plain == ROW


def test_rows_that_are_not_packed_have_their_last_target(special_bytes):
    documents, weights = [[*b"ab"], [*b"cde"]], [[0, 1], [0, 1, 0]]
    batch = batch_of(documents, weights, context=4, packing=False, batch_size=3)
    assert shown(batch, special_bytes, count=3) == (
        "==== row 0: 2 tokens, 1 in the loss, 1 document, 3 padding of 4 places ====\n"
        "---- document 1: 2 tokens, 1 in the loss ----\n"
        "a⟦b⟧\n"
        "==== row 1: 3 tokens, 1 in the loss, 1 document, 2 padding of 4 places ====\n"
        "---- document 1: 3 tokens, 1 in the loss ----\n"
        "c⟦d⟧e\n"
        "==== row 2: 0 tokens, 0 in the loss, 0 documents, 4 padding of 4 places ====\n"
    )
    assert shown(batch, special_bytes, count=1).count("row") == 1


def test_a_packed_row_that_is_full_has_its_last_target_too(special_bytes):
    batch = batch_of([[*b"abc"]], [[0, 1, 1]], context=2, packing=True)
    assert shown(batch, special_bytes).endswith("a⟦bc⟧\n")
    batch = batch_of([[*b"ab"]], [[0, 1]], context=2, packing=True)
    assert shown(batch, special_bytes).endswith("a⟦b⟧\n")


@pytest.mark.parametrize(("packing", "padding"), [(True, 3), (False, 4)])
def test_token_zero_may_be_real(special_bytes, packing, padding):
    batch = batch_of([[97, 0]], [[0, 1]], context=5, packing=packing)
    assert f"1 document, {padding} padding of 5 places" in shown(batch, special_bytes)
    assert shown(batch, special_bytes).endswith("a⟦\\x00⟧\n")
