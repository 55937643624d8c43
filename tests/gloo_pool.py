"""The package's worker pool, with what tests need imported once.

@pytest.fixture(scope="module")
def pool():
    with GlooPool(2) as pool:
        yield pool

def test_sum(pool):
    assert pool.run(sum_of_ranks, 10) == [11, 11]   # sum_of_ranks is a function of a module
"""

from __future__ import annotations

from megatron_mtp.device.worker_pool import WorkerPool


class GlooPool(WorkerPool):
    """`size` processes that have joined one gloo group, with the CPU facade installed.

    Args:
        size: number of processes.
        timeout_s: longest time that one `run` may take.
    """

    def __init__(self, size: int, timeout_s: float = 120.0):
        super().__init__(size, timeout_s, preload=["tests.gloo_preload"])
