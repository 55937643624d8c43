import pytest

from tests.gloo_pool import GlooPool


@pytest.fixture(scope="package")
def one():
    with GlooPool(1) as pool:
        yield pool


@pytest.fixture(scope="package")
def two():
    with GlooPool(2) as pool:
        yield pool
