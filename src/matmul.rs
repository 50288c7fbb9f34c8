//! Products of strided f32 matrices.

use std::ops::Range;

use gemm::Parallelism;

/// A read-only matrix over a slice: element (i, j) is at `i * row_stride + j * column_stride`.
#[derive(Clone, Copy)]
pub struct Mat<'a> {
    data: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

/// A writable row-major matrix over a slice, with a stride between rows.
pub struct MatMut<'a> {
    data: &'a mut [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
}

/// What happens to the destination's old content.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Into {
    Overwrite,
    Accumulate,
}

/// How many threads one product may use: all of rayon's, or the caller's own when the caller
/// already runs many products side by side.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Threads {
    All,
    One,
}

fn extent(rows: usize, columns: usize, row_stride: usize, column_stride: usize) -> usize {
    if rows == 0 || columns == 0 {
        0
    } else {
        (rows - 1) * row_stride + (columns - 1) * column_stride + 1
    }
}

impl<'a> Mat<'a> {
    /// Row-major without gaps.
    pub fn new(data: &'a [f32], rows: usize, columns: usize) -> Self {
        Self::strided(data, rows, columns, columns)
    }

    /// Row-major with `row_stride` elements from one row to the next.
    pub fn strided(data: &'a [f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        assert!(
            extent(rows, columns, row_stride, 1) <= data.len(),
            "a {rows}x{columns} matrix with row stride {row_stride} does not fit {} elements",
            data.len()
        );
        Self {
            data,
            rows,
            columns,
            row_stride,
            column_stride: 1,
        }
    }

    /// The transpose, without moving anything.
    pub fn t(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }
}

impl<'a> MatMut<'a> {
    /// Row-major without gaps.
    pub fn new(data: &'a mut [f32], rows: usize, columns: usize) -> Self {
        Self::columns_of(data, rows, columns, 0..columns)
    }

    /// The given columns of a row-major matrix of `rows` × `width`.
    pub fn columns_of(
        data: &'a mut [f32],
        rows: usize,
        width: usize,
        columns: Range<usize>,
    ) -> Self {
        assert!(
            columns.end <= width && rows * width <= data.len(),
            "columns {columns:?} of a {rows}x{width} matrix do not fit {} elements",
            data.len()
        );
        let start = if rows == 0 { 0 } else { columns.start };
        Self {
            data: &mut data[start..],
            rows,
            columns: columns.len(),
            row_stride: width,
        }
    }
}

/// The given columns of a row-major matrix of `rows` × `width`, to read.
pub fn columns_of(data: &[f32], rows: usize, width: usize, columns: Range<usize>) -> Mat<'_> {
    assert!(
        columns.end <= width && rows * width <= data.len(),
        "columns {columns:?} of a {rows}x{width} matrix do not fit {} elements",
        data.len()
    );
    let start = if rows == 0 { 0 } else { columns.start };
    Mat::strided(&data[start..], rows, columns.len(), width)
}

/// `out = alpha · left · right`, or `out += …`, in f32.
///
/// # Panics
/// If the shapes do not agree: shapes are validated where data enters, so this is a defect here.
#[expect(
    clippy::needless_pass_by_value,
    reason = "a place to write into is handed over, as a mutable slice is"
)]
pub fn matmul(out: MatMut, into: Into, alpha: f32, left: Mat, right: Mat, threads: Threads) {
    assert_eq!(left.columns, right.rows, "inner sizes of a product");
    assert_eq!(
        (out.rows, out.columns),
        (left.rows, right.columns),
        "sizes of a product"
    );
    if out.rows == 0 || out.columns == 0 {
        return;
    }
    if left.columns == 0 {
        if into == Into::Overwrite {
            for row in out.data.chunks_mut(out.row_stride).take(out.rows) {
                row[..out.columns].fill(0.0);
            }
        }
        return;
    }
    // A product this small is done before a second thread has woken up.
    let small = out.rows * out.columns * left.columns < 1 << 16;
    let parallelism = match threads {
        Threads::All if !small => Parallelism::Rayon(rayon::current_num_threads()),
        _ => Parallelism::None,
    };
    // SAFETY: each pointer comes from a slice that holds rows × columns at the given strides
    // (asserted on construction and narrowed never widened since), the destination is borrowed
    // uniquely and so overlaps neither operand, and f32 is one of gemm's types.
    unsafe {
        gemm::gemm(
            out.rows,
            out.columns,
            left.columns,
            out.data.as_mut_ptr(),
            1,
            out.row_stride as isize,
            into == Into::Accumulate,
            left.data.as_ptr(),
            left.column_stride as isize,
            left.row_stride as isize,
            right.data.as_ptr(),
            right.column_stride as isize,
            right.row_stride as isize,
            1.0f32,
            alpha,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(count: usize, seed: u32) -> Vec<f32> {
        (0..count as u32)
            .map(|i| {
                let mixed = (i.wrapping_mul(2_654_435_761) ^ seed).wrapping_mul(2_246_822_519);
                (mixed >> 8) as f32 / (1u32 << 24) as f32 - 0.5
            })
            .collect()
    }

    #[test]
    fn strided_products_agree_with_float64() {
        for (m, n, k, threads) in [
            (1, 1, 1, Threads::One),
            (7, 5, 3, Threads::All),
            (65, 33, 129, Threads::All),
        ] {
            let width = n + 4;
            let left = numbers(m * k, 1);
            let right = numbers(n * k, 2);
            for into in [Into::Overwrite, Into::Accumulate] {
                let start = numbers(m * width, 3);
                let mut out = start.clone();
                matmul(
                    MatMut::columns_of(&mut out, m, width, 2..2 + n),
                    into,
                    0.5,
                    Mat::new(&left, m, k),
                    Mat::new(&right, n, k).t(),
                    threads,
                );
                for i in 0..m {
                    for j in 0..width {
                        let old = f64::from(start[i * width + j]);
                        let expected = if (2..2 + n).contains(&j) {
                            let dot: f64 = (0..k)
                                .map(|l| {
                                    f64::from(left[i * k + l]) * f64::from(right[(j - 2) * k + l])
                                })
                                .sum();
                            0.5 * dot + if into == Into::Accumulate { old } else { 0.0 }
                        } else {
                            old
                        };
                        let got = f64::from(out[i * width + j]);
                        assert!(
                            (got - expected).abs() < 1e-5,
                            "{m} {n} {k}: {got} {expected}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn an_empty_inner_size_gives_zeros() {
        let mut out = vec![f32::NAN; 6];
        matmul(
            MatMut::new(&mut out, 2, 3),
            Into::Overwrite,
            1.0,
            Mat::new(&[], 2, 0),
            Mat::new(&[], 0, 3),
            Threads::One,
        );
        assert_eq!(out, [0.0; 6]);
    }
}
