"""Floor 7: one small file per verb; parsing and printing, no logic."""

import os
from glob import glob

# libtpu may be installed only to compile for TPUs; where no accelerator is, looking for one prints
# a screenful of errors at every start. Set before jax is imported, which reads it then.
if not any(glob(pattern) for pattern in ("/dev/accel*", "/dev/vfio/*", "/dev/nvidia*")):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
