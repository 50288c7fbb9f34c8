"""Runs on PyTorch: transformers, PEFT and ferrotune's layers under the trainer that is in Rust.

The trainer (`src/engine/trainer.rs`) owns data, order, schedule, evaluations, early stopping,
checkpoints and files, for both engines. What it asks of PyTorch is one object, `learner.Learner`:
forward and backward of a batch, an optimiser step, the judgement of a batch, and weights and
moments as flat arrays in the trainer's own layout. Initial values come from the trainer, and what a
user takes away is written by it, so that both engines begin alike and leave the same files.

Of several processes (`torchrun`) the first alone runs the trainer; the others follow its calls, and
each computes its share of a batch's rows.
"""
