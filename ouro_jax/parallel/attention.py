"""One attention for every platform: splash on TPU, cuDNN on GPU, dense XLA elsewhere.

With `context` shards, queries stay where they are and keys, values and segment ids are gathered.
Rows are balanced: shard i holds chunks i and 2C-1-i of 2C, so that each has the same causal work.

B batch, L local query positions, S positions of the whole row, H heads, G KV heads, K head width,
C context shards.
"""

import functools
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask import Mask
from jax.sharding import Mesh, PartitionSpec

from ouro_jax.config import ModelConfig
from ouro_jax.errors import ConfigError
from ouro_jax.model.attention import Attention, attend, dense_attention
from ouro_jax.parallel.mesh import BATCH_AXES

LANES = 128  # width of a TPU register: block sizes are multiples

Kernel = Callable[..., jax.Array]
"""(q_BLHK, k_BSGK, v_BSGK, ids_BL, ids_BS, shard) → o_BLHK on one device; keys, values and their
ids are in the row's order, `shard` is this device's place along `context`."""


def balance_order(length: int, context: int) -> np.ndarray:
    """The columns of a row in the order in which `context` shards hold them: new j was order[j].

    Raises ConfigError where 2 × `context` chunks do not divide `length`.
    """
    if context == 1:
        return np.arange(length)
    if length % (2 * context):
        raise ConfigError(
            f"mesh.context = {context}: 2 × mesh.context does not divide sequence_length = "
            f"{length}; choose a mesh.context whose double does."
        )
    chunks = np.arange(length).reshape(2 * context, -1)
    return np.stack([chunks[:context], chunks[: context - 1 : -1]], axis=1).reshape(-1)


