"""Hugging Face checkpoints: what is loaded is written back, and what does not fit is refused."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import reference
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ouro_jax.config import ModelConfig
from ouro_jax.errors import ConfigError
from ouro_jax.interop.huggingface import load_huggingface, save_huggingface

LAYER_Q = "model.layers.0.self_attn.q_proj.weight"


def checkpoint(directory, dtype=np.float32, fields=None, **shape):
    """Fields and tensors of a small random model, written with the safetensors library."""
    made, tensors = reference.random_checkpoint(np.random.default_rng(0), **shape)
    made |= {"torch_dtype": np.dtype(dtype).name, "bos_token_id": 0, "early_exit_step": None}
    tensors = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    reference.write_checkpoint(directory, made | (fields or {}), tensors)
    return made | (fields or {}), tensors


def shard(directory, tensors):
    """Splits the single file into two with an index, as released large models have it."""
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(places.values()):
        save_file({n: tensors[n] for n in names if places[n] == file}, directory / file)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def require_same_bytes(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        assert ours[name].tobytes() == tensor.tobytes(), name


def round_trip(source, target):
    target.mkdir()
    config, params = load_huggingface(source)
    save_huggingface(config, params, target)
    return load_file(target / "model.safetensors"), json.loads((target / "config.json").read_text())


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_what_is_loaded_is_written_back_bit_for_bit(tmp_path, dtype, sharded):
    fields, tensors = checkpoint(tmp_path / "in", dtype, heads=6, kv_heads=2, head_dim=4, layers=3)
    if sharded:
        shard(tmp_path / "in", tensors)
    ours, written = round_trip(tmp_path / "in", tmp_path / "out")
    require_same_bytes(ours, tensors)
    assert written == fields
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_golden_checkpoint_is_written_back(golden_dir, tmp_path):
    ours, written = round_trip(golden_dir / "set_a", tmp_path / "out")
    require_same_bytes(ours, load_file(golden_dir / "set_a" / "model.safetensors"))
    assert written == json.loads((golden_dir / "set_a" / "config.json").read_text())


def test_tensors_are_transposed_and_heads_split(tmp_path):
    _, tensors = checkpoint(tmp_path, heads=4, kv_heads=2, head_dim=6, hidden=16)
    config, params = load_huggingface(tmp_path)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 2, 6)
    kernel_NDHK = params["stack"]["layers"]["self_attn"]["q_proj"]["kernel"]
    assert isinstance(kernel_NDHK, jax.Array) and kernel_NDHK.shape == (2, 16, 4, 6)
    for head in range(4):
        expected_KD = tensors[LAYER_Q][head * 6 : (head + 1) * 6]
        np.testing.assert_array_equal(kernel_NDHK[0, :, head], expected_KD.T)
    output_NHKD = params["stack"]["layers"]["self_attn"]["o_proj"]["kernel"]
    expected_DK = tensors["model.layers.1.self_attn.o_proj.weight"][:, 6:12]
    np.testing.assert_array_equal(output_NHKD[1, 1], expected_DK.T)


def test_leaves_go_where_the_caller_places_them(tmp_path):
    checkpoint(tmp_path)
    mesh = jax.make_mesh((2,), ("fsdp",), devices=jax.devices()[:2])
    shardings = {
        True: jax.NamedSharding(mesh, jax.P(None, "fsdp")),
        False: jax.NamedSharding(mesh, jax.P()),
    }
    _, params = load_huggingface(
        tmp_path, lambda path, array: jax.device_put(array, shardings["mlp" in path])
    )
    kernel_NDF = params["stack"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel_NDF.sharding == shardings[True]
    assert params["lm_head"]["kernel"].sharding == shardings[False]
    (tmp_path / "out").mkdir()
    save_huggingface(load_huggingface(tmp_path)[0], params, tmp_path / "out")
    require_same_bytes(
        load_file(tmp_path / "out" / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    )


def test_mixed_dtypes_are_kept(tmp_path):
    fields, tensors = checkpoint(tmp_path / "in", ml_dtypes.bfloat16)
    for name in ("weight", "bias"):
        gate = f"model.early_exit_gate.{name}"
        tensors[gate] = tensors[gate].astype(np.float32)
    reference.write_checkpoint(tmp_path / "in", fields, tensors)
    _, params = load_huggingface(tmp_path / "in")
    assert params["stack"]["early_exit_gate"]["bias"].dtype == np.float32
    assert params["lm_head"]["kernel"].dtype == jnp.bfloat16
    require_same_bytes(round_trip(tmp_path / "in", tmp_path / "out")[0], tensors)


@pytest.mark.parametrize(
    "change",
    [
        {"num_key_value_heads": None},
        {"head_dim": None},
        {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"torch_dtype": None, "dtype": "float32"},
        {"torch_dtype": None},
        {"layer_types": ["full_attention"] * 2, "sliding_window": None, "max_window_layers": 28},
        {"rope_scaling": {"type": "default"}, "attention_bias": None},
        {"early_exit_step": 2, "early_exit_threshold": 0.7, "note": {"any": ["thing"]}},
        {"max_position_embeddings": None, "initializer_range": None},
    ],
)
def test_fields_that_change_nothing_come_back_as_they_were(tmp_path, change):
    """Null and absent alike: keys set to None here are removed in a second pass."""
    fields, tensors = checkpoint(tmp_path / "in", fields=change)
    assert round_trip(tmp_path / "in", tmp_path / "nulls")[1] == fields
    present = {key: value for key, value in fields.items() if value is not None}
    reference.write_checkpoint(tmp_path / "in", present, tensors)
    assert round_trip(tmp_path / "in", tmp_path / "absent")[1] == present


def test_what_training_changed_is_written(tmp_path):
    rope = {"rope_type": "default", "rope_theta": 1e4}
    checkpoint(tmp_path / "in", fields={"rope_parameters": rope, "bos_token_id": 7})
    config, params = load_huggingface(tmp_path / "in")
    layers = jax.tree.map(lambda x: jnp.concatenate([x, x]), params["stack"]["layers"])
    params["stack"] = params["stack"] | {"layers": layers}
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    config = dataclasses.replace(
        config, num_layers=4, num_loops=2, rope_theta=1e6, dtype="bfloat16"
    )
    (tmp_path / "out").mkdir()
    save_huggingface(config, params, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["num_hidden_layers"], written["total_ut_steps"]) == (4, 2)
    assert written["layer_types"] == ["full_attention"] * 4
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 1e6
    assert (written["torch_dtype"], written["bos_token_id"]) == ("bfloat16", 7)
    again, loaded = load_huggingface(tmp_path / "out")
    assert again == config
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_a_model_made_here_states_every_field_of_the_released_ones(tmp_path, golden_dir):
    fields, tensors = checkpoint(tmp_path / "in")
    loaded, params = load_huggingface(tmp_path / "in")
    made = ModelConfig(**{f.name: getattr(loaded, f.name) for f in dataclasses.fields(loaded)
                          if f.name != "carried"})  # fmt: skip
    (tmp_path / "out").mkdir()
    save_huggingface(made, params, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    released = json.loads((golden_dir / "set_a" / "config.json").read_text())
    assert written.keys() == released.keys()
    same = ("architectures", "auto_map", "model_type", "hidden_act", "early_exit_threshold",
            "rope_scaling", "use_sliding_window", "tie_word_embeddings", "torch_dtype")  # fmt: skip
    assert {key: written[key] for key in same} == {key: released[key] for key in same}
    assert load_huggingface(tmp_path / "out")[0] == made
    require_same_bytes(load_file(tmp_path / "out" / "model.safetensors"), tensors)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("model_type", "qwen2", "'ouro'"),
        ("hidden_act", "gelu", "'silu'"),
        ("attention_dropout", 0.1, "0, the only"),
        ("attention_bias", True, "False, the only"),
        ("tie_word_embeddings", True, "False, the only"),
        ("use_sliding_window", True, "False, the only"),
        ("layer_types", ["full_attention", "sliding_attention"], "2 times 'full_attention'"),
        ("layer_types", ["full_attention"], "2 times 'full_attention'"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}, "RoPE scaling is not implemented"),
        ("rope_scaling", {"type": "linear", "factor": 2.0}, "RoPE scaling is not implemented"),
        ("rope_parameters", {"rope_type": "llama3", "rope_theta": 1e4}, "not implemented"),
        ("rope_parameters", {"rope_theta": 7.0}, "the same base"),
        ("rope_parameters", "default", "null or"),
        ("torch_dtype", "float16", "float32, bfloat16"),
        ("vocab_size", "96", "a whole number"),
        ("num_hidden_layers", 2.0, "a whole number"),
        ("num_attention_heads", True, "a whole number"),
        ("rope_theta", "1e4", "a number"),
        ("num_key_value_heads", 3, "a divisor"),
    ],
)
def test_config_values_not_implemented_are_refused(tmp_path, key, value, expected):
    checkpoint(tmp_path, fields={key: value})
    with pytest.raises(ConfigError) as error:
        load_huggingface(tmp_path)
    message = str(error.value)
    assert str(tmp_path / "config.json") in message and expected in message
    assert repr(value) in message and (key in message or key == "num_key_value_heads")


def test_missing_config_keys_are_all_named(tmp_path):
    fields, tensors = checkpoint(tmp_path)
    for key in ("total_ut_steps", "rope_theta", "rms_norm_eps"):
        del fields[key]
    reference.write_checkpoint(tmp_path, fields, tensors)
    with pytest.raises(ConfigError, match="missing rms_norm_eps?|total_ut_steps") as error:
        load_huggingface(tmp_path)
    assert all(key in str(error.value) for key in ("total_ut_steps", "rope_theta", "rms_norm_eps"))


def test_every_tensor_that_does_not_fit_is_named_with_its_shapes(tmp_path):
    fields, tensors = checkpoint(tmp_path)
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.early_exit_gate.bias"]
    tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((3, 5), np.float32)
    tensors["lm_head.weight"] = np.zeros((96, 31), np.float32)
    tensors[LAYER_Q] = tensors[LAYER_Q].astype(ml_dtypes.bfloat16)
    reference.write_checkpoint(tmp_path, fields, tensors)
    with pytest.raises(ConfigError) as error:
        load_huggingface(tmp_path)
    for line in (
        "missing model.layers.1.mlp.up_proj.weight [48, 32]",
        "missing model.early_exit_gate.bias [1]",
        "surplus model.layers.2.mlp.up_proj.weight [3, 5]",
        "lm_head.weight has shape [96, 31], expected [96, 32]",
        "model.layers.*.self_attn.q_proj.weight has dtypes ['BF16', 'F32'], expected one",
    ):
        assert line in str(error.value)


def test_other_dtypes_are_refused(tmp_path):
    fields, tensors = checkpoint(tmp_path)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.float16)
    reference.write_checkpoint(tmp_path, fields, tensors)
    with pytest.raises(ConfigError, match=r"lm_head.weight.*F16.*F32, BF16"):
        load_huggingface(tmp_path)


@pytest.mark.parametrize("kept", [0, 5, 100, 5000, -4])
def test_a_file_cut_off_is_refused_by_name(tmp_path, kept):
    checkpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ConfigError, match="model.safetensors"):
        load_huggingface(tmp_path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"dtype"', b'"btype"'),
        (b'"F32"', b'"F3"'),
        (b"[96,32]", b"[96,33]"),
        (b"data_offsets", b"data_offset_"),
        (b'{"', b'["'),
    ],
)
def test_a_damaged_header_is_refused_by_name(tmp_path, old, new):
    checkpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))
    with pytest.raises(ConfigError, match="model.safetensors"):
        load_huggingface(tmp_path)


def test_overlapping_tensors_are_refused(tmp_path):
    checkpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["model.layers.0.input_layernorm.weight"]["data_offsets"] = header["model.norm.weight"][
        "data_offsets"
    ]
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    path.write_bytes(data[:8] + text + data[8 + length :])
    with pytest.raises(ConfigError, match="overlap"):
        load_huggingface(tmp_path)


def test_index_problems_are_named(tmp_path):
    _, tensors = checkpoint(tmp_path)
    shard(tmp_path, tensors)
    index = tmp_path / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    cases = {
        "absent.safetensors": places | {LAYER_Q: "absent.safetensors"},
        "a file beside it": places | {LAYER_Q: "../model.safetensors"},
        "missing \\['another.weight'\\]": places | {"another.weight": places[LAYER_Q]},
        "surplus \\['model.norm.weight'\\]": {
            k: places[k] for k in places if "model.norm" not in k
        },
        "weight_map": None,
    }
    for expected, weight_map in cases.items():
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ConfigError, match=expected):
            load_huggingface(tmp_path)


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_an_unreadable_config_is_refused_by_name(tmp_path, text):
    checkpoint(tmp_path)
    if text is None:
        (tmp_path / "config.json").unlink()
    else:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match="config.json"):
        load_huggingface(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path):
    checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="neither"):
        load_huggingface(tmp_path)


def test_saving_refuses_a_missing_folder_and_a_tree_that_does_not_fit(tmp_path):
    checkpoint(tmp_path)
    config, params = load_huggingface(tmp_path)
    with pytest.raises(ConfigError, match="no such folder"):
        save_huggingface(config, params, tmp_path / "absent")
    wrong = params | {
        "lm_head": {"kernel": params["lm_head"]["kernel"][:5], "bias": jnp.zeros(3)},
        "embed_tokens": {"embedding": params["embed_tokens"]["embedding"].astype(jnp.float16)},
        "stack": {name: part for name, part in params["stack"].items() if name != "norm"},
    }
    with pytest.raises(ConfigError) as error:
        save_huggingface(config, wrong, tmp_path)
    for part in ("missing stack/norm/scale", "surplus lm_head/bias", "lm_head/kernel has shape",
                 "embed_tokens/embedding is float16"):  # fmt: skip
        assert part in str(error.value)
    assert load_huggingface(tmp_path)[0] == config  # the old file was not touched


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    _, tensors = checkpoint(tmp_path)
    config, params = load_huggingface(tmp_path)

    def full_disk(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "ascontiguousarray", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_huggingface(config, params, tmp_path)
    monkeypatch.undo()
    require_same_bytes(load_file(tmp_path / "model.safetensors"), tensors)
    assert not list(tmp_path.glob("*.part"))


INT8 = {"quant_method": "int8", "bits": 8, "symmetric": True, "per_channel": True}


def quantised(directory, dtype=np.float32, **changes):
    """A quantised grouped-query checkpoint, written with the safetensors library."""
    fields = {"quantization_config": INT8}
    fields, tensors = checkpoint(directory, dtype, fields, heads=6, kv_heads=2, head_dim=4)
    rng = np.random.default_rng(1)
    for name in [name for name in tensors if "_proj" in name or name == "lm_head.weight"]:
        tensors[name] = rng.integers(-128, 128, tensors[name].shape).astype(np.int8)
        tensors[f"{name}_scale"] = rng.random((len(tensors[name]), 1)).astype(np.float32)
    reference.write_checkpoint(directory, fields, tensors | changes)
    return fields, tensors


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_int8_weights_are_written_back_bit_for_bit(tmp_path, dtype):
    fields, tensors = quantised(tmp_path / "in", dtype)
    ours, written = round_trip(tmp_path / "in", tmp_path / "out")
    require_same_bytes(ours, tensors)
    assert written == fields
    config, params = load_huggingface(tmp_path / "in")
    q_proj = params["stack"]["layers"]["self_attn"]["q_proj"]
    assert (q_proj["kernel"].dtype, q_proj["kernel"].shape) == (jnp.int8, (2, 32, 6, 4))
    assert q_proj["kernel_scale"].shape == (2, 6, 4)
    # A head's scales belong to its own rows of torch's matrix.
    scale_KO = tensors[f"{LAYER_Q}_scale"][4:8]
    np.testing.assert_array_equal(q_proj["kernel_scale"][0, 1], scale_KO[:, 0])
    o_proj = params["stack"]["layers"]["self_attn"]["o_proj"]
    assert o_proj["kernel_scale"].shape == (2, 32)


def test_what_is_float_again_says_nothing_of_int8(tmp_path):
    quantised(tmp_path / "int8")
    _, tensors = checkpoint(tmp_path / "float", heads=6, kv_heads=2, head_dim=4)
    (tmp_path / "out").mkdir()
    config, _ = load_huggingface(tmp_path / "int8")
    save_huggingface(config, load_huggingface(tmp_path / "float")[1], tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    require_same_bytes(load_file(tmp_path / "out" / "model.safetensors"), tensors)


def test_int8_tensors_that_do_not_fit_are_named(tmp_path):
    fields, tensors = quantised(tmp_path, **{LAYER_Q: np.zeros((24, 32), np.float32)})
    with pytest.raises(ConfigError, match=f"{LAYER_Q} is F32, expected I8"):
        load_huggingface(tmp_path)
    missing = {name: tensor for name, tensor in tensors.items() if name != f"{LAYER_Q}_scale"}
    reference.write_checkpoint(tmp_path, fields, missing)
    with pytest.raises(ConfigError, match=rf"missing {LAYER_Q}_scale \[24, 1\]"):
        load_huggingface(tmp_path)
    # Without the entry the scales are surplus and int8 is no dtype of a weight.
    reference.write_checkpoint(tmp_path, fields | {"quantization_config": None}, tensors)
    with pytest.raises(ConfigError, match=f"surplus {LAYER_Q}_scale") as error:
        load_huggingface(tmp_path)
    assert "lm_head.weight is I8, expected F32 or BF16" in str(error.value)
    other = {"quantization_config": INT8 | {"bits": 4}}
    reference.write_checkpoint(tmp_path, fields | other, tensors)
    with pytest.raises(ConfigError, match="quantization_config = .*'bits': 4.*: expected null or"):
        load_huggingface(tmp_path)


MEASURE = r"""
import re, sys
from pathlib import Path
import jax.numpy as jnp
from ouro_jax.interop.huggingface import load_huggingface, save_huggingface
peak = lambda: 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
jnp.zeros(8).block_until_ready()
before = peak()
config, params = load_huggingface(sys.argv[1])
loaded = peak() - before
save_huggingface(config, params, sys.argv[2])
print(loaded, peak() - before)
"""


def test_neither_way_holds_the_model_twice(tmp_path):
    """150 MB; one stack of MLP weights, the largest leaf, is 23 % of it.

    VmHWM and not ru_maxrss, which a child inherits from its parent.
    """
    checkpoint(tmp_path / "in", layers=8, hidden=768, mlp=2816, heads=6, head_dim=128,
               kv_heads=6, vocab=4096, dtype=ml_dtypes.bfloat16)  # fmt: skip
    size = (tmp_path / "in" / "model.safetensors").stat().st_size
    assert size > 150e6
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "in"), str(tmp_path / "out")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for peak in map(int, printed.split()):
        assert size < peak < 1.6 * size, f"{peak / size:.2f} x the model"
