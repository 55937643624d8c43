"""The two kinds of storage that tests of checkpoints run on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_mtp.storage.place import Place, files_in, folders_in, write_durably
from megatron_mtp.storage.remote_path import RemotePath
from tests.harness.ranks import Ranks
from tests.harness.s3 import S3_ENVIRONMENT, Bucket, FaultProxy, enter_environment, new_bucket

STORES = ["files", pytest.param("s3", marks=pytest.mark.slow)]
"""A test on the S3 server takes seconds: tens of requests to a server in Python. `make test` runs a few of them."""


@pytest.fixture(params=STORES)
def folder(request: pytest.FixtureRequest) -> Place:
    """An empty run directory of one test: a folder, and one on the S3 server."""
    if request.param == "files":
        found: Path = request.getfixturevalue("tmp_path")
        return found
    return request.getfixturevalue("s3").place()


@pytest.fixture
def run_folder(folder: Place, ranks: Ranks) -> Place:
    """The same, for ranks of a pool of 2."""
    if isinstance(folder, RemotePath):
        lead_ranks_to(ranks, os.environ["AWS_ENDPOINT_URL"])
    return folder


@pytest.fixture(scope="module")
def module_bucket(s3_server: FaultProxy, _s3_environment: None, ranks: Ranks) -> Bucket:
    """A bucket for all tests of a module, which ranks of a pool of 2 see too."""
    lead_ranks_to(ranks, s3_server.url)
    return new_bucket(s3_server)


def lead_ranks_to(ranks: Ranks, url: str) -> None:
    """Ranks of a pool of 2 find the S3 server."""
    ranks(2).run(enter_environment, {**S3_ENVIRONMENT, "AWS_ENDPOINT_URL": url})


def copy_run(source: Place, target: Place) -> Place:
    """Copies all that is in a run directory."""
    for folder in (source, *folders_in(source)):
        place = target if folder is source else target / folder.name
        place.mkdir(parents=True, exist_ok=True)
        for name in files_in(folder):
            write_durably(place / name, (folder / name).read_bytes())
    return target
