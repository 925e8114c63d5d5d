"""What others have published."""

NFNETS = {
    f"dm_nfnet_f{n}": top1 for n, top1 in enumerate((83.6, 84.7, 85.1, 85.7, 85.9, 86.0, 86.5))
}
"""Top-1 in percent on ImageNet (arXiv 2102.06171, table 3; F6 with SAM)."""

EFFICIENTNETS = {
    f"efficientnet_b{n}": top1
    for n, top1 in enumerate((77.1, 79.1, 80.1, 81.6, 82.9, 83.6, 84.0, 84.3))
}
"""Likewise (arXiv 1905.11946, table 2)."""
