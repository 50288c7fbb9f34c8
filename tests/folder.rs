//! Reading model folders: what is read equals what was written, and every way a folder can be broken has its own message.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::Path;

use common::assert_says;
use ferrotune::dtype::DType;
use ferrotune::error::{Error, Result};
use ferrotune::folder::{ConfigFile, Tensor, Weights, tokenizer_file, write_safetensors};
use half::{bf16, f16};
use proptest::prelude::*;
use safetensors::Dtype;
use tempfile::TempDir;

fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn message<T>(result: Result<T>) -> String {
    result.err().expect("an error").to_string()
}

fn small(path: &Path) {
    let tensors = vec![
        Tensor::from_f32("a", DType::F32, &[2, 3], &[0.0, 1.0, 2.0, 3.0, 4.0, 5.5]),
        Tensor::from_f32("b", DType::BF16, &[2], &[1.0, -2.0]),
    ];
    write_safetensors(path, tensors, &[("format", "pt")]).unwrap();
}

proptest! {
    #[test]
    fn written_tensors_are_read_back(
        values in prop::collection::vec(any::<f32>().prop_filter("finite", |x| x.is_finite()), 0..40),
        extra in 0_usize..5,
    ) {
        let dir = folder();
        let path = dir.path().join("model.safetensors");
        let bytes: Vec<u8> = (0..extra as u8).collect();
        let n = values.len();
        let tensors = vec![
            Tensor::from_bytes("bytes", Dtype::U8, &[extra], &bytes),
            Tensor::from_f32("w.f16", DType::F16, &[n], &values),
            Tensor::from_f32("w.bf16", DType::BF16, &[n], &values),
            Tensor::from_f32("w.f32", DType::F32, &[1, n], &values),
        ];
        write_safetensors(&path, tensors, &[("format", "pt")]).unwrap();
        let weights = Weights::open(dir.path()).unwrap();
        prop_assert_eq!(weights.names().collect::<Vec<_>>(), ["bytes", "w.bf16", "w.f16", "w.f32"]);
        prop_assert_eq!(weights.to_f32("w.f32").unwrap(), values.clone());
        let halves: Vec<f32> = values.iter().map(|&x| f16::from_f32(x).to_f32()).collect();
        prop_assert_eq!(weights.to_f32("w.f16").unwrap(), halves);
        let brains: Vec<f32> = values.iter().map(|&x| bf16::from_f32(x).to_f32()).collect();
        prop_assert_eq!(weights.to_f32("w.bf16").unwrap(), brains);
        prop_assert_eq!(weights.get("bytes").unwrap().bytes, &bytes[..]);
        prop_assert_eq!(weights.get("w.f32").unwrap().shape, &[1, n][..]);
        // The reference implementation reads the same file.
        let file = fs::read(&path).unwrap();
        let reference = safetensors::SafeTensors::deserialize(&file).unwrap();
        prop_assert_eq!(reference.len(), 4);
        prop_assert_eq!(reference.tensor("w.f16").unwrap().data(), weights.get("w.f16").unwrap().bytes);
    }

    /// Whatever the bytes, opening returns; a file cut anywhere is an error.
    #[test]
    fn broken_files_are_errors(cut in 0.0..1.0_f64, noise in prop::collection::vec(any::<u8>(), 0..64)) {
        let dir = folder();
        let path = dir.path().join("model.safetensors");
        small(&path);
        let whole = fs::read(&path).unwrap();
        fs::write(&path, &whole[..(cut * whole.len() as f64) as usize]).unwrap();
        let text = message(Weights::open(dir.path()));
        prop_assert!(text.contains("truncated"), "{}", text);
        fs::write(&path, &noise).unwrap();
        let refused = matches!(Weights::open(dir.path()), Err(Error::Format { .. }));
        prop_assert!(refused);
    }
}

