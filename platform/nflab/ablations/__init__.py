"""What grids of runs say: from the rows of their cells to tables, sentences and figures.

Each module answers one question of the paper, at any time after the runs, from MLflow's rows alone.
"""

from nflab.ablations.findings import Findings, groups

__all__ = ["Findings", "groups"]
