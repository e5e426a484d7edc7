"""Batch norm over the global batch: the statistics, and so the loss curve, do not depend on the number of workers.

`torch.nn.SyncBatchNorm` refuses tensors on a CPU. This one runs on both, and agrees with batch norm in one process on the
whole batch (Ioffe and Szegedy, Batch Normalization, ICML 2015, section 3; variances are combined as in Chan, Golub and
LeVeque, 1979), in the forward pass, the gradient and the running statistics. Workers may hold different numbers of images.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class GlobalBatchNorm(nn.BatchNorm2d):
    """Batch norm of (B,C,H,W) over all workers in training, and the usual one in evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        return torch.as_tensor(_Normalise.apply(x, self.weight, self.bias, self))


class _Normalise(torch.autograd.Function):
    """Forward and backward pass with one exchange of 2 C numbers each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, module: GlobalBatchNorm) -> Tensor:
        # Of each image in float32, over the images in float64: so the sum does not depend on who has which image.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        means, variances = _moments(wide)
        images = torch.full_like(means[0], x.shape[0])
        mean, square, images = _sum(torch.stack([means.sum(0), (variances + means.square()).sum(0), images]))
        mean, square = mean / images, square / images
        variance = (square - mean.square()).clamp(min=0).to(weight.dtype)
        mean = mean.to(weight.dtype)
        count = images[0] * (x.shape[2] * x.shape[3])
        with torch.no_grad():
            assert module.running_mean is not None and module.running_var is not None and module.momentum is not None
            module.running_mean.lerp_(mean, module.momentum)
            module.running_var.lerp_(variance * (count / (count - 1).clamp(min=1)).to(weight.dtype), module.momentum)
            if module.num_batches_tracked is not None:
                module.num_batches_tracked.add_(1)
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.eps, ctx.count = module.eps, count
        return nn.functional.batch_norm(x, mean, variance, weight, bias, training=False, eps=module.eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, variance = ctx.saved_tensors
        inverse = torch.rsqrt(variance + ctx.eps)
        # As if the statistics were constants; what they owe to x follows below.
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        sums = _sum(torch.stack([dbias, dweight]).double())
        mean_grad, mean_product = (sums / ctx.count).to(weight.dtype)
        # dx -= w s (mean(g) + x_hat mean(g x_hat)), written as an affine function of x
        slope = weight * inverse.square() * mean_product
        offset = weight * inverse * mean_grad - slope * mean
        slope, offset = slope[:, None, None], offset[:, None, None]
        if dx.dtype == slope.dtype:
            dx.addcmul_(x, slope, value=-1).sub_(offset)
        else:  # slope x and offset nearly cancel, which must not happen in half precision
            dx -= (slope * x + offset).to(dx.dtype)
        return dx, dweight, dbias, None


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """(B,C) mean and variance over the pixels of each image, in float64.

    In two passes, so that a large mean costs no digits: as exact as `torch.var_mean`, which on a CPU takes five times as long
    (it walks channels-last tensors one number at a time).
    """
    means = x.mean((2, 3))
    centred = x - means[:, :, None, None]
    return means.double(), centred.square_().mean((2, 3)).double()


def _sum(tensor: Tensor) -> Tensor:
    """Add up over all workers, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def share_statistics(module: nn.Module) -> nn.Module:
    """Replace each batch norm in the module; parameters and buffers stay the same tensors. Returns the module."""
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d:
            setattr(module, name, _shared(child))
        else:
            share_statistics(child)
    return module


def _shared(own: nn.BatchNorm2d) -> GlobalBatchNorm:
    new = GlobalBatchNorm(own.num_features, own.eps, own.momentum)
    new.weight, new.bias = own.weight, own.bias
    new.running_mean, new.running_var, new.num_batches_tracked = (
        own.running_mean,
        own.running_var,
        own.num_batches_tracked,
    )
    return new.train(own.training)
