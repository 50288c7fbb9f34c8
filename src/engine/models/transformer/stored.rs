//! How a folder calls and lays out a model's tensors.

use crate::engine::models::architecture::Architecture;
use crate::folder::Weights;

/// What the folder calls a tensor: a model that was saved without a head has no name for its base.
pub fn stored(weights: &Weights, architecture: &Architecture, name: &str) -> String {
    let bare = name.strip_prefix(architecture.names().base);
    match bare.and_then(|bare| bare.strip_prefix('.')) {
        Some(bare) if !weights.contains(name) && weights.contains(bare) => bare.to_owned(),
        _ => name.to_owned(),
    }
}

/// `[n, k]` in row-major order, of `[k, n]` where `transposed`.
pub fn laid<T: Copy>(values: Vec<T>, n: usize, k: usize, transposed: bool) -> Vec<T> {
    if transposed {
        transpose(&values, k, n)
    } else {
        values
    }
}

/// `[columns, rows]` of `[rows, columns]`.
pub fn transpose<T: Copy>(values: &[T], rows: usize, columns: usize) -> Vec<T> {
    (0..columns)
        .flat_map(|column| (0..rows).map(move |row| values[row * columns + column]))
        .collect()
}
