"""How accurate are pre-trained weights on a dataset's test split?

Every image is resized and cropped as the model's authors do, and counts once, on any number of
workers. The result is recorded in MLflow and shown beside the published one.

Example:
  python experiments/evaluate.py --model dm_nfnet_f0 --pretrained hub --dataset imagenet/
"""

import _start  # noqa: F401

from nflab.analysis.published import NFNETS
from nflab.settings import locations
from nflab.settings.config import Config
from nflab.terminal import command_line
from nflab.terminal.wording import console


def main(config: Config, resume: bool) -> None:
    """Evaluates, then prints both accuracies."""
    from nflab.learning.evaluation import check_pretrained, evaluate_pretrained
    from nflab.studies.training import run_training

    check_pretrained(config)
    result = run_training(config, "evaluate", resume, evaluate_pretrained)
    if result.outcome == "failed":
        raise SystemExit(f"error: the evaluation failed:\n{result.error}\nlogs: {result.logs}")
    if result.outcome == "diverged":
        raise SystemExit("error: the network does not answer every image with finite logits")
    metrics, published = result.metrics, NFNETS.get(config.model.model)
    out = console()
    out.print(f"test top-1 {metrics['test_top1']:.2f} %, top-5 {metrics['test_top5']:.2f} %")
    if published is not None:
        out.print(f"published top-1 on ImageNet: {published} %")
    out.print(f"Browse:  {locations.browse(config.run)}")


if __name__ == "__main__":
    command_line.main(Config, main, __doc__, trains=False)
