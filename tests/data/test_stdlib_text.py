"""The standard library as text: whole modules per split, right names and signatures."""

import ast
import itertools
import re
import textwrap
from collections import Counter

from ouro_jax.data import stdlib_text
from ouro_jax.data.stdlib_text import module_paths, parse_module


def test_modules_are_the_library_without_tests_and_tables():
    paths = module_paths()
    assert {"textwrap.py", "json/decoder.py"} <= set(paths)
    parts = {part for path in paths for part in path.split("/")[:-1]}
    assert not parts & {"site-packages", "test", "tests", "encodings", "pydoc_data"}
    assert len(set(paths)) == len(paths) > 300


def test_a_module_is_described_from_its_source():
    module = parse_module("textwrap.py")
    assert (module.name, module.docstring) == ("textwrap", textwrap.__doc__.strip())
    entries = {entry.name: entry for entry in module.entries}
    assert entries["textwrap.dedent"].signature == "dedent(text)"
    assert entries["textwrap.TextWrapper"].signature == "class TextWrapper"
    assert entries["textwrap.TextWrapper.fill"].signature == "fill(self, text)"
    assert parse_module("json/__init__.py").name == "json"


def test_questions_are_answered_from_docstrings():
    conversations = list(itertools.chain(*stdlib_text.questions("train")))
    conversations += list(itertools.chain(*stdlib_text.questions("heldout")))
    answers = {
        turns[i]["content"]: turns[i + 1]["content"]
        for turns in conversations
        for i in range(0, len(turns), 2)
    }
    assert answers["What does textwrap.dedent do?"].startswith("Remove any common leading")
    assert answers["What is the module textwrap for?"] == "Text wrapping and filling."
    for turns in conversations:
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
        assert all(turn["content"] for turn in turns)


def test_a_module_is_in_one_split_in_all_sources():
    parsed = [parse_module(path) for path in module_paths()]
    shared = Counter(module.docstring for module in parsed)
    names = {m.docstring: m.name for m in parsed if m.docstring and shared[m.docstring] == 1}
    found = {}
    for split in ("train", "heldout"):
        code = [ast.get_docstring(ast.parse(text)) for [text] in stdlib_text.code(split)]
        prose = [text.split("\n")[0] for [text] in stdlib_text.prose(split)]
        questions = [
            turns[0]["content"] for turns in itertools.chain(*stdlib_text.questions(split))
        ]
        found[split] = [
            {names[docstring] for docstring in code if docstring in names},
            set(prose) & set(names.values()),
            set(re.findall(r"What is the module (\S+) for", "\n".join(questions))),
        ]
    for train, heldout in itertools.product(found["train"], found["heldout"]):
        assert len(train) > 100 and len(heldout) > 5
        assert not train & heldout