def attention_for(model: ModelConfig, sequence_length: int, mesh: Mesh) -> Attention:
    """The attention of `model` for training rows of `sequence_length` on the devices of `mesh`.

    Call what it returns inside `use_mesh`, with every axis automatic, or inside a `shard_map`
    whose manual axes are `slice`, `data`, `fsdp` and `context`. With `context` above 1 the columns
    are expected in `balance_order`. Raises ConfigError where that order does not exist.
    """
    context = mesh.shape["context"]
    order = balance_order(sequence_length, context)
    device = mesh.devices.flat[0]
    block = _block_size(sequence_length, context)
    if device.platform == "tpu" and model.head_dim % (LANES // 2) == 0 and block:
        kernel = _splash(model.num_heads // mesh.shape["tensor"], order, context, block)
    elif "NVIDIA" in device.device_kind and _cudnn_can(model, sequence_length // context):
        kernel = functools.partial(_cudnn, order.reshape(context, -1))
    elif context == 1:
        return dense_attention
    else:
        kernel = functools.partial(_dense, order.reshape(context, -1))
    return functools.partial(_on_each_device, kernel, context)


def _on_each_device(kernel: Kernel, context: int, q_BLHK, k_BLGK, v_BLGK, segment_ids_BL=None):
    """Runs `kernel` on each device's part; a Pallas call cannot be partitioned automatically.

    The axes that are not manual yet become so here; with none left there is nothing to do.
    """

    def local(q_BLHK, k_BLGK, v_BLGK, ids_BL):
        if context == 1:
            return kernel(q_BLHK, k_BLGK, v_BLGK, ids_BL, ids_BL, 0)
        # AD turns the gathers of keys and values into reduce-scatters of their gradients.
        whole = jax.tree.map(functools.partial(_gather, context), (k_BLGK, v_BLGK, ids_BL))
        return kernel(q_BLHK, *whole[:2], ids_BL, whole[2], jax.lax.axis_index("context"))

    mesh = jax.sharding.get_abstract_mesh()
    free = set(mesh.axis_names) - set(mesh.manual_axes)
    if not free:
        return local(q_BLHK, k_BLGK, v_BLGK, segment_ids_BL)

    def split(*axes):
        return tuple(axis for axis in axes if axis in free)

    ids = PartitionSpec(split(*BATCH_AXES), split("context"))
    each = PartitionSpec(*ids, split("tensor"))
    on_devices = jax.shard_map(
        local, in_specs=(each, each, each, ids), out_specs=each, axis_names=free, check_vma=False
    )
    return on_devices(q_BLHK, k_BLGK, v_BLGK, segment_ids_BL)


def _gather(context: int, x_BL):
    """All of the row in its own order: chunks 0 … C-1 come first, the others last one first."""

    def length_outermost(x):
        # In memory: of long rows (seen with 16K over two shards) TPU otherwise makes the
        # gradient's reduce-scatter an all-reduce, which moves twice the bytes.
        return with_layout_constraint(x, Layout((1, 0, *range(2, x.ndim))))

    gathered = jax.lax.all_gather(length_outermost(x_BL), "context", axis=1, tiled=True)
    batch, length, *rest = gathered.shape
    chunk_shape = (batch, context, 2, length // (2 * context), *rest)
    chunks = length_outermost(gathered).reshape(chunk_shape)
    return jnp.concatenate([chunks[:, :, 0], chunks[:, ::-1, 1]], axis=1).reshape(gathered.shape)


def _visible(rows_CL, k_BSGK, ids_BL, ids_BS, shard):
    """visible_BLS: which keys the local queries, of the columns rows_CL[shard], may see."""
    causal_LS = jnp.asarray(rows_CL)[shard][:, None] >= jnp.arange(k_BSGK.shape[1])
    if ids_BL is None:
        return jnp.broadcast_to(causal_LS, (len(k_BSGK), *causal_LS.shape))
    return causal_LS & (ids_BL[:, :, None] == ids_BS[:, None, :])


def _dense(rows_CL, q_BLHK, k_BSGK, v_BSGK, *place):
    """All scores of the local queries at once."""
    return attend(q_BLHK, k_BSGK, v_BSGK, _visible(rows_CL, k_BSGK, *place))


def _cudnn_can(model: ModelConfig, length: int) -> bool:
    """What cuDNN's flash attention takes: 16 bits, heads of 8 to 128, even lengths with a mask."""
    fits = model.head_dim <= 128 and model.head_dim % 8 == 0 and length % 2 == 0
    return model.dtype == "bfloat16" and fits


def _cudnn(rows_CL, q_BLHK, k_BSGK, v_BSGK, ids_BL, ids_BS, shard):
    """cuDNN's flash attention, in which query head h reads KV head h // (H / G) too.

    Segments, and the order of context shards, are a mask: cuDNN adds it as a bias of 2 bytes for
    a pair of a query and a key, once for all heads (32 MiB at 4K), and keeps no scores. Of the
    whole row it also skips the blocks above the diagonal. JAX offers it no segments otherwise.
    """
    whole = len(rows_CL) == 1
    mask_B1LS = None
    if not whole or ids_BL is not None:
        mask_B1LS = _visible(rows_CL, k_BSGK, ids_BL, ids_BS, shard)[:, None]
    return jax.nn.dot_product_attention(
        q_BLHK, k_BSGK, v_BSGK, mask=mask_B1LS, is_causal=whole, implementation="cudnn"
    )


def _block_size(length: int, context: int) -> int:
    """Rows and columns of a block of scores; 0 where no block divides a shard's chunks.

    A block of Q queries reads each key once for Q of them: at 128 a chip waits for its memory, at
    512 (v5e) to 1024 (v6e) it does not. But the half of a diagonal block is thrown away, which
    at an eighth of the row costs an eighth of the work.
    """
    chunk = length // (2 * context if context > 1 else 1)
    sizes = [size for size in (1024, 512, 256, 128) if chunk % size == 0]
    return next((size for size in sizes if 8 * size <= length), min(sizes, default=0))


class _BalancedCausal(Mask):
    """Query i, of original column q_sequence[i], sees keys up to there.

    The kernel computes it from `q_sequence`; indexing only tells it which blocks are empty or
    full, so a block is given as what its first and its last key are to its queries: seen by some,
    seen by all. (A block's 10^6 pairs, 4,096 blocks of a row of 64K, would take 9 s.)
    """

    mask_function = staticmethod(operator.ge)

    def __init__(self, order: np.ndarray):
        self.q_sequence = order.astype(np.int32)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.q_sequence.shape * 2

    def __getitem__(self, idx) -> np.ndarray:
        queries, keys = self.q_sequence[idx[0]], idx[1]
        return np.array([queries.max() >= keys.start, queries.min() >= keys.stop - 1])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BalancedCausal) and np.array_equal(
            self.q_sequence, other.q_sequence
        )

    def __hash__(self) -> int:
        return hash(self.q_sequence.tobytes())


def _splash(heads: int, order: np.ndarray, context: int, block: int) -> Kernel:
    """Splash attention over the blocks of scores that are not empty.

    The backward pass is two kernels: the fused one writes a partial gradient of the queries, in
    their dtype, for each block of keys (at 64K 64 × the queries) and adds them up afterwards.
    """
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block,
        block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    mask = splash.MultiHeadMask([_BalancedCausal(order)] * heads)

    def kernel(q_BLHK, k_BSGK, v_BSGK, ids_BL, ids_BS, shard):
        # Made here, as constants of the trace: arrays cannot be made on devices that are not here.
        whole = splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=context)

        def part(x):
            axis = 0 if x.ndim == 1 else 1  # q_sequence [S]; of blocks, [1, queries, keys]
            size = x.shape[axis] // context
            return jax.lax.dynamic_slice_in_dim(x, shard * size, size, axis)

        ids = None if ids_BL is None else splash.SegmentIds(ids_BL, ids_BS)
        q, k, v = (x.swapaxes(1, 2) for x in (q_BLHK * q_BLHK.shape[-1] ** -0.5, k_BSGK, v_BSGK))
        return jax.vmap(jax.tree.map(part, whole))(q, k, v, ids).swapaxes(1, 2)

    return kernel
