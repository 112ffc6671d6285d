"""What a run shows while it trains: a live panel on a terminal, plain lines elsewhere."""

import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

LINE_SECONDS = 10.0
# Weight of the newest step in the shown speed: about the last ten steps count.
SMOOTHING = 0.1


class Progress:
    """Shows the stage, tokens, speed, MFU, memory, time left, loss per loop and depth.

    Use as a context manager. On a terminal a panel is redrawn in place; when the output goes to a
    file or pipe, a line is printed at the start and end of a stage and at most every ten seconds
    between. With `enabled` False (processes 1, …) it shows nothing.
    """

    def __init__(self, *, enabled: bool = True, console: Console | None = None):
        self._console = console or Console()
        self._enabled = enabled
        self._live: Live | None = None
        self._stage: _StageProgress | None = None
        self._last_line = -LINE_SECONDS
        self._saved_at: float | None = None

    def __enter__(self) -> "Progress":
        if self._enabled and self._console.is_terminal:
            live = Live(console=self._console, refresh_per_second=4, transient=True)
            live.start()
            self._live = live
        return self

    def __exit__(self, *_) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def start_stage(
        self, name: str, total_tokens: int, *, done_tokens: int = 0, tokens_after: int = 0
    ) -> None:
        """Begins a stage of `total_tokens`, of which `done_tokens` are done already.

        `tokens_after` is what later stages will train: with it the whole run's time left is shown.
        """
        self._stage = _StageProgress(name, total_tokens, done_tokens, tokens_after)
        self._last_line = time.monotonic()
        done = f", {done_tokens:,} of them done" if done_tokens else ""
        self.message(f"{name}: {total_tokens:,} tokens{done}.")

    def update(self, record: dict[str, Any]) -> None:
        """Shows a `train` record of the stage."""
        stage = self._started()
        stage.update(record)
        if self._live is not None:
            self._live.update(stage.panel(min(88, self._console.width), self._age()))
        elif time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            age = self._age()
            self.message(stage.line() + (f"  saved {age} ago" if age else ""))

    def message(self, text: str) -> None:
        """Prints a line that stays, above the panel if there is one."""
        if self._enabled:
            self._console.print(Text(text), soft_wrap=True)

    def saved(self) -> None:
        """A checkpoint is whole: its age is shown from now on."""
        self._saved_at = time.monotonic()

    def _age(self) -> str:
        return "" if self._saved_at is None else clock(time.monotonic() - self._saved_at)

    def finish_stage(self) -> None:
        """Ends the stage with a line of where it arrived."""
        self.message(self._started().summary())
        if self._live is not None:
            self._live.update("")
        self._stage = None

    def _started(self) -> "_StageProgress":
        assert self._stage is not None, "start_stage comes first"
        return self._stage


class _StageProgress:
    """Where a stage stands, and how to say so."""

    def __init__(self, name: str, total_tokens: int, done_tokens: int, tokens_after: int):
        self.name, self.total, self.done, self.after = name, total_tokens, done_tokens, tokens_after
        self.speed: float | None = None
        # The newest record, and the newest that knows its speed.
        self.record: dict[str, Any] = {}
        self.timed: dict[str, Any] = {}
        self.started = time.monotonic()

    def update(self, record: dict[str, Any]) -> None:
        self.record = record
        self.done = min(self.done + record["batch_tokens"], self.total)
        speed = record["tokens_per_second"]
        if speed:
            before = self.speed or speed
            self.speed = before + SMOOTHING * (speed - before)
            self.timed = record

    def times_left(self) -> str:
        """Time left in the stage and the run, at the speed of now; later stages may differ."""
        if self.speed is None:
            return "time left unknown yet"
        here = (self.total - self.done) / self.speed
        left = f"{clock(here)} left"
        if not self.after:
            return left
        return f"{left}, {clock(here + self.after / self.speed)} with the later stages"

    def line(self) -> str:
        record = self.record
        share = 100 * self.done / self.total
        return (
            f"{self.name} {share:5.1f} %  step {record['step']:,}  "
            f"{self.done:,}/{self.total:,} tokens  {self._speed()}  {self.times_left()}  "
            f"loss {_number(record['loss'])}  per loop {_numbers(record['loss_per_loop'])}  "
            f"depth {_number(record['mean_depth'], 2)}"
        )

    def summary(self) -> str:
        took = clock(time.monotonic() - self.started)
        if not self.record:
            return f"{self.name}: finished."
        return (
            f"{self.name}: finished after {self.done:,} tokens in {took}; loss per loop "
            f"{_numbers(self.record['loss_per_loop'])}, mean depth "
            f"{_number(self.record['mean_depth'], 2)} of {len(self.record['loss_per_loop'])}."
        )

    def panel(self, width: int, checkpoint_age: str) -> Panel:
        record = self.record
        head = Table.grid(expand=True, padding=(0, 2))
        head.add_column(ratio=1)
        head.add_column(justify="right")
        bar = ProgressBar(total=self.total, completed=self.done, complete_style="cyan")
        head.add_row(bar, Text(f"{100 * self.done / self.total:.1f} %", style="bold"))
        facts = Table.grid(padding=(0, 2))
        facts.add_column(style="dim", justify="right")
        facts.add_column()
        facts.add_row("tokens", f"{self.done:,} of {self.total:,}, {self._speed()}")
        facts.add_row("time", self.times_left())
        if record["hbm_bytes_limit"]:
            facts.add_row("memory", _memory(record))
        facts.add_row("loss", f"{_number(record['loss'])} at step {record['step']:,}")
        facts.add_row("per loop", _numbers(record["loss_per_loop"]))
        facts.add_row("depth", self._depth())
        if checkpoint_age:
            facts.add_row("saved", f"{checkpoint_age} ago")
        return Panel(
            Group(head, facts), title=f"[bold]{self.name}[/]", title_align="left",
            border_style="cyan", width=width,
        )  # fmt: skip

    def _depth(self) -> Text:
        """Mean depth, and the exit distribution as one bar a loop."""
        shares = self.record["exit_distribution"]
        text = Text(f"{_number(self.record['mean_depth'], 2)} of {len(shares)}  ")
        for share in shares:
            text.append("▁▂▃▄▅▆▇█"[min(int((share or 0) * 8), 7)], style="cyan")
        return text

    def _speed(self) -> str:
        record = self.timed
        if self.speed is None:
            return "speed unknown yet"
        smoothed = self.speed / record["tokens_per_second"]
        each = record["tokens_per_second_per_device"] * smoothed
        share = f"{record['mfu'] * smoothed:.1f} % "
        share += "MFU" if record["mfu_peak"].endswith("data sheet") else "of a measured matmul"
        return f"{self.speed:,.0f} tokens/s, {each:,.0f} per device ({share})"


def clock(seconds: float) -> str:
    """`4:05`, `2:04:05`, `3 d 2 h`: a duration at the precision one reads it with."""
    whole = int(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def _memory(record: dict[str, Any]) -> str:
    used, peak, limit = (
        record[f"hbm_bytes_{name}"] / 2**30 for name in ("in_use", "peak", "limit")
    )
    return f"{used:.1f} GiB of {limit:.1f} in use, {peak:.1f} at most"


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _numbers(values: list[float | None]) -> str:
    return " ".join(_number(value) for value in values)
