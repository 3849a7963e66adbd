"""How a run goes: on transformers' Trainer, with what is recorded, kept and gone on with."""
