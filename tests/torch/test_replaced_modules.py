"""A target is the module that was hooked: where another one takes its name, that is said, and nothing is lost."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from small_models import Block, adapted, hooks, mlp, run
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

import unilora_torch
from unilora_core import TargetError
from unilora_torch import Bank, Target
from unilora_torch.structure import StructureHook

pytestmark = pytest.mark.traces

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(7))


def without_first(model):
    del model.blocks[0]


def without_last(model):
    model.blocks.pop(1)


def sliced(model):
    model.blocks = model.blocks[1:]


def deleted(model):
    del model.head


REPLACED = {
    "a layer": (lambda model: setattr(model.blocks[0], "up", nn.Linear(6, 12)), "blocks.0.up", "linear.Linear"),
    "a copy of a layer": (lambda model: setattr(model, "head", copy.deepcopy(mlp().head)), "head", "linear.Linear"),
    "a layer of another kind": (lambda model: setattr(model, "head", nn.Identity()), "head", "Identity"),
    "by its name": (lambda model: model.set_submodule("blocks.1.down", nn.Linear(12, 6)), "blocks.1.down", "Linear"),
    "a block": (lambda model: model.blocks.__setitem__(1, Block(6)), "blocks.1.up", "linear.Linear"),
    "all blocks": (lambda model: setattr(model, "blocks", mlp().blocks), "blocks.0.up", "linear.Linear"),
    "the first of a list": (without_first, "blocks.0.up", "linear.Linear"),
    "a part of a list": (sliced, "blocks.0.up", "linear.Linear"),
    "the last of a list": (without_last, "blocks.1.up", "no module has this name"),
    "a child that is gone": (deleted, "head", "no module has this name"),
}


@pytest.mark.parametrize("what", REPLACED)
@pytest.mark.parametrize("fresh", [True, False])
def test_what_was_replaced_is_told_of(what, fresh, tmp_path):
    """``fresh``: no pass has reached the targets yet."""
    change, name, now = REPLACED[what]
    model, adapter = adapted()
    adapter.save(tmp_path / "before")
    if not fresh:
        model(X)
    theta_d = adapter.theta_d.detach().clone()
    change(model)
    said = rf"{name}: the module that was adapted is gone: .*{now}.* detach\(merge=True\)"
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for do in (
        lambda: model(X),
        lambda: adapter.save(tmp_path / "adapter"),
        lambda: adapter.export_lora(tmp_path / "lora"),
        adapter.merge,
        lambda: adapter.detach(merge=True),
        lambda: adapter.verify(X),
        lambda: adapter.swap(tmp_path / "before"),
        lambda: adapter.grow(2),
        lambda: unilora_torch.switch(model, "unilora"),
    ):
        with pytest.raises(TargetError, match=said):
            do()
    assert [path.name for path in tmp_path.iterdir()] == ["before"]
    assert torch.equal(adapter.theta_d, theta_d)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    unilora_torch.switch(model, ())
    adapter.detach()
    assert not any(sum(counts) for counts in hooks(model).values())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not hasattr(model, "unilora")


def test_disabled_is_the_base_whatever_was_replaced():
    model, adapter = adapted()
    model.head = nn.Linear(6, 3)
    with adapter.disabled():
        assert torch.equal(model(X), model.head(model.blocks[1](model.blocks[0](X))))


def test_the_module_can_be_put_back():
    model, adapter = adapted()
    output = model(X)
    model.blocks[0].up = nn.Linear(6, 12)
    with pytest.raises(TargetError, match=r"structure\.modules"):
        model(X)
    model.blocks[0].up = adapter.structure.modules["blocks.0.up"]
    assert torch.equal(model(X), output)


@pytest.mark.parametrize("part", ["blocks.0", "blocks.1"])
def test_a_part_that_is_called_alone(part):
    model, _ = adapted()
    model.get_submodule(part)(X)
    model.get_submodule(part).up = nn.Linear(6, 12)
    with pytest.raises(TargetError, match=rf"{part}\.up: the module that was adapted is gone"):
        model.get_submodule(part)(X)


def test_a_merged_model_may_be_changed():
    """That is the remedy; what is merged comes off for good only."""
    model, adapter = adapted()
    output = model(X)
    adapter.merge()
    original = model.head
    model.head = nn.Linear(6, 3)
    model.head.load_state_dict(original.state_dict())
    torch.testing.assert_close(model(X), output)
    before = model.head.weight.clone()
    for change in (adapter.unmerge, adapter.detach, lambda: unilora_torch.switch(model, ())):
        with pytest.raises(TargetError, match="head: the module that was adapted is gone"):
            change()
    with pytest.raises(TargetError, match="head: the module that was adapted is gone"), adapter.disabled():
        pass
    assert adapter.merged
    assert torch.equal(model.head.weight, before)
    torch.testing.assert_close(model(X), output)
    adapter.detach(merge=True)
    torch.testing.assert_close(model(X), output)


class Wrapper(nn.Module):
    """With a child of its own, and no attribute of the wrapped module."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.other = inner, nn.Linear(2, 2)

    def forward(self, x):
        return self.inner(x)


