//! PEFT's adapter folder: adapter_config.json and adapter_model.safetensors.