#[test]
fn truncation_says_expected_and_found() {
    let dir = folder();
    let path = dir.path().join("model.safetensors");
    small(&path);
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..whole.len() - 3]).unwrap();
    let (expected, found) = (whole.len().to_string(), (whole.len() - 3).to_string());
    assert_says(
        Weights::open(dir.path()),
        &["model.safetensors", "truncated", &expected, &found],
    );
    fs::write(&path, &whole[..20]).unwrap();
    assert_says(
        Weights::open(dir.path()),
        &["truncated inside its header", "20"],
    );
    fs::write(&path, []).unwrap();
    assert_says(Weights::open(dir.path()), &["truncated", "0 bytes"]);
    let mut long = whole.clone();
    long.push(0);
    fs::write(&path, long).unwrap();
    assert_says(Weights::open(dir.path()), &["1 bytes too long"]);
    fs::write(&path, [0xff; 40]).unwrap();
    assert_says(Weights::open(dir.path()), &["not a safetensors file"]);
}

#[test]
fn missing_files_say_what_is_there() {
    let dir = folder();
    assert_says(
        Weights::open(dir.path()),
        &["missing model.safetensors", "empty"],
    );
    fs::write(dir.path().join("pytorch_model.bin"), "x").unwrap();
    assert_says(
        Weights::open(dir.path()),
        &["missing model.safetensors", "pytorch_model.bin"],
    );
    assert_says(
        ConfigFile::open(dir.path()),
        &["missing config.json", "pytorch_model.bin"],
    );
    fs::write(dir.path().join("tokenizer.model"), "x").unwrap();
    assert_says(
        tokenizer_file(dir.path()),
        &[
            "missing tokenizer.json",
            "tokenizer.model alone is not read",
        ],
    );
    assert!(matches!(
        Weights::open(&dir.path().join("nowhere")),
        Err(Error::Io { .. })
    ));
    assert!(matches!(
        ConfigFile::open(&dir.path().join("nowhere")),
        Err(Error::Io { .. })
    ));
}

#[test]
fn a_tensor_that_is_not_there_or_not_a_float() {
    let dir = folder();
    let path = dir.path().join("model.safetensors");
    let tensors = vec![
        Tensor::from_bytes("model.ids.weight", Dtype::I64, &[1], &[0; 8]),
        Tensor::from_f32("model.q_proj.weight", DType::F32, &[1], &[1.0]),
    ];
    write_safetensors(&path, tensors, &[]).unwrap();
    let weights = Weights::open(dir.path()).unwrap();
    assert_says(
        weights.get("model.k_proj.weight"),
        &["no tensor 'model.k_proj.weight'", "2 tensors"],
    );
    assert_says(
        weights.to_f32("model.ids.weight"),
        &["I64", "F32, F16 and BF16"],
    );
    assert!(weights.contains("model.ids.weight") && !weights.contains("model.k_proj.weight"));
}

#[test]
fn a_header_with_one_name_twice() {
    let dir = folder();
    let header = br#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#;
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.push(7);
    fs::write(dir.path().join("model.safetensors"), file).unwrap();
    assert_says(Weights::open(dir.path()), &["names tensor 'a' twice"]);
}

fn shard(dir: &Path, name: &str, tensors: &[&str]) {
    let tensors = tensors
        .iter()
        .map(|&tensor| Tensor::from_f32(tensor, DType::F32, &[1], &[1.0]));
    write_safetensors(&dir.join(name), tensors.collect(), &[]).unwrap();
}

fn index(dir: &Path, text: &str) {
    fs::write(dir.join("model.safetensors.index.json"), text).unwrap();
}

