"""What a run is: frozen dataclasses, validated when built, read from `ml_collections`.

A config file builds a `Config` and returns `to_config_dict(config)`; the command line overrides
keys of that dictionary; `from_config_dict` makes it a `Config` again. Everything that can be
checked without data or devices is checked here, so a wrong config fails in the first second.
The settings of a run that are neither model nor stage are described in `settings.py`.
"""

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_collections

from ouro_jax.errors import ConfigError, nearest, require, require_choice
from ouro_jax.settings import (
    CheckpointConfig,
    DataConfig,
    DeadlineConfig,
    EvaluationConfig,
    GuardConfig,
    LayoutConfig,
    LoggingConfig,
    MeshConfig,
    OptimizerConfig,
    ProfileConfig,
)

STAGE_ORDER = (
    "stable_1a",
    "stable_1b",
    "anneal",
    "long_context",
    "mid_training",
    "sft",
    "gate",
)
SCHEDULES = ("constant", "cosine", "wsd")
OBJECTIVES = ("expected", "last_loop", "gate", "gate_lookahead")
GATE_OBJECTIVES = ("gate", "gate_lookahead")  # they train the exit gate alone
TRANSITIONS = ("none", "upcycle_stacked", "upcycle_interleaved")
# What the backward pass recomputes; `_dots` keeps the results of the matrix products.
REMAT_POLICIES = ("auto", "none", "layer", "layer_dots", "loop_and_layer", "loop_and_layer_dots")
GATHERS = ("auto", "once", "each_loop")
DTYPES = ("float32", "bfloat16")
MESH_AXES = ("slice", "data", "fsdp", "tensor", "context")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a LoopLM, in Hugging Face's words where they have one.

    `dtype` is the compute dtype; parameters keep the dtype they were made or loaded in. The
    embedding has its own initial scale: the sandwich norms add vectors of unit rms to it, so in a
    small, short run 0.02 drowns the token (tests and the tiny config use 1).
    `carried` holds the fields of a loaded `config.json` as they were, those that change nothing
    here included; `save_huggingface` writes them back.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_loops: int = 4
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    initializer_range: float = 0.02
    embedding_initializer_range: float = 0.02
    max_position_embeddings: int = 65_536
    dtype: str = "bfloat16"
    carried: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            if f.type is int:
                value = getattr(self, f.name)
                require(value >= 1, f"model.{f.name}", value, "at least 1")
        require(
            self.num_heads % self.num_kv_heads == 0, "model.num_kv_heads", self.num_kv_heads,
            f"a divisor of model.num_heads = {self.num_heads}",
        )  # fmt: skip
        require(
            self.head_dim % 2 == 0, "model.head_dim", self.head_dim, "an even number (RoPE pairs)"
        )
        require(self.rope_theta > 0, "model.rope_theta", self.rope_theta, "a positive number")
        require(self.norm_eps > 0, "model.norm_eps", self.norm_eps, "a positive number")
        require_choice(self.dtype, DTYPES, "model.dtype")


def num_parameters(config: ModelConfig) -> int:
    """Parameters of the model, embedding, head and gate included (1,434,652,673 for Ouro 1.4B)."""
    attention = config.hidden_size * config.head_dim * 2 * (config.num_heads + config.num_kv_heads)
    mlp = 3 * config.hidden_size * config.intermediate_size
    layer = attention + mlp + 4 * config.hidden_size
    embedding_and_head = 2 * config.vocab_size * config.hidden_size
    gate = config.hidden_size + 1
    return config.num_layers * layer + embedding_and_head + config.hidden_size + gate


