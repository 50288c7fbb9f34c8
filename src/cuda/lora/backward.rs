//! Backward of a group.

use super::super::device::Device;
use super::super::launch::{Address, Stream};
use super::gemm::{self, Carried, Matrix, Product};
use super::kernels::{
    self, DownOuter, DownOuterPlan, MAX_SEGMENTS, Outer, ReduceJob, Up, UpSegment,
};
use super::panels::{adapters_do, jobs_of_a, jobs_of_b, panel_b};
use super::{
    Input, Layout, Projection, kept_row, masks, outer90, segments_of, type_number, vectors,
};
use crate::error::Result;

/// Writes the adapters' gradients that are asked for, and to `grad_x`, unless 0, the LoRA terms' part of x's gradient
/// with the products of the weights that are given: these must lie alike, and nothing is dropped but under a mask that was
/// kept.
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
    let _context = device.enter()?; // matrices are described to the current one's device
    let planes = input.planes as u32;
    let columns: u64 = projections.iter().map(Projection::columns).sum();
    let g = workspace + layout.g;
    let given = projections.iter().any(|one| one.weight != 0);
    let mut jobs = jobs_of_b(input, projections, layout, workspace);
    if grad_x != 0 && !(given && adapters_do(input, projections)) {
        jobs.extend(jobs_of_a(input, projections, layout, workspace));
    }
    // SAFETY: the caller's promise; panels, G and partial sums lie in the workspace, here and below.
    unsafe { kernels::pack(device, stream, input.dtype, &jobs) }?;

    let mut sums_of_g = Vec::with_capacity(projections.len());
    let mut sums = Vec::with_capacity(2 * projections.len());
    let mut column = 0;
    for (i, projection) in projections.iter().enumerate() {
        let plan = &layout.plans[i];
        let width = projection.columns();
        let down_outer = DownOuter {
            grad: projection.y,
            panel: panel_b(input, projection, layout, workspace, i),
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
        // SAFETY: as above.
        let parts = unsafe { pass_over(device, stream, input, projection, plan, down_outer) }?;
        let (of_g, of_b) = sums_of(
            input,
            projection,
            &parts,
            &down_outer,
            g + 2 * column,
            columns,
        );
        sums_of_g.push(of_g);
        sums.extend(of_b);
        column += width;
    }
    // SAFETY: as above.
    unsafe {
        kernels::reduce(device, stream, &sums_of_g)?;
        for projection in projections.iter().filter(|_| grad_x != 0) {
            projection.dequantize(device, stream, input, true)?;
        }
        if grad_x != 0 {
            let write = if given { sum_of_grad_x } else { term_of_grad_x };
            write(
                device,
                stream,
                input,
                projections,
                layout,
                workspace,
                grad_x,
            )?;
        }
        if projections.iter().any(|projection| projection.grad_a != 0) {
            let beside = grad_x != 0; // which alone was launched last: it may start before that is done
            sums.extend(grad_a(
                device,
                stream,
                input,
                projections,
                layout,
                workspace,
                beside,
            )?);
        }
        kernels::reduce(device, stream, &sums)
    }
}

/// Into how many partial sums dB, and G, were divided.
struct Parts {
    ranges: u64,
    column_blocks: u64,
}

/// Writes partial sums of a projection's G and dB.
///
/// # Safety
/// As [`backward`].
unsafe fn pass_over(
    device: &Device,
    stream: Stream,
    input: &Input,
    projection: &Projection,
    plan: &DownOuterPlan,
    of: DownOuter,
) -> Result<Parts> {
    let (dtype, segments) = (input.dtype, projection.segments());
    // SAFETY: the caller's promise.
    unsafe {
        if outer90::takes(device, input, projection.y, projection.n) {
            let (h, column) = (input.h, projection.h_column);
            outer90::down_outer(device, stream, dtype, segments, &of, h, column)?;
            Ok(Parts {
                ranges: outer90::ranges(device, input.m, projection.n).0,
                column_blocks: outer90::column_blocks(projection.n),
            })
        } else {
            kernels::down_outer(device, stream, dtype, segments, plan, of)?;
            Ok(Parts {
                ranges: plan.ranges,
                column_blocks: plan.column_blocks,
            })
        }
    }
}

