//! The sixteen values of each 4-bit type, and the 256 of the dynamic 8-bit type that holds nested absmax.

use std::sync::LazyLock;

use crate::dtype::QuantType;

/// NormalFloat 4 (Dettmers et al. 2023, arXiv 2305.14314, appendix E), in ascending order of value and of code.
const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// FP4: bit 3 is the sign, bits 0..3 index these values. Code 8 is a second zero.
const FP4: [f32; 16] = [
    0.0,
    0.0625 / 12.0,
    8.0 / 12.0,
    1.0,
    4.0 / 12.0,
    6.0 / 12.0,
    2.0 / 12.0,
    3.0 / 12.0,
    0.0,
    -0.0625 / 12.0,
    -8.0 / 12.0,
    -1.0,
    -4.0 / 12.0,
    -6.0 / 12.0,
    -2.0 / 12.0,
    -3.0 / 12.0,
];

/// FP4's codes by ascending value; of the two zeros, 0 stands for [-0.0026, 0] and 8 for (0, 0.0026].
const FP4_ORDER: [u8; 16] = [11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3];
const NF4_ORDER: [u8; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];

/// The values of a 4-bit type and the search tree that finds the nearest one.
#[derive(Debug)]
pub struct Codebook {
    /// Value of each code.
    pub values: [f32; 16],
    /// `order[rank]` is the code of the value with that rank.
    pub(super) order: [u8; 16],
    /// The fifteen midpoints between neighbouring values as a binary heap in slots 1..16: with i = 1 at first,
    /// four times `i = 2 i + (x > tree[i])` leaves i = 16 + rank of the value nearest to x (ties go down).
    pub(super) tree: [f32; 16],
}

impl Codebook {
    pub fn of(quant_type: QuantType) -> &'static Self {
        static NF4_BOOK: LazyLock<Codebook> = LazyLock::new(|| Codebook::new(NF4, NF4_ORDER));
        static FP4_BOOK: LazyLock<Codebook> = LazyLock::new(|| Codebook::new(FP4, FP4_ORDER));
        match quant_type {
            QuantType::Nf4 => &NF4_BOOK,
            QuantType::Fp4 => &FP4_BOOK,
        }
    }

    fn new(values: [f32; 16], order: [u8; 16]) -> Self {
        let sorted = order.map(|code| values[usize::from(code)]);
        let mut tree = [0.0; 16];
        for (level, first) in [1_usize, 2, 4, 8].into_iter().enumerate() {
            let stride = 16 >> level;
            for i in 0..first {
                let rank = stride / 2 - 1 + i * stride;
                tree[first + i] = f32::midpoint(sorted[rank], sorted[rank + 1]);
            }
        }
        Self {
            values,
            order,
            tree,
        }
    }

    /// Code of the value nearest to `x`.
    pub(super) fn encode(&self, x: f32) -> u8 {
        let mut i = 1;
        for _ in 0..4 {
            i = 2 * i + usize::from(x > self.tree[i]);
        }
        self.order[i - 16]
    }
}

/// The signed dynamic 8-bit type (Dettmers, 8-Bit Approximations for Parallelism in Deep Learning, arXiv 1511.04561):
/// 256 ascending values. For exponents 10⁻⁶ to 10⁰ and 2⁰ to 2⁶ fractions, the middles of equal steps from 0.1 to 1;
/// their negatives; 0 and 1. Equal to bitsandbytes' `create_dynamic_map()` bit for bit.
pub fn dynamic_map() -> &'static [f32; 256] {
    static MAP: LazyLock<[f32; 256]> = LazyLock::new(|| {
        let mut map = [0.0_f32; 256];
        map[255] = 1.0;
        let mut next = 1;
        for exponent in 0..7_u32 {
            let scale = 10.0_f64.powi(exponent as i32 - 6) as f32;
            let steps = 1_usize << exponent;
            for i in 0..steps {
                let value = scale * f32::midpoint(boundary(i, steps), boundary(i + 1, steps));
                map[next] = value;
                map[next + 1] = -value;
                next += 2;
            }
        }
        map.sort_by(f32::total_cmp);
        map
    });
    &MAP
}

/// Element i of `torch.linspace(0.1, 1, steps + 1)`: counted from the nearer end, rounded once (a fused
/// multiply-add, as torch's vector code does it; the f64 product and sum are exact here).
fn boundary(i: usize, steps: usize) -> f32 {
    let (start, end) = (0.1_f32, 1.0_f32);
    let step = f64::from((end - start) / steps as f32);
    if i < steps.div_ceil(2) {
        (f64::from(start) + step * i as f64) as f32
    } else {
        (f64::from(end) - step * (steps - i) as f64) as f32
    }
}
