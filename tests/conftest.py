"""What every test gets: one torch thread, so that shared machines are neither crowded nor slow, and no deadlines."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("kairos", deadline=None)
settings.load_profile("kairos")
