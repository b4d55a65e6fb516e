"""The first losses and gradient norms of a small Llama are those that several
independent libraries agree on.
"""

import numpy as np
import pytest

from tests.bench import contestants, reference


@pytest.mark.parametrize(
    "steps", [5, pytest.param(len(reference.LOSSES), marks=pytest.mark.parity)]
)
def test_losses_and_norms_of_the_reference_model(steps: int) -> None:
    step = contestants.ours(contestants.Terms("fp32"), 0)
    known = [step(reference.samples(number), True) for number in range(steps)]
    losses, norms = zip(*known, strict=True)
    np.testing.assert_allclose(losses, reference.LOSSES[:steps], rtol=0, atol=1e-5)
    np.testing.assert_allclose(norms, reference.GRAD_NORMS[:steps], rtol=5e-5)
