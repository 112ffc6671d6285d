"""Attention on a mesh equals plain attention on one device, whoever computes it.

B batch, L sequence, H heads, G KV heads, K head width.
"""

import collections
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec

from ouro_jax.config import MeshConfig, ModelConfig
from ouro_jax.errors import ConfigError
from ouro_jax.model.attention import dense_attention
from ouro_jax.parallel import attention
from ouro_jax.parallel.attention import attention_for, balance_order
from ouro_jax.parallel.mesh import BATCH_AXES, batch_sharding, make_mesh, use_mesh

BATCH, HEADS, KV_HEADS = 4, 4, 2
TPU, NVIDIA, AMD = ("tpu", "TPU v5 lite"), ("gpu", "NVIDIA H100 80GB HBM3"), ("gpu", "AMD MI300X")
SITUATIONS = pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])


def model_of(head_dim, dtype="float32"):
    return ModelConfig(64, 64, 64, 1, HEADS, KV_HEADS, head_dim, dtype=dtype)


def as_on(mesh, platform, kind) -> Any:
    """What `attention_for` reads of a mesh, as if its devices were of another kind."""
    device = SimpleNamespace(platform=platform, device_kind=kind)
    return SimpleNamespace(shape=mesh.shape, devices=np.array([device]))


def random_row(length, head_dim, seed=0):
    """q, k, v, segment ids of packed documents, weights of the output."""
    keys = jax.random.split(jax.random.key(seed), 5)
    shapes = [(BATCH, length, heads, head_dim) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    q, k, v, w = map(jax.random.normal, keys, shapes)
    starts = jax.random.bernoulli(keys[4], 4 / length, (BATCH, length))
    return q, k, v, jnp.cumsum(starts, axis=1), w


def output_and_gradients(attend, q, k, v, ids, w):
    """o_BLHK and the gradients of Σ o · w with respect to q, k and v."""
    o, pullback = jax.vjp(lambda *qkv: attend(*qkv, ids), q, k, v)
    return o, *pullback(w)


def on_mesh(attend, mesh, manual):
    """`output_and_gradients` of `attend` on `mesh`, jitted: all axes automatic, or most manual."""
    step = functools.partial(output_and_gradients, attend)
    if manual:
        rows = PartitionSpec(BATCH_AXES, "context")
        step = jax.shard_map(
            step, mesh=mesh, in_specs=rows, out_specs=rows,
            axis_names={*BATCH_AXES, "context"}, check_vma=False,
        )  # fmt: skip
    return jax.jit(step)


def check_equal_to_dense(attend, mesh, manual, length, head_dim, packed):
    """Columns in balanced order in, the same out; 1e-5 of values and gradients of size 1 to 10."""
    q, k, v, ids, w = random_row(length, head_dim)
    row = (q, k, v, ids if packed else None, w)
    expected = jax.jit(functools.partial(output_and_gradients, dense_attention))(*row)
    order = balance_order(length, mesh.shape["context"])
    placed = jax.tree.map(
        lambda x: jax.device_put(x[:, order], batch_sharding(mesh, microbatched=False)), row
    )
    with use_mesh(mesh):
        got = on_mesh(attend, mesh, manual)(*placed)
    for name, one, other in zip(("o", "q", "k", "v"), expected, got, strict=True):
        close = np.testing.assert_allclose
        close(np.asarray(other), one[:, order], rtol=1e-5, atol=1e-5, err_msg=name)


@SITUATIONS
@pytest.mark.parametrize("context, packed", [(2, True), (4, True), (4, False)])
def test_dense_attention_over_context_shards(context, packed, manual):
    mesh = make_mesh(MeshConfig(fsdp=4 // context, tensor=2, context=context))
    attend = attention_for(model_of(8), 48, mesh)
    check_equal_to_dense(attend, mesh, manual, 48, 8, packed)


@SITUATIONS
@pytest.mark.parametrize("context, packed", [(1, True), (2, True), (2, False)])
def test_splash_attention(context, packed, manual, monkeypatch):
    interpreted = functools.partial(splash.make_splash_mha, interpret=True)
    monkeypatch.setattr(splash, "make_splash_mha", interpreted)
    mesh = make_mesh(MeshConfig(fsdp=4 // context, tensor=2, context=context))
    attend = attention_for(model_of(64), 512, as_on(mesh, *TPU))
    assert attend is not dense_attention
    check_equal_to_dense(attend, mesh, manual, 512, 64, packed)


@SITUATIONS
@pytest.mark.parametrize("context", [1, 2])
def test_cudnn_attention_is_lowered_without_a_gpu(context, manual, monkeypatch):
    """What is handed to cuDNN, not what it computes: that needs a GPU."""
    monkeypatch.setattr(cudnn, "cuda_versions", SimpleNamespace(cudnn_get_version=lambda: 91000))
    mesh = make_mesh(MeshConfig(fsdp=4 // context, tensor=2, context=context))
    attend = attention_for(model_of(16, "bfloat16"), 64, as_on(mesh, *NVIDIA))
    q, k, v, ids, w = random_row(64, 16)
    q, k, v, w = (x.astype(jnp.bfloat16) for x in (q, k, v, w))
    with use_mesh(mesh):
        traced = on_mesh(attend, mesh, manual).trace(q, k, v, ids, w)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "@__cudnn$fmha" in line]
    assert [line.split("(")[0].split("fmha")[1] for line in calls] == [
        "ScaleBiasSoftmax", "ScaleBiasSoftmaxBackward",
    ]  # fmt: skip
    mask_type = "CAUSAL" if context == 1 else "NO_MASK"
    # A device's rows and heads; its queries, all keys.
    queries = f"tensor<{context}x{64 // context}x2x16xbf16>"
    for call in calls:
        assert f"mask_type\\22: \\22{mask_type}\\22" in call
        assert f"({queries}, tensor<{context}x64x1x16xbf16>" in call
        assert f"tensor<{context}x1x{64 // context}x64xbf16>" in call
    assert text.count("stablehlo.reduce_scatter") == (2 if context > 1 else 0)


def test_attention_of_a_platform_that_lacks_the_kernel_is_dense():
    mesh = make_mesh(MeshConfig())
    bf16 = functools.partial(model_of, dtype="bfloat16")
    for model, length, device in (
        (bf16(64), 512, ("cpu", "cpu")),
        (bf16(16), 512, TPU),  # a head narrower than half a register
        (bf16(128), 96, TPU),  # no block of 128
        (model_of(64), 512, NVIDIA),  # float32
        (bf16(256), 512, NVIDIA),
        (bf16(64), 512, AMD),
    ):
        assert attention_for(model, length, as_on(mesh, *device)) is dense_attention
    for model, length, device in ((bf16(64), 128, TPU), (bf16(128), 512, NVIDIA)):
        assert attention_for(model, length, as_on(mesh, *device)) is not dense_attention


@pytest.mark.parametrize("length, context", [(24, 1), (24, 2), (24, 3), (96, 4), (7, 1)])
def test_every_context_shard_has_the_same_work(length, context):
    order = balance_order(length, context)
    assert sorted(order) == list(range(length))
    # Column j sees j + 1 keys.
    visible = (order + 1).reshape(context, -1).sum(axis=1)
    assert set(visible) == {length * (length + 1) // 2 // context}


def test_the_balanced_order_itself():
    assert list(balance_order(8, 2)) == [0, 1, 6, 7, 2, 3, 4, 5]
    assert list(balance_order(5, 1)) == [0, 1, 2, 3, 4]
    with pytest.raises(ConfigError, match="mesh.context = 3: .* sequence_length = 20"):
        balance_order(20, 3)


@pytest.mark.parametrize("context, queries", [(1, 128), (4, 128), (1, 256)])
def test_splash_computes_no_empty_block(context, queries):
    """Blocks of `queries` × 128 of a row of 1024, against a count of the pairs that each holds."""
    order = balance_order(1024, context)
    mask = splash.MultiHeadMask([attention._BalancedCausal(order)] * 2)
    sizes = splash.BlockSizes(
        block_q=queries, block_kv=128, block_q_dkv=queries, block_kv_dkv=128,
        block_q_dq=queries, block_kv_dq=128,
    )  # fmt: skip
    kernel: Any = splash.make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=context
    )
    visible = order[:, None] >= np.arange(1024)
    pairs = visible.reshape(-1, queries, 8, 128).sum(axis=(1, 3))
    kinds = np.where(pairs == queries * 128, 2, np.where(pairs > 0, 1, 0)).reshape(context, -1)
    for info in (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info):
        shards = np.asarray(info.block_mask).reshape(context, -1)
        counts = [collections.Counter(shard[shard > 0]) for shard in shards]
        assert counts == [collections.Counter(shard[shard > 0]) for shard in kinds]
        assert len({sum(count.values()) for count in counts}) == 1


def test_blocks_are_as_large_as_the_row_allows():
    """At most an eighth of the row, and divisors of a shard's chunks: 2048 at 64K over 16."""
    for (length, context), block in {
        (4096, 1): 512, (8192, 1): 1024, (65_536, 16): 1024, (65_536, 64): 512, (4096, 2): 512,
        (640, 1): 128, (512, 2): 128, (96, 1): 0, (128, 2): 0,
    }.items():  # fmt: skip
        assert attention._block_size(length, context) == block, (length, context)


def test_attention_compiles_for_tpu():
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }  # fmt: skip
    child = Path(__file__).with_name("compile_attention.py")
    done = subprocess.run(
        [sys.executable, str(child)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    reports = [json.loads(line) for line in done.stdout.splitlines()[-4:]]
    for report in reports:
        # Forward, gradient of keys and values, gradient of queries.
        assert report["pallas_calls"] == (3 if report["head_dim"] == 128 else 0), report
    # Of arrays of 32 MiB; what is smaller, the compiler adds in other ways.
    assert [report["reduce_scatters"] for report in reports[:2]] == [2, 2], reports
