"""What a config refuses, and in which words; the files in `configs/` and the paper's Table 1."""

import dataclasses
import runpy
from pathlib import Path

import pytest

from ouro_jax.config import (
    STAGE_ORDER,
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    LayoutConfig,
    LoggingConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    ProfileConfig,
    Stage,
    check_transition,
    from_config_dict,
    num_parameters,
    parse_prior,
    to_config_dict,
    to_dict,
)
from ouro_jax.errors import ConfigError

CONFIGS = Path(__file__).parent.parent / "configs"
STAGE = Stage(
    tokens=1000, sequence_length=10, batch_tokens=100, num_layers=2, num_loops=4,
    mixture={"code": 0.5, "prose": 0.5}, learning_rate=1e-3,
)  # fmt: skip
MODEL = ModelConfig(128, 32, 48, 2, 4, 2, 8)
CONFIG = Config("test", MODEL, {"stable_1a": STAGE, "stable_1b": STAGE})


def load(file: str, *variant: str) -> Config:
    return from_config_dict(runpy.run_path(str(CONFIGS / file))["get_config"](*variant))


def message(make) -> str:
    with pytest.raises(ConfigError) as error:
        make()
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 0}, ["model.vocab_size = 0", "at least 1"]),
        ({"num_loops": -3}, ["model.num_loops = -3", "at least 1"]),
        ({"num_kv_heads": 3}, ["model.num_kv_heads = 3", "divisor of model.num_heads = 4"]),
        ({"head_dim": 7}, ["model.head_dim = 7", "even"]),
        ({"rope_theta": 0.0}, ["model.rope_theta = 0.0", "positive"]),
        ({"norm_eps": -1e-6}, ["model.norm_eps = -1e-06", "positive"]),
        ({"dtype": "float16"}, ["model.dtype = 'float16'", "float32, bfloat16", "'bfloat16'?"]),
    ],
)
def test_a_wrong_model_names_the_key_the_value_and_what_is_expected(changes, words):
    text = message(lambda: dataclasses.replace(MODEL, **changes))
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokens": 0}, ["tokens = 0", "at least 1"]),
        ({"sequence_length": 0}, ["sequence_length = 0", "at least 1"]),
        ({"num_layers": 0}, ["num_layers = 0", "at least 1"]),
        ({"learning_rate": 0.0}, ["learning_rate = 0.0", "more than 0"]),
        ({"rope_theta": -1.0}, ["rope_theta = -1.0", "more than 0"]),
        ({"entropy_weight": -0.1}, ["entropy_weight = -0.1", "0 or more"]),
        ({"weight_decay": -0.1}, ["weight_decay = -0.1", "0 or more"]),
        ({"warmup_tokens": -1}, ["warmup_tokens = -1", "0 or more"]),
        ({"warmup_tokens": 600, "decay_tokens": 500}, ["warmup_tokens = 600", "1,000 tokens"]),
        ({"warmup_tokens": 1000}, ["warmup_tokens = 1000", "1,000 tokens"]),
        ({"schedule": "cosin"}, ["schedule = 'cosin'", "constant, cosine, wsd", "'cosine'?"]),
        ({"objective": "gates"}, ["objective = 'gates'", "last_loop", "'gate'?"]),
        ({"transition": "upcycle"}, ["transition = 'upcycle'", "Did you mean 'upcycle_stacked'?"]),
        ({"prior": "geometric:1.5"}, ["prior = 'geometric:1.5'", "0 < λ < 1"]),
        ({"batch_tokens": 105}, ["batch_tokens = 105", "multiple of", "sequence_length = 10"]),
        ({"batch_ramp": ((500, 95),)}, ["batch_ramp = 95", "multiple of"]),
        ({"batch_ramp": ((500, 50), (400, 60))}, ["batch_ramp = ((500, 50)", "rising"]),
        ({"min_loops": -1}, ["min_loops = -1", "0 (no fewer than num_loops)"]),
        ({"min_loops": 9}, ["min_loops = 9", "num_loops = "]),
        ({"max_epochs": -1.0}, ["max_epochs = -1.0", "0 or more"]),
        ({"skip_rows": ((5, 5),)}, ["skip_rows = ((5, 5),)", "start < stop"]),
        ({"skip_rows": ((-1, 5),)}, ["skip_rows = ((-1, 5),)", "sorted and disjoint"]),
        ({"skip_rows": ((0, 5), (4, 9))}, ["skip_rows = ((0, 5), (4, 9))", "disjoint"]),
        ({"skip_rows": ((7, 9), (0, 5))}, ["skip_rows = ((7, 9), (0, 5))", "sorted"]),
        ({"mixture": {}}, ["mixture = {}", "at least one source"]),
        ({"mixture": {"a": 1.5, "b": -0.5}}, ["mixture.b = -0.5", "0 or more"]),
        ({"mixture": {"a": 0.5, "b": 0.4}}, ["mixture = {'a': 0.5, 'b': 0.4}", "sum to 0.9"]),
    ],
)
def test_a_wrong_stage_names_the_key_the_value_and_what_is_expected(changes, words):
    stages = {"stable_1a": STAGE, "anneal": dataclasses.replace(STAGE, **changes)}
    text = message(lambda: Config("test", MODEL, stages))
    assert text.startswith("stages.anneal.")
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stages": {}}, ["stages = {}", "at least one stage"]),
        ({"stages": {"stable1a": STAGE}}, ["'stable1a'", "Did you mean 'stable_1a'?"]),
        ({"first_stage": "stabel_1b"}, ["first_stage = 'stabel_1b'", "'stable_1b'?"]),
        ({"mesh": MeshConfig(tensor=-2)}, ["mesh.tensor = -2", "0 or more"]),
        ({"layout": LayoutConfig(remat="layers")}, ["layout.remat = 'layers'", "'layer'?"]),
        (
            {"layout": LayoutConfig(microbatch_rows=-1)},
            ["layout.microbatch_rows = -1", "0 (chosen) or more"],
        ),
        (
            {"data": DataConfig(source_tokens={"code": 0})},
            ["data.source_tokens.code = 0", "at least 1"],
        ),
        ({"checkpoint": CheckpointConfig(keep=0)}, ["checkpoint.keep = 0", "at least 1"]),
        (
            {"checkpoint": CheckpointConfig(every_tokens=0)},
            ["checkpoint.every_tokens = 0", "at least 1"],
        ),
        ({"evaluation": EvaluationConfig(0)}, ["evaluation.every_tokens = 0", "at least 1"]),
        ({"evaluation": EvaluationConfig(num_loops=0)}, ["evaluation.num_loops = 0"]),
        ({"evaluation": EvaluationConfig(rows_per_source=0)}, ["evaluation.rows_per_source = 0"]),
        ({"logging": LoggingConfig(every_steps=0)}, ["logging.every_steps = 0", "at least 1"]),
        ({"profile": ProfileConfig(start_step=-1)}, ["profile.start_step = -1", "0 (no trace)"]),
        ({"profile": ProfileConfig(num_steps=0)}, ["profile.num_steps = 0", "at least 1"]),
        (
            {"optimizer": OptimizerConfig(clip_norm=0.0)},
            ["optimizer.clip_norm = 0.0", "more than 0"],
        ),
        ({"optimizer": OptimizerConfig(eps=0.0)}, ["optimizer.eps = 0.0", "more than 0"]),
        ({"optimizer": OptimizerConfig(beta2=1.0)}, ["optimizer.beta2 = 1.0", "below 1"]),
    ],
)
def test_a_wrong_run_names_the_key_the_value_and_what_is_expected(changes, words):
    text = message(lambda: dataclasses.replace(CONFIG, **changes))
    assert all(word in text for word in words), text


