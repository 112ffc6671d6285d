"""Shows, verifies and prunes the checkpoints of a run.

  ouro checkpoint list runs/tiny
  ouro checkpoint verify runs/tiny
  ouro checkpoint verify runs/tiny/stable_1a/2000
  ouro checkpoint prune runs/tiny --keep=1 --dry_run

`verify` reads every file, names all that are not as they were written, and leaves with 1 if there
is one. `prune` deletes the temporary checkpoints of each stage but the newest; permanent ones are
never deleted, nor those that were not finished. Where a workdir's config says that checkpoints lie
elsewhere, it is there that they are looked for; that folder can be named itself, too.
"""

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags
from etils import epath
from rich import box
from rich.console import Console
from rich.table import Table

from ouro_jax.cli.common import FLAGS, run_verb
from ouro_jax.cli.data_progress import show_progress
from ouro_jax.errors import ConfigError, RunError, require_choice
from ouro_jax.training.checkpoint_files import (
    CheckpointFile,
    absolute,
    checkpoint_root,
    checkpoints_at,
    delete,
    list_set_aside,
    problems_of,
    prunable,
)
from ouro_jax.training.progress import clock

flags.DEFINE_integer("keep", None, "Of each stage, how many temporary checkpoints stay.")
flags.DEFINE_bool("dry_run", False, "Say what would be deleted, and leave.")


def main(action: str = "", directory: str = "") -> Mapping[str, Any]:
    """The verb: `action`, and the workdir, the folder of a stage or that of a checkpoint."""
    require_choice(action, ACTIONS, "ouro checkpoint")
    if not directory:
        raise ConfigError(f"name the workdir: ouro checkpoint {action} runs/tiny")
    return ACTIONS[action](absolute(directory))


def _list(directory: epath.Path) -> Mapping[str, Any]:
    checkpoints = checkpoints_at(directory)
    set_aside = list_set_aside(checkpoint_root(directory))
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, collapse_padding=True)
    for name in ("stage", "step", "tokens", "GB", "saved", "kind", "state"):
        table.add_column(name, justify="right" if name in ("step", "tokens", "GB") else "left")
    for checkpoint in checkpoints:
        table.add_row(*_row(checkpoint, "finished" if checkpoint.is_finished else "not finished"))
    for checkpoint in set_aside:
        table.add_row(*_row(checkpoint, "set aside"), style="dim")
    Console().print(table)
    return {
        "directory": str(directory),
        "checkpoints": [_described(checkpoint) for checkpoint in checkpoints],
        "set_aside": [_described(checkpoint) for checkpoint in set_aside],
    }


def _row(checkpoint: CheckpointFile, state: str) -> list[str]:
    tokens = checkpoint.meta.get("tokens_seen")
    return [
        checkpoint.stage, f"{checkpoint.step:,}", "–" if tokens is None else f"{tokens:,}",
        f"{checkpoint.bytes / 1e9:,.3f}", f"{clock(time.time() - checkpoint.saved_at)} ago",
        "permanent" if checkpoint.is_permanent else "temporary", state,
    ]  # fmt: skip


def _described(checkpoint: CheckpointFile) -> Mapping[str, Any]:
    return {
        "stage": checkpoint.stage, "step": checkpoint.step, "path": str(checkpoint.path),
        "tokens": checkpoint.meta.get("tokens_seen"), "bytes": checkpoint.bytes,
        "saved_at": checkpoint.saved_at, "permanent": checkpoint.is_permanent,
        "finished": checkpoint.is_finished,
    }  # fmt: skip


def _verify(directory: epath.Path) -> Mapping[str, Any]:
    checkpoints = checkpoints_at(directory)
    total, done, lock = sum(checkpoint.bytes for checkpoint in checkpoints), 0, threading.Lock()
    with show_progress() as show:

        def advance(num_bytes: int) -> None:
            nonlocal done
            with lock:
                done += num_bytes
                show("verifying", done, total)

        problems = {
            str(checkpoint.path): problems_of(checkpoint.path, advance=advance)
            for checkpoint in checkpoints
        }
    broken = {path: found for path, found in problems.items() if found}
    summary = {"directory": str(directory), "checkpoints": list(problems), "problems": broken}
    if not broken:
        print(f"checkpoints: {len(problems)}, {total / 1e9:,.3f} GB; all files are as written")
        return summary
    if FLAGS.json:
        print(json.dumps(summary))
    lines = [problem for found in broken.values() for problem in found]
    raise RunError(
        f"checkpoints that are not whole: {len(broken)} of {len(problems)}; what is wrong:\n  "
        + "\n  ".join(lines)
    )


def _prune(directory: epath.Path) -> Mapping[str, Any]:
    if FLAGS.keep is None:
        raise ConfigError("--keep is missing: e.g. --keep=2")
    gone = prunable(checkpoints_at(directory), FLAGS.keep)
    if not FLAGS.dry_run:
        delete(gone)
    for checkpoint in gone:
        print(checkpoint.path)
    did = "would be deleted" if FLAGS.dry_run else "deleted"
    print(f"checkpoints {did}: {len(gone)}, {_bytes(gone) / 1e9:,.3f} GB")
    return {"deleted": [str(checkpoint.path) for checkpoint in gone], "bytes": _bytes(gone),
            "dry_run": FLAGS.dry_run}  # fmt: skip


def _bytes(checkpoints: Sequence[CheckpointFile]) -> int:
    return sum(checkpoint.bytes for checkpoint in checkpoints)


ACTIONS: Mapping[str, Callable[[epath.Path], Mapping[str, Any]]] = {
    "list": _list,
    "verify": _verify,
    "prune": _prune,
}


def run() -> None:
    """Parses flags and runs the verb."""
    run_verb(main, __name__, max_words=2)


if __name__ == "__main__":
    run()
