"""AWS for Ray's cluster launcher, going on to the next kind of machine when one is not to be had.

Ray's own provider asks for the worker type of the highest `priority` again and again, whatever AWS
answers: its autoscaler puts a type back only if machines came and never joined. This one, refused,
launches at once the type that follows, of those with the same resources, in the order of priority;
so it does with a type whose machines come and never join. A launcher file names it as
`provider: {type: external, module: nflab.cluster.aws.Provider}`.
"""

import copy
import time
from typing import Any

from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import hash_launch_conf
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.tags import (
    TAG_RAY_LAUNCH_CONFIG,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

from nflab.cluster.joining import Joining
from nflab.cluster.placement import TYPE_LABEL
from nflab.cluster.waiting import LEFT_OUT, Refusal, note_refusal

VISIBLE_SECONDS = 5.0
"""Until a machine that was launched stands in AWS's lists."""

_NEXT = "next_node_types"


class Provider(AWSNodeProvider):
    """Launches and ends the machines of a cluster."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self._joining = Joining()

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        """Ids of the cluster's machines that are not gone and bear these tags."""
        found = list(super().non_terminated_nodes(tag_filters))
        if not tag_filters:  # as the autoscaler asks, every few seconds
            self._joining.found({n: self.node_tags(n).get(TAG_RAY_NODE_STATUS) for n in found})
        return found

    def prepare_for_head_node(self, cluster_config: dict[str, Any]) -> dict[str, Any]:
        """Tells the head, whose autoscaler launches workers, which type follows which, by which
        label runs ask for each, and leaves it the zones in which each is sold: the reason why
        another has none is of no use."""
        config = copy.deepcopy(cluster_config)
        node_types = config["available_node_types"]
        for name, node_type in node_types.items():
            if name != config["head_node_type"]:
                node_type["node_config"] = self._where_sold(node_type["node_config"])
                node_type["labels"] = {TYPE_LABEL: name, **node_type.get("labels", {})}
        config["provider"][_NEXT] = {
            name: {
                "name": following,
                "node_config": node_types[following]["node_config"],
                "auth": config["auth"],
                "max_workers": node_types[following]["max_workers"],
            }
            for name, following in order(config).items()
        }
        return config

    def _where_sold(self, node_config: dict[str, Any]) -> dict[str, Any]:
        """A worker type without the subnets of zones that do not sell it, unless all are."""
        compute = self.ec2.meta.client
        kind = [{"Name": "instance-type", "Values": [node_config["InstanceType"]]}]
        offers = compute.describe_instance_type_offerings(
            LocationType="availability-zone", Filters=kind
        )
        zones = {offer["Location"] for offer in offers["InstanceTypeOfferings"]}
        subnets = compute.describe_subnets(SubnetIds=node_config["SubnetIds"])["Subnets"]
        sold = {subnet["SubnetId"] for subnet in subnets if subnet["AvailabilityZone"] in zones}
        kept = [subnet for subnet in node_config["SubnetIds"] if subnet in sold]
        return {**node_config, "SubnetIds": kept or node_config["SubnetIds"]}

    def create_node(
        self, node_config: dict[str, Any], tags: dict[str, str], count: int
    ) -> dict[str, Any]:
        """Launches `count` machines, those that AWS has not as the type that follows.

        Raises:
            NodeLaunchException: AWS refused the type, for some of them at least, or it is left out
                for machines of it never joined. What was launched all the same, of this type or the
                following one, the autoscaler finds by itself.
        """
        made: dict[str, Any] = {}
        node_type = tags.get(TAG_RAY_USER_NODE_TYPE, "")
        try:
            if (reason := self._joining.left_out(node_type)) is not None:
                raise NodeLaunchException(LEFT_OUT, reason, None)
            while len(made) < count:  # asked for many, AWS launches as many as it has
                launched = super().create_node(node_config, tags, count - len(made))
                self._joining.launched(launched, node_type)
                made |= launched
            return made
        except NodeLaunchException as refused:
            following, room = self._following(node_type)
            # What AWS encodes after this is another each time.
            told = refused.description.split(" Encoded authorization failure")[0]
            reason = f"{refused.category}: {told}".rstrip(".")
            name = None if following is None else following["name"]
            note_refusal(Refusal(time.time(), node_type, reason, name))
            if following is None:
                self._become_visible(made)
                raise
            instead = {
                **tags,
                TAG_RAY_USER_NODE_TYPE: following["name"],
                TAG_RAY_LAUNCH_CONFIG: hash_launch_conf(
                    following["node_config"], following["auth"]
                ),
            }
            try:
                made |= self.create_node(
                    following["node_config"], instead, min(count - len(made), room)
                )
            finally:
                self._become_visible(made)
            raise

    def _become_visible(self, made: dict[str, Any]) -> None:
        """Had the autoscaler a refusal before it sees the machines, it would ask for more."""
        if made:
            time.sleep(VISIBLE_SECONDS)

    def _following(self, node_type: str) -> tuple[dict[str, Any] | None, int]:
        """The next type after one of which there may be more machines, and how many; None if there
        is none."""
        types = self.provider_config.get(_NEXT, {})
        while (following := types.get(node_type)) is not None:
            node_type = following["name"]
            there = len(self.non_terminated_nodes({TAG_RAY_USER_NODE_TYPE: node_type}))
            room = following["max_workers"] - there
            if room > 0:
                return following, room
        return None, 0


def order(config: dict[str, Any]) -> dict[str, str]:
    """Which worker type follows which, of those with the same resources, by priority.

    Args:
        config: content of a launcher file.
    """
    node_types = config["available_node_types"]
    workers = [name for name in node_types if name != config["head_node_type"]]
    workers.sort(key=lambda name: -node_types[name].get("priority", 0))
    following = {}
    for i, name in enumerate(workers):
        for other in workers[i + 1 :]:
            if node_types[other]["resources"] == node_types[name]["resources"]:
                following[name] = other
                break
    return following
