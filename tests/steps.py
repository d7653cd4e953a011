"""Parameters, gradients and options of the AdamW tests."""

import torch

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [FP32, BF16, FP16]

OPTIONS = {
    "defaults": {},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "amsgrad and maximize": {"amsgrad": True, "maximize": True},
    "no decay": {"weight_decay": 0.0},
    "no momentum": {"betas": (0.0, 0.0)},
    "everything": {"lr": 0.3, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.5, "amsgrad": True, "maximize": True},
    "lr is a tensor": {"lr": torch.tensor(0.05)},
    "lr is 0": {"lr": 0.0},
}


def make(shapes, dtype=FP32, device="cpu"):
    return [torch.randn(shape).to(device, dtype).requires_grad_() for shape in shapes]


def clone(params):
    return [p.detach().clone().requires_grad_(p.requires_grad) for p in params]


def train(optimizer, params, steps, seed=1, first=0):
    """Steps with gradients that depend on the step's number only. Every third step has small ones."""
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(1000 * seed + step)
        for p in params:
            g = torch.randn(p.shape, generator=generator) * (1e-3 if step % 3 == 2 else 1)
            p.grad = g.to(p.device, p.dtype) if p.requires_grad else None
        optimizer.step()


def assert_equal(got, expected, what="parameter"):
    for i, (x, y) in enumerate(zip(got, expected, strict=True)):
        differ = (x != y).sum().item()
        assert differ == 0, f"{what} {i} of shape {list(x.shape)} differs in {differ} elements"
