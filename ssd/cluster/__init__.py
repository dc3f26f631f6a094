"""Pipelines in a Ray cluster.

Ray decides where workers run, keeps them alive and says when they die. Not one token of a round
goes through it: the front speaks to the workers over control lanes, and draft and verifier meet
at a link of their own.

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