@dataclass(frozen=True)
class Stage:
    """One stage of the curriculum (paper, Table 1). Tokens are the clock of everything in it.

    `batch_ramp` is a table of (until this many tokens of the stage, tokens per batch); after its
    last row `batch_tokens` holds. `learning_rate` is reached after `warmup_tokens`; `cosine` then
    falls to `final_learning_rate` at the end of the stage, `wsd` stays and falls linearly over
    the last `decay_tokens`. `prior` is `uniform` or `geometric:λ`. `transition` says how the
    parameters of the stage before become this one's.

    Every step runs `num_loops` loops or, with `min_loops`, a number of them drawn from `min_loops`
    to `num_loops`, evenly: a model so trained can be looped further than others (not in the paper).

    `mixture` maps a source to its share of rows. Each source goes on where the earlier stages
    with rows of this length left it, and when it has run out starts again in another order; a
    stage whose sources would be read more than `max_epochs` times by its end is refused (0: no
    limit). `skip_rows` are spans [start, stop) of the stage's rows that are never trained on:
    they do not count, so the stage is as long as without them.
    """

    tokens: int
    sequence_length: int
    batch_tokens: int
    num_layers: int
    num_loops: int
    mixture: Mapping[str, float]
    learning_rate: float
    rope_theta: float = 10_000.0
    entropy_weight: float = 0.05
    final_learning_rate: float = 0.0
    schedule: str = "constant"
    warmup_tokens: int = 0
    decay_tokens: int = 0
    batch_ramp: tuple[tuple[int, int], ...] = ()
    weight_decay: float = 0.1
    objective: str = "expected"
    prior: str = "uniform"
    transition: str = "none"
    reset_optimizer: bool = False
    min_loops: int = 0
    max_epochs: float = 0.0
    skip_rows: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Config:
    """One run: a linear stream of stages in one workdir, and all it needs.

    `first_stage` skips the stages before it; their rows count as read. `init_from` names a stage
    of another run (`WORKDIR/stable_1a`) or a folder in the Hugging Face format to take parameters
    from.
    """

    name: str
    model: ModelConfig
    stages: Mapping[str, Stage]
    seed: int = 0
    first_stage: str = ""
    init_from: str = ""
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    layout: LayoutConfig = LayoutConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    deadlines: DeadlineConfig = DeadlineConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()
    profile: ProfileConfig = ProfileConfig()

    def __post_init__(self) -> None:
        require(bool(self.stages), "stages", {}, "at least one stage")
        for name, stage in self.stages.items():
            require_choice(name, STAGE_ORDER, "stages: name of a stage")
            _validate_stage(f"stages.{name}", stage)
        if self.first_stage:
            require_choice(self.first_stage, self.stages, "first_stage")
        _validate_transitions(self)
        for axis in MESH_AXES:
            require(
                getattr(self.mesh, axis) >= 0, f"mesh.{axis}", getattr(self.mesh, axis), "0 or more"
            )
        require_choice(self.layout.remat, REMAT_POLICIES, "layout.remat")
        require_choice(self.layout.gather, GATHERS, "layout.gather")
        for key, value in (
            ("checkpoint.every_tokens", self.checkpoint.every_tokens),
            ("checkpoint.keep", self.checkpoint.keep),
            ("evaluation.every_tokens", self.evaluation.every_tokens),
            ("evaluation.rows_per_source", self.evaluation.rows_per_source),
            ("evaluation.num_loops", self.evaluation.num_loops),
            ("logging.every_steps", self.logging.every_steps),
            ("profile.num_steps", self.profile.num_steps),
            ("guard.patience", self.guard.patience),
        ):
            require(value >= 1, key, value, "at least 1")
        for source, tokens in self.data.source_tokens.items():
            require(tokens >= 1, f"data.source_tokens.{source}", tokens, "at least 1")
        for key, value, zero in (
            ("layout.microbatch_rows", self.layout.microbatch_rows, "chosen"),
            ("profile.start_step", self.profile.start_step, "no trace"),
            ("checkpoint.every_minutes", self.checkpoint.every_minutes, "none by time"),
            ("data.max_bad_rows", self.data.max_bad_rows, "none"),
            *((f"guard.{f}", v, "none") for f, v in dataclasses.asdict(self.guard).items()),
            *((f"deadlines.{f}", v, "none") for f, v in dataclasses.asdict(self.deadlines).items()),
        ):
            require(value >= 0, key, value, f"0 ({zero}) or more")
        for key in ("clip_norm", "eps"):
            value = getattr(self.optimizer, key)
            require(value > 0, f"optimizer.{key}", value, "more than 0")
        for key in ("beta1", "beta2"):
            value = getattr(self.optimizer, key)
            require(0 <= value < 1, f"optimizer.{key}", value, "at least 0 and below 1")

    def stream(self) -> list[tuple[str, Stage]]:
        """The stages of this run in the order of the paper, from `first_stage` on."""
        names = [name for name in STAGE_ORDER if name in self.stages]
        start = names.index(self.first_stage) if self.first_stage else 0
        return [(name, self.stages[name]) for name in names[start:]]

    def earlier_stages(self, name: str) -> list[tuple[str, Stage]]:
        """The stages before stage `name` in the order of the paper, also before `first_stage`."""
        before = STAGE_ORDER[: STAGE_ORDER.index(name)]
        return [(other, self.stages[other]) for other in before if other in self.stages]

    def stage_model(self, name: str) -> ModelConfig:
        """The model's own config as of a stage: its layers, loops, RoPE base and longest row."""
        stream = self.stream()
        past = stream[: [other for other, _ in stream].index(name) + 1]
        stage = self.stages[name]
        return dataclasses.replace(
            self.model,
            num_layers=stage.num_layers,
            num_loops=stage.num_loops,
            rope_theta=stage.rope_theta,
            max_position_embeddings=max(earlier.sequence_length for _, earlier in past),
        )


