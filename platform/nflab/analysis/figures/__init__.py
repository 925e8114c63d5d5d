"""Figures that answer the questions of the experiments."""

from nflab.analysis.figures.agc import draw_agc
from nflab.analysis.figures.contact_sheet import draw_contact_sheet
from nflab.analysis.figures.front import draw_front
from nflab.analysis.figures.latency import draw_latency
from nflab.analysis.figures.search import draw_map, draw_parallel, draw_slices
from nflab.analysis.figures.signals import draw_signals
from nflab.analysis.figures.sweep import draw_importances, draw_learning_curves, draw_top1
from nflab.analysis.figures.transfer import draw_transfer

__all__ = [
    "draw_agc",
    "draw_contact_sheet",
    "draw_front",
    "draw_importances",
    "draw_latency",
    "draw_learning_curves",
    "draw_map",
    "draw_parallel",
    "draw_signals",
    "draw_slices",
    "draw_top1",
    "draw_transfer",
]
