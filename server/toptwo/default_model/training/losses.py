"""What training minimises: cross-entropy, divergence from the dense model, and uneven load.

The vocabulary is large: logits are made, used and dropped a slice of tokens at a time, with the gradient of
their input at once. The output matrix is frozen. Must not know layers, text or files.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional

SLICE = 256  # tokens

# logits [N, V] and the indices of their tokens -> (losses [N], gradients [N, V]); may overwrite the logits
Judge = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def cross_entropy(hidden_NH: Tensor, output_VH: Tensor, labels_N: Tensor) -> Tensor:
    """Of every token, nats [N]. Differentiable in what the output matrix sees."""

    def judge(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        labels = labels_N[index, None]
        log_p = logits - logits.logsumexp(1, keepdim=True)
        losses = -log_p.gather(1, labels)[:, 0]
        slope = log_p.exp_()
        slope.scatter_add_(1, labels, torch.full_like(losses, -1)[:, None])
        return losses, slope

    return _apply(hidden_NH, output_VH, judge)


def divergence(hidden_NH: Tensor, teacher_NH: Tensor, output_VH: Tensor) -> Tensor:
    """KL(teacher || student) of every token's next-token distribution, nats [N]."""

    def judge(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        log_p = logits - logits.logsumexp(1, keepdim=True)
        log_t = (teacher_NH[index] @ output_VH.T).float().log_softmax(1)
        teacher = log_t.exp()
        losses = (teacher * (log_t - log_p)).sum(1)
        return losses, log_p.exp_() - teacher

    return _apply(hidden_NH, output_VH, judge)


class _Head(torch.autograd.Function):
    """Losses [N] of tokens, slice by slice."""

    @staticmethod
    def forward(ctx: FunctionCtx, hidden_NH: Tensor, output_VH: Tensor, judge: Judge) -> Tensor:
        losses, slopes = [], []
        for index in torch.split(torch.arange(len(hidden_NH), device=hidden_NH.device), SLICE):
            loss, slope = judge((hidden_NH[index] @ output_VH.T).float(), index)
            losses.append(loss)
            slopes.append(slope.to(output_VH.dtype) @ output_VH)
        ctx.save_for_backward(torch.cat(slopes))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slope_NH,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return slope_NH * grads[0][:, None].to(slope_NH.dtype), None, None


def _apply(hidden_NH: Tensor, output_VH: Tensor, judge: Judge) -> Tensor:
    losses: Tensor = _Head.apply(hidden_NH, output_VH, judge)  # type: ignore[no-untyped-call]
    return losses


def load_balance(logits_NE: Tensor, top_k: int) -> Tensor:
    """1 where load and probability are even, E where one expert has it all (Switch, arXiv 2101.03961, eq. 4).

    [] from the logits of one layer.
    """
    num_experts = logits_NE.shape[1]
    chosen = functional.one_hot(logits_NE.topk(top_k).indices, num_experts).sum(1).float()
    return num_experts * (chosen.mean(0) / top_k * logits_NE.softmax(1).mean(0)).sum()
