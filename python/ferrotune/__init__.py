"""LoRA and QLoRA fine-tuning at the speed of the frozen model."""
