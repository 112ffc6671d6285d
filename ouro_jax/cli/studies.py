"""The studies of `ouro experiment` that take trained checkpoints: what each needs and draws."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from ouro_jax.errors import ConfigError, require

PROMPT_TOKENS, PROMPTS = 64, 64
PAIRS = 1000


class Asked(NamedTuple):
    """What the flags say: checkpoints, where data lies ("" for the run's own), where to write.

    The judge of safety is a model at an OpenAI-compatible endpoint ("" for OpenAI's own), and
    `mode` says whether the model judged is a `base` or a `thinking` one.
    """

    checkpoints: Sequence[str]
    data: str
    workdir: Path
    judge: str = ""
    judge_url: str = ""
    mode: str = "base"

    def one(self) -> str:
        """The checkpoint, where a study takes a single one."""
        require(len(self.checkpoints) == 1, "--checkpoint", list(self.checkpoints), "one of them")
        return self.checkpoints[0]


def study(name: str, asked: Asked) -> Mapping[str, Any]:
    """Runs the study `name`; what is in its records is not computed again."""
    if not asked.checkpoints:
        raise ConfigError(f"experiment {name!r} needs --checkpoint, e.g. --checkpoint=runs/tiny")
    asked.workdir.mkdir(parents=True, exist_ok=True)
    files = STUDIES[name](asked)
    print(", ".join(map(str, files)))
    return {"workdir": str(asked.workdir), "files": [str(file) for file in files]}


def _depth(asked: Asked) -> list[Path]:
    from ouro_jax.experiments.depth import run_depth
    from ouro_jax.reporting.depth import draw_depth

    records, path, figure = [], asked.workdir / "depth.jsonl", asked.workdir / "depth.png"
    for name in asked.checkpoints:
        records += run_depth(_subject(name), _heldout(name, asked.data), path, progress=_say)
    draw_depth(records, figure)
    return [path, figure]


def _exits(asked: Asked) -> list[Path]:
    from ouro_jax.experiments.exits import run_exits
    from ouro_jax.reporting.exits import draw_calibration, draw_exits

    path = asked.workdir / "exits.jsonl"
    figures = [asked.workdir / "exits.png", asked.workdir / "calibration.png"]
    subjects = [_subject(name) for name in asked.checkpoints]
    heldout = _heldout(asked.checkpoints[-1], asked.data)
    records = run_exits(subjects, heldout, path, progress=_say)
    for draw, figure in zip((draw_exits, draw_calibration), figures, strict=True):
        draw(records, figure)
    return [path, *figures]


def _kv(asked: Asked) -> list[Path]:
    from ouro_jax.experiments.kv import run_kv
    from ouro_jax.experiments.scores import heldout_prompts
    from ouro_jax.reporting.kv import kv_table

    path, subject = asked.workdir / "kv.jsonl", _subject(asked.one())
    prompts = heldout_prompts(_heldout(asked.one(), asked.data), PROMPTS, PROMPT_TOKENS)
    records = run_kv(subject, prompts, path, exits=(None, "q:0.5"), progress=_say)
    Console().print(kv_table(records))
    return [path]


def _faithfulness(asked: Asked) -> list[Path]:
    from ouro_jax.data.tokenizer import load_tokenizer
    from ouro_jax.experiments.pairs import pair_questions, read_quora_pairs, template_pairs
    from ouro_jax.experiments.probes import run_faithfulness
    from ouro_jax.reporting.probes import draw_agreement, draw_probes

    path = asked.workdir / "faithfulness.jsonl"
    figures = [asked.workdir / "probes.png", asked.workdir / "agreement.png"]
    subject, tokenizer_file = _opened(asked.one())
    if asked.data:
        pairs, name = read_quora_pairs(asked.data, PAIRS), "Quora question pairs"
    else:
        pairs, name = template_pairs(), "template pairs"
    questions = pair_questions(load_tokenizer(tokenizer_file), pairs, name, balanced=True)
    records = run_faithfulness(subject, questions, path, progress=_say)
    draw_probes(records, figures[0])
    draw_agreement(records[0], figures[1])
    return [path, *figures]


def _scaling_law(asked: Asked) -> list[Path]:
    from ouro_jax.experiments.scaling_law import run_scaling_law
    from ouro_jax.reporting.scaling_law import draw_scaling_law

    path, figure = asked.workdir / "scaling_law.jsonl", asked.workdir / "scaling_law.png"
    run_scaling_law(asked.checkpoints, path, _say)
    draw_scaling_law(path, figure)
    return [path, figure]


def _safety(asked: Asked) -> list[Path]:
    from ouro_jax.data.tokenizer import load_tokenizer
    from ouro_jax.experiments.safety import load_prompts, run_safety
    from ouro_jax.experiments.safety_judge import OpenAIJudge
    from ouro_jax.reporting.safety import draw_safety

    prompts = load_prompts(asked.data or "HEx-PHI")
    require(bool(asked.judge), "--judge", asked.judge, "the judging model's name, e.g. gpt-4o")
    judge = OpenAIJudge(asked.judge, asked.judge_url or None)
    subject, tokenizer_file = _opened(asked.one())
    path, figure = asked.workdir / "safety.jsonl", asked.workdir / "safety.png"
    run_safety(
        subject.config, subject.params, load_tokenizer(tokenizer_file), prompts, judge, path,
        model_name=subject.name, mode=asked.mode, say=_say,
    )  # fmt: skip
    draw_safety([path], figure)
    return [path, figure]


STUDIES: dict[str, Callable[[Asked], list[Path]]] = {
    "depth": _depth, "exit": _exits, "kv": _kv, "faithfulness": _faithfulness,
    "safety": _safety, "scaling_law": _scaling_law,
}  # fmt: skip


def _say(line: str) -> None:
    Console(stderr=True).print(line, highlight=False, soft_wrap=True)


def _subject(name: str) -> Any:
    return _opened(name)[0]


def _opened(name: str) -> tuple[Any, Path]:
    """The checkpoint as a subject, and its tokenizer."""
    from ouro_jax.cli.open_checkpoint import open_checkpoint
    from ouro_jax.experiments.study import Subject

    checkpoint = open_checkpoint(name)
    if checkpoint.tokenizer_file is None:
        raise ConfigError(f"--checkpoint={name}: there is no tokenizer.json with it; add one.")
    return Subject(name, checkpoint.config, checkpoint.params), checkpoint.tokenizer_file


def _heldout(name: str, data: str) -> Any:
    """Held-out rows at the data root `data`, or of the run that the checkpoint is of."""
    from ouro_jax.config import from_config_dict
    from ouro_jax.experiments.scores import prepared_heldout
    from ouro_jax.training.trainer import prepare_data

    if data:
        return prepared_heldout(data)
    configs = [folder / "config.json" for folder in (Path(name), Path(name).parent)]
    found = next((file for file in configs if file.is_file()), None)
    if found is None:
        raise ConfigError(
            f"--checkpoint={name}: no config.json of a run there, so its held-out rows are not "
            "known; name a folder of prepared data with --data."
        )
    config = from_config_dict(json.loads(found.read_text()))
    length = config.stream()[-1][1].sequence_length
    return prepared_heldout(str(prepare_data(config)), length)
