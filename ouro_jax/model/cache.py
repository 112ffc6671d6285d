"""The key/value cache: an ordinary value, carried through the loops and updated in place.

C sets of keys and values (T loops, or one), N layers, R cache rows, B batch, S cache slots,
G KV heads, K head width, L new positions.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jax.experimental.layout import Layout, with_layout_constraint

from ouro_jax.config import ModelConfig

KV_POLICIES = {
    "full": "every loop reads what the same loop wrote; all loops run",
    "exited": "as full, but the exit loop's keys and values stand in for those of deeper loops",
    "last": "one set: each loop overwrites it, so that the last loop that ran is kept",
    "first": "one set: the first loop writes it, the others read it",
    "mean": "one set: the mean over the loops that ran",
}
PER_LOOP = ("full", "exited")
# What is cut out of the cache and written into it has its layout pinned: XLA for TPU otherwise
# gives the cache the layout that a product or a write likes, and copies all of it there and back
# for every token (v5e: 3 GiB of temporaries for a 3 GiB cache).
CACHE_LAYOUT = Layout(tuple(range(6)))


class KVCache(struct.PyTreeNode):
    """Keys and values of every (loop, layer), or of every layer where loops share them.

    The S positions of a head lie next to each other: attention's products read them as they are.
    Those of bfloat16 are held as their bits, uint16: XLA for CPU has no update of a bfloat16 slice
    and would turn the whole cache into float32 and back for each (8 times slower).
    """

    keys_CNRGSK: jax.Array
    values_CNRGSK: jax.Array
    policy: str = struct.field(pytree_node=False, default="full")

    @property
    def num_slots(self) -> int:
        """Positions that fit into a row of the cache."""
        return self.keys_CNRGSK.shape[4]


class Address(struct.PyTreeNode):
    """Where a batch stands in the cache: its loops (from 0), its cache rows, its positions.

    The positions of a row follow each other. `longest` is how many slots anything of value reads;
    rows of which nothing is kept may stand beyond.
    """

    loop_B: jax.Array
    rows_B: jax.Array
    positions_BL: jax.Array
    longest: jax.Array


def empty_cache(
    config: ModelConfig, rows: int, num_slots: int, num_loops: int, policy: str = "full"
) -> KVCache:
    """A cache of zeros for the compute dtype: 2·C·N·R·G·S·K elements; C is 1 where loops share."""
    shape = (
        num_loops if policy in PER_LOOP else 1,
        config.num_layers, rows, config.num_kv_heads, num_slots, config.head_dim,
    )  # fmt: skip
    held = jnp.uint16 if config.dtype == "bfloat16" else jnp.dtype(config.dtype)
    return KVCache(jnp.zeros(shape, held), jnp.zeros(shape, held), policy)


def write(
    cache_CNRGSK: jax.Array,
    new_BLGK: jax.Array,
    policy: str,
    layer: jax.Array,
    address: Address,
) -> jax.Array:
    """Writes what a layer made of a batch into the slots of its positions.

    Where loops share a set, it is merged into what is there as `policy` says. A loop over the rows
    keeps every write a dynamic_update_slice, which XLA does in place.
    """
    new_BGLK = new_BLGK.swapaxes(1, 2)

    def write_row(index, cache):
        loop, new_GLK = address.loop_B[index], new_BGLK[index]
        set_index = loop if policy in PER_LOOP else 0
        start = (set_index, layer, address.rows_B[index], 0, address.positions_BL[index, 0], 0)
        if policy in ("first", "mean"):
            bits = jax.lax.dynamic_slice(cache, start, (1, 1, 1, *new_GLK.shape))[0, 0, 0]
            old_GLK = jax.lax.bitcast_convert_type(bits, new_GLK.dtype)
            new_GLK = _merged(policy, old_GLK, new_GLK, loop)
        update = jax.lax.bitcast_convert_type(new_GLK, cache.dtype)[None, None, None]
        update = with_layout_constraint(update, CACHE_LAYOUT)
        return jax.lax.dynamic_update_slice(cache, update, start)

    return jax.lax.fori_loop(0, new_BLGK.shape[0], write_row, cache_CNRGSK)


def _merged(policy: str, old: jax.Array, new: jax.Array, loop: jax.Array) -> jax.Array:
    if policy == "first":
        return jnp.where(loop == 0, new, old)
    # A slot holds another token's before loop 0: it must not get into the mean, even as NaN.
    old32 = jnp.where(loop == 0, 0, old.astype(jnp.float32))
    return (old32 + (new.astype(jnp.float32) - old32) / (loop + 1)).astype(new.dtype)


def read(
    cache_CNRGSK: jax.Array,
    policy: str,
    layer: jax.Array,
    address: Address,
    index: jax.Array | int,
    seen: int,
    dtype: jnp.dtype,
) -> jax.Array:
    """The first `seen` slots that the loop of batch row `index` reads: GSK in `dtype`."""
    groups, _, width = cache_CNRGSK.shape[3:]
    set_index = address.loop_B[index] if policy in PER_LOOP else 0
    start = (set_index, layer, address.rows_B[index], 0, 0, 0)
    row = jax.lax.dynamic_slice(cache_CNRGSK, start, (1, 1, 1, groups, seen, width))
    row_GSK = with_layout_constraint(row, CACHE_LAYOUT)[0, 0, 0]
    return jax.lax.bitcast_convert_type(row_GSK, dtype)


def stand_in(
    cache: KVCache,
    rows_B: jax.Array,
    loop_B: jax.Array,
    positions_B: jax.Array,
    leaves_B: jax.Array,
) -> KVCache:
    """Copies what loop `loop_B` wrote at `positions_B` to all deeper loops of rows that leave.

    For the policy `exited`: what attends at a deeper loop later finds the exit loop's there.
    """
    # One row, if XLA knows of it, becomes no loop: the last layer's write is then fused into the
    # slice, a second time, and the cache is copied for it.
    stop = jnp.where(jnp.any(leaves_B), len(rows_B), 0)

    def fill(array):
        loops, layers, _, groups, _, width = array.shape
        loop_C = jnp.arange(loops).reshape(-1, *[1] * (array.ndim - 1))

        def fill_row(index, array):
            loop = loop_B[index]
            start = (0, 0, rows_B[index], 0, positions_B[index], 0)
            column = jax.lax.dynamic_slice(array, start, (loops, layers, 1, groups, 1, width))
            column = with_layout_constraint(column, CACHE_LAYOUT)
            exited = jax.lax.dynamic_index_in_dim(column, loop)
            column = jnp.where(leaves_B[index] & (loop_C > loop), exited, column)
            return jax.lax.dynamic_update_slice(array, column, start)

        return jax.lax.fori_loop(0, stop, fill_row, array)

    return cache.replace(
        keys_CNRGSK=fill(cache.keys_CNRGSK), values_CNRGSK=fill(cache.values_CNRGSK)
    )


def condense(
    filled: KVCache, cache: KVCache, row: jax.Array, loops: jax.Array, dtype: jnp.dtype
) -> KVCache:
    """Puts row 0 of `filled`, written by `loops` loops each with its set, into `row` of `cache`.

    `cache` has one set: of the last loop, of the first, or the mean of all that ran (float32).
    """

    def put(filled_CNRGSK, cache_CNRGSK):
        if cache.policy == "mean":
            exact = jax.lax.bitcast_convert_type(filled_CNRGSK[:, :, 0], dtype).astype(jnp.float32)
            ran = (jnp.arange(exact.shape[0]) < loops).reshape(-1, *[1] * (exact.ndim - 1))
            mean = jnp.where(ran, exact, 0).sum(0) / loops
            bits_NGSK = jax.lax.bitcast_convert_type(mean.astype(dtype), cache_CNRGSK.dtype)
        else:
            index = loops - 1 if cache.policy == "last" else 0
            bits_NGSK = jax.lax.dynamic_index_in_dim(filled_CNRGSK, index, keepdims=False)[:, 0]
        return jax.lax.dynamic_update_slice(
            cache_CNRGSK, bits_NGSK[None, :, None], (0, 0, row, 0, 0, 0)
        )

    return cache.replace(
        keys_CNRGSK=put(filled.keys_CNRGSK, cache.keys_CNRGSK),
        values_CNRGSK=put(filled.values_CNRGSK, cache.values_CNRGSK),
    )
