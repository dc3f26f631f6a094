"""Where workers run in a Ray cluster: the resources they request, their bundles, and their addresses."""

from __future__ import annotations

import ipaddress
import logging
import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Literal

import ray
from ray.util import get_node_ip_address
from ray.util.placement_group import (
    PlacementGroup,
    get_current_placement_group,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ..config.sections import Config, ModelConfig, section_of
from ..errors import PipelineError, UsageError, WorkerError

Strategy = Literal["STRICT_PACK", "PACK", "SPREAD", "STRICT_SPREAD"]
Bundle = dict[str, float]
LOOPBACK = "127.0.0.1"


def connect(address: str | None = None, *, cpus: int | None = None) -> None:
    """Joins a Ray cluster.

    Args:
        address: of the cluster; ``auto``: the one this machine belongs to. None starts a cluster of this machine
            alone, which ends with this process.
        cpus: CPUs of a cluster that is started.

    Raises:
        PipelineError: there is no such cluster, or it refuses the connection.
    """
    own = {"num_cpus": cpus, "include_dashboard": False} if address is None else {}
    with _Joining(address or "this machine"):
        ray.init(address=address, logging_level=logging.WARNING, **own)


class _Joining:
    """Turns any error of Ray into a PipelineError, and leaves the cluster that was joined in part. No list of types
    would do: Ray raises bare ``Exception`` too ("The current node timed out during startup")."""

    def __init__(self, where: str):
        self._where = where

    def __enter__(self) -> None:
        return

    def __exit__(self, _kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, Exception):
            ray.shutdown()
            raise PipelineError(f"cannot join the Ray cluster at {self._where}: {error}") from error


def bundles(config: Config, resources: Mapping[str, Bundle] | None = None) -> dict[str, Bundle]:
    """Returns the resources of each role: a CPU for every core it is pinned to (one if it is not pinned), a GPU if
    its device is one, and what ``resources`` adds.

    Args:
        resources: custom resources by role.

    Raises:
        UsageError: ``resources`` has an unknown role or an amount that is not above 0.
    """

    def bundle(model: ModelConfig) -> Bundle:
        wanted = {"CPU": float(len(model.cores or [0]))}
        return {**wanted, "GPU": 1.0} if on_gpu(model) else wanted

    def model(role: str) -> ModelConfig:
        return getattr(config.for_role(role), section_of(role))

    wanted = {role: bundle(model(role)) for role in config.roles}
    for role, more in (resources or {}).items():
        if role not in wanted:
            raise UsageError(f"resources has the role {role!r}; the roles are {', '.join(wanted)}")
        for name, amount in more.items():
            if not amount > 0:
                raise UsageError(f"the {role}'s resource {name!r} must be above 0, not {amount}")
        wanted[role].update(more)
    return wanted


class Placement:
    """Bundles of a placement group, one for each role.

    Args:
        wanted: resources by role.
        group: a placement group that is ready.
        first: index of the first role's bundle in the group.
        owned: whether ``release`` removes the group.
    """

    def __init__(self, wanted: Mapping[str, Bundle], group: PlacementGroup, *, first: int = 0, owned: bool = True):
        self._wanted, self._group, self._first, self._owned = dict(wanted), group, first, owned
        table = placement_group_table(group)["bundles_to_node_id"]
        self._nodes: dict[str, str] = {role: table[first + index] for index, role in enumerate(self._wanted)}

    @classmethod
    def reserve(
        cls, wanted: Mapping[str, Bundle], *, strategy: Strategy, timeout_s: float, name: str = ""
    ) -> Placement:
        """Creates a placement group and waits until it is ready.

        Args:
            name: by which ``release_abandoned`` finds the group.

        Raises:
            WorkerError: the cluster had no room in time; the message compares the request with what there is.
            UsageError: this process has not joined a Ray cluster.
        """
        if not ray.is_initialized():
            raise UsageError("this process has not joined a Ray cluster; call ssd.cluster.connect() first")
        group = placement_group(list(wanted.values()), strategy=strategy, name=name)
        try:
            if not group.wait(math.ceil(timeout_s)):
                raise WorkerError(_refusal(wanted, strategy, timeout_s))
            return cls(wanted, group)
        except BaseException:
            remove_placement_group(group)
            raise

    @classmethod
    def around(cls, wanted: Mapping[str, Bundle]) -> Placement:
        """Returns the placement group that this actor runs in. The first bundle is the actor's, the workers' bundles
        follow in order.

        Raises:
            UsageError: this process does not run in such a group.
        """
        group = get_current_placement_group()
        if group is None or group.bundle_count != 1 + len(wanted):
            raise UsageError(f"this process must run in a placement group of {1 + len(wanted)} bundles, its own first")
        return cls(wanted, group, first=1, owned=False)

    def options(self, role: str) -> dict[str, Any]:
        """Returns the actor options that put a role's worker into its bundle."""
        bundle = self._wanted[role]
        return {
            "num_cpus": bundle["CPU"],
            # Always set: without it Ray assigns no GPU to an actor in a GPU bundle.
            "num_gpus": bundle.get("GPU", 0),
            "resources": {name: amount for name, amount in bundle.items() if name not in ("CPU", "GPU")},
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=self._first + list(self._wanted).index(role)
            ),
        }

    @property
    def one_node(self) -> bool:
        """Whether all workers are on the same node."""
        return len(set(self._nodes.values())) == 1

    @property
    def here(self) -> bool:
        """Whether all workers are on the node of this process."""
        return set(self._nodes.values()) == {ray.get_runtime_context().get_node_id()}

    def release(self) -> None:
        """Removes the group if it is owned. Ray kills what still runs in it."""
        if self._owned:
            remove_placement_group(self._group)