def parse_prior(prior: str, key: str = "prior") -> float | None:
    """`uniform` → None, `geometric:0.3` → 0.3; ConfigError naming `key` for anything else."""
    if prior == "uniform":
        return None
    kind, _, value = prior.partition(":")
    try:
        parameter = float(value)
    except ValueError:
        parameter = -1.0
    require(
        kind == "geometric" and 0 < parameter < 1, key, prior, "uniform or geometric:λ, 0 < λ < 1"
    )
    return parameter


def _validate_stage(key: str, stage: Stage) -> None:
    for name in ("tokens", "sequence_length", "batch_tokens", "num_layers", "num_loops"):
        require(getattr(stage, name) >= 1, f"{key}.{name}", getattr(stage, name), "at least 1")
    require(stage.learning_rate > 0, f"{key}.learning_rate", stage.learning_rate, "more than 0")
    require(stage.rope_theta > 0, f"{key}.rope_theta", stage.rope_theta, "more than 0")
    for name in ("entropy_weight", "final_learning_rate", "weight_decay", "warmup_tokens",
                 "decay_tokens", "max_epochs"):  # fmt: skip
        require(getattr(stage, name) >= 0, f"{key}.{name}", getattr(stage, name), "0 or more")
    require(
        0 <= stage.min_loops <= stage.num_loops, f"{key}.min_loops", stage.min_loops,
        f"0 (no fewer than num_loops) to {key}.num_loops = {stage.num_loops}",
    )  # fmt: skip
    require(
        stage.warmup_tokens < stage.tokens
        and stage.warmup_tokens + stage.decay_tokens <= stage.tokens, f"{key}.warmup_tokens",
        stage.warmup_tokens, f"warm-up and decay within the stage's {stage.tokens:,} tokens",
    )  # fmt: skip
    require_choice(stage.schedule, SCHEDULES, f"{key}.schedule")
    require_choice(stage.objective, OBJECTIVES, f"{key}.objective")
    require_choice(stage.transition, TRANSITIONS, f"{key}.transition")
    parse_prior(stage.prior, f"{key}.prior")
    _validate_batches(key, stage)
    _validate_skips(f"{key}.skip_rows", stage.skip_rows)
    _validate_mixture(f"{key}.mixture", stage.mixture)


def _validate_batches(key: str, stage: Stage) -> None:
    until = 0
    for row in stage.batch_ramp:
        require(
            len(row) == 2 and row[0] > until and row[1] > 0, f"{key}.batch_ramp", stage.batch_ramp,
            "rows (until tokens, batch tokens) with rising first numbers",
        )  # fmt: skip
        until = row[0]
    for name, batch_tokens in (
        *((f"{key}.batch_ramp", row[1]) for row in stage.batch_ramp),
        (f"{key}.batch_tokens", stage.batch_tokens),
    ):
        require(
            batch_tokens % stage.sequence_length == 0, name, batch_tokens,
            f"a multiple of {key}.sequence_length = {stage.sequence_length:,}",
        )  # fmt: skip


def _validate_skips(key: str, spans: tuple[tuple[int, int], ...]) -> None:
    end = 0
    for span in spans:
        require(
            len(span) == 2 and end <= span[0] < span[1], key, spans,
            "spans (start, stop) of rows, start < stop, sorted and disjoint",
        )  # fmt: skip
        end = span[1]


