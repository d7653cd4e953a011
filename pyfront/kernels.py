"""The Triton kernels: kernels/*.py, which lie inside of this package in a wheel and beside it in a checkout.

kernels/ has no __init__.py, because a package of that name at the top of a checkout would hide Hugging Face's `kernels`
from transformers. This module stands for it, and says where its submodules are.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

    def __getattr__(name: str) -> ModuleType: ...  # its submodules


_here = Path(__file__).parent
__path__ = [str(folder) for folder in (_here / "kernels", _here.parent / "kernels") if folder.is_dir()][:1]
