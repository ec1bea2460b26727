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
    ValueError for a negative lr, eps or weight_decay, or betas outside [0, 1).
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
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        lr, betas, state = group["lr"], group["betas"], self.state[parameter]
        if not state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        state["step"] += 1
        correction1, correction2 = (1 - beta ** state["step"] for beta in betas)
        rows: Any = ...  # all of them, as a view
        if gradient.is_sparse:
            gradient = gradient.coalesce()
            rows, gradient = gradient.indices()[0], gradient.values()
        tensors = parameter, state["exp_avg"], state["exp_avg_sq"]
        weight, first, second = (tensor[rows] for tensor in tensors)
        weight.mul_(1 - lr * group["weight_decay"])
        first.lerp_(gradient, 1 - betas[0])
        second.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
        weight.addcdiv_(first, (second / correction2).sqrt_().add_(group["eps"]), value=-lr / correction1)
        for tensor, updated in zip(tensors, (weight, first, second), strict=True):
            if rows is not ...:
                tensor[rows] = updated


class OneCycle(OneCycleLR):
    """torch's OneCycleLR whose peak is the optimizer's learning rate; a Task gives its total_steps."""

    def __init__(self, optimizer: torch.optim.Optimizer, total_steps: int | None = None, **kwargs: Any) -> None:
        super().__init__(optimizer, [group["lr"] for group in optimizer.param_groups], total_steps, **kwargs)
