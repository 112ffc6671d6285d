"""The curriculum as data: rows, batches and learning rate at any point of a stage.

Tokens are the clock. Rows of the stage consumed so far decide the batch of the next step and the
learning rate, so nothing depends on how a run was interrupted.
"""

import dataclasses
import math
import statistics
from collections import Counter
from functools import cached_property

from ouro_jax.config import GATE_OBJECTIVES, Config, ModelConfig, Stage
from ouro_jax.data.interleave import Interleave
from ouro_jax.data.splits import stable_hash
from ouro_jax.errors import ConfigError
from ouro_jax.model.flops import train_flops_per_token

# A microbatch of about 8K tokens per device keeps matrix products large and memory small.
MICROBATCH_TOKENS = 8192


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """A stage with its batches laid out: what happens at any row of it."""

    name: str
    stage: Stage

    @property
    def total_rows(self) -> int:
        """Rows of the stage; the last step may take it past `stage.tokens` by part of a batch."""
        rows = math.ceil(self.stage.tokens / self.stage.sequence_length)
        for start, end, batch in self._segments():
            if end is None or end >= rows:
                return start + math.ceil((rows - start) / batch) * batch
        raise AssertionError("the last segment has no end")

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the stage."""
        total = self.total_rows
        return sum(
            math.ceil(((total if end is None else min(end, total)) - start) / batch)
            for start, end, batch in self._segments()
            if start < total
        )

    def batch_rows(self, row: int) -> int:
        """Rows of the step that starts at `row`; 0 at the end of the stage."""
        if row >= self.total_rows:
            return 0
        for start, end, batch in self._segments():
            if start <= row and (end is None or row < end):
                return batch
        raise AssertionError("the last segment has no end")

    @cached_property
    def order(self) -> Interleave:
        """The order in which the stage's sources give its rows."""
        return Interleave(self.stage.mixture, self.stage.skip_rows)

    def learning_rate(self, row: int) -> float:
        """Learning rate of the step that ends at `row`."""
        stage, tokens = self.stage, row * self.stage.sequence_length
        peak, final = stage.learning_rate, stage.final_learning_rate
        if tokens < stage.warmup_tokens:
            return peak * tokens / stage.warmup_tokens
        if stage.schedule == "cosine":
            done = (tokens - stage.warmup_tokens) / (stage.tokens - stage.warmup_tokens)
            return final + (peak - final) * (1 + math.cos(math.pi * min(done, 1.0))) / 2
        if stage.decay_tokens and stage.schedule == "wsd":
            left = max(stage.tokens - tokens, 0) / stage.decay_tokens
            return final + (peak - final) * min(left, 1.0)
        return peak

    @property
    def depths(self) -> range:
        """Every number of loops that a step of this stage can have."""
        return range(self.stage.min_loops or self.stage.num_loops, self.stage.num_loops + 1)

    def num_loops(self, row: int) -> int:
        """The loops of the step that starts at `row`: by a hash, so all hosts draw the same."""
        return self.depths[stable_hash(f"{self.name}/{row}") % len(self.depths)]

    def flops_per_token(self, model: ModelConfig) -> int:
        """The model's work on one token of this stage, the mean over `depths`.

        A frozen model has no backward pass.
        """
        length = self.stage.sequence_length
        flops = round(statistics.mean(
            train_flops_per_token(dataclasses.replace(model, num_loops=loops), length)
            for loops in self.depths
        ))  # fmt: skip
        return flops // 3 if self.stage.objective in GATE_OBJECTIVES else flops

    def batch_sizes(self) -> list[int]:
        """Every number of rows a step of this stage can have."""
        tokens = [row[1] for row in self.stage.batch_ramp] + [self.stage.batch_tokens]
        return [count // self.stage.sequence_length for count in tokens]

    def _segments(self) -> list[tuple[int, int | None, int]]:
        """(first row, row after the last or None, rows per batch); steps never straddle two."""
        segments, start = [], 0
        length = self.stage.sequence_length
        for until_tokens, batch_tokens in self.stage.batch_ramp:
            batch = batch_tokens // length
            steps = math.ceil((until_tokens / length - start) / batch)
            end = start + max(0, steps) * batch
            segments.append((start, end, batch))
            start = end
        return [*segments, (start, None, self.stage.batch_tokens // length)]


def microbatch_rows(plan: StagePlan, shards: int, requested: int) -> int:
    """Rows of one microbatch over all devices: `requested` rows on each of `shards`, or chosen.

    Chosen: the largest number per device that divides every batch of the stage and holds at most
    8,192 tokens. Raises ConfigError where a batch of the stage does not divide.
    """
    key = f"stages.{plan.name}"
    for rows in plan.batch_sizes():
        if rows % shards:
            raise ConfigError(
                f"{key}.batch_tokens: a batch of {rows} rows of {plan.stage.sequence_length} "
                f"tokens does not divide over {shards} devices (mesh.slice × data × fsdp); make "
                f"it a multiple of {shards * plan.stage.sequence_length:,} tokens."
            )
        if requested and (rows // shards) % requested:
            raise ConfigError(
                f"layout.microbatch_rows = {requested} does not divide the {rows // shards} rows "
                f"per device of {key} ({rows} rows over {shards} devices); choose a divisor."
            )
    if requested:
        return requested * shards
    common = math.gcd(*(rows // shards for rows in plan.batch_sizes()))
    most = max(1, MICROBATCH_TOKENS // plan.stage.sequence_length)
    return shards * max(rows for rows in range(1, most + 1) if common % rows == 0)


def first_rows(config: Config, name: str) -> dict[str, int]:
    """The row of each source at which stage `name` goes on reading; 0 where it is not there.

    These are the rows that the earlier stages with rows of the same length drew, also those
    before `first_stage`: a run that begins with a later stage reads none of their rows again.
    """
    length, drawn = config.stages[name].sequence_length, Counter()
    for other, stage in config.earlier_stages(name):
        if stage.sequence_length == length:
            plan = StagePlan(other, stage)
            drawn.update(plan.order.drawn(plan.total_rows))
    return dict(drawn)
