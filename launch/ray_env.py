"""Joining a Ray cluster from a launcher."""

from __future__ import annotations

import os

from ssd.errors import UsageError


def join(*, more_cpus: int = 0, alone: bool = True) -> None:
    """Join the cluster of ``RAY_ADDRESS``, or start one of this machine alone, which ends with this
    process. Call it before anything imports Ray.

    Args:
        more_cpus: CPUs that are only counted (for processes that mostly wait), where one is started.
        alone: whether one may be started.

    Raises:
        PipelineError: there is no such cluster, or it does not let us in.
        UsageError: there is none to join and none may be started.
    """
    # Ray reads these when it is imported: only those who hold the token may use the cluster.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's own default, 15, lets anything else on the machine push the workers aside. It holds for a
    # cluster started here; elsewhere it is for those who run `ray start`.
    os.environ.setdefault("RAY_worker_niceness", "0")
    from ssd.cluster import connect

    if "RAY_ADDRESS" in os.environ:
        connect("auto")
    elif not alone:
        raise UsageError("there is no cluster to join; set RAY_ADDRESS (auto: the one this machine belongs to)")
    else:
        # Draft and verifier each ask for a CPU; a machine with one still runs both, in turn.
        connect(cpus=max(2, os.cpu_count() or 1) + more_cpus)