/// What adds up the partial sums of a projection's G, to `g` among `columns`, and of its gradient of B.
fn sums_of(
    input: &Input,
    projection: &Projection,
    parts: &Parts,
    from: &DownOuter,
    g: Address,
    columns: u64,
) -> (ReduceJob, Option<ReduceJob>) {
    let job = ReduceJob {
        from_columns: projection.columns() as u32,
        from_column: 0,
        planes: 1,
        scale: 1.0,
        ..ReduceJob::default()
    };
    let of_g = ReduceJob {
        partial: from.g_partial,
        to: g,
        rows: input.m,
        row_stride: input.planes * columns,
        column_stride: 1,
        ranges: parts.column_blocks as u32,
        columns: projection.columns() as u32,
        dtype: type_number(input.dtype.into()),
        planes: input.planes as u32,
        scale: projection.scaling * projection.left(), // of G, wherever it is used
        ..job
    };
    let of_b = (projection.grad_b != 0).then(|| ReduceJob {
        partial: from.panel_partial,
        to: projection.grad_b,
        rows: projection.n,
        row_stride: projection.r,
        column_stride: 1,
        ranges: parts.ranges as u32,
        columns: projection.r as u32,
        dtype: type_number(projection.grad),
        ..job
    });
    (of_g, of_b)
}

/// Writes the partial sums of the gradients of A, `beside` the kernel before or after it; returns what adds them up.
///
/// # Safety
/// As [`backward`], after G was written.
unsafe fn grad_a(
    device: &Device,
    stream: Stream,
    input: &Input,
    projections: &[Projection],
    layout: &Layout,
    workspace: Address,
    beside: bool,
) -> Result<Vec<ReduceJob>> {
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
        early: u32::from(beside),
        reserved: 0,
        segments,
    };
    let hopper = outer90::takes(device, input, input.x, input.k);
    let (ranges, _) = if hopper {
        outer90::ranges(device, input.m, input.k)
    } else {
        kernels::outer_ranges(device, input.m, input.k)
    };
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
                dtype: type_number(projection.grad),
                planes: 1,
                rows_first: 1,
                scale: 1.0,
            });
        }
        column += projection.columns() as u32;
    }
    // SAFETY: the caller's promise.
    unsafe {
        if hopper {
            let bits =
                (input.bits != 0).then(|| Matrix::new(input.bits, input.m, kept_row(input.k) / 2));
            outer90::outer(device, stream, input.dtype, count, &outer, bits)?;
        } else {
            kernels::outer(device, stream, input.dtype, count, outer)?;
        }
    }
    Ok(sums)
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

/// # Safety
/// As [`backward`], after G was written.
unsafe fn sum_of_grad_x(
    device: &Device,
    stream: Stream,
    input: &Input,
    projections: &[Projection],
    layout: &Layout,
    workspace: Address,
    grad_x: Address,
) -> Result<()> {
    let columns: u64 = projections.iter().map(Projection::columns).sum();
    let beside = |place, rows| Matrix::new(workspace + place, rows, input.planes * columns);
    let given = || projections.iter().filter(|one| one.weight != 0);
    let products: Vec<_> = given()
        .map(|one| Product {
            x: Matrix::new(one.y, input.m, one.n),
            w: one.weight_matrix(input.k),
        })
        .collect();
    let adapters = adapters_do(input, projections);
    let (panels, chunks, lower) = if adapters {
        let lie = |one: &Projection| Matrix::new(one.lora_a, one.r, input.k);
        let parts = projections
            .iter()
            .enumerate()
            .flat_map(|(i, one)| (0..one.segments()).map(move |part| (i as u8, 16 * part as u8)));
        let chunk = |(segment, (panel, place))| gemm::Chunk {
            h_column: 16 * segment as u16,
            panel,
            place,
        };
        let chunks = parts.enumerate().map(chunk).collect();
        (projections.iter().map(lie).collect(), chunks, 0)
    } else {
        let places: Vec<_> = (0..columns).step_by(16).map(|at| (at, at)).collect();
        let (chunks, lower) = gemm::chunks(input.planes, &places, columns, columns);
        (vec![beside(layout.panel_a, input.k)], chunks, lower)
    };
    let carried = Carried {
        products: &products,
        down_rows: given().all(|one| !one.weight_transposed),
        h: beside(layout.g, input.m),
        panels: &panels,
        adapters,
        chunks: &chunks,
        lower,
        bits: input.bits,
        bias: 0,
        out: Matrix::new(grad_x, input.m, input.k),
        gated: None,
        together: 0,
    };
    // SAFETY: the caller's promise.
    unsafe { gemm::launch(device, stream, input.dtype, &carried) }
}
