//! Backward of a group.

use super::super::device::Device;
use super::super::error::Result;
use super::super::launch::{Address, Stream};
use super::forward::panel_jobs;
use super::kernels::{self, DownOuter, MAX_SEGMENTS, Outer, ReduceJob, Up, UpSegment};
use super::{Float16, Input, Layout, Projection, masks, segments_of, type_number, vectors};
use crate::dtype::DType;

/// Writes the adapters' gradients that are asked for, and to `grad_x`, unless 0, the LoRA terms' part of x's gradient.
///
/// # Safety
/// As [`super::forward`], with `grad_x` `[m, k]` aligned to 16 bytes.
///
/// # Errors
/// A launch that failed.
pub unsafe fn backward(
    device: &Device,
    stream: Stream,
    input: &Input,
    projections: &[Projection],
    layout: &Layout,
    workspace: Address,
    grad_x: Address,
) -> Result<()> {
    if input.m == 0 {
        return Ok(());
    }
    let planes = input.planes as u32;
    let columns: u64 = projections.iter().map(Projection::columns).sum();
    let g = workspace + layout.g;
    let g_type = match input.dtype {
        Float16::F16 => DType::F16,
        Float16::BF16 => DType::BF16,
    };
    let jobs = panel_jobs(input, projections, layout, workspace);
    // SAFETY: the caller's promise; panels, G and partial sums lie in the workspace, here and below.
    unsafe { kernels::pack(device, stream, input.dtype, &jobs) }?;

    let mut sums = Vec::with_capacity(2 * projections.len());
    let mut column = 0;
    for (i, projection) in projections.iter().enumerate() {
        let plan = &layout.plans[i];
        let width = projection.columns();
        let down_outer = DownOuter {
            grad: projection.y,
            panel: workspace + layout.panel_b[i],
            h: input.h + 2 * projection.h_column,
            g_partial: workspace + layout.g_partial[i],
            panel_partial: workspace + layout.b_partial[i],
            m: input.m,
            n: projection.n,
            h_stride: planes * input.h_columns as u32,
            h_plane: input.h_columns as u32,
            planes,
            stages: 0,
            rows_per_range: 0,
            vectors: vectors(projection.y, projection.n),
        };
        let segments = projection.segments();
        // SAFETY: as above.
        unsafe {
            kernels::down_outer(device, stream, input.dtype, segments, plan, down_outer)?;
        }
        let job = ReduceJob {
            from_columns: width as u32,
            from_column: 0,
            planes: 1,
            scale: 1.0,
            ..ReduceJob::default()
        };
        sums.push(ReduceJob {
            partial: down_outer.g_partial,
            to: g + 2 * column,
            rows: input.m,
            row_stride: input.planes * columns,
            column_stride: 1,
            ranges: plan.column_blocks as u32,
            columns: width as u32,
            dtype: type_number(g_type),
            planes,
            scale: projection.scaling,
            ..job
        });
        if projection.grad_b != 0 {
            sums.push(ReduceJob {
                partial: down_outer.panel_partial,
                to: projection.grad_b,
                rows: projection.n,
                row_stride: projection.r,
                column_stride: 1,
                ranges: plan.ranges as u32,
                columns: projection.r as u32,
                dtype: type_number(projection.adapter),
                ..job
            });
        }
        column += width;
    }
    // SAFETY: as above.
    unsafe { kernels::reduce(device, stream, &sums) }?;

    if grad_x != 0 {
        // SAFETY: as above.
        unsafe {
            term_of_grad_x(
                device,
                stream,
                input,
                projections,
                layout,
                workspace,
                grad_x,
            )
        }?;
    }

    if projections.iter().any(|projection| projection.grad_a != 0) {
        // SAFETY: as above.
        unsafe { grad_a(device, stream, input, projections, layout, workspace) }?;
    }
    Ok(())
}

/// # Safety
/// As [`backward`], after G was written.
unsafe fn grad_a(
    device: &Device,
    stream: Stream,
    input: &Input,
    projections: &[Projection],
    layout: &Layout,
    workspace: Address,
) -> Result<()> {
    let columns: u64 = projections.iter().map(Projection::columns).sum();
    let (segments, count) = segments_of(projections, |_| 1.0);
    let outer = Outer {
        x: input.x,
        g: workspace + layout.g,
        partial: workspace + layout.a_partial,
        masks: masks(input, projections),
        m: input.m,
        w: input.k,
        g_stride: (input.planes * columns) as u32,
        g_plane: columns as u32,
        planes: input.planes as u32,
        stages: 0,
        rows_per_range: 0,
        vectors: vectors(input.x, input.k),
        segments,
    };
    let (ranges, _) = kernels::outer_ranges(device, input.m, input.k);
    let mut sums = Vec::with_capacity(projections.len());
    let mut column = 0;
    for projection in projections {
        if projection.grad_a != 0 {
            sums.push(ReduceJob {
                partial: outer.partial,
                to: projection.grad_a,
                rows: input.k,
                row_stride: 1,
                column_stride: input.k,
                ranges: ranges as u32,
                from_columns: columns as u32,
                from_column: column,
                columns: projection.r as u32,
                dtype: type_number(projection.adapter),
                planes: 1,
                rows_first: 1,
                scale: 1.0,
            });
        }
        column += projection.columns() as u32;
    }
    // SAFETY: the caller's promise.
    unsafe {
        kernels::outer(device, stream, input.dtype, count, outer)?;
        kernels::reduce(device, stream, &sums)
    }
}

/// # Safety
/// As [`backward`], after G was written.
unsafe fn term_of_grad_x(
    device: &Device,
    stream: Stream,
    input: &Input,
    projections: &[Projection],
    layout: &Layout,
    workspace: Address,
    grad_x: Address,
) -> Result<()> {
    let planes = input.planes as u32;
    let columns: u64 = projections.iter().map(Projection::columns).sum();
    let (found, count) = segments_of(projections, |_| 1.0);
    let mut segments = [UpSegment::default(); MAX_SEGMENTS];
    for (part, (segment, of)) in segments.iter_mut().zip(found).enumerate() {
        let column = 16 * part as u32;
        *segment = UpSegment {
            of,
            h_column: column,
            panel_column: column,
        };
    }
    let up = Up {
        h: workspace + layout.g,
        panel: workspace + layout.panel_a,
        out: grad_x,
        bias: 0,
        masks: masks(input, projections),
        m: input.m,
        w: input.k,
        h_stride: planes * columns as u32,
        panel_stride: planes * columns as u32,
        h_plane: columns as u32,
        panel_plane: columns as u32,
        planes,
        parts: count as u32,
        rows_per_block: 0,
        vectors: vectors(grad_x, input.k),
        segments,
    };
    // SAFETY: the caller's promise.
    unsafe { kernels::up(device, stream, input.dtype, false, up) }
}
