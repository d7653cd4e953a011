"""fusetune.AdamW with torch.distributed: checkpoints of one process and of shards, and steps of DTensors."""

import os
import sys

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from steps import BF16, FP32, assert_equal
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from fusetune.optim.adamw import AdamW

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch is built without gloo"),
    pytest.mark.filterwarnings("ignore"),  # torch's own, of checkpoints without processes
]
RANKS = 2


def make_model(dtype=FP32):
    """The second bias has one element, so that the second process has none of it."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(13, 70), torch.nn.Tanh(), torch.nn.Linear(70, 1)).to(dtype)


def train(model, optimizer, steps, first=0, clip=0.0):
    norms = []
    for step in range(first, first + steps):
        x = torch.randn(8, 13, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).float().square().mean().backward()
        if clip:
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clip))
        optimizer.step()
    return norms


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("second", [AdamW, torch.optim.AdamW], ids=["to ours", "to torch"])
@pytest.mark.parametrize("first", [AdamW, torch.optim.AdamW], ids=["from ours", "from torch"])
@pytest.mark.usefixtures("one_thread")
def test_checkpoints_of_one_process(first, second, flatten, tmp_path):
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model = make_model()
    optimizer = first(model.parameters(), lr=0.01, amsgrad=True, fused=True)
    train(model, optimizer, 3)
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}, checkpoint_id=tmp_path)

    other = make_model()
    other.load_state_dict(model.state_dict())
    loaded = second(other.parameters(), lr=0.01, amsgrad=True, fused=True)
    state = {"optimizer": get_optimizer_state_dict(other, loaded, options=options)}
    dcp.load(state, checkpoint_id=tmp_path)
    set_optimizer_state_dict(other, loaded, state["optimizer"], options=options)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        assert_equal(loaded.state[q].values(), optimizer.state[p].values(), "state")
    train(model, optimizer, 2, first=3)
    train(other, loaded, 2, first=3)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "options",
    [
        {"state_dtype": "int8"},
        {"master_weights": "fp32", "state_dtype": "float32"},
        {"master_weights": "split16"},
        {"stochastic_rounding": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.usefixtures("one_thread")
def test_checkpoints_in_every_form(options, flatten, tmp_path):
    flags = StateDictOptions(flatten_optimizer_state_dict=flatten)
    models = [torch.nn.Linear(70, 60).to(BF16) for _ in range(2)]
    optimizers = [AdamW(model.parameters(), **options) for model in models]

    def train(model, optimizer, steps, first):
        for step in range(first, first + steps):
            optimizer.zero_grad()
            x = torch.randn(8, 70, generator=torch.Generator().manual_seed(step)).to(BF16)
            model(x).square().mean().backward()
            optimizer.step()

    train(models[0], optimizers[0], 3, 0)
    dcp.save(get_optimizer_state_dict(models[0], optimizers[0], options=flags), checkpoint_id=tmp_path)
    models[1].load_state_dict(models[0].state_dict())
    state = get_optimizer_state_dict(models[1], optimizers[1], options=flags)
    dcp.load(state, checkpoint_id=tmp_path)
    set_optimizer_state_dict(models[1], optimizers[1], state, options=flags)
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, 3, 3)
    assert_equal(models[0].parameters(), models[1].parameters())


def process(rank, function, folder):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS))
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    function(init_device_mesh("cpu", (RANKS,)), folder)
    dist.barrier()  # nobody leaves while another process is in a collective
    sys.stderr.flush()
    os._exit(0)  # once in ten times a thread of gloo's is not joined when all is torn down, and aborts the process


def shards(model, mesh, policy=None):
    policy = policy or MixedPrecisionPolicy()
    fully_shard(model[2], mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def steps_are_torchs(mesh):
    """Of shards of every precision; what torch's fused kernel rounds otherwise, its tails, its for-loop may, too."""
    mixed = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=FP32)
    for dtype, policy in ((FP32, None), (FP32, mixed), (BF16, None)):
        models = [shards(make_model(dtype), mesh, policy) for _ in range(2)]
        optimizers = [
            AdamW(models[0].parameters(), lr=0.01, amsgrad=True),
            torch.optim.AdamW(models[1].parameters(), lr=0.01, amsgrad=True, fused=True),
        ]
        for model, optimizer in zip(models, optimizers, strict=True):
            train_in(dtype, model, optimizer, 3)
        for p, q in zip(*(model.parameters() for model in models), strict=True):
            states = [{"p": t, **o.state[t]} for o, t in zip(optimizers, (p, q), strict=True)]
            assert states[0].keys() == states[1].keys()
            for name in states[0].keys() - {"step"}:
                got, expected = (state[name] for state in states)
                assert isinstance(got, DTensor)
                assert (got.placements, got.shape, got.dtype) == (expected.placements, expected.shape, expected.dtype)
                eps = torch.finfo(dtype).eps
                torch.testing.assert_close(got.to_local(), expected.to_local(), rtol=4 * eps, atol=0.01 * eps)
            assert states[0]["step"] == states[1]["step"] == 3


