//! SwiGLU (Shazeer, 2020): `silu(gate) · up` on a row `[gate | up]`.

use rayon::prelude::*;

use crate::simd::{sigmoid, vectorized};

/// Rows a thread takes at a time.
const ROWS: usize = 32;

/// Writes `y` `[m, f]` for `gate_up` `[m, 2f]`.
pub fn swiglu(gate_up: &[f32], f: usize, y: &mut [f32]) {
    y.par_chunks_mut(f * ROWS)
        .zip(gate_up.par_chunks(2 * f * ROWS))
        .for_each(|(y, gate_up)| {
            vectorized(|| {
                for (y, row) in y.chunks_exact_mut(f).zip(gate_up.chunks_exact(2 * f)) {
                    let (gate, up) = row.split_at(f);
                    for ((y, &g), &u) in y.iter_mut().zip(gate).zip(up) {
                        *y = g * sigmoid(g) * u;
                    }
                }
            });
        });
}

/// Turns `gate_up` `[m, 2f]` into its gradient in place, for `dy` `[m, f]`.
pub fn swiglu_backward(gate_up: &mut [f32], f: usize, dy: &[f32]) {
    gate_up
        .par_chunks_mut(2 * f * ROWS)
        .zip(dy.par_chunks(f * ROWS))
        .for_each(|(gate_up, dy)| {
            vectorized(|| {
                for (row, dy) in gate_up.chunks_exact_mut(2 * f).zip(dy.chunks_exact(f)) {
                    let (gate, up) = row.split_at_mut(f);
                    for ((g, u), &dy) in gate.iter_mut().zip(up).zip(dy) {
                        let s = sigmoid(*g);
                        let silu = *g * s;
                        *g = dy * *u * (s + silu * (1.0 - s));
                        *u = dy * silu;
                    }
                }
            });
        });
}
