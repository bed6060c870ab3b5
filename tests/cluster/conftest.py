"""A SLURM cluster of two machines, for all tests of this folder."""

from __future__ import annotations

import pytest
import slurm_cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """A running `SlurmCluster`; skips with the reason where none can run."""
    if reason := slurm_cluster.unavailable():
        pytest.skip(reason)
    with slurm_cluster.SlurmCluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running
