"""Fine-tune pre-trained weights: a new classifier, a lower learning rate, and parts frozen at will.

Validation accuracy is measured before the first step (epoch 0) and after each epoch.

Example:
  python experiments/train.py --dataset digits:0-4 --name base
  python experiments/finetune.py --recipe digits_finetune --dataset digits:5-9 \
      --pretrained runs/base/checkpoints/epoch-000040/weights.pt --frozen stem stage1
"""

import _start  # noqa: F401

from nflab.settings import locations
from nflab.settings.config import Config
from nflab.settings.errors import ConfigError
from nflab.terminal import command_line
from nflab.terminal.wording import console


def main(config: Config, resume: bool) -> None:
    """Fine-tunes, then says what it gained."""
    from nflab.studies.training import run_training

    if config.model.pretrained is None:
        raise ConfigError("fine-tuning needs weights to start from: give --pretrained FILE or hub")
    result = run_training(config, "finetune", resume)
    if result.outcome == "diverged":
        raise SystemExit("error: the run diverged: a loss or a logit was not finite")
    if result.outcome != "finished":
        raise SystemExit(f"error: the run {result.outcome}:\n{result.error}\nlogs: {result.logs}")
    out = console()
    for metric, split in (("val_top1", "validation"), ("test_top1", "test")):
        before, after = (result.history[metric][place] for place in (0, -1))
        out.print(f"{split} top-1 {before:.2f} % before, {after:.2f} % after fine-tuning")
    out.print(f"Browse:  {locations.browse(config.run)}")


if __name__ == "__main__":
    command_line.main(Config, main, __doc__, recipe="finetune")
