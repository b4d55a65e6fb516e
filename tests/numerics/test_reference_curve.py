"""The first 12 losses and gradient norms of a small Llama are those that several
independent libraries agree on.
"""

import numpy as np
import torch

from tests.bench import contestants, reference


def test_losses_and_norms_of_the_reference_model() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        step = contestants.ours(contestants.Terms("fp32"), 0)
        known = [
            step(reference.samples(number), True) for number in range(len(reference.LOSSES))
        ]
        losses, norms = zip(*known, strict=True)
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_allclose(losses, reference.LOSSES, rtol=0, atol=1e-5)
    np.testing.assert_allclose(norms, reference.GRAD_NORMS, rtol=5e-5)
