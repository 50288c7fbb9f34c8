//! 4-bit checkpoints: what bitsandbytes stores reads back, and what it could not have stored is refused by name.

#![allow(clippy::unwrap_used)]

use std::path::Path;

use ferrotune::dtype::QuantType;
use ferrotune::error::{Error, Result};
use ferrotune::quant::{
    NamedTensor, Quantized4bit, TensorBytes, from_tensors, quantize_4bit, to_tensors,
};
use safetensors::Dtype;

const NAME: &str = "model.layers.0.mlp.up_proj.weight";

fn weight(double_quant: bool) -> Quantized4bit {
    let values: Vec<f32> = (0..48 * 90)
        .map(|i| ((i * 7919) % 1000) as f32 / 500.0 - 1.0)
        .collect();
    quantize_4bit(&values, &[48, 90], QuantType::Nf4, 64, double_quant).unwrap()
}

fn read(tensors: &[NamedTensor]) -> Result<Option<Quantized4bit>> {
    from_tensors(Path::new("model.safetensors"), NAME, |name| {
        let tensor = tensors.iter().find(|tensor| tensor.name == name)?;
        Some(TensorBytes {
            dtype: tensor.dtype,
            shape: &tensor.shape,
            bytes: &tensor.bytes,
        })
    })
}

/// The message after `change` was made to the tensor with this suffix.
fn refused(suffix: &str, change: impl FnOnce(&mut NamedTensor)) -> String {
    let mut tensors = to_tensors(NAME, &weight(true)).unwrap();
    let name = format!("{NAME}{suffix}");
    change(
        tensors
            .iter_mut()
            .find(|tensor| tensor.name == name)
            .unwrap(),
    );
    let error = read(&tensors).unwrap_err();
    assert!(matches!(error, Error::Format { .. }), "{error:?}");
    let text = error.to_string();
    assert!(
        text.starts_with(&format!("model.safetensors: tensor '{NAME}")),
        "{text}"
    );
    text
}

#[test]
fn names_types_and_shapes_are_bitsandbytes() {
    let tensors = to_tensors(NAME, &weight(true)).unwrap();
    let listed: Vec<_> = tensors
        .iter()
        .map(|tensor| {
            (
                &tensor.name[NAME.len()..],
                tensor.dtype,
                tensor.shape.clone(),
            )
        })
        .collect();
    let json = &tensors[5].bytes;
    assert_eq!(
        listed,
        [
            ("", Dtype::U8, vec![2160, 1]),
            (".absmax", Dtype::U8, vec![68]),
            (".nested_absmax", Dtype::F32, vec![1]),
            (".nested_quant_map", Dtype::F32, vec![256]),
            (".quant_map", Dtype::F32, vec![16]),
            (
                ".quant_state.bitsandbytes__nf4",
                Dtype::U8,
                vec![json.len()]
            ),
        ]
    );
    let json: serde_json::Value = serde_json::from_slice(json).unwrap();
    let keys: Vec<_> = json.as_object().unwrap().keys().collect();
    assert_eq!(
        keys,
        [
            "quant_type",
            "blocksize",
            "dtype",
            "shape",
            "nested_blocksize",
            "nested_dtype",
            "nested_offset"
        ]
    );
    assert_eq!(
        (&json["dtype"], &json["shape"]),
        (&"float32".into(), &serde_json::json!([48, 90]))
    );
}

#[test]
fn what_is_written_reads_back() {
    for double_quant in [false, true] {
        let weight = weight(double_quant);
        assert_eq!(
            read(&to_tensors(NAME, &weight).unwrap()).unwrap(),
            Some(weight)
        );
    }
}

#[test]
fn a_weight_without_quant_state_is_not_4_bit() {
    assert_eq!(
        read(&to_tensors(NAME, &weight(true)).unwrap()[..5]).unwrap(),
        None
    );
}

#[test]
fn half_precision_absmax_is_widened() {
    let mut tensors = to_tensors(NAME, &weight(false)).unwrap();
    let absmax = tensors
        .iter_mut()
        .find(|tensor| tensor.name.ends_with(".absmax"))
        .unwrap();
    absmax.dtype = Dtype::BF16;
    absmax.bytes = [0x80, 0x3f].repeat(68);
    let read = read(&tensors).unwrap().unwrap();
    assert_eq!(
        read.state.absmax,
        ferrotune::quant::Absmax::Plain(vec![1.0; 68])
    );
}

#[test]
fn every_missing_tensor_is_named() {
    for suffix in [
        "",
        ".absmax",
        ".nested_absmax",
        ".nested_quant_map",
        ".quant_map",
    ] {
        let text = refused(suffix, |tensor| tensor.name.push('_'));
        assert!(
            text.contains(&format!("'{NAME}{suffix}': missing")),
            "{text}"
        );
    }
}

#[test]
fn sizes_must_fit_the_shape() {
    let text = refused("", |tensor| tensor.bytes.truncate(100));
    assert!(
        text.contains("100 bytes") && text.contains("needs 2160"),
        "{text}"
    );
    let text = refused(".absmax", |tensor| tensor.bytes.truncate(67));
    assert!(
        text.contains("absmax has 67 values") && text.contains("needs 68"),
        "{text}"
    );
    let text = refused(".nested_absmax", |tensor| tensor.bytes.clear());
    assert!(text.contains("nested_absmax has 0 values"), "{text}");
    let text = refused(".nested_quant_map", |tensor| tensor.bytes.truncate(1000));
    assert!(text.contains("nested_quant_map has 250 values"), "{text}");
    let text = refused(".nested_absmax", |tensor| {
        tensor.bytes = f32::NAN.to_le_bytes().to_vec();
    });
    assert!(text.contains("value 0 is NaN"), "{text}");
}

#[test]
fn the_map_must_be_the_types() {
    let text = refused(".quant_map", |tensor| {
        tensor.bytes[..4].copy_from_slice(&0.5_f32.to_le_bytes());
    });
    assert!(text.contains("not the codebook of nf4"), "{text}");
    let text = refused(".quant_map", |tensor| tensor.dtype = Dtype::I32);
    assert!(text.contains("dtype I32"), "{text}");
}

#[test]
fn the_json_must_say_what_is_needed() {
    let state = ".quant_state.bitsandbytes__nf4";
    let with = |from: &'static str, to: &'static str| {
        refused(state, move |tensor| {
            let json = String::from_utf8(tensor.bytes.clone()).unwrap();
            assert!(json.contains(from), "{json}");
            tensor.bytes = json.replace(from, to).into_bytes();
        })
    };
    assert!(with("{", "[").contains("JSON does not parse"));
    assert!(with("\"blocksize\"", "\"size\"").contains("blocksize"));
    assert!(with(":64", ":48").contains("not 48"));
    assert!(with("nf4", "fp4").contains("quant_type 'fp4'"));
    assert!(with("\"float32\",\"shape\"", "\"int8\",\"shape\"").contains("'int8'"));
    assert!(with("nested_offset", "offset").contains("'nested_offset' is missing"));
    assert!(with("\"nested_blocksize\":256", "\"nested_blocksize\":0").contains("not 0"));
    assert!(with("[48,90]", "[48,91]").contains("needs 2184"));
}
