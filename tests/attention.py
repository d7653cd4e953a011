"""What the tests of flash_attention share: inputs, masks, and the rule of oracle.py with the floors of attention."""

import itertools

import oracle
import pytest
import torch
from oracle import LAYOUTS

from fusetune.ops import flash_attention, flash_attention_reference
from fusetune.ops.philox import kept_scale

OP = "flash_attention"
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
float32 = pytest.mark.beyond_cuda("float32")
LARGE = [pytest.mark.large, pytest.mark.large_on_host]
DTYPES = [pytest.param(FP32, marks=float32), BF16, FP16]


def cases(small, large):
    """Rows of arguments of a test, of which the interpreters are spared the large ones."""
    return [pytest.param(*case) for case in small] + [pytest.param(*case, marks=LARGE) for case in large]


def with_dtypes(small, large=()):
    """The same with a dtype as one more argument. Small rows are of float16, which all backends take, and on the CPU
    and on GPUs of another dtype too. Large rows take turns, the first in bfloat16 on the CUDA harness as well."""

    def with_dtype(row, dtype, marks):
        marks = [*marks, *([float32] if dtype == FP32 else [])]
        return pytest.param(*row, dtype, marks=marks, id="-".join(map(str, (*row, dtype))))

    found = [with_dtype(row, FP16, []) for row in small]
    found += [with_dtype(row, (FP32, BF16)[n % 2], LARGE) for n, row in enumerate(small)]
    for n, row in enumerate(large):
        found.append(with_dtype(row, (BF16, FP16, FP32)[n % 3], LARGE if n else LARGE[:1]))
    return found


def cross(rows, *axes):
    """Every row with every combination of further arguments."""
    return [(*row, *rest) for row, *rest in itertools.product(rows, *axes)]


def make(shape, dtype=FP32, device="cpu", layout=None):
    """q, k, v and a gradient, normally distributed. shape: B, H, Hkv, Sq, Sk, D and, if another, Dv."""
    B, H, Hkv, Sq, Sk, D, *rest = shape
    (Dv,) = rest or [D]
    sizes = [(H, Sq, D), (Hkv, Sk, D), (Hkv, Sk, Dv), (H, Sq, Dv)]
    q, k, v, do = (torch.randn(B, *size).to(device, dtype) for size in sizes)
    if layout == "bshd":
        q, k, v, do = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v, do))
    elif layout == "packed":
        q, k, v = torch.stack([t.transpose(1, 2) for t in (q, k, v)], dim=2).permute(2, 0, 3, 1, 4)
    elif layout == "expanded":
        k, v = (t[:, :1].expand(t.shape) for t in (k, v))
        do = torch.randn(1, device=device, dtype=dtype).expand(do.shape)
    elif layout:
        q, k, v, do = (LAYOUTS[layout](t) for t in (q, k, v, do))
    return {name: t.requires_grad_() for name, t in {"q": q, "k": k, "v": v}.items()}, do