class Deaf(Wrapper):
    """It holds the module and does not call it."""

    def forward(self, x):
        return x @ torch.ones(6, 3)


def own(model):
    model.blocks[0], model.head = Wrapper(model.blocks[0]), Wrapper(Wrapper(model.head))


def compiled(model):
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")


def checkpointed(kind):
    return lambda model: apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, kind))


WRAPPED = {
    "checkpoints of blocks": checkpointed(Block),
    "checkpoints of layers": checkpointed(nn.Linear),
    "of one's own": own,
    "compiled": compiled,
    "another list": lambda model: setattr(model, "blocks", nn.ModuleList(model.blocks)),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize("fresh", [True, False])
def test_a_wrapper_is_no_other_module(wrapper, fresh, tmp_path):
    model, adapter = adapted()
    wanted = run(*adapted(), X)
    if not fresh:
        model(X)
    WRAPPED[wrapper](model)
    for found, value in zip(run(model, adapter, X), wanted, strict=True):
        assert torch.equal(found, value)
    adapter.save(tmp_path / "adapter")
    other = mlp()
    unilora_torch.load(other, tmp_path / "adapter", check_base=False)
    assert torch.equal(other(X), wanted[0])
    inner = adapter.structure.modules["blocks.0.up"]
    before = inner.weight.clone()
    adapter.merge()
    assert not torch.equal(inner.weight, before)
    torch.testing.assert_close(model(X), wanted[0])
    adapter.unmerge()
    assert torch.equal(inner.weight, before)
    model.head = nn.Linear(6, 3)
    with pytest.raises(TargetError, match="head: the module that was adapted is gone"):
        model(X)
    adapter.detach()
    torch.compiler.reset()


def test_what_is_replaced_inside_a_wrapper():
    for wrap, inside in (
        (own, lambda model: model.blocks[0].inner),
        (checkpointed(Block), lambda model: model.blocks[0]._checkpoint_wrapped_module),
    ):
        model, _ = adapted()
        wrap(model)
        model(X)
        inside(model).up = nn.Linear(6, 12)
        with pytest.raises(TargetError, match=r"blocks\.0\.up: the module that was adapted is gone"):
            model(X)


def test_a_wrapper_that_does_not_call_its_module():
    model, _ = adapted()
    model(X)
    model.head = Deaf(model.head)
    with pytest.raises(TargetError, match="head: the model's forward pass never calls this module"):
        model(X)


class Fusible(nn.Module):
    """As the attention of diffusers: q and k stay as they are when they are fused, and are passed by."""

    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(6, 6), nn.Linear(6, 6)

    def fuse(self):
        self.qk = nn.Linear(6, 12)
        self.qk.weight.data = torch.cat([self.q.weight, self.k.weight]).detach()
        self.qk.bias.data = torch.cat([self.q.bias, self.k.bias]).detach()

    def forward(self, x):
        q, k = self.qk(x).chunk(2, -1) if hasattr(self, "qk") else (self.q(x), self.k(x))
        return q * k


def test_layers_that_are_passed_by_once_they_are_fused():
    model, adapter = adapted(model=nn.Sequential(Fusible()), d=9)
    output = model(X)
    model[0].fuse()
    with pytest.raises(TargetError, match=r"0\.q: .*never calls this module \(2 such\)"):
        model(X)
    adapter.detach()
    model, adapter = adapted(model=nn.Sequential(Fusible()), d=9)
    adapter.detach(merge=True)
    output = model(X)
    model[0].fuse()
    torch.testing.assert_close(model(X), output)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_looks_at_its_own_modules(duplicate):
    model, _ = adapted()
    output = model(X)
    twin = duplicate(model)
    model.head = nn.Linear(6, 3)
    assert torch.equal(twin(X), output)
    twin.blocks[1] = Block(6)
    with pytest.raises(TargetError, match=r"blocks\.1\.up"):
        twin(X)
    with pytest.raises(TargetError, match=r"head"):
        model(X)


def test_several_adapters():
    model, one = adapted(targets=["up"])
    _, other = adapted(model=model, targets=["head"], name="other", d=9)
    output = model(X)
    model.head = nn.Linear(6, 3)
    with pytest.raises(TargetError, match="head"):
        model(X)
    unilora_torch.switch(model, "unilora")
    model(X)
    other.detach()
    assert model(X).shape == output.shape
    one.detach()


def test_hooks_that_somebody_took_off(tmp_path):
    model, adapter = adapted()
    output = model(X)
    model.blocks[1].up._forward_hooks.clear()
    with pytest.raises(TargetError, match=r"blocks\.1\.up: the adapter's hook was taken off this module \(1 such\)"):
        model(X)
    adapter.save(tmp_path / "adapter")
    adapter.detach()
    unilora_torch.load(model, tmp_path / "adapter")
    assert torch.equal(model(X), output)


def test_hooks_of_others_may_be_taken_off():
    base = mlp()
    theirs = base.blocks[1].up.register_forward_hook(lambda *_: None)
    model, _ = adapted(model=base)
    output = model(X)
    theirs.remove()
    assert torch.equal(model(X), output)


def test_while_a_compiled_model_is_called():
    model, adapter = adapted()
    call = torch.compile(model, backend="eager", fullgraph=True)
    output = call(X)
    head = model.head
    model.head = nn.Linear(6, 3)
    with pytest.raises(Exception, match="head: the module that was adapted is gone"):
        call(X)
    model.head = head
    assert torch.equal(call(X), output)
    torch.compiler.reset()


def test_a_parameter_that_is_replaced_is_read_anew():
    """The module is the same: its weight may be another one."""
    target = Target("w", "head", 6, 3, parameter="weight")
    for targets in (["head"], [target]):
        model, adapter = adapted(targets=targets, d=9)
        model(X)
        weight = nn.Parameter(torch.randn(3, 6), requires_grad=False)
        model.head.weight = weight
        wanted, other = adapted(targets=targets, d=9)
        wanted.head.weight.data.copy_(weight)
        assert torch.equal(model(X), wanted(X))
        for each in (adapter, other):
            each.merge()
        assert torch.equal(model(X), wanted(X))
        assert model.head.weight is weight


def test_a_layer_that_is_resized_in_place():
    model, adapter = adapted(model=nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 3)), targets=["0", "1"], d=9)
    ids = torch.arange(4)
    output = model(ids)
    model[1].weight = nn.Parameter(torch.cat([model[1].weight, torch.randn(2, 6)]), requires_grad=False)
    model[1].bias, model[1].out_features = nn.Parameter(torch.zeros(5)), 5
    assert model(ids).shape == (4, 5)  # the new outputs have no update
    model[0].weight, model[0].num_embeddings = nn.Parameter(torch.randn(11, 6)), 11
    with pytest.raises(TargetError, match=r"0: 9 inputs are adapted, this Embedding has 11 now"):
        model(ids)
    before = model[0].weight.clone()
    with pytest.raises(TargetError, match=r"0: .* 9 inputs .* Embedding has 11"):
        adapter.merge()
    assert torch.equal(model[0].weight, before)
    adapter.detach()
    assert output.shape == (4, 3)