def _validate_mixture(key: str, mixture: Mapping[str, float]) -> None:
    require(bool(mixture), key, dict(mixture), "at least one source")
    for source, weight in mixture.items():
        require(weight >= 0, f"{key}.{source}", weight, "a share of 0 or more")
    total = sum(mixture.values())
    require(
        abs(total - 1) <= 1e-6, key, dict(mixture),
        f"shares that sum to one; these sum to {total:.6g}",
    )  # fmt: skip


def _validate_transitions(config: Config) -> None:
    stream = config.stream()
    before = None
    for name, stage in stream:
        key = f"stages.{name}"
        if before is None:
            starts_from_nothing = not config.init_from
            require(
                stage.transition == "none" or not starts_from_nothing, f"{key}.transition",
                stage.transition, "none: the run starts here and init_from is not set",
            )  # fmt: skip
        else:
            check_transition(stage.transition, before.num_layers, stage.num_layers, key)
        before = stage


def check_transition(transition: str, layers_before: int, layers: int, key: str) -> None:
    """Raises a ConfigError if `layers_before` layers cannot become `layers` by `transition`."""
    if transition == "none":
        require(
            layers == layers_before, f"{key}.num_layers", layers,
            f"{layers_before}, as in the stage before, or transition = 'upcycle_stacked'",
        )  # fmt: skip
    else:
        require(
            layers > layers_before and layers % layers_before == 0, f"{key}.num_layers", layers,
            f"a multiple of the {layers_before} layers of the stage before ({transition})",
        )  # fmt: skip


def to_config_dict(config: Config) -> ml_collections.ConfigDict:
    """The `ml_collections` form of a config, as config files return it."""
    return _unsorted(to_dict(config))


def _unsorted(tree: Mapping[str, Any]) -> ml_collections.ConfigDict:
    # A ConfigDict sorts the keys of the dictionaries inside it, whatever it is told about its own.
    items = {k: _unsorted(v) if isinstance(v, Mapping) else v for k, v in tree.items()}
    return ml_collections.ConfigDict(items, sort_keys=False)


def to_dict(value: Any) -> Any:
    """Dataclasses as plain dictionaries, in the order of their fields."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_dict(item) for key, item in value.items()}
    return value


def from_config_dict(tree: ml_collections.ConfigDict | Mapping[str, Any]) -> Config:
    """Reads a `Config` back; unknown keys and wrong types are ConfigErrors that name the key."""
    return _read(Config, dict(tree), "")


def _read(kind: Any, value: Any, key: str) -> Any:
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, value, key)
    if origin is Mapping:
        require(isinstance(value, Mapping | ml_collections.ConfigDict), key, value, "a dictionary")
        item = typing.get_args(kind)[1]
        return {name: _read(item, entry, f"{key}.{name}") for name, entry in dict(value).items()}
    if origin is tuple:
        require(isinstance(value, tuple | list), key, value, "a tuple")
        item = typing.get_args(kind)[0]
        items = value if typing.get_args(kind)[-1] is Ellipsis else tuple(value)
        return tuple(_read(item, entry, key) for entry in items)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is Any or (isinstance(value, kind) and not (kind is int and isinstance(value, bool))):
        return value
    raise ConfigError(f"{key} = {value!r}: expected {kind.__name__}, got {type(value).__name__}.")


def _read_dataclass(kind: Any, value: Any, key: str) -> Any:
    require(isinstance(value, Mapping | ml_collections.ConfigDict), key, value, "a dictionary")
    value = dict(value)
    types = typing.get_type_hints(kind)
    prefix = f"{key}." if key else ""
    for name in value:
        if name not in types:
            raise ConfigError(f"Unknown config key {prefix}{name}.{nearest(name, types)}")
    for f in dataclasses.fields(kind):
        optional = (f.default is not dataclasses.MISSING
                    or f.default_factory is not dataclasses.MISSING)  # fmt: skip
        if f.name not in value and not optional:
            raise ConfigError(f"Config key {prefix}{f.name} is missing ({types[f.name]}).")
    return kind(**{name: _read(types[name], item, prefix + name) for name, item in value.items()})