def test_transitions_that_do_not_fit_say_what_would():
    def stages(**changes):
        return {"stable_1a": STAGE, "stable_1b": dataclasses.replace(STAGE, **changes)}

    text = message(lambda: Config("test", MODEL, stages(num_layers=4)))
    assert "stages.stable_1b.num_layers = 4" in text and "expected 2" in text
    assert "upcycle_stacked" in text
    text = message(
        lambda: Config("test", MODEL, stages(num_layers=5, transition="upcycle_stacked"))
    )
    assert "stages.stable_1b.num_layers = 5" in text and "multiple of the 2 layers" in text
    text = message(lambda: Config("test", MODEL, stages(transition="upcycle_interleaved")))
    assert "stages.stable_1b.num_layers = 2" in text
    first = {"stable_1a": dataclasses.replace(STAGE, transition="upcycle_stacked")}
    text = message(lambda: Config("test", MODEL, first))
    assert "stages.stable_1a.transition = 'upcycle_stacked'" in text and "init_from" in text
    assert Config("test", MODEL, first, init_from="elsewhere").stream()
    check_transition("upcycle_interleaved", 2, 6, "stages.anneal")


def test_priors():
    assert parse_prior("uniform") is None
    assert parse_prior("geometric:0.3") == 0.3
    for prior in ("geometric", "geometric:", "geometric:0", "poisson:0.5", "uniform:1", ""):
        assert "prior = " in message(lambda prior=prior: parse_prior(prior))


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (["sed"], 1, ["Unknown config key sed", "Did you mean 'seed'?"]),
        (["model", "hiden_size"], 8, ["key model.hiden_size", "'hidden_size'?"]),
        (["stages", "stable_1a", "token"], 8, ["key stages.stable_1a.token.", "'tokens'?"]),
        (["model", "hidden_size"], 3.5, ["model.hidden_size = 3.5", "expected int", "got float"]),
        (["model", "num_loops"], True, ["model.num_loops = True", "expected int", "got bool"]),
        (["stages", "stable_1a", "learning_rate"], "1", ["learning_rate = '1'", "expected float"]),
        (["stages", "stable_1a", "mixture"], 3, ["stages.stable_1a.mixture = 3", "a dictionary"]),
        (["stages", "stable_1a", "mixture", "a"], "1", ["mixture.a = '1'", "expected float"]),
        (["stages", "stable_1a", "batch_ramp"], 3, ["batch_ramp = 3", "a tuple"]),
        (["stages", "stable_1a", "batch_ramp"], ((1, 2.5),), ["batch_ramp = 2.5", "expected int"]),
        (["mesh"], None, ["mesh = None", "a dictionary"]),
    ],
)
def test_unknown_keys_and_wrong_types_are_named(path, value, words):
    tree = to_dict(CONFIG)
    place = tree
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    text = message(lambda: from_config_dict(tree))
    assert all(word in text for word in words), text


