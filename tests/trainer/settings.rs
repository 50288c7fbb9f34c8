//! Settings that cannot be used, and what is said about them.

use std::path::Path;

use ferrotune::engine::TrainConfig;
use ferrotune::error::Error;
use serde_json::{Value, json};

use crate::support::settings;

fn refusal(settings: &Value) -> String {
    match TrainConfig::from_json(&settings.to_string()) {
        Err(Error::Argument(message)) => message,
        other => panic!("{settings} gave {other:?}"),
    }
}

#[test]
fn a_value_out_of_range_is_named_with_its_range() {
    let cases = [
        ("r", json!(0), "at least 1, not 0"),
        ("r", json!(-4), "-4"),
        ("lora_alpha", json!(0.0), "above 0, not 0"),
        ("lora_dropout", json!(1.0), "below 1, not 1"),
        ("lora_dropout", json!(-0.1), "at least 0"),
        ("target_modules", json!([]), "all-linear"),
        ("target_modules", json!(""), "all-linear"),
        (
            "rank_pattern",
            json!({"q_proj": 0}),
            "rank_pattern['q_proj']",
        ),
        (
            "alpha_pattern",
            json!({"q_proj": -1.0}),
            "alpha_pattern['q_proj']",
        ),
        (
            "blocksize",
            json!(48),
            "power of two from 32 to 4096, not 48",
        ),
        ("blocksize", json!(8192), "not 8192"),
        ("epochs", json!(0.0), "above 0"),
        ("epochs", json!(1e30), "at most 1e6"),
        ("max_steps", json!(0), "at least 1"),
        ("max_seconds", json!(-1.0), "above 0, not -1"),
        ("batch_size", json!(0), "at least 1"),
        ("gradient_accumulation", json!(0), "at least 1"),
        ("sequence_length", json!(1), "at least 2"),
        ("learning_rate", json!(0.0), "above 0"),
        ("learning_rate", json!(-1e-4), "not -0.0001"),
        ("min_learning_rate_ratio", json!(1.5), "from 0 to 1"),
        ("weight_decay", json!(-0.1), "at least 0"),
        ("beta1", json!(1.0), "below 1"),
        ("beta2", json!(-0.5), "at least 0"),
        ("eps", json!(0.0), "above 0"),
        ("max_grad_norm", json!(-1.0), "at least 0"),
        ("heldout", json!(0.0), "above 0 and below 1"),
        ("heldout", json!(1.0), "above 0 and below 1"),
        ("eval_every", json!(0), "at least 1"),
        ("eval_tokens", json!(0), "at least 1"),
        ("patience", json!(0), "at least 1"),
        ("checkpoint_every", json!(0), "at least 1"),
        ("threads", json!(0), "from 1 to 1024, not 0"),
        ("threads", json!(100_000), "not 100000"),
        ("data", json!([]), "at least one file"),
        ("model", json!(""), "folder"),
        ("method", json!("dora"), "dora"),
        ("quant_type", json!("int8"), "int8"),
        ("schedule", json!("step"), "step"),
        ("seed", json!(1.5), "1.5"),
        ("learning_rate", json!("fast"), "fast"),
    ];
    let mut settings = settings(Path::new("run"), json!({"method": "qlora"}));
    assert!(TrainConfig::from_json(&settings.to_string()).is_ok());
    for (name, value, part) in cases {
        let good = std::mem::replace(&mut settings[name], value);
        let message = refusal(&settings);
        assert!(
            message.contains(name) && message.contains(part),
            "{name}: {message}"
        );
        settings[name] = good;
    }
}

#[test]
fn every_setting_must_be_there_and_no_other() {
    let complete = settings(Path::new("run"), json!({}));
    let names: Vec<String> = complete.as_object().unwrap().keys().cloned().collect();
    assert_eq!(names.len(), 64);
    for name in names {
        let mut settings = complete.clone();
        settings.as_object_mut().unwrap().remove(&name);
        let message = refusal(&settings);
        assert!(
            message.contains(&format!("missing field `{name}`")),
            "{message}"
        );
    }
    let message = refusal(&settings(Path::new("run"), json!({"learning_rat": 1})));
    assert!(message.contains("learning_rat"), "{message}");
}

#[test]
fn settings_survive_json() {
    let changes = json!({
        "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"down_proj": 4},
        "max_steps": 7, "patience": 2, "quant_type": "fp4", "heldout": 0.0,
        "heldout_data": ["other.txt"],
    });
    let settings = settings(Path::new("run"), changes);
    let config = TrainConfig::from_json(&settings.to_string()).unwrap();
    assert_eq!(serde_json::to_value(&config).unwrap(), settings);
}

#[test]
fn full_training_needs_no_lora_settings() {
    let settings = settings(
        Path::new("run"),
        json!({"method": "full", "r": 0, "blocksize": 0}),
    );
    assert!(TrainConfig::from_json(&settings.to_string()).is_ok());
}
