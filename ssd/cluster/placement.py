"""Where workers run in a Ray cluster: what they ask for, the bundles they get, and the addresses
at which they are reached."""

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
    """Join the Ray cluster at ``address`` (``auto``: the one this machine belongs to), or start
    one of this machine alone, with ``cpus`` CPUs, which ends with this process.

    Raises:
        PipelineError: there is no such cluster, or it does not let us in.
    """
    own = {"num_cpus": cpus, "include_dashboard": False} if address is None else {}
    try:
        ray.init(address=address, logging_level=logging.WARNING, **own)
    except Exception as error:  # Ray raises bare ones too: "The current node timed out during startup"
        ray.shutdown()
        raise PipelineError(f"cannot join the Ray cluster at {address or 'this machine'}: {error}") from error


def bundles(config: Config, resources: Mapping[str, Bundle] | None = None) -> dict[str, Bundle]:
    """What each role asks for: a CPU for every core it is pinned to (one if it is not), a GPU of
    its own where its device is one, and what ``resources`` adds, by role.

    Raises: UsageError: ``resources`` names no role of this configuration, or no amount above 0.
    """

    def bundle(model: ModelConfig) -> Bundle:
        wanted = {"CPU": float(len(model.cores or [0]))}
        return {**wanted, "GPU": 1.0} if on_gpu(model) else wanted

    def model(role: str) -> ModelConfig:
        return getattr(config.for_role(role), section_of(role))

    wanted = {role: bundle(model(role)) for role in config.roles}
    for role, more in (resources or {}).items():
        if role not in wanted:
            raise UsageError(f"resources are asked for {role!r}; the roles are {', '.join(wanted)}")
        for name, amount in more.items():
            if not amount > 0:
                raise UsageError(f"the {role}'s resource {name!r} must be above 0, not {amount}")
        wanted[role].update(more)
    return wanted


class Placement:
    """Bundles of a placement group, one for each role.

    Args:
        wanted: by role. group: a ready one. first: index of the first role's bundle in it.
        owned: ``release`` gives the group back.
    """

    def __init__(self, wanted: Mapping[str, Bundle], group: PlacementGroup, *, first: int = 0, owned: bool = True):
        self._wanted, self._group, self._first, self._owned = dict(wanted), group, first, owned
        table = placement_group_table(group)["bundles_to_node_id"]
        self._nodes: dict[str, str] = {role: table[first + index] for index, role in enumerate(self._wanted)}

    @classmethod
    def reserve(
        cls, wanted: Mapping[str, Bundle], *, strategy: Strategy, timeout_s: float, name: str = ""
    ) -> Placement:
        """A group of its own.

        Args:
            name: by which ``release_abandoned`` finds the group.

        Raises:
            WorkerError: the cluster did not have the room in time; names what was asked for and
                what there was.
            UsageError: this process is in no Ray cluster.
        """
        if not ray.is_initialized():
            raise UsageError("this process is in no Ray cluster; call ssd.cluster.connect() first")
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
        """The group this actor was put in: the first bundle is its own, the workers' follow, in order.

        Raises: UsageError: this process is in no such group.
        """
        group = get_current_placement_group()
        if group is None or group.bundle_count != 1 + len(wanted):
            raise UsageError(f"this process must run in a placement group of {1 + len(wanted)} bundles, its own first")
        return cls(wanted, group, first=1, owned=False)

    def options(self, role: str) -> dict[str, Any]:
        """Actor options that put the role's worker into its bundle."""
        bundle = self._wanted[role]
        return {
            "num_cpus": bundle["CPU"],
            # Always said: without it an actor in a group's GPU bundle is given no GPU.
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
        """Give the bundles back, if they are ours; what still runs in them is killed."""
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
    """Give back the room of a pipeline whose owner was killed: Ray itself keeps it for as long as
    the job runs. Nothing happens if there is none of that name."""
    with suppress(ValueError):
        remove_placement_group(get_placement_group(name))


def front_address(placement: Placement, address: str | None) -> str:
    """The address of this process that the workers connect to: loopback when they are all on its
    node, otherwise the node's own, unless the caller names another.

    Raises:
        UsageError: the address means every interface, or is not one.
    """
    if address is None:
        return LOOPBACK if placement.here else node_address()
    return checked_address(address)


def node_address() -> str:
    """This node's address, as Ray knows it. Raises: UsageError as ``checked_address``."""
    return checked_address(get_node_ip_address())


def checked_address(address: str) -> str:
    """``address``, if it is one interface's.

    Raises:
        UsageError: it is not; lanes are not protected, and must not be open to every network.
    """
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        raise UsageError(f"{address!r} is not a numeric address; give one of this node's") from None
    if parsed.is_unspecified:
        raise UsageError(f"{address} would open the lanes to every network; give one address of this node")
    return address


def on_gpu(model: ModelConfig) -> bool:
    return model.device.partition(":")[0] == "cuda"


def with_visible_gpu(config: Config, role: str, gpu_ids: list[str], visible: str | None) -> Config:
    """The configuration as the role's worker must read it: GPUs by the numbers it sees.

    Ray hands out GPUs itself, so a configured index says only that there shall be one. A worker
    usually sees its own GPU alone, as number 0; the partner's then gets any other number, so that
    the two still tell that they are distinct.

    Args:
        gpu_ids: the GPUs Ray gave the worker.
        visible: what CUDA shows the worker (``CUDA_VISIBLE_DEVICES``); None means all.
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
    """The line of Ray's that says what happened; it ends a traceback of several processes."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__


def _amounts(resources: Mapping[str, float]) -> str:
    shown = {"CPU": resources.get("CPU", 0)} | {
        name: amount for name, amount in resources.items() if amount and not _internal(name)
    }
    return " + ".join(f"{amount:g} {name}" for name, amount in shown.items())


def _internal(name: str) -> bool:
    """Resources Ray counts for itself."""
    own = ("memory", "object_store_memory", "node:", "accelerator_type:", "bundle_")
    return name.startswith(own) or "_group_" in name
