"""What every test gets: one torch thread, so that shared machines are neither crowded nor slow, and no deadlines."""

import os

import torch
from hypothesis import settings

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, and when a kernel is defined
settings.register_profile("kairos", deadline=None)
settings.load_profile("kairos")
