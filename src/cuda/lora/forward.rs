//! Forward of a group.

use super::super::device::Device;
use super::super::launch::{Address, Stream};
use super::gemm::{self, Carried, Matrix, Product};
use super::kernels::{self, Down, MAX_SEGMENTS, Masks, PackJob, Segment, Up, UpSegment};
use super::{Input, Layout, Projection, Terms, masks, segments_of, type_number, vectors};
use crate::error::Result;

/// Panels of A, side by side, and of B.
pub(super) fn panel_jobs(
    input: &Input,
    projections: &[Projection],
    layout: &Layout,
    workspace: Address,
) -> Vec<PackJob> {
    let planes = input.planes as u32;
    let columns: u64 = projections.iter().map(Projection::columns).sum();
    let mut jobs = Vec::with_capacity(2 * projections.len());
    let mut column = 0;
    for (projection, panel_b) in projections.iter().zip(&layout.panel_b) {
        let job = PackJob {
            columns: projection.r as u32,
            parts: projection.segments() as u32,
            planes,
            dtype: type_number(projection.adapter),
            ..PackJob::default()
        };
        jobs.push(PackJob {
            from: projection.lora_a,
            to: workspace + layout.panel_a,
            rows: input.k,
            row_stride: 1,
            column_stride: input.k,
            to_stride: planes * columns as u32,
            to_column: column,
            to_plane: columns as u32,
            ..job
        });
        jobs.push(PackJob {
            from: projection.lora_b,
            to: workspace + panel_b,
            rows: projection.n,
            row_stride: projection.r,
            column_stride: 1,
            to_stride: planes * projection.columns() as u32,
            to_column: 0,
            to_plane: projection.columns() as u32,
            ..job
        });
        column += projection.columns() as u32;
    }
    jobs
}

/// Where the sum of projection `i`'s biases is; 0 if it has none.
fn bias_of(projection: &Projection, layout: &Layout, workspace: Address, i: usize) -> Address {
    if projection.bias == 0 && projection.lora_bias == 0 {
        0
    } else {
        workspace + layout.bias[i]
    }
}

