"""How a stage's step is laid out on devices."""

import dataclasses

from ouro_jax.config import MeshConfig


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh with every axis set, `once` or `each_loop`, a remat policy, rows per batch shard."""

    mesh: MeshConfig
    gather: str
    remat: str
    microbatch_rows: int

    @property
    def batch_shards(self) -> int:
        """Over how many parts the rows of a batch are split."""
        return self.mesh.slice * self.mesh.data * self.mesh.fsdp
