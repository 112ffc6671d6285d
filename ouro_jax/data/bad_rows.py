"""Unreadable rows: what one is, and how many of them a run may skip."""

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ouro_jax.errors import ConfigError


class UnreadableRow(ConfigError):
    """Record `record` of a shard (its path) of a source cannot be read, and the `reason`."""

    def __init__(self, source: str, shard: str, record: int, reason: str):
        # All four as `args`: an exception is pickled by them on its way between processes.
        super().__init__(source, shard, record, reason)
        self.source, self.shard, self.record, self.reason = source, shard, record, reason

    @property
    def directory(self) -> str:
        """The folder of prepared rows that the shard lies in."""
        return self.shard.rpartition("/")[0]

    def __str__(self) -> str:
        return (
            f"{self.shard}, record {self.record}: cannot be read ({self.reason}). "
            f"Run `ouro data verify {self.directory}`."
        )


class BadRows:
    """Counts the unreadable rows that were skipped, each record once however often it is met.

    `tell` hears of every such record once, from the thread that read it and some steps before
    the row's turn: {"source", "shard", "record", "reason"}. `known` are such records that were told
    of before. A process counts what it reads itself.
    """

    def __init__(
        self, limit: int, tell: Callable[[dict[str, Any]], None],
        known: Iterable[Mapping[str, Any]] = (),
    ):  # fmt: skip
        self._limit, self._tell = limit, tell
        self._seen = {(row["source"], row["shard"], row["record"]) for row in known}
        self._lock = threading.Lock()

    def skip(self, row: UnreadableRow) -> None:
        """Counts `row` and tells of it; ConfigError if that makes more than the limit."""
        record = row.source, row.shard, row.record
        with self._lock:
            if record not in self._seen:
                self._seen.add(record)
                self._tell(
                    {
                        "source": row.source,
                        "shard": row.shard,
                        "record": row.record,
                        "reason": row.reason,
                    }
                )
            count = len(self._seen)
        if count > self._limit:
            raise ConfigError(
                f"{row.shard}, record {row.record}: cannot be read ({row.reason}). Unreadable rows "
                f"so far: {count}, data.max_bad_rows = {self._limit}. Run `ouro data verify "
                f"{row.directory}`; copy or prepare anew what is damaged, or raise the limit."
            ) from row
