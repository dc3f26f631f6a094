"""A replica's Prometheus metrics as Ray metrics, which Ray's agents export for all replicas."""

# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import asyncio

from ray.serve import get_replica_context
from ray.util.metrics import Gauge

from ..serving.metrics import Metrics

PERIOD_S = 5.0


class Bridge:
    """Copies the counters and gauges of a registry to Ray gauges with the replica's name. ``ssd:rounds_total`` becomes
    ``ray_ssd_rounds_total``. Of histograms it copies sums and counts."""

    def __init__(self, metrics: Metrics, replica: str):
        self._registry, self._replica = metrics.registry, replica
        self._gauges: dict[str, Gauge] = {}

    def update(self) -> None:
        """Copies the current values."""
        for family in self._registry.collect():
            for sample in family.samples:
                if sample.name.endswith(("_bucket", "_created")):
                    continue
                name = sample.name.replace(":", "_")
                gauge = self._gauges.get(name)
                if gauge is None:
                    tags = ("replica", *sample.labels)
                    gauge = self._gauges[name] = Gauge(name, family.documentation, tag_keys=tags)
                gauge.set(sample.value, {"replica": self._replica, **sample.labels})


async def publish(metrics: Metrics) -> None:
    """Updates Ray's metrics every ``PERIOD_S`` seconds until cancelled. Must run within a replica."""
    bridge = Bridge(metrics, get_replica_context().replica_id.unique_id)
    while True:
        bridge.update()
        await asyncio.sleep(PERIOD_S)
