"""Safety by depth: answers to HEx-PHI at loops 1 … 8, each with a judge's score (paper, 7.1).

Paper, T = 4: harmful rate (share of score 5) 0.009 for 1.4B-Thinking, 0.003 for 2.6B-Thinking; it
falls with depth, untrained depths 5 … 8 included; the judge was GPT-4o.

The prompts are not in this repository and are not written into records either: their licence
forbids it. Records name them by `id` and a digest.
"""

import csv
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ouro_jax.config import ModelConfig
from ouro_jax.errors import ConfigError, require, require_choice
from ouro_jax.experiments.safety_judge import HARMFUL, Judge
from ouro_jax.inference.generate import MOST_SLOTS, generate
from ouro_jax.inference.slots import decoding_params
from ouro_jax.inference.text import decode_text, encode_prompt, stop_ids
from ouro_jax.training.lines import Lines, read_lines

NUM_CATEGORIES = 11
DEPTHS = tuple(range(1, 9))
HOW_TO_GET = (
    "The prompts are yours to bring: ask for access at "
    "https://huggingface.co/datasets/LLM-Tuning-Safety/HEx-PHI, accept its licence, and download "
    "category_1.csv … category_11.csv into a folder (`hf download LLM-Tuning-Safety/HEx-PHI "
    "--repo-type=dataset --local-dir=DIR`)."
)


@dataclass(frozen=True)
class Prompt:
    """A prompt; `id` says where it stands: `category_3/12`, or the line of a JSONL file."""

    id: str
    category: int
    text: str

    @property
    def digest(self) -> str:
        """What tells texts apart in records that do not hold them."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Answering:
    """How answers are made; `chat` puts the prompt into a conversation."""

    temperature: float
    top_p: float
    max_new_tokens: int
    chat: bool


# As the paper has them; how a base model is prompted it does not say: by the bare text here.
ANSWERING = {
    "base": Answering(0.0, 1.0, 128, chat=False),
    "thinking": Answering(1.0, 0.7, 8192, chat=True),
}


def load_prompts(path: str | Path) -> list[Prompt]:
    """Prompts of a folder with category_1.csv … as HEx-PHI ships, or of a JSONL file.

    A line of JSONL has `prompt` and, if it likes, `category`. ConfigError says how to get the data
    if there is none, and names a line that is wrong.
    """
    path = Path(path)
    if path.is_dir():
        prompts = list(_csv_prompts(path))
    elif path.is_file():
        prompts = list(_jsonl_prompts(path))
    else:
        raise ConfigError(f"prompts {str(path)!r}: no such folder or file. {HOW_TO_GET}")
    if not prompts:
        raise ConfigError(f"prompts {str(path)!r}: there are none in it. {HOW_TO_GET}")
    return prompts


def _csv_prompts(folder: Path) -> Iterator[Prompt]:
    for category in range(1, NUM_CATEGORIES + 1):
        file = folder / f"category_{category}.csv"
        if file.is_file():
            with file.open(encoding="utf-8-sig", newline="") as rows:
                # A prompt with a comma may stand there without quotes.
                texts = [",".join(row).strip() for row in csv.reader(rows)]
            for number, text in enumerate(filter(None, texts), start=1):
                yield Prompt(f"category_{category}/{number}", category, text)


def _jsonl_prompts(file: Path) -> Iterator[Prompt]:
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            text, category = record["prompt"].strip(), int(record.get("category", 0))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{file}, line {number}: expected an object with the text `prompt` and, if there "
                "is one, the number `category`."
            ) from error
        require(bool(text), f"{file}, line {number}: prompt", text, "a text")
        yield Prompt(f"line/{number}", category, text)


def run_safety(
    config: ModelConfig,
    params: dict,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    judge: Judge,
    output: str | Path,
    *,
    model_name: str,
    mode: str,
    depths: Sequence[int] = DEPTHS,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Answers every prompt with each number of loops, has it judged, and returns the summary.

    Args:
      config, params, tokenizer: the model, as `generate` takes it.
      output: JSONL that grows: `safety_run` (the settings), `safety_answer` and `safety_score`
        records, `safety_summary` at the end. Repeated, the command goes on: what is answered or
        judged there is not again.
      model_name: what the records call the model.
      mode: `base` or `thinking`, a key of `ANSWERING`.
      depths: numbers of loops to run; each is a model of its own.
      say: is told how far it is.

    A judge sees the whole answer, thoughts included. The summary has the mean score and the
    harmful rate (share of score 5) of each depth over the replies that held a score, and how many
    did not. Raises ConfigError for wrong settings and for an `output` of other ones, RunError if
    the judge cannot be reached.
    """
    require_choice(mode, ANSWERING, "mode")
    require(len(prompts) > 0, "prompts", [], "at least one prompt")
    require(bool(depths) and min(depths) >= 1, "depths", depths, "numbers of loops from 1 on")
    settings = {
        "model": model_name, "mode": mode, **asdict(ANSWERING[mode]), "judge": judge.name,
        "judges_harm": judge.judges_harm, "seed": seed,
    }  # fmt: skip
    done = _open_records(Path(output), settings)
    params = decoding_params(config, params)  # once, and not for each chunk
    say(f"{len(prompts)} prompts at {len(depths)} depths; {len(done.scores)} judged before")
    for depth in depths:
        for start in range(0, len(prompts), MOST_SLOTS):
            chunk = prompts[start : start + MOST_SLOTS]
            if any((prompt.digest, depth) not in done.answers for prompt in chunk):
                # All of a chunk again, so that draws do not depend on where a run was stopped.
                texts = _answer(config, params, tokenizer, chunk, depth, mode, seed + start)
                done.add_answers(chunk, depth, texts)
            for prompt in chunk:
                done.judge(prompt, depth, judge)
            say(f"depth {depth}: {min(start + MOST_SLOTS, len(prompts))} of {len(prompts)} judged")
    by_depth = [_summary_at(depth, prompts, done.scores) for depth in depths]
    done.append("safety_summary", by_depth=by_depth)
    done.close()
    for row in by_depth:
        say(_sentence(row))
    return {"output": str(output), **settings, "prompts": len(prompts), "by_depth": by_depth}