def test_a_narrower_layer():
    model, _ = adapted(model=nn.Sequential(nn.Linear(6, 3)), d=9)
    model[0].weight, model[0].in_features = nn.Parameter(torch.randn(3, 4)), 4
    with pytest.raises(TargetError, match="0: 6 inputs are adapted, this Linear has 4 now"):
        model(X[:, :4])


def test_a_bank(tmp_path):
    _, adapter = adapted()
    adapter.save(tmp_path / "adapter")
    for change in (without_first, lambda model: setattr(model.blocks[0], "up", nn.Linear(6, 12))):
        model = mlp()
        bank = Bank(model)
        bank.add("a", tmp_path / "adapter")
        with bank.rows(["a"] * 4):
            model(X)
        change(model)
        with pytest.raises(TargetError, match=r"blocks\.0\.up: the module that was adapted is gone"), bank.rows(["a"]):
            pass
        with pytest.raises(TargetError, match=r"blocks\.0\.up: the module that was adapted is gone"):
            bank.add("b", tmp_path / "adapter")
        assert bank.names == ("a",)
        bank.close()
        assert not any(sum(counts) for counts in hooks(model).values())
    model = mlp()
    bank = Bank(model)
    bank.add("a", tmp_path / "adapter")
    with bank.rows(["a"] * 4):
        output = model(X)
    own(model)
    with bank.rows(["a"] * 4):
        assert torch.equal(model(X), output)


