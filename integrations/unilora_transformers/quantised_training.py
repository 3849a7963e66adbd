"""Removal of what prevents the training of an adapter on a quantised model, in bitsandbytes and in the trainers."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from unilora_torch import Adapter
from unilora_torch.adapter import adapters

__all__ = ["TrainableQuantised"]

FLAG = "_hf_peft_config_loaded"
PACKS = "support_avx512bf16_for_cpu"


class TrainableQuantised:
    """A handle that lets a quantised model's adapter be trained; `remove` makes the model as it was.

    *The Trainer* refuses a quantised model of which nothing can be trained. It recognises the others by PEFT's class,
    or by transformers' own flag "an adapter is loaded on this model". That is the truth here, so the flag is set, on
    this model only; it also makes gradient checkpointing let gradients through the embeddings, as an adapter needs.
    The other ways to be accepted state what is not true: that the weights are not quantised, or are trained in their
    quantised form.

    *bitsandbytes*, on a CPU with AVX-512 BF16, packs the 4-bit weights of a layer for inference at its first pass in
    evaluation mode, for good, and no gradient flows back through a packed layer. So these layers no longer pack, and
    packed ones are unpacked, which is a side effect of their `state_dict`.
    """

    def __init__(self, model: PreTrainedModel, adapter: Adapter):
        self.model, self.quantised = model, bool(getattr(model, "is_quantized", False))
        self.packing = [module for module in model.modules() if getattr(module, PACKS, False)]
        if self.quantised:
            vars(model)[FLAG] = True
        if self.quantised or self.packing:
            adapter.theta_d = _Float32(adapter.theta_d.detach(), adapter.theta_d.requires_grad)
        for module in self.packing:
            setattr(module, PACKS, False)
            module.state_dict()

    def remove(self) -> None:
        """Make the model as it was; this is also called as the last adapter is detached."""
        if len(adapters(self.model)) > 1:
            return
        if self.quantised:
            vars(self.model).pop(FLAG, None)
        for module in self.packing:
            setattr(module, PACKS, True)


class _Float32(nn.Parameter):
    """A parameter that stays float32 when its `data` is replaced by a cast of it.

    TRL casts what is trained on a 4-bit or 8-bit base to bfloat16 by ``parameter.data = parameter.data.to(…)``, which
    suits LoRA's A and B. θ_d - θ_d⁰, from which B is made, would be lost in the rounding.
    """

    @property
    def data(self) -> Tensor:
        return super().data

    @data.setter
    def data(self, value: Tensor) -> None:
        if value.dtype != torch.float32:
            value = self.data if torch.equal(value, self.data.to(value.dtype)) else value.float()
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
