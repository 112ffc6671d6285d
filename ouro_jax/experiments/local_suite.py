"""Three tasks for lm-evaluation-harness that need no download: made from what Python brings along.

One of each kind: a choice by likelihood, a rolling perplexity, a generated answer. Their texts are
held out from the data that `configs/tiny.py` trains on; examples for few-shot prompts are not.
"""

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

from ouro_jax.data import arithmetic
from ouro_jax.data.splits import in_split, stable_hash
from ouro_jax.data.stdlib_text import Entry, module_paths, parse_module, prose

DOCUMENTS = {"heldout": 200, "train": 20}
CHOICES = 4
MOST_ENTRIES = 500  # to draw wrong choices from; parsing all modules takes seconds
LONGEST_CHOICE = 200
LONGEST_TEXT = 2000
HELDOUT_SEED, TRAIN_SEED = 1, 0  # of the arithmetic that the tiny data set is made from, too

Document = dict[str, Any]


def local_tasks() -> list[dict[str, Any]]:
    """The suite as configs of the harness's tasks, in its own words.

    `local_docs`: which of four docstrings is that of a function, given its name and signature.
    `local_prose`: perplexity of docstrings and help topics. `local_arithmetic`: `(3 * 5) mod 7 =`.
    """
    return [
        _task("local_docs", docs_choices) | {
            "output_type": "multiple_choice",
            "doc_to_text": "text",
            "doc_to_target": "label",
            "doc_to_choice": "choices",
            "target_delimiter": "",
            "metric_list": [_mean("acc"), _mean("acc_norm")],
        },
        _task("local_prose", prose_texts) | {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "text",
        },
        _task("local_arithmetic", equations) | {
            "output_type": "generate_until",
            "doc_to_text": "problem",
            "doc_to_target": "answer",
            "fewshot_delimiter": "\n",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
            "metric_list": [_mean("exact_match")],
            "process_results": is_answer,
        },
    ]  # fmt: skip


def docs_choices(split: str) -> Iterator[Document]:
    """`text` (a name with its signature), `choices` (docstrings) and `label`, the right one.

    The wrong ones belong to other things of the same split, drawn by the hash of the name.
    """
    found = (
        (entry, summary)
        for path in module_paths() if in_split(path, split)
        for entry in parse_module(path).entries if (summary := _summary(entry))
    )  # fmt: skip
    entries = list(itertools.islice(found, MOST_ENTRIES))
    for entry, summary in entries:
        numbers = random.Random(stable_hash(entry.name))
        others = sorted({other for _, other in entries} - {summary})
        choices = numbers.sample(others, CHOICES - 1)
        label = numbers.randrange(CHOICES)
        choices.insert(label, summary)
        text = f"{entry.name}: {entry.signature}\n"
        yield {"text": text, "choices": choices, "label": label}


def prose_texts(split: str) -> Iterator[Document]:
    """`text`: the beginning of what a module says about itself, or of a topic of Python's help."""
    return ({"text": text[:LONGEST_TEXT]} for (text,) in prose(split) if text)


def equations(split: str) -> Iterator[Document]:
    """`problem` and `answer` of modular arithmetic in its shortest form."""
    seed = HELDOUT_SEED if split == "heldout" else TRAIN_SEED
    for problem, text in arithmetic.problems(seed):
        if problem.endswith(" =") and in_split(problem, split):
            yield {"problem": problem, "answer": text.removeprefix(problem).strip()}


def is_answer(document: Document, results: list[str]) -> dict[str, float]:
    """Whether the generated line is the answer, but for spaces around it."""
    return {"exact_match": float(results[0].strip() == document["answer"])}


def _task(name: str, documents: Callable[[str], Iterator[Document]]) -> dict[str, Any]:
    def data(**_: Any) -> dict[str, Any]:
        from datasets import Dataset  # comes with lm-eval

        return {
            split: Dataset.from_list(list(itertools.islice(documents(split), count)))
            for split, count in DOCUMENTS.items()
        }

    splits = {"test_split": "heldout", "fewshot_split": "train"}
    return {"task": name, "custom_dataset": data, "metadata": {"version": 1}} | splits


def _mean(metric: str) -> dict[str, Any]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


def _summary(entry: Entry) -> str:
    """The first paragraph of a docstring as one line; empty if it is long."""
    summary = " ".join(entry.docstring.strip().split("\n\n")[0].split())
    return summary if len(summary) <= LONGEST_CHOICE else ""
