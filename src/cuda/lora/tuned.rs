//! What was measured of base products on a Hopper chip; `python benches/cuda_gemm.py --tune` writes the table.

/// A product `[m, w]` over `depth`, W as `[w, depth]` or, `down_rows`, `[depth, w]`.
#[derive(Debug, Clone, Copy)]
pub struct Tuned {
    pub m: u64,
    pub w: u64,
    pub depth: u64,
    pub down_rows: bool,
    /// Tiles of 256 rows that are best taken together.
    pub together: u32,
    /// Microseconds of ours, and of cuBLAS.
    pub ours: f32,
    pub cublas: f32,
}

/// The product with the nearest number of rows, if one of at most twice as many, or half, was measured.
pub fn found(m: u64, w: u64, depth: u64, down_rows: bool) -> Option<Tuned> {
    let apart = |one: &Tuned| one.m.max(m) as f64 / one.m.min(m) as f64;
    TABLE
        .iter()
        .filter(|one| {
            (one.w, one.depth, one.down_rows) == (w, depth, down_rows) && apart(one) < 2.0
        })
        .min_by(|a, b| apart(a).total_cmp(&apart(b)))
        .map(|one| {
            let scale = m as f32 / one.m as f32;
            Tuned {
                m,
                ours: one.ours * scale,
                cublas: one.cublas * scale,
                ..*one
            }
        })
}

const TABLE: &[Tuned] = include!("tuned_table.rs");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_number_of_rows_is_found_and_scaled() {
        let near = found(6000, 14336, 4096, false).expect("measured of 8192");
        let measured = found(8192, 14336, 4096, false).expect("measured");
        assert_eq!(near.together, measured.together);
        assert!((near.ours / measured.ours - 6000.0 / 8192.0).abs() < 1e-3);
        assert!(found(1 << 20, 14336, 4096, false).is_none());
        assert!(found(8192, 14337, 4096, false).is_none());
        let turned = found(8192, 4096, 14336, true).expect("measured");
        assert!(turned.down_rows);
    }

    #[test]
    fn the_table_is_plausible() {
        for one in TABLE {
            let rate = |time: f32| (2 * one.m * one.w * one.depth) as f32 / time / 1e6; // TFLOP/s
            assert!(one.together > 0, "{one:?}");
            assert!((50.0..1000.0).contains(&rate(one.ours)), "{one:?}");
            assert!((50.0..1000.0).contains(&rate(one.cublas)), "{one:?}");
            let alike = |other: &&Tuned| {
                (other.m, other.w, other.depth, other.down_rows)
                    == (one.m, one.w, one.depth, one.down_rows)
            };
            assert_eq!(TABLE.iter().filter(alike).count(), 1, "{one:?}");
        }
    }
}
