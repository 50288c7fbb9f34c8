//! Writing model folders, and bitsandbytes' 4-bit weights in them.

#![allow(clippy::unwrap_used)]

mod common;

use std::borrow::Cow;
use std::fs;
use std::path::Path;

use common::assert_says;
use ferrotune::dtype::{DType, QuantType};
use ferrotune::error::Error;
use ferrotune::folder::{
    ConfigFile, ModelFolder, Staging, Tensor, Weights, write_model, write_safetensors,
};
use ferrotune::quant::{dequantize_4bit, to_tensors};
use half::{bf16, f16};
use safetensors::Dtype;
use tempfile::TempDir;

fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

const CONFIG: &str = r#"{
  "architectures": ["LlamaForCausalLM"],
  "hidden_size": 64, "rms_norm_eps": 1e-05, "tie_word_embeddings": true, "head_dim": null,
  "torch_dtype": "bfloat16", "eos_token_id": [1, 2], "bos_token_id": 0,
  "rope_scaling": {"rope_type": "llama3", "factor": "eight"},
  "quantization_config": {"load_in_4bit": true}
}"#;

fn base(dir: &Path) -> ConfigFile {
    fs::write(dir.join("config.json"), CONFIG).unwrap();
    fs::write(dir.join("tokenizer.json"), "{\"t\": 1}").unwrap();
    fs::write(dir.join("README.md"), "the base's card").unwrap();
    ConfigFile::open(dir).unwrap()
}

fn model<'a>(
    config: &'a ConfigFile,
    base: &'a Path,
    tensors: Vec<Tensor<'a>>,
    limit: u64,
) -> ModelFolder<'a> {
    ModelFolder {
        config,
        dtype: DType::F16,
        tensors,
        base: Some(base),
        model_card: Some("merged"),
        max_shard_size: limit,
    }
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_model_is_written_in_shards_and_again_in_one_file() {
    let (source, target) = (folder(), folder());
    let config = base(source.path());
    let values: Vec<f32> = (0..10).map(|i| i as f32).collect();
    let tensors = |count: usize| -> Vec<Tensor> {
        (0..count)
            .map(|i| Tensor::from_f32(format!("t{i}"), DType::F16, &[10], &values))
            .collect()
    };
    // 20 bytes a tensor: two a shard.
    write_model(target.path(), model(&config, source.path(), tensors(5), 45)).unwrap();
    assert_eq!(
        names(target.path()),
        [
            "README.md",
            "config.json",
            "model-00001-of-00003.safetensors",
            "model-00002-of-00003.safetensors",
            "model-00003-of-00003.safetensors",
            "model.safetensors.index.json",
            "tokenizer.json"
        ]
    );
    let weights = Weights::open(target.path()).unwrap();
    assert_eq!(weights.names().count(), 5);
    assert_eq!(weights.to_f32("t4").unwrap(), values);
    assert!(
        weights
            .file_of("t2")
            .ends_with("model-00002-of-00003.safetensors")
    );
    let index: serde_json::Value = serde_json::from_slice(
        &fs::read(target.path().join("model.safetensors.index.json")).unwrap(),
    )
    .unwrap();
    assert_eq!(index["metadata"]["total_size"], 100);
    assert_eq!(index["metadata"]["total_parameters"], 50);
    let written = ConfigFile::open(target.path()).unwrap();
    assert_eq!(written.dtype().unwrap(), Some(DType::F16));
    assert!(written.opt("quantization_config").is_none());
    assert_eq!(written.usize("hidden_size").unwrap(), 64);
    assert_eq!(
        fs::read_to_string(target.path().join("README.md")).unwrap(),
        "merged"
    );
    write_model(
        target.path(),
        model(&config, source.path(), tensors(2), 1 << 30),
    )
    .unwrap();
    assert_eq!(
        names(target.path()),
        [
            "README.md",
            "config.json",
            "model.safetensors",
            "tokenizer.json"
        ]
    );
    assert_eq!(Weights::open(target.path()).unwrap().names().count(), 2);
}

