"""An optimizer for gradients that hold a few rows, and a one-cycle schedule that asks the optimizer for its peak."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR


class LazyAdamW(torch.optim.Optimizer):
    """AdamW that, for a sparse gradient, reads and writes only the rows which the gradient holds.

    The moments and the weight decay of a row wait while it is not used ("lazy" Adam, as torch.optim.SparseAdam, which
    takes neither dense gradients beside sparse ones nor weight decay). Dense gradients are treated as by AdamW.

    Args:
        params: parameters or groups.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled, of the rows that are updated.

    Raises:
        ValueError: a negative lr, eps or weight_decay, or betas outside [0, 1).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"{name} is {value}; it must not be negative")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas are {betas}; they must be in [0, 1)")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; returns the closure's loss if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        correction1, correction2 = 1 - beta1 ** state["step"], 1 - beta2 ** state["step"]
        tensors = parameter, state["exp_avg"], state["exp_avg_sq"]
        gradient = parameter.grad
        assert gradient is not None
        rows = None
        if gradient.is_sparse:
            gradient = gradient.coalesce()
            rows, gradient = gradient.indices()[0], gradient.values()
        weight, first, second = tensors if rows is None else (tensor[rows] for tensor in tensors)
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (second / correction2).sqrt_().add_(group["eps"])
        weight.addcdiv_(first, root, value=-group["lr"] / correction1)
        if rows is not None:
            for tensor, updated in zip(tensors, (weight, first, second), strict=True):
                tensor[rows] = updated


class OneCycle(OneCycleLR):
    """torch's OneCycleLR whose peak is the learning rate of the optimizer, which so stands in one place.

    Args:
        optimizer: with the peak learning rate of each group.
        total_steps: length of the cycle; a Task gives that of the training.
        kwargs: see OneCycleLR; all but max_lr.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, total_steps: int | None = None, **kwargs: Any) -> None:
        peaks = [group["lr"] for group in optimizer.param_groups]
        super().__init__(optimizer, max_lr=peaks, total_steps=total_steps, **kwargs)
