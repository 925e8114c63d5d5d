"""Does the signal keep its size through a network at initialisation?

Draws signal propagation plots (arXiv 2101.08692, section 2.1): mean and variance of the features
at every block, for unit normal noise, with skip gains at 1, beside what the network's betas expect.

Example:
  python experiments/signal_propagation.py dm_nf_resnet50 preact_resnet50 dm_nfnet_f0
"""

import argparse
from pathlib import Path

import _start  # noqa: F401


def main() -> None:
    """Measures, draws, and says where the figure is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", help="names, as nfnet.list_models() lists them")
    parser.add_argument("--image-size", type=int, default=128, help="pixels along each side")
    parser.add_argument("--images", type=int, default=8, help="images of noise")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("signal_propagation.png"))
    asked = parser.parse_args()

    import torch

    import nfnet
    from nflab.analysis.figures import draw_signals

    signals = {}
    for name in asked.models:
        torch.manual_seed(asked.seed)
        try:
            model = nfnet.create_model(name)
            channels = model.variant.in_channels
            noise = torch.randn(asked.images, channels, asked.image_size, asked.image_size)
            signals[name] = nfnet.signal_propagation(model, noise)
        except ValueError as error:
            raise SystemExit(f"error: {error}") from None
        print(f"{name}: {len(signals[name])} blocks")
    draw_signals(signals, asked.out)
    print(f"Figure: {asked.out}")


if __name__ == "__main__":
    main()
