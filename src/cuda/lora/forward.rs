//! Forward of a group.

use super::super::device::Device;
use super::super::error::Result;
use super::super::launch::{Address, Stream};
use super::kernels::{self, Down, MAX_SEGMENTS, Masks, PackJob, Up, UpSegment};
use super::{Input, Layout, Projection, masks, segments_of, type_number, vectors};
use crate::dtype::DType;

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

fn bias_job(input: &Input, projection: &Projection, to: Address) -> Option<PackJob> {
    if projection.bias == 0 && projection.lora_bias == 0 {
        return None;
    }
    let dtype = match input.dtype {
        super::Float16::F16 => DType::F16,
        super::Float16::BF16 => DType::BF16,
    };
    Some(PackJob {
        from: projection.bias,
        more: projection.lora_bias,
        to,
        rows: projection.n,
        row_stride: 1,
        column_stride: 1,
        dtype: type_number(dtype),
        more_dtype: type_number(projection.lora_bias_dtype),
        scale: projection.scaling,
        ..PackJob::default()
    })
}

/// Writes H and every projection's LoRA term with its biases.
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
    let mut biases = Vec::with_capacity(projections.len());
    for (projection, place) in projections.iter().zip(&layout.bias) {
        let job = bias_job(input, projection, workspace + place);
        biases.push(job.map_or(0, |job| job.to));
        jobs.extend(job);
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
    for (i, projection) in projections.iter().enumerate() {
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
            bias: biases[i],
            masks: Masks {
                seed: 0,
                columns: 0,
            },
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
        // SAFETY: as above.
        unsafe { kernels::up(device, stream, input.dtype, input.onto, up) }?;
    }
    Ok(())
}