#[test]
fn a_failed_write_leaves_the_old_model() {
    let dir = folder();
    let config = base(dir.path());
    let one = || Tensor::from_f32("t", DType::F32, &[1], &[1.0]);
    write_model(dir.path(), model(&config, dir.path(), vec![one()], 100)).unwrap();
    let before: Vec<(String, Vec<u8>)> = names(dir.path())
        .into_iter()
        .map(|name| (name.clone(), fs::read(dir.path().join(name)).unwrap()))
        .collect();
    let broken = Tensor::lazy("u", Dtype::F32, &[1], || Err(Error::run("no more")));
    assert_says(
        write_model(
            dir.path(),
            model(&config, dir.path(), vec![one(), broken], 4),
        ),
        &["no more"],
    );
    let short = Tensor::lazy("u", Dtype::F32, &[2], || Ok(Cow::Owned(vec![0; 4])));
    assert_says(
        write_model(dir.path(), model(&config, dir.path(), vec![short], 100)),
        &["'u'", "8 bytes, not 4"],
    );
    assert_says(
        write_model(
            dir.path(),
            model(&config, dir.path(), vec![one(), one()], 4),
        ),
        &["two tensors are named 't'"],
    );
    let lone = vec![Tensor::lazy("u", Dtype::F32, &[1], || {
        Err(Error::run("not now"))
    })];
    assert_says(
        write_safetensors(&dir.path().join("model.safetensors"), lone, &[]),
        &["not now"],
    );
    let mut staging = Staging::new(dir.path()).unwrap();
    staging.write("config.json", b"{}").unwrap();
    drop(staging);
    for (name, content) in &before {
        assert_eq!(&fs::read(dir.path().join(name)).unwrap(), content, "{name}");
    }
    assert_eq!(names(dir.path()).len(), before.len());
}

/// Written by bitsandbytes: tests/data/make_bitsandbytes.py.
#[test]
fn bitsandbytes_weights_are_read_and_written_back() {
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/bitsandbytes_4bit.safetensors");
    let weights = Weights::open_file(&path).unwrap();
    for (name, quant_type, dtype) in [
        ("nf4_double", QuantType::Nf4, DType::BF16),
        ("fp4_plain", QuantType::Fp4, DType::F16),
    ] {
        let weight = format!("{name}.weight");
        let quantized = weights.quantized(&weight).unwrap().expect("4-bit");
        let state = &quantized.state;
        assert_eq!(
            (state.quant_type, state.dtype, &state.shape[..]),
            (quant_type, dtype, &[20, 64][..])
        );
        let expected = weights.to_f32(&format!("{name}.expected")).unwrap();
        let found: Vec<f32> = if dtype == DType::BF16 {
            let mut out = vec![bf16::ZERO; 1280];
            dequantize_4bit(&quantized.packed, state, &mut out).unwrap();
            out.iter().map(|x| x.to_f32()).collect()
        } else {
            let mut out = vec![f16::ZERO; 1280];
            dequantize_4bit(&quantized.packed, state, &mut out).unwrap();
            out.iter().map(|x| x.to_f32()).collect()
        };
        assert_eq!(found, expected);

        // Through our writer, the quant state in another shard than the weight.
        let dir = folder();
        let config = base(dir.path());
        let tensors = to_tensors("w", &quantized).unwrap();
        let tensors = tensors
            .iter()
            .map(|t| Tensor::from_bytes(&t.name, t.dtype, &t.shape, &t.bytes));
        write_model(
            dir.path(),
            model(&config, dir.path(), tensors.collect(), 500),
        )
        .unwrap();
        let back = Weights::open(dir.path()).unwrap();
        assert_ne!(back.file_of("w"), back.file_of("w.quant_map"));
        assert_eq!(back.quantized("w").unwrap().unwrap(), quantized);
    }
    assert_eq!(weights.quantized("nf4_double.expected").unwrap(), None);
}

#[test]
fn four_bit_weights_with_parts_missing() {
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/bitsandbytes_4bit.safetensors");
    let weights = Weights::open_file(&path).unwrap();
    let without = |part: &str| {
        let dir = folder();
        let all = weights
            .names()
            .filter(|name| name.starts_with("nf4_double.weight") && !name.ends_with(part));
        let tensors = all.map(|name| {
            let view = weights.get(name).unwrap();
            Tensor::from_bytes(name, view.dtype, view.shape, view.bytes)
        });
        write_safetensors(
            &dir.path().join("model.safetensors"),
            tensors.collect(),
            &[],
        )
        .unwrap();
        Weights::open(dir.path())
            .unwrap()
            .quantized("nf4_double.weight")
    };
    for part in [
        ".weight.absmax",
        ".quant_map",
        ".nested_absmax",
        ".nested_quant_map",
    ] {
        assert_says(
            without(part),
            &[
                "model.safetensors",
                &format!("nf4_double.weight{}", part.trim_start_matches(".weight")),
            ],
        );
    }
    assert_says(
        without("bitsandbytes__nf4"),
        &["'nf4_double.weight' has an absmax but no"],
    );
}
