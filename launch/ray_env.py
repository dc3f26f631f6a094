"""Joining a Ray cluster from a launcher."""

from __future__ import annotations

import os

from ssd.errors import UsageError


def join(*, more_cpus: int = 0, alone: bool = True) -> None:
    """Joins the cluster of ``RAY_ADDRESS``, or starts one of this machine alone, which ends with this process.

    It must be called before anything imports Ray.

    Args:
        more_cpus: CPUs that a cluster started here reports in addition, for processes that mostly wait.
        alone: whether a cluster may be started.

    Raises:
        PipelineError: the cluster cannot be reached, or it refuses this process.
        UsageError: there is no cluster to join and none may be started.
    """
    # Ray reads these when it is imported. With tokens, only their holders can use the cluster.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # With Ray's default, 15, workers get the CPU only when nothing else on the machine wants it. This applies to a
    # cluster started here; for others it is set where `ray start` runs.
    os.environ.setdefault("RAY_worker_niceness", "0")
    from ssd.cluster import connect

    if "RAY_ADDRESS" in os.environ:
        connect("auto")
    elif not alone:
        raise UsageError("there is no cluster to join; set RAY_ADDRESS (auto: the cluster this machine belongs to)")
    else:
        # Draft and verifier request a CPU each; a machine with a single one runs both in turns.
        connect(cpus=max(2, os.cpu_count() or 1) + more_cpus)