def _refusal(wanted: Mapping[str, Bundle], strategy: Strategy, timeout_s: float) -> str:
    asked = ", ".join(f"{role} {_amounts(bundle)}" for role, bundle in wanted.items())
    where = {"STRICT_PACK": " on one node", "STRICT_SPREAD": " on different nodes"}.get(strategy, "")
    nodes = [node for node in ray.nodes() if node["Alive"]]
    return (
        f"Ray found no room for the workers in {timeout_s:g} s: asked for {asked}{where}; available "
        f"{_amounts(ray.available_resources())}, in all {_amounts(ray.cluster_resources())} "
        f"on {len(nodes)} node{'s' if len(nodes) > 1 else ''}"
    )


def release_abandoned(name: str) -> None:
    """Removes the placement group of a pipeline whose owner was killed, which Ray keeps until the job ends. Does
    nothing if there is no group of that name."""
    with suppress(ValueError):
        remove_placement_group(get_placement_group(name))


def front_address(placement: Placement, address: str | None) -> str:
    """Returns the address of this process for the workers to connect to: the given one, or loopback if all workers
    are on this node, or the node's address.

    Raises:
        UsageError: the address means every interface, or is not an address.
    """
    if address is None:
        return LOOPBACK if placement.here else node_address()
    return checked_address(address)


def node_address() -> str:
    """Returns this node's address as Ray knows it. Raises: UsageError: as ``checked_address``."""
    return checked_address(get_node_ip_address())


def checked_address(address: str) -> str:
    """Returns the address of one interface unchanged.

    Raises:
        UsageError: it is not a numeric address, or means every interface. Lanes are not encrypted and must not be
            open to every network.
    """
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        raise UsageError(f"{address!r} is not a numeric address; give one of this node's") from None
    if parsed.is_unspecified:
        raise UsageError(f"{address} would open the lanes to every network; give one address of this node")
    return address


def on_gpu(model: ModelConfig) -> bool:
    """Whether a model runs on a GPU."""
    return model.device.partition(":")[0] == "cuda"


def with_visible_gpu(config: Config, role: str, gpu_ids: list[str], visible: str | None) -> Config:
    """Returns the configuration for a role's worker, with GPUs numbered as the worker sees them.

    Ray assigns GPUs itself, so a configured index only means that the role needs one. A worker usually sees its
    own GPU alone, as number 0. Its partner's GPU gets another number, so that the two remain distinct.

    Args:
        gpu_ids: the GPUs that Ray assigned to the worker.
        visible: the GPUs that CUDA shows the worker (``CUDA_VISIBLE_DEVICES``); None means all.
    """
    if not gpu_ids:
        return config
    shown = visible.split(",") if visible else []
    own = shown.index(gpu_ids[0]) if gpu_ids[0] in shown else int(gpu_ids[0]) if visible is None else 0
    mine = section_of(role)
    other = "target" if mine == "draft" else "draft"
    changed = {mine: getattr(config, mine).model_copy(update={"device": f"cuda:{own}"})}
    partner = getattr(config, other)
    if partner is not None and on_gpu(partner):
        changed[other] = partner.model_copy(update={"device": f"cuda:{own + 1}"})
    return config.model_copy(update=changed)


def reason(error: BaseException) -> str:
    """Returns the last line of a Ray error, which says what happened; a traceback of several processes precedes it."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__


def _amounts(resources: Mapping[str, float]) -> str:
    shown = {"CPU": resources.get("CPU", 0)} | {
        name: amount for name, amount in resources.items() if amount and not _internal(name)
    }
    return " + ".join(f"{amount:g} {name}" for name, amount in shown.items())


def _internal(name: str) -> bool:
    """Whether a resource is one of Ray's own."""
    own = ("memory", "object_store_memory", "node:", "accelerator_type:", "bundle_")
    return name.startswith(own) or "_group_" in name
