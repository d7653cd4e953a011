"""Which classes are replaced by what, and which layers share their input: one table per family, as data.

fusetune.patching reads them."""

from __future__ import annotations

from typing import NamedTuple

from fusetune.models import bert, llama, peft


class Row(NamedTuple):
    """What replaces a class, by names that are imported only where an instance of it is found."""

    op: str  # "attention": the attention function of its model's config; "lora": the class
    replaced_by: str
    why_not: str  # a function: module -> why it must be left alone, or None


# By the qualified name of the class. A subclass is another class: it may have another forward.
ROWS = {name: Row(*row) for table in (bert.TABLE, llama.TABLE, peft.TABLE) for name, row in table.items()}
SHARED_INPUT = {**bert.SHARED_INPUT, **llama.SHARED_INPUT}
