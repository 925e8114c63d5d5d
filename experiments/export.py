"""Write a trained network as an ONNX file or a torch.export program, checked against the original.

Example:
  python experiments/export.py runs/base/checkpoints/epoch-000040 base.onnx
"""

import argparse
from pathlib import Path

import _start  # noqa: F401


def main() -> None:
    """Exports, then says what was written."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="folder with weights.pt and model.json")
    parser.add_argument("file", type=Path, help="what to write: NAME.onnx or NAME.pt2")
    asked = parser.parse_args()

    import nfnet
    from nflab.learning.classifier import ImageClassifier

    exports = {".onnx": nfnet.export_onnx, ".pt2": nfnet.export_torch}
    if asked.file.suffix not in exports:
        raise SystemExit(f"error: {asked.file} must end in .onnx or .pt2")
    try:
        classifier = ImageClassifier(asked.checkpoint)
        _, height, width = classifier.image_shape
        exports[asked.file.suffix](classifier.model, asked.file, (height, width))
    except (OSError, ValueError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from None
    print(
        f"{asked.file}: images (N, {', '.join(map(str, classifier.image_shape))}), "
        f"logits (N, {len(classifier.class_names)})"
    )


if __name__ == "__main__":
    main()
