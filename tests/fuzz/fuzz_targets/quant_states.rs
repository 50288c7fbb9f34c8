//! Any tensors under bitsandbytes' names: a 4-bit weight that can be dequantised, or one error. The first bytes cut the
//! rest into the tensors.

#![no_main]

use std::collections::HashMap;
use std::path::Path;

use ferrotune::quant::{TensorBytes, dequantize_4bit, from_tensors, to_tensors};
use libfuzzer_sys::fuzz_target;
use safetensors::Dtype;

const NAMES: [&str; 6] = [
    "w", "w.absmax", "w.quant_map", "w.nested_absmax", "w.nested_quant_map",
    "w.quant_state.bitsandbytes__nf4",
];
const TYPES: [Dtype; 5] = [Dtype::U8, Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::I64];
/// Values up to which a weight that was read is dequantised.
const MOST_VALUES: usize = 1 << 20;

fuzz_target!(|input: &[u8]| {
    let mut rest = input;
    let mut tensors = HashMap::new();
    for name in NAMES {
        let [kind, low, high, behind @ ..] = rest else {
            break;
        };
        let size = usize::from(u16::from_le_bytes([*low, *high])).min(behind.len());
        let (bytes, behind) = behind.split_at(size);
        rest = behind;
        tensors.insert(name, (TYPES[usize::from(*kind) % TYPES.len()], [size], bytes));
    }
    let find = |name: &str| {
        let (dtype, shape, bytes) = tensors.get(name)?;
        Some(TensorBytes { dtype: *dtype, shape, bytes })
    };
    let Ok(Some(weight)) = from_tensors(Path::new("fuzz"), "w", find) else {
        return;
    };
    let values: usize = weight.state.shape.iter().product();
    if values <= MOST_VALUES {
        let mut out = vec![0f32; values];
        assert!(dequantize_4bit(&weight.packed, &weight.state, &mut out).is_ok());
    }
    assert!(to_tensors("w", &weight).is_ok());
});
