"""One training step, the same for the loop, the search for a micro-batch, the doctor and benchmarks."""

import numpy as np
import torch


def seed_step(seed: int, step: int, micro: int, process_index: int) -> None:
    """Seed what is drawn on the device (drop path), the one place where the process count may show."""
    # The last word keeps it apart from what is drawn of data, as in `sample_rng`.
    torch.manual_seed(int(np.random.SeedSequence((seed, step, micro, process_index, 4)).generate_state(1)[0]))
