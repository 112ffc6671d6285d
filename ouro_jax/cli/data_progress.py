"""What `ouro data prepare` and `clean` show while they work: how far, how fast, time left."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


@contextlib.contextmanager
def show_progress() -> Iterator[Callable[[Any], None]]:
    """Yields what `data.prepare.prepare` takes as `on_progress`; on stderr, in a terminal only."""
    columns = (
        BarColumn(20),
        DownloadColumn(binary_units=True),
        TextColumn("{task.fields[shards]}"),
        TextColumn("{task.fields[speed]}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None, shards="starting", speed="")

        def show(progress: Any) -> None:
            elapsed = bar.tasks[0].elapsed or 0
            speed = f"{progress.tokens / elapsed:,.0f} tokens/s" if elapsed else ""
            bar.update(
                task,
                total=progress.total_bytes,
                completed=progress.done_bytes,
                shards=f"shard {progress.done_parts:,} of {progress.num_parts:,}",
                speed=speed,
            )

        yield show


@contextlib.contextmanager
def show_steps() -> Iterator[Callable[[str, int, int], None]]:
    """Yields what `data.clean.clean` takes as `on_progress`; on stderr, in a terminal only."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(20),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks: dict[str, Any] = {}

        def show(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = bar.add_task(step, total=None)
            bar.update(tasks[step], completed=done, total=total or None)

        yield show
