"""Settings of a run beside its model and stages; `config.py` puts them together and checks them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class DataConfig:
    """Where prepared rows lie: `root/tokenizer.json`, `root/<source>/<split>-<length>/`.

    `embedded_bytes` > 0 prepares text found on any machine with Python under `root` first, at
    most so many bytes of each source; `task` makes the rows of a synthetic task instead, by its
    `name` and its settings (`data/tasks/`). `source_tokens` says how many tokens a source is
    expected to hold: the dry run reckons with it until the source is prepared. Of the rows that a
    run reads so many may be unreadable, and are skipped; one more ends the run.
    """

    root: str = "data"
    embedded_bytes: int = 0
    task: Mapping[str, Any] = field(default_factory=dict)
    source_tokens: Mapping[str, int] = field(default_factory=dict)
    max_bad_rows: int = 0


@dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; 0 means chosen, for each stage anew."""

    slice: int = 0
    data: int = 0
    fsdp: int = 0
    tensor: int = 0
    context: int = 0


@dataclass(frozen=True)
class LayoutConfig:
    """How a step is laid out on its mesh.

    `gather`: weights split over `fsdp` are gathered `once` before the loops and microbatches and
    gradients reduced once after them, or in `each_loop`. `remat`: what is recomputed.
    `microbatch_rows`: rows per device of a microbatch (0: chosen).
    """

    gather: str = "auto"
    remat: str = "auto"
    microbatch_rows: int = 0


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and clipping (paper, Table 1). The paper does not state `eps`: 1e-8 is optax's."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_norm: float = 1.0


@dataclass(frozen=True)
class CheckpointConfig:
    """Temporary checkpoints every so many minutes, of which the newest `keep` stay; permanent ones
    every so many tokens and at the end of a stage.

    They lie under `directory`, which may be a bucket (`gs://…`), or else in the workdir.
    """

    every_minutes: float = 15.0
    every_tokens: int = 100_000_000_000
    keep: int = 2
    directory: str = ""


@dataclass(frozen=True)
class GuardConfig:
    """What is done about bad steps and silent errors; a step that is not finite is never taken.

    A loss or gradient norm `spike_deviations` robust standard deviations above the median of the
    last 128 steps is a spike (0: nothing is), and not taken either. The rows of a refused step are
    skipped; after `patience` of them in a row the run goes back to its last checkpoint and skips
    all rows since; after `rollbacks` times without a new checkpoint it ends. Every so many steps
    (0: never) a step is computed twice and compared bit for bit.
    """

    spike_deviations: float = 0.0
    patience: int = 3
    rollbacks: int = 3
    repeat_every_steps: int = 0


@dataclass(frozen=True)
class DeadlineConfig:
    """Seconds that each phase of a run may take before the watchdog ends the process (0: any)."""

    start: float = 1800.0
    compile: float = 3600.0
    step: float = 600.0
    data: float = 600.0
    evaluation: float = 3600.0
    checkpoint: float = 1800.0


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out loss per source every so many tokens, read out after loops 1 … `num_loops`.

    `ngram_baselines` fits unigram and bigram models on all that the run saw: for small runs.
    """

    every_tokens: int = 1_000_000_000
    rows_per_source: int = 512
    num_loops: int = 8
    ngram_baselines: bool = False


@dataclass(frozen=True)
class LoggingConfig:
    """A training record every so many steps; Weights & Biases only if a project is named."""

    every_steps: int = 10
    tensorboard: bool = True
    wandb_project: str = ""


@dataclass(frozen=True)
class ProfileConfig:
    """A profiler trace of `num_steps` steps from step `start_step` of the run on (0: none).

    `num_steps` also is the length of a trace asked for by the file `WORKDIR/profile_now`.
    """

    start_step: int = 0
    num_steps: int = 3
