"""What `ouro data` shows while it works: how far, how fast, how long still."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

Show = Callable[..., None]


@contextlib.contextmanager
def show_progress() -> Iterator[Show]:
    """Yields `show(step, done_bytes, total_bytes, note="")`, a bar for every step, on stderr."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(12),
        DownloadColumn(binary_units=True),
        TextColumn("{task.fields[note]}"),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def show(step: str, done: int, total: int, note: str = "") -> None:
            if step not in tasks:
                tasks[step] = bars.add_task(step, total=None, note="")
            bars.update(tasks[step], completed=done, total=total or None, note=note)

        yield show


def preparation_note(show: Show) -> Callable[[Any], None]:
    """What `data.prepare.prepare` takes as `on_progress`: shards and tokens a second, by `show`."""
    start = time.monotonic()

    def on_progress(progress: Any) -> None:
        speed = progress.tokens / max(time.monotonic() - start, 1e-3)
        note = f"{progress.done_parts:,}/{progress.num_parts:,} shards, {speed / 1e6:.2f}M tokens/s"
        show("preparing", progress.done_bytes, progress.total_bytes, note)

    return on_progress
