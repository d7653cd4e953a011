"""The data of the default jobs, from the standard library of the running Python.

For classification: docstrings, labelled by subject. The sources are parsed, never imported or run. The subjects are
groups of chapters of the Python library reference (https://docs.python.org/3/library/index.html); a module that this
Python lacks is passed over. For language modelling: the texts of `help()` on topics, such as `help("LOOPING")`.
"""

from __future__ import annotations

import ast
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from fusetune.train.config import TrainConfig, UserError
from fusetune.train.data import Texts

SUBJECTS = {
    "data types and numbers": """
        _collections_abc _pydatetime _pydecimal _strptime array bisect calendar collections copy datetime decimal enum
        fractions functools graphlib heapq itertools numbers operator pprint random reprlib statistics types weakref
        zoneinfo""",
    "text and markup": """
        _markupbase base64 cmd codecs difflib email encodings getopt getpass gettext html json locale mailbox mailcap
        mimetypes optparse argparse quopri re shlex string stringprep textwrap uu xdrlib xml""",
    "files and archives": """
        _compression _pyio bz2 compression configparser csv dbm filecmp fileinput fnmatch genericpath glob gzip io
        linecache lzma netrc ntpath os pathlib pickle plistlib posixpath shelve shutil sqlite3 stat tarfile tempfile
        tomllib zipfile zipimport""",
    "concurrency": """
        _threading_local asyncio concurrent contextvars multiprocessing queue sched selectors signal subprocess
        threading""",
    "networking": """
        ftplib http imaplib ipaddress nntplib poplib smtpd smtplib socket socketserver ssl telnetlib urllib uuid
        webbrowser wsgiref xmlrpc""",
    "graphical interfaces": """
        colorsys idlelib tkinter turtle turtledemo""",
    "testing and debugging": """
        bdb cProfile cgitb doctest logging pdb profile pstats timeit trace traceback tracemalloc unittest warnings""",
    "the language and its runtime": """
        _py_abc abc ast code codeop compileall contextlib dataclasses dis imp importlib inspect keyword lib2to3
        modulefinder opcode pickletools pkgutil py_compile pyclbr pydoc runpy site symtable sysconfig tabnanny token
        tokenize typing""",
}
MIN_WORDS = 10
MAX_TEXTS = 600  # of a subject
EVAL_SHARE = 0.2


def load_docstrings(config: TrainConfig) -> Texts:
    """Docstrings of modules, classes and functions; no module (with its submodules) gives texts to both parts.

    Raises:
        UserError: this Python comes without the sources of its library.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    draw = random.Random(config.seed)
    seen: set[str] = set()
    parts: tuple[list[tuple[str, int]], ...] = ([], [])
    for number, modules in enumerate(SUBJECTS.values()):
        by_module = {module: list(_docstrings(library, module, seen)) for module in modules.split()}
        total = min(MAX_TEXTS, sum(map(len, by_module.values())))
        wanted = round(EVAL_SHARE * total)
        order = sorted(by_module)
        draw.shuffle(order)
        train: list[str] = []
        evaluation: list[str] = []
        largest = sum(map(len, by_module.values())) / 3  # a larger module would leave too little to learn from
        for module in order:
            enough = len(evaluation) >= wanted or len(by_module[module]) > largest
            (train if enough else evaluation).extend(by_module[module])
        for part, texts, limit in zip(parts, (train, evaluation), (total - wanted, wanted), strict=True):
            draw.shuffle(texts)
            part += [(text, number) for text in texts[:limit]]
    for part, most in zip(parts, (config.max_train_samples, config.max_eval_samples), strict=True):
        draw.shuffle(part)
        del part[most or len(part) :]
        if len({label for _, label in part}) < 2:
            raise UserError(f"data: {library} must hold the sources of Python's standard library; use --dataset")
    return Texts(
        train=[(text,) for text, _ in parts[0]],
        evaluation=[(text,) for text, _ in parts[1]],
        source="docstrings of Python's standard library",
        train_labels=[label for _, label in parts[0]],
        eval_labels=[label for _, label in parts[1]],
        names=list(SUBJECTS),
    )


def load_topics(config: TrainConfig) -> Texts:
    """The texts of `pydoc_data.topics`, a tenth of the topics to evaluate on."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UserError("data: this Python comes without pydoc_data.topics; use --dataset") from error
    names = sorted(topics)
    held = set(random.Random(config.seed).sample(names, max(1, len(names) // 10)))
    train = [name for name in names if name not in held][: config.max_train_samples]
    evaluation = sorted(held)[: config.max_eval_samples]
    return Texts(
        train=[(topics[name],) for name in train],
        evaluation=[(topics[name],) for name in evaluation],
        source="the topics of Python's help()",
    )


def _docstrings(library: Path, module: str, seen: set[str]) -> Iterator[str]:
    """Cleaned docstrings of a module or package, in the order of its sources, none twice."""
    package = library / module
    sources = sorted(package.rglob("*.py")) if package.is_dir() else [package.with_suffix(".py")]
    for source in sources:
        if {"test", "tests", "idle_test"} & set(source.parts) or not source.is_file():
            continue
        try:
            tree = ast.parse(source.read_bytes())
        except (OSError, SyntaxError, ValueError):  # some packages carry files for other versions of Python
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = _clean(ast.get_docstring(node) or "")
                key = re.sub(r"\W+", " ", text.lower())[:200]
                if len(text.split()) >= MIN_WORDS and key not in seen:
                    seen.add(key)
                    yield text


def _clean(docstring: str) -> str:
    """The prose: without interactive examples, rulers and line breaks."""
    prose = re.sub(r"^\s*(>>>|\.\.\.).*$", "", docstring, flags=re.MULTILINE)
    return " ".join(re.sub(r"[-=*~`_#+|]{3,}", " ", prose).split())