#[test]
fn broken_indices() {
    let dir = folder();
    let path = dir.path();
    shard(path, "one.safetensors", &["a", "b"]);
    index(
        path,
        r#"{"weight_map": {"a": "one.safetensors", "c": "two.safetensors"}}"#,
    );
    assert_says(
        Weights::open(path),
        &[
            "index.json",
            "shard two.safetensors",
            "missing",
            "one.safetensors",
        ],
    );
    shard(path, "two.safetensors", &["d"]);
    assert_says(
        Weights::open(path),
        &["tensor 'c' is in two.safetensors", "does not hold it"],
    );
    shard(path, "two.safetensors", &["c", "b"]);
    assert_says(
        Weights::open(path),
        &["two.safetensors", "'b' is also in", "one.safetensors"],
    );
    index(path, r#"{"weight_map": {"a": "../one.safetensors"}}"#);
    assert_says(
        Weights::open(path),
        &["'../one.safetensors'", "not the name of a file"],
    );
    index(path, r#"{"weight_map": 3}"#);
    assert_says(Weights::open(path), &["not an index of shards"]);
    index(path, r#"{"weight_map": {"c": "one.safetensors"}}"#);
    assert_says(
        Weights::open(path),
        &["tensor 'c' is in one.safetensors", "does not hold it"],
    );
}

const CONFIG: &str = r#"{
  "architectures": ["LlamaForCausalLM"],
  "hidden_size": 64, "rms_norm_eps": 1e-05, "tie_word_embeddings": true, "head_dim": null,
  "torch_dtype": "bfloat16", "eos_token_id": [1, 2], "bos_token_id": 0,
  "rope_scaling": {"rope_type": "llama3", "factor": "eight"},
  "quantization_config": {"load_in_4bit": true}
}"#;

#[test]
fn config_fields_are_typed() {
    let dir = folder();
    fs::write(dir.path().join("config.json"), CONFIG).unwrap();
    let config = ConfigFile::open(dir.path()).unwrap();
    assert_eq!(config.architecture().unwrap(), "LlamaForCausalLM");
    assert_eq!(config.usize("hidden_size").unwrap(), 64);
    assert_eq!(config.usize_or("head_dim", 16).unwrap(), 16);
    assert!((config.f64("rms_norm_eps").unwrap() - 1e-5).abs() < 1e-20);
    assert!((config.f64_or("rope_theta", 1e4).unwrap() - 1e4).abs() < 1e-9);
    assert!(config.bool_or("tie_word_embeddings", false).unwrap());
    assert_eq!(config.dtype().unwrap(), Some(DType::BF16));
    assert_eq!(config.token_ids("eos_token_id").unwrap(), [1, 2]);
    assert_eq!(config.token_ids("bos_token_id").unwrap(), [0]);
    assert!(config.token_ids("pad_token_id").unwrap().is_empty());
    let rope = config.section("rope_scaling").unwrap().unwrap();
    assert_eq!(rope.str("rope_type").unwrap(), "llama3");
    assert_says(
        rope.f64("factor"),
        &[
            "config.json",
            "rope_scaling.factor",
            "a number",
            "\"eight\"",
        ],
    );
    assert_says(
        config.usize("num_hidden_layers"),
        &["config.json", "missing field 'num_hidden_layers'"],
    );
    assert_says(
        config.usize("rms_norm_eps"),
        &["'rms_norm_eps' must be a whole number"],
    );
    assert!(matches!(
        config.usize("vocab_size"),
        Err(Error::Format { .. })
    ));
}

#[test]
fn configs_that_are_no_configs() {
    let dir = folder();
    let path = dir.path().join("config.json");
    fs::write(&path, "{\"hidden_size\": ").unwrap();
    assert_says(
        ConfigFile::open(dir.path()),
        &["config.json", "not valid JSON", "line 1"],
    );
    fs::write(&path, "[1]").unwrap();
    assert_says(
        ConfigFile::open(dir.path()),
        &["must be a JSON object, not a list"],
    );
    fs::write(&path, r#"{"dtype": "int8"}"#).unwrap();
    let config = ConfigFile::open(dir.path()).unwrap();
    assert_says(config.dtype(), &["config.json", "int8"]);
    assert_says(config.architecture(), &["missing field 'architectures'"]);
}
