"""The story of steps.py: on the stand-in kubelet always, on the cluster of KUBECONFIG if there is one."""

import os
from pathlib import Path

import pytest

from tests.e2e.kubectl import RealCluster
from tests.e2e.standin import standing_in
from tests.e2e.steps import story


async def test_pods_of_the_shipped_manifests_have_their_devices_come_what_may(root: Path) -> None:
    async with standing_in(root) as cluster:
        await story(cluster)


@pytest.mark.skipif(not os.environ.get("KUBECONFIG"), reason="KUBECONFIG is not set: no cluster to try it on")
async def test_they_have_on_a_real_cluster_too() -> None:
    async with RealCluster.prepared() as cluster:
        await story(cluster)
