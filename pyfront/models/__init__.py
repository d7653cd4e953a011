"""Which classes are replaced by what, and which layers share their input: one table per family, as data.

fusetune.patching reads them."""

from __future__ import annotations

from typing import NamedTuple

from fusetune.models import bart, bert, gpt, llama, modules, peft, t5, vision


class Row(NamedTuple):
    """What replaces a class, by names that are imported only where an instance of it is found."""

    op: str  # "attention" or "lora"
    replaced_by: str  # a class, or an op that the attention function of its model's config calls
    why_not: str  # a function: module -> why it must be left alone, or None
    by_config: bool = False  # whether the config of its model names the attention function


# By the qualified name of the class. A subclass is another class: it may have another forward.
ROWS = {
    name: Row(*row)
    for family in (bart, bert, gpt, llama, modules, peft, t5, vision)
    for name, row in family.TABLE.items()
}
# Of attention classes of transformers that are in no table.
UNLISTED = Row("attention", "fusetune.ops.flash_attention", "fusetune.nn.flash_attention.why_not_unlisted", True)
SHARED_INPUT = {**bert.SHARED_INPUT, **llama.SHARED_INPUT}
