"""Figures that answer the questions of the experiments."""

from nflab.figures.agc import draw_agc
from nflab.figures.signals import draw_signals
from nflab.figures.sweep import draw_importances, draw_learning_curves, draw_top1
from nflab.figures.transfer import draw_transfer

__all__ = [
    "draw_agc",
    "draw_importances",
    "draw_learning_curves",
    "draw_signals",
    "draw_top1",
    "draw_transfer",
]