def test_fused_modules_of_torch(tmp_path):
    """`fuse_modules` moves the hooks to the fused module, without their keyword arguments."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.quantization import fuse_modules, quantize_dynamic

        def conv():
            torch.manual_seed(0)
            return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()

        image = torch.randn(1, 3, 6, 6)
        model, adapter = adapted(model=conv(), targets=["0"], d=9)
        output = model(image)
        with pytest.raises(TargetError, match=r"0: the module that was adapted is gone.*ConvReLU2d"):
            fuse_modules(model, [["0", "1", "2"]])(image)
        adapter.merge()
        torch.testing.assert_close(fuse_modules(model, [["0", "1", "2"]])(image), output)

        model, adapter = adapted(model=mlp().eval())
        output = model(X)
        with pytest.raises(TargetError, match=r"blocks\.0\.up: .* torch\.ao\.nn\.quantized\.dynamic\S*Linear"):
            quantize_dynamic(model, {nn.Linear})(X)
        assert torch.equal(model(X), output)
        adapter.merge()
        torch.testing.assert_close(quantize_dynamic(model, {nn.Linear})(X), output, rtol=0.1, atol=0.1)
        adapter.unmerge()
        adapter.save(tmp_path / "adapter")
        quantised = quantize_dynamic(mlp().eval(), {nn.Linear})
        unilora_torch.load(quantised, tmp_path / "adapter", check_base=False)
        torch.testing.assert_close(quantised(X), output, rtol=0.1, atol=0.1)


def test_a_saved_model_comes_back_whole(tmp_path):
    model, _ = adapted()
    output = model(X)
    held = io.BytesIO()
    torch.save(model, held)
    held.seek(0)
    twin = torch.load(held, weights_only=False)
    assert torch.equal(twin(X), output)
    twin.unilora.merge()
    twin.unilora.unmerge()
    twin.unilora.detach()
    assert torch.equal(twin(X), mlp()(X))
    assert torch.equal(model(X), output)


def test_detach_takes_every_hook_off():
    model, adapter = adapted()
    there = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    assert sum(isinstance(hook, StructureHook) for hook in there) == 3  # the model's, and one of each block
    adapter.detach()
    assert not any(sum(counts) for counts in hooks(model).values())
