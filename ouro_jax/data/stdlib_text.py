"""Text that every machine with Python has: its standard library, as code, prose and questions.

Everything of one module belongs to one split, by a hash of its path: a function that is in the
held-out code is in the held-out docstrings and questions, and nowhere in the training ones.
"""

import ast
import functools
import pydoc_data.topics
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ouro_jax.data.splits import in_split, stable_hash

# No tests and nothing installed later. `encodings` is 1.5 MB of tables that resemble each other,
# `pydoc_data` is the prose itself.
EXCLUDED_FOLDERS = frozenset(
    "site-packages dist-packages test tests idle_test encodings pydoc_data __pycache__".split()
)

Conversation = list[dict[str, str]]


class Entry(NamedTuple):
    """A documented function or class: `textwrap.dedent`, `dedent(text)`, its docstring."""

    name: str
    signature: str
    docstring: str


class Module(NamedTuple):
    """A module's name, its docstring (or '') and its documented entries in source order."""

    name: str
    docstring: str
    entries: tuple[Entry, ...]


@functools.cache
def module_paths() -> tuple[str, ...]:
    """Paths of the library's modules, relative to its folder, in the order of their hashes."""
    library = _library()
    paths = (path.relative_to(library) for path in library.rglob("*.py"))
    kept = [path.as_posix() for path in paths if not EXCLUDED_FOLDERS & set(path.parts[:-1])]
    return tuple(sorted(kept, key=stable_hash))


def code(split: str) -> Iterator[list[str]]:
    """The source of each module of `split`, a document each."""
    return ([_read(path)] for path in module_paths() if in_split(path, split))


def prose(split: str) -> Iterator[list[str]]:
    """What each module of `split` says about itself, and the topics of Python's own help."""
    topics = pydoc_data.topics.topics
    keys = [*module_paths(), *(f"topics/{name}" for name in topics)]
    for key in sorted(keys, key=stable_hash):
        if not in_split(key, split):
            continue
        if key.startswith("topics/"):
            yield [topics[key.removeprefix("topics/")]]
        else:
            yield [_describe(parse_module(key))]


def questions(split: str) -> Iterator[list[Conversation]]:
    """Questions about each module of `split` with answers from its docstrings."""
    for path in module_paths():
        if in_split(path, split):
            yield list(_module_questions(parse_module(path)))


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _read(path: str) -> str:
    with tokenize.open(_library() / path) as file:  # honours the file's encoding declaration
        return file.read()


@functools.cache
def parse_module(path: str) -> Module:
    """Names, signatures and docstrings of a module, read from its source, never imported."""
    name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # escape sequences in old modules
        tree = ast.parse(_read(path))
    return Module(name, ast.get_docstring(tree) or "", tuple(_entries(tree, name)))


def _entries(parent: ast.Module | ast.ClassDef, prefix: str) -> Iterator[Entry]:
    for node in parent.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        name = f"{prefix}.{node.name}"
        docstring = ast.get_docstring(node)
        if docstring:
            yield Entry(name, _signature(node), docstring)
        if isinstance(node, ast.ClassDef):
            yield from _entries(node, name)


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {node.name}({bases})" if bases else f"class {node.name}"
    return f"{node.name}({ast.unparse(node.args)})"


def _describe(module: Module) -> str:
    parts = [f"{module.name}\n\n{module.docstring}"] if module.docstring else []
    parts += [f"{entry.name}: {entry.signature}\n{entry.docstring}" for entry in module.entries]
    return "\n\n".join(parts)


def _first_paragraph(docstring: str) -> str:
    return re.sub(r"\s+", " ", docstring.strip().split("\n\n")[0])


def _module_questions(module: Module) -> Iterator[Conversation]:
    if module.docstring:
        yield _turns(f"What is the module {module.name} for?", _first_paragraph(module.docstring))
    for entry in module.entries:
        if any(part.startswith("_") for part in entry.name.split(".")):
            continue
        what = f"What does {entry.name} do?", _first_paragraph(entry.docstring)
        how = f"What is the signature of {entry.name}?", entry.signature
        if stable_hash(entry.name) % 2:
            yield _turns(*what)
            yield _turns(*how)
        else:
            yield _turns(*what, "And its signature?", how[1])


def _turns(*texts: str) -> Conversation:
    """User and assistant in turn."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
