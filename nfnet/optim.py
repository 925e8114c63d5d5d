"""Stochastic gradient descent with adaptive gradient clipping, and its parameter groups."""

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, cast, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.sgd import sgd

from nfnet.agc import adaptive_clip_grad_
from nfnet.model import ResNet, layer_group

_PART_BYTES = 2 << 20  # with gradients and momenta three times as much


class SGD_AGC(Optimizer):
    """SGD with Nesterov momentum that first clips each unit's gradient.

    One step of a parameter p with gradient g, in the authors' order:
    `g = clip(g) + weight_decay * p; m = momentum * m + g; p -= lr * (g + momentum * m)`
    (`p -= lr * m` without Nesterov), with m = 0 before the first step. Clipping writes to
    `p.grad`. Every setting can be given per parameter group, and `lr_factor`, which there
    multiplies the learning rate; see `param_groups`.

    Args:
        params: parameters, or groups of them as dictionaries.
        lr: learning rate.
        momentum: momentum, in [0, 1).
        nesterov: whether to look one step ahead.
        weight_decay: factor of the weights that is added to their gradient after clipping.
        clipping: largest allowed ratio of a unit's gradient norm to its weight norm; None
            turns clipping off.
        eps: lower bound of the weight norm in that ratio.

    Attributes:
        clipped_fraction: for each clipped parameter of the last step, the share of its units
            whose gradient was scaled down, as a 0-d tensor.
        ratios: None, or a dictionary that every step fills anew with what clipping compares with
            its threshold, as `adaptive_clip_grad_` describes it.

    Raises:
        ValueError: a setting is out of its range.

    Source: arXiv 2102.06171, section 4.1; Sutskever et al., ICML 2013 (Nesterov momentum).
    """

    clipped_fraction: dict[Tensor, Tensor]
    ratios: dict[Tensor, Tensor] | None

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.9,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        clipping: float | None = 0.01,
        eps: float = 1e-3,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "clipping": clipping,
            "eps": eps,
            "lr_factor": 1.0,
        }
        self.clipped_fraction = {}
        self.ratios = None
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; settings it does not name take the optimizer's own."""
        _check_settings({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # of a state from before there were factors
            group.setdefault("lr_factor", 1.0)
        self.clipped_fraction = {}
        self.ratios = None

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step.

        Args:
            closure: computes the gradients and returns the loss, if the caller has not.

        Returns:
            The closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.clipped_fraction.clear()  # a new one would be lost where this is compiled
        if self.ratios is not None:
            self.ratios.clear()
        for group in self.param_groups:
            for params in _parts([p for p in group["params"] if p.grad is not None]):
                self._step_part(params, group)
        return loss

    def _step_part(self, params: list[Tensor], group: dict[str, Any]) -> None:
        if group["clipping"] is not None:
            shares = adaptive_clip_grad_(params, group["clipping"], group["eps"], self.ratios)
            self.clipped_fraction.update(zip(params, shares, strict=True))
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        updated = [_local(p) for p in params]
        grads = [_local(cast(Tensor, p.grad)) for p in params]
        momenta: list[Tensor | None] = [_local(self.state[p]["momentum_buffer"]) for p in params]
        fused = all(map(_lie_alike, updated, grads, momenta))
        if not fused:
            grads = [grad.clone() for grad in grads]  # which torch's other way writes to
        sgd(
            updated,
            grads,
            momenta,
            fused=fused,
            foreach=not fused,
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"] * group["lr_factor"],
            dampening=0.0,
            nesterov=group["nesterov"],
            maximize=False,
        )


def _parts(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """A group's parameters in runs that stay in a CPU's cache from the first pass over them to
    the last; elsewhere all at once, in few launches."""
    part: list[Tensor] = []
    size = 0
    for p in params:
        if part and p.device.type == "cpu" and size + p.nbytes > _PART_BYTES:
            yield part
            part, size = [], 0
        part.append(p)
        size += p.nbytes
    if part:
        yield part


def _lie_alike(p: Tensor, grad: Tensor, momentum: Tensor | None) -> bool:
    """Whether element n of each is the same one in the order of memory, in which torch's fused
    update goes through them whatever their strides are."""
    last = p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last)
    dense = last or p.is_contiguous()
    return dense and momentum is not None and _strides(p) == _strides(grad) == _strides(momentum)


def _strides(x: Tensor) -> list[int]:
    """Those that say where an element is: of an axis of one the stride says nothing."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def _local(x: Tensor) -> Tensor:
    """What this process holds of a tensor that is sharded (a DTensor, whose module takes long to
    import); the update is elementwise."""
    held: Tensor = x.to_local() if hasattr(x, "to_local") else x
    return held


def _check_settings(settings: dict[str, Any]) -> None:
    for name in ("lr", "weight_decay", "eps"):
        if not settings[name] >= 0:
            raise ValueError(
                f"{name} is {settings[name]}, expected 0 or more; choose such a number."
            )
    if not 0 <= settings["momentum"] < 1:
        raise ValueError(
            f"momentum is {settings['momentum']}, expected a number in [0, 1); 0.9 is usual."
        )
    if settings["clipping"] is not None and not settings["clipping"] > 0:
        raise ValueError(
            f"clipping is {settings['clipping']}, expected a number above 0; "
            "pass None to turn clipping off."
        )


def param_groups(
    model: nn.Module,
    weight_decay: float,
    clipping: float | None,
    unclipped: Collection[str] = ("head",),
    layer_decay: float = 1.0,
    classifier: str = "head.fc",
) -> list[dict[str, Any]]:
    """Split a model's parameters into the paper's three groups.

    Args:
        model: a model from `create_model`, or any other whose classifier is named.
        weight_decay: for weights; gains, biases and norm parameters get none.
        clipping: for everything but the unclipped parts; None turns clipping off everywhere.
        unclipped: parts of the network, as `layer_group` names them, that are not clipped; of the
            head that is the classifier's weight, for the authors clip its bias. Of another model
            "head" is its classifier, and there are no other parts.
        layer_decay: factor of the learning rate from each block of the network to the one before
            it, in (0, 1]; the classifier's is 1. Each layer then has groups of its own.
        classifier: name of the module whose weight is the classifier's.

    Returns:
        Groups for `SGD_AGC`: gains, biases and norm parameters (clipped, not decayed), unclipped
        weights (decayed; by default the classifier's), every other weight (both); then, if there
        are any, the gains and biases of unclipped stages and the like. Parameters that need no
        gradient are left out.

    Raises:
        ValueError: the model has no such classifier, or `layer_decay` is out of its range.

    Source: arXiv 2102.06171, sections 4.1 and 5, and the authors' code.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay is {layer_decay}, expected a number in (0, 1]; 1 is none.")
    if clipping is None:
        unclipped = ("head",)  # one way to split what is not clipped anyway
    parameters = dict(model.named_parameters())
    if f"{classifier}.weight" not in parameters:
        raise ValueError(
            f"{type(model).__name__} has no parameter {classifier}.weight, expected one, since the "
            "classifier's weight must not be clipped; say what it is called with classifier=..."
        )
    if not isinstance(model, ResNet) and set(unclipped) - {"head"}:
        raise ValueError(
            f"unclipped is {tuple(unclipped)}, expected ('head',) or (): the parts of a "
            f"{type(model).__name__} are not known."
        )
    layers = list(dict.fromkeys(_layer(name, classifier) for name in parameters))
    layers = [*(layer for layer in layers if layer != classifier), classifier]
    factors = {layer: layer_decay**n for n, layer in enumerate(reversed(layers))}
    # A state that is loaded expects the three, with or without parameters.
    members: dict[tuple[int, float], list[Tensor]] = {
        (kind, 1.0): [] for kind in (_VECTORS, _FREE_WEIGHTS, _WEIGHTS) if layer_decay == 1
    }
    for name, p in parameters.items():
        if not p.requires_grad:
            continue
        part = _part(model, name, classifier)
        free = part in unclipped
        if p.ndim <= 1 or name.endswith(".gain"):
            kind = _FREE_VECTORS if free and part != "head" else _VECTORS
        else:
            kind = _FREE_WEIGHTS if free else _WEIGHTS
        members.setdefault((kind, factors[_layer(name, classifier)]), []).append(p)
    return [
        {
            "params": params,
            "weight_decay": weight_decay if kind in (_WEIGHTS, _FREE_WEIGHTS) else 0.0,
            "clipping": clipping if kind in (_VECTORS, _WEIGHTS) else None,
            "lr_factor": factor,
        }
        for (kind, factor), params in sorted(members.items(), key=lambda one: one[0])
    ]


# In the order of their groups.
_VECTORS, _FREE_WEIGHTS, _WEIGHTS, _FREE_VECTORS = range(4)


def _part(model: nn.Module, name: str, classifier: str) -> str:
    """The part of the network that `unclipped` may name."""
    if isinstance(model, ResNet):
        return layer_group(name)
    return "head" if name.startswith(f"{classifier}.") else ""


def _layer(name: str, classifier: str) -> str:
    """The block that a parameter is in: its name up to its first numbers, as `layer1.0` or
    `stages.0.1`, else its first word."""
    if name.startswith(f"{classifier}."):
        return classifier
    words = name.split(".")
    end = next((place for place, word in enumerate(words) if word.isdecimal()), 0)
    while end + 1 < len(words) and words[end + 1].isdecimal():
        end += 1
    return ".".join(words[: end + 1])
