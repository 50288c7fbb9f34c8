//! Adapters as the kernels read them: panels in the workspace, or where they lie.

use super::super::launch::Address;
use super::kernels::PackJob;
use super::{Input, Layout, Projection, type_number};

fn job_of(input: &Input, projection: &Projection) -> PackJob {
    PackJob {
        columns: projection.r as u32,
        parts: projection.segments() as u32,
        planes: input.planes as u32,
        dtype: type_number(projection.adapter),
        ..PackJob::default()
    }
}

/// Makes the panels of A, side by side: `[k, planes · columns]`.
pub(super) fn jobs_of_a(
    input: &Input,
    projections: &[Projection],
    layout: &Layout,
    workspace: Address,
) -> Vec<PackJob> {
    let planes = input.planes as u32;
    let columns: u64 = projections.iter().map(Projection::columns).sum();
    let mut column = 0;
    let job = |projection: &Projection| {
        let job = PackJob {
            from: projection.lora_a,
            to: workspace + layout.panel_a,
            rows: input.k,
            row_stride: 1,
            column_stride: input.k,
            to_stride: planes * columns as u32,
            to_column: column,
            to_plane: columns as u32,
            ..job_of(input, projection)
        };
        column += projection.columns() as u32;
        job
    };
    projections.iter().map(job).collect()
}

/// Where each A lies as `[planes, r, k]`, and what makes the parts of those wider than x in the place of their panels: k
/// is then a multiple of 16.
pub(super) fn parts_of_a(
    input: &Input,
    projections: &[Projection],
    layout: &Layout,
    workspace: Address,
) -> (Vec<Address>, Vec<PackJob>) {
    if input.planes == 1 {
        let places = projections.iter().map(|one| one.lora_a).collect();
        return (places, Vec::new());
    }
    let mut at = workspace + layout.panel_a;
    let mut places = Vec::with_capacity(projections.len());
    let mut jobs = Vec::with_capacity(projections.len());
    for projection in projections {
        let elements = projection.r * input.k;
        places.push(at);
        jobs.push(PackJob {
            from: projection.lora_a,
            to: at,
            rows: elements / 16,
            row_stride: 16,
            column_stride: 1,
            columns: 16,
            parts: 1,
            to_stride: 16,
            to_column: 0,
            to_plane: elements as u32,
            ..job_of(input, projection)
        });
        at += 2 * input.planes * elements;
    }
    (places, jobs)
}

/// Whether Hopper's product takes every A as it lies.
pub(super) fn adapters_do(input: &Input, projections: &[Projection]) -> bool {
    input.planes == 1
        && input.k.is_multiple_of(8)
        && projections.iter().all(|one| one.lora_a.is_multiple_of(16))
}

/// Whether B lies as its panel would.
fn lies_as_panel(input: &Input, projection: &Projection) -> bool {
    input.planes == 1
        && projection.r == projection.columns()
        && projection.lora_b.is_multiple_of(16)
}

/// Where projection `i`'s panel of B is: `[n, planes · columns]`.
pub(super) fn panel_b(
    input: &Input,
    projection: &Projection,
    layout: &Layout,
    workspace: Address,
    i: usize,
) -> Address {
    if lies_as_panel(input, projection) {
        projection.lora_b
    } else {
        workspace + layout.panel_b[i]
    }
}

/// Makes the panels of B that do not lie there already.
pub(super) fn jobs_of_b(
    input: &Input,
    projections: &[Projection],
    layout: &Layout,
    workspace: Address,
) -> Vec<PackJob> {
    let missing = projections
        .iter()
        .zip(&layout.panel_b)
        .filter(|(projection, _)| !lies_as_panel(input, projection));
    let job = |(projection, place): (&Projection, &u64)| PackJob {
        from: projection.lora_b,
        to: workspace + place,
        rows: projection.n,
        row_stride: projection.r,
        column_stride: 1,
        to_stride: input.planes as u32 * projection.columns() as u32,
        to_column: 0,
        to_plane: projection.columns() as u32,
        ..job_of(input, projection)
    };
    missing.map(job).collect()
}

/// Where the sum of projection `i`'s biases is; 0 if it has none.
pub(super) fn bias_of(
    projection: &Projection,
    layout: &Layout,
    workspace: Address,
    i: usize,
) -> Address {
    if projection.bias == 0 && projection.lora_bias == 0 {
        0
    } else {
        workspace + layout.bias[i]
    }
}

pub(super) fn bias_job(input: &Input, projection: &Projection, to: Address) -> Option<PackJob> {
    if projection.bias == 0 && projection.lora_bias == 0 {
        return None;
    }
    Some(PackJob {
        from: projection.bias,
        more: projection.lora_bias,
        to,
        rows: projection.n,
        row_stride: 1,
        column_stride: 1,
        dtype: type_number(input.dtype.into()),
        more_dtype: type_number(projection.lora_bias_dtype),
        scale: projection.scaling,
        ..PackJob::default()
    })
}
