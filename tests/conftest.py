import pytest

from tests.harness.own_code import own_folder as own_folder
from tests.harness.ranks import ranks as ranks


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In several processes, files with tests of many ranks come first: they take longest, and none is left for last."""
    if hasattr(config, "workerinput"):  # of pytest-xdist
        long = {item.path for item in items if item.get_closest_marker("dist")}
        items.sort(key=lambda item: item.path not in long)
