//! Any adapter folder: an adapter whose targets can be asked for, or one error. What a NUL separates are
//! adapter_config.json and adapter_model.safetensors.

#![no_main]

use ferrotune::adapter::{self, AdapterConfig, Rules};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let split = input.iter().position(|byte| *byte == 0);
    let (config, weights) = split.map_or((input, &[][..]), |at| (&input[..at], &input[at + 1..]));
    if let Ok(map) = serde_json::from_slice(config)
        && let Ok((config, _)) = AdapterConfig::from_json(&map)
        && let Ok(rules) = Rules::new(&config)
    {
        let _ = rules.chooses("model.layers.3.self_attn.q_proj");
        let _ = rules.scaling("model.layers.3.self_attn.q_proj");
        // What was read is written and read again as it is.
        let again = AdapterConfig::from_json(&config.to_json());
        assert!(again.is_ok(), "{again:?}");
    }
    let Ok(folder) = tempfile::tempdir() else {
        return;
    };
    let written = std::fs::write(folder.path().join(adapter::CONFIG_FILE), config)
        .and_then(|()| std::fs::write(folder.path().join(adapter::WEIGHTS_FILE), weights));
    if written.is_ok() {
        let _ = adapter::read(folder.path());
    }
});
