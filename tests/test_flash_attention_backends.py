"""Which backend a call on a GPU takes. Measurements are replaced: none of this needs a GPU."""

import pytest
import torch

from fusetune.ops import _flash_attention_backends as backends
from fusetune.ops._flash_attention_backends import Arguments

NOTHING = Arguments(*[None] * 7, 0.125, 0.0, -1, -1, False, 0.0, None)
Q = torch.zeros(1, 2, 4, 64, dtype=torch.bfloat16)


@pytest.fixture
def on_gpu(monkeypatch):
    """Has everything work, and gives what is asked of the measurement: [(case, names of the ways)]."""
    asked = []

    def fastest(op, case, device, ways):
        asked.append((op, list(ways)))
        for way in ways.values():
            way()
        return list(ways)[-1]

    monkeypatch.delenv("FUSETUNE_BACKEND", raising=False)
    monkeypatch.setattr(backends, "choose", lambda op, device: "triton")
    monkeypatch.setattr(backends, "works", lambda name, device: True)
    monkeypatch.setattr(backends, "fastest", fastest)
    return asked


def choose_for(a, q=Q, results=None):
    return backends.choose_for(q, q, q, a, lambda backend: [(results or {}).get(backend, torch.ones(3)), torch.ones(0)])


@pytest.mark.parametrize(
    ("change", "candidates"),
    [
        ({}, ["triton", "cuda", "cuda_sm90"]),
        ({"right": 0}, ["triton", "cuda", "cuda_sm90"]),
        ({"dropout_p": 0.1}, ["triton", "cuda"]),
        ({"left": 3}, ["triton", "cuda"]),
        ({"keep": torch.ones(1, 4, dtype=torch.bool)}, ["triton", "cuda"]),
        ({"softcap": 2.0}, None),
        ({"sinks": torch.zeros(2)}, None),
    ],
    ids=str,
)
def test_what_takes_a_call_is_measured(on_gpu, change, candidates):
    taken = choose_for(NOTHING._replace(**change))
    assert taken == (candidates or ["triton"])[-1]
    assert on_gpu == ([("flash_attention", candidates)] if candidates else [])


def test_float32_is_tritons_alone(on_gpu):
    assert choose_for(NOTHING, Q.float()) == "triton"


def test_what_disagrees_is_out(on_gpu):
    with pytest.raises(RuntimeError, match=r"cuda differs from triton by 0\.5 at 1"):  # fastest() passes over it
        choose_for(NOTHING, results={"cuda": torch.tensor([1.0, 1.5, 1.0])})
    with pytest.raises(RuntimeError, match="cuda differs from triton by nan"):
        choose_for(NOTHING, results={"cuda": torch.tensor([1.0, torch.nan, 1.0])})


@pytest.mark.parametrize(
    ("change", "may"),
    [
        ({}, True),
        ({"right": 0}, True),
        ({"right": 3}, False),
        ({"left": 3}, False),
        ({"softcap": 2.0}, False),
        ({"dropout_p": 0.1}, False),
        ({"mask": torch.ones(1, 1, 4, 4, dtype=torch.bool)}, False),
        ({"sinks": torch.zeros(2)}, False),
    ],
    ids=str,
)
def test_torch_is_measured_where_it_computes_the_same(on_gpu, monkeypatch, change, may):
    a, q = NOTHING._replace(**change), torch.randn(1, 4, 6, 8)
    k = torch.randn(1, 2, 6, 8)
    monkeypatch.setattr(backends, "_on_gpu", lambda tensor: True)
    assert backends.torch_is_faster(q, k, k, a, lambda *qkv: backends.torch_attention(*qkv, a)) is may
    assert [op for op, _ in on_gpu] == ["flash_attention or torch"] * may


def test_nothing_is_measured_on_a_cpu(on_gpu):
    def fails(*qkv):
        pytest.fail("it was run")

    assert not backends.torch_is_faster(Q, Q, Q, NOTHING, fails)
    assert backends.torch_is_faster(Q[:, :, :1], Q, Q, NOTHING, fails)  # decoding
    assert not backends.torch_is_faster(Q[:, :, :1], Q, Q, NOTHING._replace(softcap=2.0), fails)
    assert not backends.torch_is_faster(Q[:, :, :1].clone().requires_grad_(), Q, Q, NOTHING, fails)


def test_cases_round_lengths_up(on_gpu):
    def case(S, **change):
        q = torch.zeros(1, 2, S, 64)
        return backends.case(q, q, q, NOTHING._replace(**change))

    assert case(100) == case(128) != case(129)
    assert case(100) != case(100, right=0) != case(100, dropout_p=0.1)