def padding(kind, B, Sk, device="cpu"):
    """[B, Sk] True where a key is kept."""
    j, length = torch.arange(Sk, device=device), torch.arange(1, B + 1, device=device)[:, None] * Sk // (B + 1)
    return {
        "left": j >= length,
        "right": j < length,
        "scattered": torch.rand(B, Sk, device=device) < 0.5,
        "one sequence has none": (j >= 0) & (length > Sk // (B + 1)),
        "none": torch.zeros(B, Sk, dtype=torch.bool, device=device),
        "all": torch.ones(B, Sk, dtype=torch.bool, device=device),
        "expanded": (j % 3 > 0)[None].expand(B, Sk),
        "transposed": (j[:, None] % (length.T + 1) > 0).T,
    }[kind]


def visible(Sq, Sk, *, causal=False, window=(None, None), align="bottom_right"):
    """[Sq, Sk] True where a query sees a key by its position, element by element."""
    left, right = window
    seen = torch.zeros(Sq, Sk, dtype=torch.bool)
    for i in range(Sq):
        position = i + Sk - Sq if align == "bottom_right" else i
        for j in range(Sk):
            behind = position - j
            seen[i, j] = (
                (not causal or behind >= 0) and (left is None or behind <= left) and (right is None or -behind <= right)
            )
    return seen


def with_lse(attend):
    """`attend` with the log-sum-exp as one more column of its result, where a query sees a key."""

    def both(*tensors, **options):
        o, lse = attend(*tensors, **options, return_lse=True)
        return torch.cat([o, lse.masked_fill(lse.isinf(), 0)[..., None].to(o.dtype)], dim=-1)

    return both


def cancelled(inputs, do, large_logits=False, dropout_p=0.0, **options):
    """Floors for float32 terms that cancel in dS = P (dP - D), P = exp(logit - lse), beyond roundings of the result.

    dP_ij = z do_i.v_j, z = 1/(1-p), and its average D_i over the keys are each right to a rounding (eps/2) of their
    largest possible size z |do_i| max_j |v_j|, and D_i to one of the gradient dlse_i that is taken off it, though
    dP - D may be far smaller. With their sum e_i = eps (z |do_i| max_j |v_j| + |dlse_i|), and P's rows adding up to 1,

        error of dq_id <= scale sum_j P_ij e_i |k_jd| <= scale e_i max_j |k_jd|
        error of dk_jd <= scale sum_i P_ij e_i |q_id|, over the queries of all heads that read key j
        error of a bias's gradient <= sum of P_ij e_i over the elements that it is added to.

    Of 16-bit tensors, D is of a result that is made of rounded weights and rounded once more, off by up to twice half
    of their eps of z sum_jd P_ij |do_id v_jd|. Where the sum of a bias's gradient cancels, its e_i is larger by that.

    Where logits are large, a rounding of lse, which is one float32 of a size L_i = |lse_i|, is a relative error
    eps/2 L_i of P, where plain torch may have none. As |dP - D| <= 2 z |do_i| max_j |v_j| this makes e_i larger by the
    factor 1 + L_i, and

        error of dv_jd <= eps/2 z sum_i P_ij L_i |do_id|.
    """
    tensors = {name: t.detach().double() for name, t in inputs.items()}
    q, k, v, do = tensors.pop("q"), tensors.pop("k"), tensors.pop("v"), do.detach().double()
    if not all(t.numel() for t in (q, k, v)):
        return {}
    (B, H, _, D), (_, Hkv, Sk, Dv) = q.shape, v.shape
    scale = D**-0.5 if options.get("scale") is None else abs(options["scale"])
    eps, z = torch.finfo(torch.float32).eps, kept_scale(dropout_p)
    eye = torch.eye(Sk).to(k).expand(B, Hkv, Sk, Sk)
    P, lse = flash_attention_reference(q, k, eye, **tensors, **options, return_lse=True)
    k, v = (t.repeat_interleave(H // Hkv, dim=1) for t in (k, v))
    do, dlse = do[..., :Dv], do[..., Dv:].abs().sum(-1, keepdim=True)
    L = lse.masked_fill(lse.isinf(), 0).abs()[..., None] if large_logits else 0
    e = eps * (z * do.norm(dim=-1, keepdim=True) * v.norm(dim=-1).amax(-1)[..., None, None] + dlse) * (1 + L)

    def of_key(rows):  # sum_i P_ij rows_id
        return (P.mT @ rows).view(B, Hkv, -1, Sk, rows.shape[-1]).sum(2).max().item()

    floors = {
        "dq": scale * (e * k.abs().amax((2, 3), keepdim=True)).max().item(),
        "dk": scale * of_key(e * q.abs()),
        "dv": eps / 2 * z * of_key(L * do.abs()),
    }
    if inputs["q"].dtype != FP32:
        e = e + torch.finfo(inputs["q"].dtype).eps * z * (do.abs() * (P @ v.abs())).sum(-1, keepdim=True)
    if "bias" in tensors:
        bias = tensors["bias"]
        bias = bias[(None,) * (4 - bias.dim())]
        floors["dbias"] = (P * e).sum_to_size(bias.shape).max().item()
    if "relative_bias" in tensors:  # no diagonal sums to more than all of its head
        floors["drelative_bias"] = (P * e).sum((0, 2, 3)).max().item()
    if "sinks" in tensors:
        floors["dsinks"] = e.sum((0, 2, 3)).max().item()
    return floors


def compare(inputs, do, *, lse=False, plain=None, large_logits=False, **options):
    """Judges flash_attention's result and gradients, gives them.

    Args:
        inputs: tensors by the names of the op's arguments; gradients are taken of those that require them.
        do: the result's gradient.
        lse: whether to use the log-sum-exp as well, by a gradient of its own.
        plain: of the inputs, what to judge by in place of the reference in low precision.
        large_logits: whether a rounding of the log-sum-exp counts.
        options: of the op.
    """
    op, reference = flash_attention, flash_attention_reference
    if lse:
        op, reference = with_lse(op), with_lse(reference)
        do = torch.cat([do, torch.randn_like(do[..., :1])], dim=-1)
    floors = cancelled(inputs, do, large_logits, **options)
    loose = ["out", *(f"d{name}" for name in inputs)] if options.get("softcap") else ["dbias", "drelative_bias"]
    factors = dict.fromkeys(loose, 3.0)
    return oracle.compare(op, reference, inputs, do, plain=plain, cancelled=floors, factors=factors, **options)
