"""What every process that Ray starts for a run does first."""

import gc
import os


def set_up_worker() -> None:
    """Names the cluster that this process is part of in its environment, and lets it import fast.

    Ray Train asks Ray's state service whether a run's controller lives, to free the workers of
    one that was ended; unless told, it may ask another cluster on the same machine, or none.
    """
    import ray

    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    # Else Ray Train logs each printed line, too, and the run's log has it twice.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    # What is imported is no garbage; it was searched for a sixth of the imports' time.
    gc.set_threshold(20_000)