def train_in(dtype, model, optimizer, steps, **options):
    """`train`, where inputs are cast by FSDP or by hand."""
    handle = model.register_forward_pre_hook(lambda module, args: (args[0].to(dtype),)) if dtype == BF16 else None
    norms = train(model, optimizer, steps, **options)
    if handle:
        handle.remove()
    return norms


def norms_are_torchs(mesh):
    """Over shards, one of them empty, and a parameter that every process has whole."""
    for dtype in (FP32, BF16):
        model = shards(make_model(dtype), mesh)
        extra = torch.nn.Parameter(distribute_tensor(torch.ones(5), mesh, [Replicate()]))
        ours = [*model.parameters(), extra]
        theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
        optimizer = AdamW(ours, lr=0.01, max_grad_norm=0.1)
        stock = torch.optim.AdamW(theirs, lr=0.01, fused=True)
        for step in range(3):
            model.zero_grad()
            x = torch.randn(8, 13, generator=torch.Generator().manual_seed(step)).to(dtype)
            model(x).float().square().mean().backward()
            extra.grad = distribute_tensor(torch.full((5,), 0.25), mesh, [Replicate()])
            for p, q in zip(ours, theirs, strict=True):
                q.grad = p.grad.clone()
            exact = sum(p.grad.full_tensor().double().square().sum() for p in ours).sqrt()
            norm = torch.nn.utils.clip_grad_norm_(theirs, 0.1, foreach=False).full_tensor()
            optimizer.step()
            stock.step()
            torch.testing.assert_close(optimizer.grad_norm.double(), exact, rtol=torch.finfo(FP32).eps, atol=0)
            torch.testing.assert_close(optimizer.grad_norm, norm.float(), rtol=4 * torch.finfo(dtype).eps, atol=0)
            same = [torch.empty_like(optimizer.grad_norm) for _ in range(RANKS)]
            dist.all_gather(same, optimizer.grad_norm)
            assert same[0] == same[1]
        for p, q in zip(ours, theirs, strict=True):
            # Gradients and norms of `dtype` are rounded there, and m and v are of them: of each step's size,
            # lr max|g| / rms(g) <= 3^(1/2) lr, less than 10 roundings may differ.
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(p.full_tensor(), q.full_tensor(), rtol=4 * eps, atol=3 * 0.01 * 10 * eps)


def processes_that_lack_gradients_take_part(mesh):
    """Sharded and plain parameters, of which each process has only some gradients: none waits for the other."""
    sharded = [torch.nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(dim)])) for dim in (0, 1)]
    plain = torch.nn.Parameter(torch.ones(3))
    rank = dist.get_rank()
    optimizer = AdamW([plain, *sharded], max_grad_norm=1.0)
    plain.grad = torch.zeros(3)
    sharded[rank].grad = torch.ones_like(sharded[rank])
    optimizer.step()
    torch.testing.assert_close(optimizer.grad_norm, torch.tensor(10.0).sqrt())  # 2 x 3 elements and 4 x 1


def gradients_placed_otherwise(mesh):
    p = torch.nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
    p.grad = distribute_tensor(torch.arange(12.0).view(4, 3), mesh, [Shard(1)])
    optimizer = AdamW([p], betas=(0.0, 0.0), eps=1.0, lr=1.0, weight_decay=0.0)
    optimizer.step()
    g = torch.arange(12.0).view(4, 3)
    torch.testing.assert_close(p.full_tensor(), 1 - g / (g + 1))


