"""`ouro train` with no room for files while the steps from FIRST to before LAST are saved.

  python train_on_full_disk.py FIRST LAST --config=… --workdir=…

No write to a file goes through from the first of these saves to the next one after them.
"""

import resource
import sys

from ouro_jax.cli import train
from ouro_jax.training.saves import Saves

save = Saves.save


def save_without_room(self, state, position, *args, **kwargs):
    """`Saves.save`, after there is room or none."""
    self.finish()  # what was begun before is not what is meant
    room = 0 if first <= position.step < last else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    save(self, state, position, *args, **kwargs)


if __name__ == "__main__":
    first, last = int(sys.argv.pop(1)), int(sys.argv.pop(1))
    Saves.save = save_without_room
    train.run()
