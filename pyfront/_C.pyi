"""Launchers of the compiled kernels. Addresses and sizes are integers; the contracts are the headers in csrc/."""

with_cuda: bool
cuda_archs: str
compiler: str

def isa() -> str: ...
def isa_built() -> list[str]: ...
def isa_available() -> list[str]: ...
def set_isa(level: str) -> None: ...
def lora_forward(
    x: int,
    a: int,
    b: int,
    bias: int,
    y0: int,
    s: int,
    M: int,
    N: int,
    K: int,
    R: int,
    x_row: int,
    scale: float,
    dropout_p: float,
    seed: int,
    dtype: int,
    adapter_dtype: int,
    y_dtype: int,
    threads: int,
) -> None: ...
def lora_backward(
    dy: int,
    x: int,
    a: int,
    b: int,
    s: int,
    dx0: int,
    da: int,
    db: int,
    M: int,
    N: int,
    K: int,
    R: int,
    dy_row: int,
    x_row: int,
    scale: float,
    dropout_p: float,
    seed: int,
    dtype: int,
    adapter_dtype: int,
    dx_dtype: int,
    threads: int,
) -> None: ...
def flash_attention_forward(
    q: int,
    k: int,
    v: int,
    keep: int,
    o: int,
    lse: int,
    B: int,
    H: int,
    Hkv: int,
    Sq: int,
    Sk: int,
    D: int,
    strides: int,
    keep_row: int,
    scale: float,
    causal: bool,
    dropout_p: float,
    seed: int,
    dtype: int,
    threads: int,
) -> None: ...
def flash_attention_backward(
    grad_o: int,
    q: int,
    k: int,
    v: int,
    keep: int,
    o: int,
    lse: int,
    dq: int,
    dk: int,
    dv: int,
    B: int,
    H: int,
    Hkv: int,
    Sq: int,
    Sk: int,
    D: int,
    strides: int,
    keep_row: int,
    scale: float,
    causal: bool,
    dropout_p: float,
    seed: int,
    dtype: int,
    threads: int,
) -> None: ...
def adamw_step(table: int, rows: int, hypers: int, grad_scale: int, found_inf: int, threads: int) -> None: ...
def cuda_adamw_step(table: int, rows: int, hypers: int, grad_scale: int, found_inf: int, stream: int) -> None: ...
