"""AWS for Ray's cluster launcher, going on to the next kind of machine when one is not to be had.

Ray's own provider asks for the worker type of the highest `priority` again and again, whatever AWS
answers: its autoscaler puts a type back only if machines came and never joined. This one, refused,
launches at once the type that follows, of those with the same resources, in the order of priority.
A launcher file names it as `provider: {type: external, module: nflab.aws.Provider}`.
"""

import copy
import time
from typing import Any

from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import hash_launch_conf
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.tags import TAG_RAY_LAUNCH_CONFIG, TAG_RAY_USER_NODE_TYPE

from nflab.waiting import Refusal, note_refusal

VISIBLE_SECONDS = 5.0
"""Until a machine that was launched stands in AWS's lists."""

_NEXT = "next_node_types"


class Provider(AWSNodeProvider):
    """Launches and ends the machines of a cluster."""

    def prepare_for_head_node(self, cluster_config: dict[str, Any]) -> dict[str, Any]:
        """Tells the head, whose autoscaler launches workers, which type follows which."""
        config = copy.deepcopy(cluster_config)
        config["provider"][_NEXT] = {
            name: {
                "name": following,
                "node_config": config["available_node_types"][following]["node_config"],
                "auth": config["auth"],
            }
            for name, following in order(config).items()
        }
        return config

    def create_node(
        self, node_config: dict[str, Any], tags: dict[str, str], count: int
    ) -> dict[str, Any]:
        """Launches `count` machines, or as many of the type that follows.

        Raises:
            NodeLaunchException: AWS refused the type. If the following one was launched in its
                place, the autoscaler finds those machines by itself.
        """
        try:
            return dict(super().create_node(node_config, tags, count))
        except NodeLaunchException as refused:
            node_type = tags.get(TAG_RAY_USER_NODE_TYPE, "")
            following = self.provider_config.get(_NEXT, {}).get(node_type)
            # What AWS encodes after this is another each time.
            told = refused.description.split(" Encoded authorization failure")[0]
            reason = f"{refused.category}: {told}".rstrip(".")
            name = None if following is None else following["name"]
            note_refusal(Refusal(time.time(), node_type, reason, name))
            if following is None:
                raise
            instead = {
                **tags,
                TAG_RAY_USER_NODE_TYPE: following["name"],
                TAG_RAY_LAUNCH_CONFIG: hash_launch_conf(
                    following["node_config"], following["auth"]
                ),
            }
            self.create_node(following["node_config"], instead, count)
            # Had the autoscaler the refusal before it sees the machines, it would ask for more.
            time.sleep(VISIBLE_SECONDS)
            raise


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
