"""Pairs of questions that may ask for the same thing: Quora's, or a small set made of templates.

The paper (section 7.2) asks the model whether the two questions of a pair from Quora Question
Pairs have the same intent. Its prompt is not published; the one here is ours.
"""

import csv
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from ouro_jax.data.tokenizer import encode
from ouro_jax.errors import ConfigError, require
from ouro_jax.experiments.probes import Questions

COLUMNS = ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"]
PROMPT = (
    "Question A: {first}\nQuestion B: {second}\n"
    "Would the same reply satisfy both questions? Say True or False.\nReply:"
)
ANSWERS = (" True", " False")

# Ways to ask for one thing; two of them make a pair with the same intent, two things one without.
WORDINGS = {
    "learn": ("How do I learn {}?", "What is a good way to get started with {}?",
              "Where should a beginner in {} begin?"),
    "cost": ("How much does {} cost?", "What do people usually pay for {}?",
             "Is {} expensive, and what is the price?"),
    "time": ("How long does {} take?", "How many hours should I plan for {}?",
             "Is {} quick, or does it need a lot of time?"),
    "worth": ("Is {} worth it?", "Would you recommend {}?", "What speaks for and against {}?"),
    "origin": ("Who came up with {}?", "What is the history of {}?", "When did {} begin?"),
}  # fmt: skip
THINGS = (
    "playing the violin", "baking bread at home", "growing tomatoes", "repairing a bicycle",
    "a pottery class", "keeping bees", "learning to sail", "watercolour painting",
    "long-distance hiking", "building a bookshelf", "restoring old furniture", "street photography",
)  # fmt: skip


class QuestionPair(NamedTuple):
    """Two questions, and whether people found that they ask for the same thing."""

    first: str
    second: str
    same: bool


def read_quora_pairs(path: str | os.PathLike, count: int, seed: int = 0) -> list[QuestionPair]:
    """`count` pairs drawn from Quora's file, `quora_duplicate_questions.tsv`.

    ConfigError if it is missing, has other columns, or has fewer pairs.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(
            f"{path}: no such file. Expected quora_duplicate_questions.tsv of Quora's first data "
            "set release, Question Pairs (2017), which its terms let you download for "
            "non-commercial use but not us ship: search for 'First Quora Dataset Release: Question "
            "Pairs', save the TSV and give its path. Without it the template pairs are there."
        )
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file, delimiter="\t")
        if rows.fieldnames != COLUMNS:
            raise ConfigError(
                f"{path}: its columns are {rows.fieldnames}; expected {COLUMNS}, tabs between them."
            )
        pairs = [
            QuestionPair(row["question1"], row["question2"], row["is_duplicate"] == "1")
            for row in rows
            if row["question1"] and row["question2"]
        ]
    require(1 <= count <= len(pairs), "count", count, f"1 to the {len(pairs)} pairs of {path}")
    chosen = np.random.default_rng(seed).choice(len(pairs), count, replace=False)
    return [pairs[index] for index in sorted(chosen)]


def template_pairs(count: int = 200, seed: int = 0) -> list[QuestionPair]:
    """`count` different pairs of our own, half of them with the same intent.

    The others differ in what they want to know of a thing or, as often, in the thing: neither
    common words nor common wording tell.
    """
    rng = np.random.default_rng(seed)
    same, differs = [], []
    for thing, (intent, wordings) in itertools.product(THINGS, WORDINGS.items()):
        for a, b in itertools.combinations(range(len(wordings)), 2):
            same.append(QuestionPair(wordings[a].format(thing), wordings[b].format(thing), True))
            other_thing = rng.choice([name for name in THINGS if name != thing])
            other = rng.choice([name for name in WORDINGS if name != intent])
            second = rng.choice([
                wordings[b].format(other_thing), WORDINGS[other][b].format(thing),
            ])  # fmt: skip
            differs.append(QuestionPair(wordings[a].format(thing), str(second), False))
    differs = list(dict.fromkeys(differs))
    require(2 <= count <= 2 * len(differs), "count", count, f"2 to {2 * len(differs)} pairs")
    halves = (same, count - count // 2), (differs, count // 2)
    chosen = [
        pairs[index]
        for pairs, number in halves
        for index in rng.choice(len(pairs), number, replace=False)
    ]
    return [chosen[index] for index in rng.permutation(count)]


def pair_questions(
    tokenizer: Tokenizer, pairs: Sequence[QuestionPair], name: str, balanced: bool = False
) -> Questions:
    """The pairs as prompts; candidate 0, the positive one, says that the intent is the same.

    What the two answers begin with alike goes into the prompt, and they are told apart by the
    first token in which they differ.
    """
    yes, no = (encode(tokenizer, answer) for answer in ANSWERS)
    shared = len(os.path.commonprefix([yes, no]))
    texts = [PROMPT.format(first=pair.first, second=pair.second) for pair in pairs]
    return Questions(
        name,
        [encode(tokenizer, text) + yes[:shared] for text in texts],
        (yes[shared], no[shared]),
        truth=[0 if pair.same else 1 for pair in pairs],
        balanced=balanced,
    )