def test_a_missing_key_is_named():
    tree = to_dict(CONFIG)
    del tree["stages"]["stable_1b"]["tokens"]
    assert "stages.stable_1b.tokens is missing" in message(lambda: from_config_dict(tree))


def test_whole_numbers_serve_as_floats():
    tree = to_dict(CONFIG)
    tree["stages"]["stable_1a"]["learning_rate"] = 1
    rate = from_config_dict(tree).stages["stable_1a"].learning_rate
    assert rate == 1.0 and isinstance(rate, float)


ALL = [
    ("tiny.py",), ("tiny.py", "full"), ("tiny.py", "fork"), ("tiny.py", "smoke"),
    ("ouro_1p4b.py",), ("ouro_2p6b.py",),
]  # fmt: skip


@pytest.mark.parametrize("file", ALL, ids=":".join)
def test_every_config_loads_and_comes_back_whole(file):
    config = load(*file)
    assert from_config_dict(to_config_dict(config)) == config
    assert from_config_dict(to_dict(config)) == config
    for name, stage in config.stream():
        assert sum(stage.mixture.values()) == pytest.approx(1, abs=1e-9)
        assert min(stage.mixture.values()) > 0
        model = config.stage_model(name)
        assert (model.num_layers, model.num_loops) == (stage.num_layers, stage.num_loops)
        assert model.rope_theta == stage.rope_theta
        assert model.max_position_embeddings >= stage.sequence_length