def _answer(config, params, tokenizer, prompts, depth, mode, seed) -> list[str]:
    how = ANSWERING[mode]
    answer = generate(
        config, params, [encode_prompt(tokenizer, prompt.text, how.chat) for prompt in prompts],
        how.max_new_tokens, temperature=how.temperature, top_p=how.top_p, loops=depth, seed=seed,
        stop_ids=stop_ids(tokenizer, None),
    )  # fmt: skip
    return [decode_text(tokenizer, tokens) for tokens in answer.tokens]


class _Records:
    """The file of a run, and what it holds by (digest of the prompt, depth)."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = Lines(path)
        self.answers: dict[tuple[str, int], str] = {}
        self.scores: dict[tuple[str, int], int | None] = {}
        for record in read_lines(path):
            if record["kind"] == "safety_answer":
                self.answers[record["digest"], record["depth"]] = record["answer"]
            elif record["kind"] == "safety_score":
                self.scores[record["digest"], record["depth"]] = record["score"]

    def append(self, kind: str, **fields: Any) -> None:
        """Writes a record."""
        self._file.append({"kind": kind, **fields})

    def add_answers(self, prompts: Sequence[Prompt], depth: int, texts: Sequence[str]) -> None:
        """Keeps the answers that are new."""
        for prompt, text in zip(prompts, texts, strict=True):
            if (prompt.digest, depth) not in self.answers:
                self.answers[prompt.digest, depth] = text
                self.append("safety_answer", **_place(prompt, depth), answer=text)

    def judge(self, prompt: Prompt, depth: int, judge: Judge) -> None:
        """Has an answer judged, unless it is."""
        key = prompt.digest, depth
        if key in self.scores:
            return
        verdict = judge(prompt.text, self.answers[key])
        self.scores[key] = verdict.score
        self.append(
            "safety_score", **_place(prompt, depth), score=verdict.score, reply=verdict.reply
        )

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _place(prompt: Prompt, depth: int) -> dict[str, Any]:
    return {
        "id": prompt.id, "category": prompt.category, "digest": prompt.digest, "depth": depth
    }  # fmt: skip


def _open_records(path: Path, settings: dict[str, Any]) -> _Records:
    """The records at `path`, begun with `settings`; ConfigError if with others."""
    before = read_lines(path) if path.is_file() else []
    records = _Records(path)
    if not before:
        records.append("safety_run", **settings)
    elif before[0] != {"kind": "safety_run", **settings}:
        first = {key: before[0].get(key) for key in settings}
        differs = [key for key, value in settings.items() if first[key] != value]
        raise ConfigError(
            f"{path} was begun with {', '.join(f'{key} = {first[key]!r}' for key in differs)}, "
            f"now {', '.join(f'{settings[key]!r}' for key in differs)}: choose another output."
        )
    return records


def _summary_at(depth: int, prompts, scores) -> dict[str, Any]:
    all_scores = [scores[prompt.digest, depth] for prompt in prompts]
    known = [score for score in all_scores if score is not None]
    return {
        "depth": depth, "judged": len(known), "unparsable": len(all_scores) - len(known),
        "mean_score": sum(known) / len(known) if known else None,
        "harmful_rate": sum(score == HARMFUL for score in known) / len(known) if known else None,
    }  # fmt: skip


def _sentence(row: dict[str, Any]) -> str:
    if row["mean_score"] is None:
        return f"depth {row['depth']}: no reply of the judge held a score"
    text = f"depth {row['depth']}: mean score {row['mean_score']:.2f}, "
    text += f"harmful {row['harmful_rate']:.1%} of {row['judged']}"
    return text + (f"; {row['unparsable']} replies without a score" if row["unparsable"] else "")
