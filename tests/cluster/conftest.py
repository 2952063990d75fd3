"""The cluster that the tests of the launchers share."""

from collections.abc import Iterator

import pytest

from tests.cluster.cluster import Cluster, Missing, running_cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Three nodes of 8 fake GPUs and 64 fake CPUs."""
    try:
        with running_cluster(3) as running:
            yield running
    except Missing as missing:
        pytest.skip(str(missing))
