"""What a run would do, from its config alone: the tables of `ouro train --dry_run`.

Nothing here imports jax or reads rows: of prepared data only the manifests are opened, and where
there are none the tables say so.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from etils import epath

from ouro_jax.config import Config, num_parameters
from ouro_jax.data.rows import MANIFEST, read_manifest
from ouro_jax.training.curriculum import StagePlan, first_rows


@dataclass(frozen=True)
class Contribution:
    """What one source gives to a stage: rows, and tokens as rows × row length, padding included.

    `tokens_available` is what its rows of this length hold by the manifest, else what the config
    expects of it, else None. `epochs` is how often they have been read by the end of the stage,
    earlier stages with rows of this length included.
    """

    source: str
    share: float
    rows: int
    tokens: int
    tokens_available: int | None
    epochs: float | None


def contributions(config: Config, name: str) -> list[Contribution]:
    """What each source contributes to stage `name`, in the order of its mixture."""
    plan = StagePlan(name, config.stages[name])
    length, before = plan.stage.sequence_length, first_rows(config, name)
    given, drawn = plan.order.given(plan.total_rows), plan.order.drawn(plan.total_rows)
    found = []
    for source, rows in given.items():
        available = tokens_available(config, source, length)
        behind = (before.get(source, 0) + drawn[source]) * length
        epochs = behind / available if available else None
        share = plan.stage.mixture[source]
        found.append(Contribution(source, share, rows, rows * length, available, epochs))
    return found


def tokens_available(config: Config, source: str, sequence_length: int) -> int | None:
    """Tokens in a source's prepared rows of this length, else as the config expects, else None."""
    directory = epath.Path(config.data.root) / source / f"train-{sequence_length}"
    if (directory / MANIFEST).is_file():
        return read_manifest(directory).rows * sequence_length
    return config.data.source_tokens.get(source)


def describe(config: Config) -> list[dict[str, Any]]:
    """One entry per stage: what it trains, on how much, at which cost."""
    table = []
    for name, stage in config.stream():
        plan, model = StagePlan(name, stage), config.stage_model(name)
        tokens = plan.total_rows * stage.sequence_length
        flops = plan.flops_per_token(model)
        table.append(
            {
                "stage": name,
                "tokens": tokens,
                "steps": plan.num_steps,
                "sequence_length": stage.sequence_length,
                "batch_tokens": [rows * stage.sequence_length for rows in plan.batch_sizes()],
                "layers": stage.num_layers,
                "loops": stage.num_loops,
                "rope_theta": stage.rope_theta,
                "entropy_weight": stage.entropy_weight,
                "warmup_tokens": stage.warmup_tokens,
                "schedule": stage.schedule,
                "learning_rate": stage.learning_rate,
                "final_learning_rate": plan.learning_rate(plan.total_rows),
                "objective": stage.objective,
                "transition": stage.transition,
                "max_epochs": stage.max_epochs,
                "sources": [asdict(part) for part in contributions(config, name)],
                "parameters": num_parameters(model),
                "flops": tokens * flops,
                "checkpoints": max(1, math.ceil(tokens / config.checkpoint.every_tokens)),
            }
        )
    return table
