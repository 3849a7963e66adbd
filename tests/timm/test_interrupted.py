"""attach, stopped at any pass of its check, leaves the model as it was."""

import itertools

import pytest
import torch

import unilora_timm

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def state_of(model):
    """All that attach could leave behind, but for the values."""
    return {
        name: (
            type(module),
            module.training,
            {key: (id(value), value.requires_grad) for key, value in module._parameters.items() if value is not None},
            [list(getattr(module, hooks)) for hooks in HOOKS],
            sorted(vars(module)),
        )
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("where", ["before", "in the middle"])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "beit_base_patch16_224", "swinv2_tiny_window8_256"])
def test_an_interrupt_leaves_the_model_as_it_was(tiny, images, name, where):
    model = tiny(name)
    torch.nn.init.zeros_(model.get_classifier().weight)  # so that it is left out while the targets are checked
    torch.nn.init.zeros_(model.get_classifier().bias)
    names = {"before": "", "in the middle": list(dict(model.named_modules()))[len(list(model.modules())) // 2]}
    calls = stop = 0

    def interrupt(*_):
        nonlocal calls
        calls += 1
        if calls == stop:
            raise KeyboardInterrupt

    model.get_submodule(names[where]).register_forward_pre_hook(interrupt)
    values, state, expected = {k: v.clone() for k, v in model.state_dict().items()}, state_of(model), model(images)
    for count in itertools.count(1):
        calls, stop = 0, count
        try:
            adapter = unilora_timm.attach(model)
        except KeyboardInterrupt:
            assert state_of(model) == state, f"pass {count}"
            assert all(torch.equal(values[key], value) for key, value in model.state_dict().items())
            assert torch.equal(model(images), expected)
        else:
            break
    assert count > 3
    assert adapter.active
    adapter.detach()
    assert state_of(model) == state