def test_no_config_file_is_left_out():
    assert {path.name for path in CONFIGS.glob("*.py")} == {name for name, *_ in ALL}


def test_a_stage_config_grows_with_the_longest_row_so_far():
    config = load("tiny.py")
    lengths = [config.stage_model(name).max_position_embeddings for name in STAGE_ORDER]
    assert lengths == [128, 128, 256, 512, 512, 512, 512]


@pytest.mark.parametrize(
    ("file", "layers", "parameters"),
    [("ouro_1p4b.py", 24, 1_434_652_673), ("ouro_2p6b.py", 48, 2_667_974_657)],
)
def test_the_papers_table_1(file, layers, parameters):
    config = load(file)
    names = list(config.stages)
    assert names == list(STAGE_ORDER)
    first = 0 if layers == 24 else 1
    assert [name for name, _ in config.stream()] == names[first:]
    assert num_parameters(config.stage_model("anneal")) == parameters
    assert (config.model.num_layers, config.model.vocab_size) == (layers, 49_152)

    # Columns 1a, 1b, CT annealing, LongCT, mid-training.
    stages = [config.stages[name] for name in STAGE_ORDER[:5]]
    assert [s.tokens for s in stages] == [3 * 10**12, 3 * 10**12, 14 * 10**11, 2 * 10**10,
                                          3 * 10**11]  # fmt: skip
    assert [s.sequence_length // 1024 for s in stages] == [4, 4, 16, 64, 32]
    assert [s.num_loops for s in stages] == [8, 4, 4, 4, 4]
    assert [s.entropy_weight for s in stages] == [0.1, 0.05, 0.05, 0.05, 0.05]
    assert [s.rope_theta for s in stages] == [1e4, 1e4, 4e4, 1e6, 1e6]
    assert [s.schedule for s in stages] == ["constant", "constant", "cosine", "constant", "cosine"]
    assert [s.learning_rate for s in stages] == [3e-4, 3e-4, 3e-4, 3e-5, 3e-5]
    assert [stages[i].final_learning_rate for i in (2, 4)] == [3e-5, 1e-5]
    assert {s.weight_decay for s in stages} == {0.1}
    assert {s.batch_tokens for s in stages} == {8 * 2**20}
    assert [batch // 2**20 for _, batch in stages[0].batch_ramp] == [4, 5, 6, 7]
    assert stages[0].warmup_tokens > 0 and not any(s.warmup_tokens for s in stages[1:])
    assert [s.num_layers for s in stages] == [24, *[layers] * 4]
    assert config.optimizer == OptimizerConfig(beta1=0.9, beta2=0.95, clip_norm=1.0)
    assert config.stages["sft"].learning_rate == 2e-5 and config.stages["sft"].reset_optimizer
    assert config.stages["gate"].objective == "gate"
    transitions = [s.transition for s in config.stages.values()]
    assert transitions == ["none", "upcycle_stacked" if layers == 48 else "none", *["none"] * 5]


def test_the_papers_mixtures():
    mixtures = runpy.run_path(str(CONFIGS / "data" / "mixtures.py"))
    for name in ("STABLE", "ANNEAL", "LONG_CONTEXT", "MID_TRAINING", "SFT"):
        assert sum(mixtures[name].values()) == pytest.approx(1, abs=1e-9)
    assert mixtures["STABLE"]["nemotron_cc"] == 0.734  # Table 4
    assert mixtures["ANNEAL"]["nemotron_cc_high_quality"] == 0.665  # Table 5
    # Stage 4, 300B tokens: 90B of instructions, 30B of stage 1, 180B of stage 2; no Chinese.
    middle = mixtures["MID_TRAINING"]
    assert middle["instruction_mix"] == 0.3
    assert sum(middle[name] for name in mixtures["ANNEAL"]) == pytest.approx(0.6)
    assert not any("zh" in name or name == "map_cc" for name in middle)
