"""Pipelines in a Ray cluster.

Ray places workers, keeps them alive and reports when they die. It carries no token of a round: the front
reaches the workers over control lanes, and draft and verifier exchange frames over their own link.

::

    from ssd.cluster import PipelineActor, connect

    connect("auto")
    actor = PipelineActor.remote("embedded")
    outputs = ray.get(actor.generate.remote(["def main():\\n    "], {"max_tokens": 64}))
"""

from __future__ import annotations

from .actors import PipelineActor, RayPipeline
from .client import PipelineClient, stand, stop
from .placement import connect

__all__ = ["PipelineActor", "PipelineClient", "RayPipeline", "connect", "stand", "stop"]
