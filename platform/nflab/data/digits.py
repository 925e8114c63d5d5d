"""scikit-learn's handwritten digits: 1797 real 8x8 grey images of 43 writers, embedded."""

import hashlib
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

import nfnet
from nflab.data.dataset import Split


class Digits:
    """Implements `Dataset`. In order of occurrence, of every five images of a class the first is a
    test image, the second a validation image and the rest are for training: splits that depend
    on no library's random generator and hold all classes alike."""

    num_classes = 10
    image_shape = (1, 8, 8)

    def __init__(self) -> None:
        bunch = load_digits()
        # The file's grey levels are 0..16.
        images = torch.from_numpy(bunch.images)[:, None] * (255 / 16)
        images_NCHW, labels_N = images.round().to(torch.uint8), torch.from_numpy(bunch.target)
        nth_of_class_N = torch.zeros_like(labels_N)
        for label in range(self.num_classes):
            of_class = labels_N == label
            nth_of_class_N[of_class] = torch.arange(int(of_class.sum()))
        fold_N = nth_of_class_N % 5
        members: dict[Split, Tensor] = {
            "train": fold_N > 1,
            "val": fold_N == 1,
            "test": fold_N == 0,
        }
        self._splits = {split: (images_NCHW[m], labels_N[m]) for split, m in members.items()}
        self.sizes: Mapping[Split, int] = {
            split: len(labels) for split, (_, labels) in self._splits.items()
        }
        train = self._splits["train"][0].double() / 255
        self.mean, self.std = (s.float() for s in (train.mean((0, 2, 3)), train.std((0, 2, 3))))
        digest = hashlib.sha256()
        for split_images, split_labels in self._splits.values():
            digest.update(split_images.numpy().tobytes() + split_labels.numpy().tobytes())
        self.fingerprint = digest.hexdigest()[:16]

    def train_images(self, indices_N: Tensor, keys_N: Tensor) -> tuple[Tensor, Tensor]:
        """Images shifted by up to one pixel each way (no flips: a mirrored 2 is no 2)."""
        images, labels = self._splits["train"]
        padded = F.pad(images[indices_N], (1, 1, 1, 1))
        shift_2N = (3 * nfnet.uniform(nfnet.hash_keys(keys_N, torch.tensor([[0], [1]])))).long()
        rows_NHW = (shift_2N[0][:, None] + torch.arange(8))[:, :, None]
        columns_NHW = (shift_2N[1][:, None] + torch.arange(8))[:, None, :]
        items_N = torch.arange(len(indices_N))[:, None, None]
        return padded[:, 0][items_N, rows_NHW, columns_NHW][:, None], labels[indices_N]

    def eval_images(self, split: Split, indices_N: Tensor) -> tuple[Tensor, Tensor]:
        """The images as they are."""
        images, labels = self._splits[split]
        return images[indices_N], labels[indices_N]