fn bias_job(input: &Input, projection: &Projection, to: Address) -> Option<PackJob> {
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

/// Writes H and every projection's LoRA term with its biases, and with the product of its weight if that is given.
///
/// # Safety
/// The addresses are `device`'s and hold, or have room for, what [`Input`] and [`Projection`] say; `workspace` has
/// [`Layout::bytes`], and it and H are aligned to 16 bytes.
///
/// # Errors
/// A launch that failed.
pub unsafe fn forward(
    device: &Device,
    stream: Stream,
    input: &Input,
    projections: &[Projection],
    layout: &Layout,
    workspace: Address,
) -> Result<()> {
    if input.m == 0 {
        return Ok(());
    }
    let planes = input.planes as u32;
    let mut jobs = panel_jobs(input, projections, layout, workspace);
    for (projection, place) in projections.iter().zip(&layout.bias) {
        jobs.extend(bias_job(input, projection, workspace + place));
    }
    let (segments, count) = segments_of(projections, |projection| projection.scaling);
    let down = Down {
        x: input.x,
        panel: workspace + layout.panel_a,
        out: input.h,
        masks: masks(input, projections),
        m: input.m,
        k: input.k,
        planes,
        stages: 0,
        vectors: vectors(input.x, input.k),
        reserved: 0,
        segments,
    };
    // SAFETY: the caller's promise; panels lie in the workspace, here and below.
    unsafe {
        kernels::pack(device, stream, input.dtype, &jobs)?;
        kernels::down(device, stream, input.dtype, count, down)?;
    }
    if input.terms != Terms::Left {
        for (i, projection) in projections.iter().enumerate() {
            if projection.weight == 0 {
                // SAFETY: as above.
                unsafe { term(device, stream, input, projection, layout, workspace, i) }?;
            }
        }
    }
    // SAFETY: as above. What is launched before a weight is dequantised reads or writes another.
    unsafe { write_products(device, stream, input, projections, layout, workspace, true) }
}

/// Writes the outputs of the projections whose weights are given, after [`forward`] of them all.
///
/// # Safety
/// As [`forward`], with its workspace.
///
/// # Errors
/// A launch that failed.
pub unsafe fn products(
    device: &Device,
    stream: Stream,
    input: &Input,
    projections: &[Projection],
    layout: &Layout,
    workspace: Address,
) -> Result<()> {
    // SAFETY: the caller's promise.
    unsafe { write_products(device, stream, input, projections, layout, workspace, false) }
}

unsafe fn write_products(
    device: &Device,
    stream: Stream,
    input: &Input,
    projections: &[Projection],
    layout: &Layout,
    workspace: Address,
    early: bool,
) -> Result<()> {
    if input.m == 0 {
        return Ok(());
    }
    for (i, projection) in projections.iter().enumerate() {
        if projection.weight != 0 {
            // SAFETY: the caller's promise.
            unsafe { projection.dequantize(device, stream, input, early) }?;
            // SAFETY: as above.
            unsafe { whole(device, stream, input, projection, layout, workspace, i) }?;
        }
    }
    Ok(())
}

/// # Safety
/// As [`forward`], after H, the panel of B and the bias were written.
unsafe fn term(
    device: &Device,
    stream: Stream,
    input: &Input,
    projection: &Projection,
    layout: &Layout,
    workspace: Address,
    i: usize,
) -> Result<()> {
    let planes = input.planes as u32;
    let mut segments = [UpSegment::default(); MAX_SEGMENTS];
    for (part, segment) in segments.iter_mut().enumerate() {
        let column = 16 * part as u32;
        segment.h_column = projection.h_column as u32 + column;
        segment.panel_column = column;
    }
    let up = Up {
        h: input.h,
        panel: workspace + layout.panel_b[i],
        out: projection.y,
        bias: bias_of(projection, layout, workspace, i),
        masks: Masks::default(),
        m: input.m,
        w: projection.n,
        h_stride: planes * input.h_columns as u32,
        panel_stride: planes * projection.columns() as u32,
        h_plane: input.h_columns as u32,
        panel_plane: projection.columns() as u32,
        planes,
        parts: projection.segments() as u32,
        rows_per_block: 0,
        vectors: vectors(projection.y, projection.n),
        segments,
    };
    // SAFETY: the caller's promise.
    unsafe { kernels::up(device, stream, input.dtype, input.terms == Terms::Added, up) }
}

/// # Safety
/// As [`term`].
unsafe fn whole(
    device: &Device,
    stream: Stream,
    input: &Input,
    projection: &Projection,
    layout: &Layout,
    workspace: Address,
    i: usize,
) -> Result<()> {
    let h = Matrix::new(input.h, input.m, input.planes * input.h_columns);
    let panel = Matrix::new(
        workspace + layout.panel_b[i],
        projection.n,
        input.planes * projection.columns(),
    );
    let columns: Vec<_> = (0..projection.segments())
        .map(|part| (projection.h_column + 16 * part as u64, 16 * part as u64))
        .collect();
    let (chunks, lower) = gemm::chunks(
        input.planes,
        &columns,
        input.h_columns,
        projection.columns(),
    );
    let carried = Carried {
        products: &[Product {
            x: Matrix::new(input.x, input.m, input.k),
            w: projection.weight_matrix(input.k),
        }],
        down_rows: projection.weight_transposed,
        h,
        panel,
        chunks: &chunks,
        lower,
        masks: Masks::default(),
        masked: Segment::default(),
        bias: bias_of(projection, layout, workspace, i),
        out: Matrix::new(projection.y, input.m, projection.n),
    };
    // SAFETY: the caller's promise.
    unsafe { gemm::launch(device, stream, input.dtype, &carried) }
}
