//! Adapter folders: read back as written, checked against a model, and every way one can be broken.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::fs;

use common::assert_says;
use ferrotune::adapter::{self, Adapter, AdapterConfig, LoraPair, Modules, select};
use ferrotune::dtype::DType;
use ferrotune::error::Error;
use ferrotune::folder::{Tensor, Weights, write_safetensors};
use serde_json::{Value, json};

fn config(value: Value) -> ferrotune::error::Result<AdapterConfig> {
    let Value::Object(mut map) = value else {
        panic!("an object")
    };
    map.entry("peft_type").or_insert(json!("LORA"));
    AdapterConfig::from_json(&map).map(|(config, _)| config)
}

fn llama(layers: usize) -> Vec<String> {
    let mut names = Vec::new();
    for layer in 0..layers {
        for part in [
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
        ] {
            names.push(format!("model.layers.{layer}.{part}"));
        }
        for part in ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"] {
            names.push(format!("model.layers.{layer}.{part}"));
        }
    }
    names.push("lm_head".to_owned());
    names
}

fn pair(r: usize, k: usize, n: usize) -> LoraPair {
    LoraPair {
        r,
        in_features: k,
        out_features: n,
        lora_a: (0..r * k).map(|i| i as f32 * 0.25 - 1.0).collect(),
        lora_b: (0..n * r).map(|i| 0.5 - i as f32 * 0.125).collect(),
    }
}

fn example() -> Adapter {
    Adapter {
        config: config(
            json!({"target_modules": ["q_proj", "v_proj"], "r": 2, "rank_pattern": {"v_proj": 3}}),
        )
        .unwrap(),
        modules: BTreeMap::from([
            ("model.layers.0.self_attn.q_proj".to_owned(), pair(2, 4, 5)),
            ("model.layers.0.self_attn.v_proj".to_owned(), pair(3, 4, 2)),
        ]),
        saved: BTreeMap::new(),
    }
}

#[test]
fn an_adapter_is_read_back() {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("new/adapter");
        adapter::write(&folder, &example(), dtype, "# card", None).unwrap();
        let (read, warnings) = adapter::read(&folder).unwrap();
        // The values are exact in all three types.
        assert_eq!((read, warnings), (example(), Vec::new()));
        assert_eq!(
            fs::read_to_string(folder.join("README.md")).unwrap(),
            "# card"
        );
        let weights = Weights::open_file(&folder.join("adapter_model.safetensors")).unwrap();
        let view = weights
            .get("base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight")
            .unwrap();
        assert_eq!((view.float(), view.shape), (Some(dtype), &[2, 3][..]));
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 3);
    }
}

#[test]
fn an_adapter_is_checked_against_the_model() {
    let example = example();
    let check = |layers: usize| {
        let linear = llama(layers);
        let selection = select(
            &example.config,
            Modules {
                linear: &linear,
                ..Modules::default()
            },
        )
        .unwrap();
        example.check(&selection)
    };
    assert!(check(1).is_ok());
    assert_says(
        check(2),
        &[
            "no tensors for 2 modules",
            "model.layers.1.self_attn.q_proj",
        ],
    );
    let linear = ["model.layers.0.self_attn.q_proj".to_owned()];
    let selection = select(
        &example.config,
        Modules {
            linear: &linear,
            ..Modules::default()
        },
    )
    .unwrap();
    assert_says(
        example.check(&selection),
        &["tensors for 1 modules", "v_proj"],
    );
}

