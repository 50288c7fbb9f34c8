//! The inner loop of products in f32 vectors.

#[allow(clippy::wildcard_imports)] // the vector instructions
use std::arch::x86_64::*;

/// Rows of a block whose sums lie in registers.
pub const HEIGHT: usize = 6;

/// Its columns: two vectors.
pub const COLUMNS: usize = 16;

/// A block of sums, `stride` elements from row to row: of `inner` products of `left` `[inner][HEIGHT]` and `right`
/// `[inner][COLUMNS]`, added to what the block holds with `add`.
///
/// # Safety
/// The CPU has the features; `left`, `right` and `sums` have the elements, which nothing else writes.
#[target_feature(enable = "avx2,fma")]
pub unsafe fn multiply(
    mut left: *const f32,
    mut right: *const f32,
    inner: usize,
    sums: *mut f32,
    stride: usize,
    add: bool,
) {
    let mut found = [[_mm256_setzero_ps(); 2]; HEIGHT];
    // SAFETY: the caller's.
    unsafe {
        for row in 0..HEIGHT {
            _mm_prefetch::<_MM_HINT_T0>(sums.add(row * stride).cast());
        }
        for _ in 0..inner {
            let (first, second) = (_mm256_loadu_ps(right), _mm256_loadu_ps(right.add(8)));
            for (row, found) in found.iter_mut().enumerate() {
                let value = _mm256_broadcast_ss(&*left.add(row));
                found[0] = _mm256_fmadd_ps(value, first, found[0]);
                found[1] = _mm256_fmadd_ps(value, second, found[1]);
            }
            left = left.add(HEIGHT);
            right = right.add(COLUMNS);
        }
        for (row, found) in found.into_iter().enumerate() {
            let to = sums.add(row * stride);
            for (i, mut found) in found.into_iter().enumerate() {
                let to = to.add(8 * i);
                if add {
                    found = _mm256_add_ps(found, _mm256_loadu_ps(to));
                }
                _mm256_storeu_ps(to, found);
            }
        }
    }
}
