"""What every process that Ray starts for a run does first."""

import os


def point_at_own_cluster() -> None:
    """Names the cluster that this process is part of in its environment.

    Ray Train asks Ray's state service whether a run's controller lives, to free the workers of
    one that was ended; unless told, it may ask another cluster on the same machine, or none.
    """
    import ray

    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