#[test]
fn adapters_that_do_not_fit_are_not_written() {
    let dir = tempfile::tempdir().unwrap();
    let mut wrong = example();
    wrong
        .modules
        .insert("model.layers.1.self_attn.q_proj".to_owned(), pair(3, 4, 5));
    assert_says(
        adapter::write(dir.path(), &wrong, DType::F32, "", None),
        &["layers.1.self_attn.q_proj", "r = 3", "says 2"],
    );
    let mut wrong = example();
    wrong
        .modules
        .insert("model.layers.0.mlp.up_proj".to_owned(), pair(2, 4, 5));
    assert_says(
        adapter::write(dir.path(), &wrong, DType::F32, "", None),
        &["mlp.up_proj", "do not choose it"],
    );
    let mut wrong = example();
    wrong.modules.clear();
    assert_says(
        adapter::write(dir.path(), &wrong, DType::F32, "", None),
        &["without any module"],
    );
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn broken_adapter_folders() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path();
    assert_says(
        adapter::read(path),
        &["missing adapter_config.json", "empty"],
    );
    adapter::write(path, &example(), DType::F32, "", None).unwrap();
    let config = fs::read_to_string(path.join("adapter_config.json")).unwrap();
    fs::write(
        path.join("adapter_config.json"),
        config.replace("\"use_dora\": false", "\"use_dora\": true"),
    )
    .unwrap();
    assert_says(
        adapter::read(path),
        &["adapter_config.json", "use_dora=true is not supported"],
    );
    fs::write(
        path.join("adapter_config.json"),
        config.replace("\"r\": 2", "\"r\": -2"),
    )
    .unwrap();
    assert!(matches!(adapter::read(path), Err(Error::Format { .. })));
    fs::write(
        path.join("adapter_config.json"),
        config.replace("\"r\": 2", "\"r\": 4"),
    )
    .unwrap();
    assert_says(adapter::read(path), &["q_proj", "r = 2", "says 4"]);
    fs::write(path.join("adapter_config.json"), "{").unwrap();
    assert_says(
        adapter::read(path),
        &["adapter_config.json", "not a JSON object"],
    );
    fs::write(path.join("adapter_config.json"), &config).unwrap();

    let file = path.join("adapter_model.safetensors");
    let whole = fs::read(&file).unwrap();
    fs::write(&file, &whole[..whole.len() - 1]).unwrap();
    assert_says(
        adapter::read(path),
        &["adapter_model.safetensors", "truncated"],
    );
    let tensors = |list: &[(&str, &[usize])]| {
        let zeros = [0.0; 64];
        let tensors = list.iter().map(|&(name, shape)| {
            let name = format!("base_model.model.q_proj.{name}");
            Tensor::from_f32(name, DType::F32, shape, &zeros[..shape.iter().product()])
        });
        write_safetensors(&file, tensors.collect(), &[]).unwrap();
        adapter::read(path)
    };
    let (a, b) = ("lora_A.weight", "lora_B.weight");
    assert!(tensors(&[(a, &[2, 4]), (b, &[5, 2])]).is_ok());
    assert_says(
        tensors(&[(a, &[2, 4])]),
        &[
            "q_proj.lora_A.weight' has no partner",
            "q_proj.lora_B.weight",
        ],
    );
    assert_says(
        tensors(&[(b, &[5, 2])]),
        &["q_proj.lora_B.weight' has no partner"],
    );
    assert_says(
        tensors(&[(a, &[2, 4]), (b, &[2, 5])]),
        &["[2, 4]", "[2, 5]", "[n, r]"],
    );
    assert_says(tensors(&[(a, &[8]), (b, &[5, 2])]), &["shape [8]"]);
    assert_says(tensors(&[(a, &[0, 4]), (b, &[5, 0])]), &["shape [0, 4]"]);
    assert_says(tensors(&[(a, &[3, 4]), (b, &[5, 3])]), &["r = 3", "says 2"]);
    assert_says(
        tensors(&[(a, &[2, 4]), (b, &[5, 2]), ("lora_B.bias", &[5])]),
        &["lora_B.bias", "lora_bias is not supported"],
    );
    assert_says(
        tensors(&[("lora_A.default.weight", &[2, 4])]),
        &["unexpected tensor", "lora_A.default.weight"],
    );
    assert_says(tensors(&[]), &["without any module"]);
    fs::rename(&file, path.join("adapter_model.bin")).unwrap();
    assert_says(
        adapter::read(path),
        &["missing adapter_model.safetensors", "pickle"],
    );
}