def eight_bits_are_refused(mesh):
    p = torch.nn.Parameter(distribute_tensor(torch.ones(64, 65), mesh, [Shard(0)]))
    before = p.full_tensor().clone()
    p.grad = distribute_tensor(torch.ones(64, 65), mesh, [Shard(0)])
    optimizer = AdamW([p], state_dtype="int8")
    message = "^AdamW: state_dtype must be float32 or bfloat16 with DTensors, got int8"
    with pytest.raises(NotImplementedError, match=message):
        optimizer.step()
    assert torch.equal(p.full_tensor(), before)
    assert not optimizer.state


def forms_of_shards(mesh):
    """Masters and narrow states step as those of whole tensors do."""
    value = torch.randn(7, 5, generator=torch.Generator().manual_seed(1)).to(BF16)
    for options in ({"master_weights": "fp32"}, {"master_weights": "split16"}, {"state_dtype": "float32"}):
        p = torch.nn.Parameter(distribute_tensor(value, mesh, [Shard(0)]))
        q = torch.nn.Parameter(value.clone())
        optimizers = AdamW([p], **options), AdamW([q], **options)
        for step in range(3):
            g = torch.randn(7, 5, generator=torch.Generator().manual_seed(step)).to(BF16)
            p.grad, q.grad = distribute_tensor(g, mesh, [Shard(0)]), g
            for optimizer in optimizers:
                optimizer.step()
        fresh = AdamW([p], master_weights="split16" if options.get("master_weights") == "fp32" else "fp32")
        fresh.load_state_dict(optimizers[0].state_dict())
        for optimizer, name in ((optimizers[0], None), (fresh, "converted")):
            for key, x in optimizer.state[p].items():
                assert key == "step" or isinstance(x, DTensor), (name, key)
        p.grad = distribute_tensor(torch.zeros(7, 5).to(BF16), mesh, [Shard(0)])
        fresh.step()
        assert isinstance(next(x for key, x in fresh.state[p].items() if key in ("master", "param_lo")), DTensor)
        for key, x in optimizers[0].state[p].items():
            whole = x.float().full_tensor() if isinstance(x, DTensor) else x  # int16 has no collectives
            assert torch.equal(whole, optimizers[1].state[q][key].float()), key


def misplaced_states_raise(mesh):
    p = torch.nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
    optimizer = AdamW([p])
    state = {"step": 1.0, "exp_avg": torch.zeros(4, 3), "exp_avg_sq": torch.zeros(4, 3)}
    with pytest.raises(
        ValueError, match=r"^AdamW: exp_avg of parameter 0 must be placed as the parameter, .* got None"
    ):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: state}})


def shards_are_saved_and_loaded(mesh, folder):
    """Saved by one process and loaded by two, trained, and saved for one."""
    model = shards(make_model(), mesh)
    optimizer = AdamW(model.parameters(), lr=0.01)
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=f"{folder}/one")
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    train(model, optimizer, 2, first=2)
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=f"{folder}/two")
    whole = StateDictOptions(full_state_dict=True)
    state = get_optimizer_state_dict(model, optimizer, options=whole)
    set_optimizer_state_dict(model, optimizer, state, options=whole)
    train(model, optimizer, 1, first=4)


def in_two_processes(mesh, folder):
    for check in (
        steps_are_torchs,
        norms_are_torchs,
        processes_that_lack_gradients_take_part,
        gradients_placed_otherwise,
        eight_bits_are_refused,
        forms_of_shards,
        misplaced_states_raise,
    ):
        check(mesh)
    shards_are_saved_and_loaded(mesh, folder)


@pytest.mark.usefixtures("one_thread")
def test_two_processes(tmp_path):
    """All in one start of them, as that is what takes longest."""

    def checkpoint(model, optimizer):
        return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}

    model = make_model()
    optimizer = AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, 2)
    dcp.save(checkpoint(model, optimizer), checkpoint_id=tmp_path / "one")
    torch.multiprocessing.spawn(process, (in_two_processes, str(tmp_path)), nprocs=RANKS)

    train(model, optimizer, 2, first=2)
    other = make_model()
    loaded = AdamW(other.parameters(), lr=0.01)
    state = checkpoint(other, loaded)
    dcp.load(state, checkpoint_id=tmp_path / "two")
    set_model_state_dict(other, state["model"])
    set_optimizer_state_dict(other, loaded, state["optimizer"])
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)  # whose gradients were averaged over two processes
        assert loaded.state[q]["step"] == 4
