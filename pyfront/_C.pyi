"""Launchers of the compiled kernels. Addresses and sizes are integers; the contracts are the headers in csrc/."""

with_cuda: bool
cuda_archs: str
compiler: str

def isa() -> str: ...
def isa_built() -> list[str]: ...
def isa_available() -> list[str]: ...
def set_isa(level: str) -> None: ...
def read_tensors(
    api: object, tensor: object, parameter: object, objects: list[object], out: int, room: int
) -> bool: ...
def lora_forward(
    x: int,
    s: int,
    adapters: int,
    factors: int,
    adapter_count: int,
    projections: int,
    projection_count: int,
    M: int,
    K: int,
    x_row: int,
    dtype: int,
    adapter_dtype: int,
    y_dtype: int,
    fast: bool,
    threads: int,
) -> None: ...
def lora_backward(
    x: int,
    s: int,
    dx0: int,
    adapters: int,
    factors: int,
    adapter_count: int,
    projections: int,
    projection_count: int,
    M: int,
    K: int,
    x_row: int,
    dtype: int,
    adapter_dtype: int,
    dx_dtype: int,
    fast: bool,
    threads: int,
) -> None: ...
def dora_norm(
    w: int,
    a: int,
    b: int,
    norm: int,
    N: int,
    K: int,
    R: int,
    w_row: int,
    w_col: int,
    scale: float,
    dtype: int,
    adapter_dtype: int,
    threads: int,
) -> None: ...
def dora_forward(pre: int, g: int, bias: int, rest: int, y: int, M: int, N: int, dtype: int, threads: int) -> None: ...
def dora_backward(
    dy: int,
    pre: int,
    g: int,
    dpre: int,
    dg: int,
    dbias: int,
    M: int,
    N: int,
    dy_row: int,
    dtype: int,
    threads: int,
) -> None: ...
def dora_dropout(
    x: int, out: int, M: int, K: int, x_row: int, dropout_p: float, seed: int, dtype: int, threads: int
) -> None: ...

class FlashAttention:
    """The struct of csrc/flash_attention.h. Its members are written, never read."""

    def __init__(self) -> None: ...
    def __setattr__(self, name: str, value: int | float | tuple[int, ...]) -> None: ...

def flash_attention_forward(call: FlashAttention, threads: int) -> None: ...
def flash_attention_backward(call: FlashAttention, threads: int) -> None: ...
def adamw_step(
    table: int,
    rows: int,
    hypers: int,
    grad_scale: int,
    found_inf: int,
    grad_norm: int,
    max_grad_norm: float,
    threads: int,
) -> None: ...
def adamw_grad_norm(table: int, rows: int, grad_scale: int, norm: int, threads: int) -> None: ...
def quantize_nf4(w: int, codes: int, absmax: int, count: int, block: int, dtype: int, threads: int) -> None: ...
def dequantize(
    codes: int,
    absmax: int,
    nested: int,
    out: int,
    n0: int,
    n1: int,
    k0: int,
    k1: int,
    K: int,
    block: int,
    bits: int,
    dtype: int,
    threads: int,
) -> None: ...
def cuda_lora_down(
    t: int,
    w: int,
    out: int,
    M: int,
    C: int,
    R: int,
    t_row: int,
    w_rank: int,
    w_col: int,
    out_row: int,
    factor: float,
    dropout_p: float,
    seed: int,
    masks: int,
    dtype: int,
    w_dtype: int,
    stream: int,
) -> None: ...
def cuda_lora_up(
    t: int,
    w: int,
    bias: int,
    out: int,
    M: int,
    C: int,
    R: int,
    t_row: int,
    w_rank: int,
    w_col: int,
    out_row: int,
    factor: float,
    dropout_p: float,
    seed: int,
    masks: int,
    accumulate: bool,
    dtype: int,
    w_dtype: int,
    bias_dtype: int,
    stream: int,
) -> None: ...
def cuda_lora_outer_workspace(M: int, C: int, R: int, dropout_p: float, masks: int) -> int: ...
def cuda_lora_outer(
    t: int,
    u: int,
    out: int,
    workspace: int,
    M: int,
    C: int,
    R: int,
    t_row: int,
    u_row: int,
    out_rank: int,
    out_col: int,
    factor: float,
    dropout_p: float,
    seed: int,
    masks: int,
    dtype: int,
    dot_dtype: int,
    out_dtype: int,
    stream: int,
) -> None: ...
def cuda_flash_attention_forward(call: FlashAttention, stream: int) -> None: ...
def cuda_flash_attention_backward(call: FlashAttention, stream: int) -> None: ...
def cuda_adamw_step(
    table: int,
    rows: int,
    hypers: int,
    grad_scale: int,
    found_inf: int,
    grad_norm: int,
    max_grad_norm: float,
    workspace: int,
    stream: int,
) -> None: ...
def cuda_adamw_grad_norm(table: int, rows: int, grad_scale: int, norm: int, workspace: int, stream: int) -> None: ...
def cuda_adamw_grad_norm_workspace() -> int: ...
def cuda_dequantize(
    codes: int,
    absmax: int,
    nested: int,
    out: int,
    n0: int,
    n1: int,
    k0: int,
    k1: int,
    K: int,
    block: int,
    bits: int,
    dtype: int,
    stream: int,
) -> None: ...
def cuda_flash_attention_sm90_forward(call: FlashAttention, stream: int) -> None: ...
def cuda_flash_attention_sm90_workspace(B: int, H: int, Sq: int) -> int: ...
def cuda_flash_attention_sm90_backward(call: FlashAttention, workspace: int, stream: int) -> None: ...
