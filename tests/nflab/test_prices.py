"""The table of prices."""

from nflab.cluster import prices

CAPABILITY = {"T4": 7.5, "A100": 8.0, "A10G": 8.6, "L4": 8.9, "L40S": 8.9, "H100": 9.0, "V100": 7.0}
"""Of each GPU, from https://developer.nvidia.com/cuda-gpus."""


def test_every_gpu_of_the_table_is_one_that_the_pinned_torch_can_use() -> None:
    gpus = {row["gpu"].split()[0] for row in prices._table().values() if row["gpu"]}
    assert gpus
    assert {gpu for gpu in gpus if CAPABILITY[gpu] < 7.5} == set()
