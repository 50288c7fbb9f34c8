//! Forward of a group.

use super::super::device::Device;
use super::super::glu::Activation;
use super::super::launch::{Address, Stream};
use super::gemm::{self, Carried, Chunk, Gated, Matrix, Product};
use super::kernels::{self, Down, MAX_SEGMENTS, Masks, Up, UpSegment};
use super::panels::{bias_job, bias_of, jobs_of_a, jobs_of_b, panel_b, parts_of_a};
use super::{Input, Layout, Projection, Terms, down90, masks, segments_of, vectors};
use crate::error::Result;

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
    let _context = device.enter()?; // matrices are described to the current one's device
    // SAFETY: the caller's promise.
    unsafe { ranks(device, stream, input, projections, layout, workspace) }?;
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

/// Writes the outputs of gate and up, their weights given, and `hidden [m, n] = activation(gate) · up`.
///
/// # Safety
/// As [`forward`]; both projections are of one n and have no biases, and both weights are `[n, k]`, of a product that the
/// device [`super::takes`].
///
/// # Errors
/// A launch that failed.
pub unsafe fn forward_gated(
    device: &Device,
    stream: Stream,
    input: &Input,
    projections: &[Projection; 2],
    layout: &Layout,
    workspace: Address,
    hidden: Address,
    activation: Activation,
) -> Result<()> {
    if input.m == 0 {
        return Ok(());
    }
    let _context = device.enter()?;
    let (chunks, lower) = gated_chunks(input, projections);
    // SAFETY: the caller's promise.
    unsafe { ranks(device, stream, input, projections, layout, workspace) }?;
    for (i, projection) in projections.iter().enumerate() {
        // SAFETY: as above. What is launched before the first writes another.
        unsafe { projection.dequantize(device, stream, input, i == 0) }?;
    }
    let written = |at| Matrix::new(at, input.m, projections[0].n);
    let carried = Carried {
        products: &projections.each_ref().map(|one| Product {
            x: Matrix::new(input.x, input.m, input.k),
            w: one.weight_matrix(input.k),
        }),
        down_rows: false,
        h: Matrix::new(input.h, input.m, input.planes * input.h_columns),
        panels: &[0, 1].map(|i| {
            let address = panel_b(input, &projections[i], layout, workspace, i);
            Matrix::new(
                address,
                projections[i].n,
                input.planes * projections[i].columns(),
            )
        }),
        adapters: false,
        chunks: &chunks,
        lower,
        bits: 0,
        bias: 0,
        out: written(projections[0].y),
        gated: Some(Gated {
            up: written(projections[1].y),
            hidden: written(hidden),
            activation,
        }),
        together: 0,
    };
    // SAFETY: as above.
    unsafe { gemm::launch(device, stream, input.dtype, &carried) }
}

/// What is multiplied for H of gate and up, and how much of it is of lower parts.
fn gated_chunks(input: &Input, projections: &[Projection; 2]) -> (Vec<Chunk>, usize) {
    let mut found = Vec::new();
    let mut lower = 0;
    for (i, projection) in projections.iter().enumerate() {
        let (mut chunks, parts) = chunks_of(input, projection);
        for chunk in &mut chunks {
            chunk.panel = i as u8;
        }
        // The lower parts of both come first.
        let rest = chunks.split_off(parts);
        found.splice(lower..lower, chunks);
        lower += parts;
        found.extend(rest);
    }
    (found, lower)
}

/// Writes H, and the panels and biases that products and terms take.
///
/// # Safety
/// As [`forward`], in the device's context.
unsafe fn ranks(
    device: &Device,
    stream: Stream,
    input: &Input,
    projections: &[Projection],
    layout: &Layout,
    workspace: Address,
) -> Result<()> {
    let mut jobs = jobs_of_b(input, projections, layout, workspace);
    for (projection, place) in projections.iter().zip(&layout.bias) {
        jobs.extend(bias_job(input, projection, workspace + place));
    }
    let segments = segments_of(projections, |one| one.scaling * one.left());
    let masks = masks(input, projections);
    // SAFETY: the caller's promise; panels lie in the workspace, here and below.
    unsafe {
        if down90::takes(device, input, projections) {
            let (panels, more) = parts_of_a(input, projections, layout, workspace);
            jobs.extend(more);
            kernels::pack(device, stream, input.dtype, &jobs)?;
            down90::launch(device, stream, input, projections, &panels, segments, masks)
        } else {
            jobs.extend(jobs_of_a(input, projections, layout, workspace));
            kernels::pack(device, stream, input.dtype, &jobs)?;
            let down = Down {
                x: input.x,
                panel: workspace + layout.panel_a,
                out: input.h,
                masks,
                bits: input.bits,
                m: input.m,
                k: input.k,
                planes: input.planes as u32,
                stages: 0,
                vectors: vectors(input.x, input.k),
                reserved: 0,
                segments: segments.0,
            };
            kernels::down(device, stream, input.dtype, segments.1, down)
        }
    }
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
    let _context = device.enter()?;
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
        panel: panel_b(input, projection, layout, workspace, i),
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
        panel_b(input, projection, layout, workspace, i),
        projection.n,
        input.planes * projection.columns(),
    );
    let (chunks, lower) = chunks_of(input, projection);
    let carried = Carried {
        products: &[Product {
            x: Matrix::new(input.x, input.m, input.k),
            w: projection.weight_matrix(input.k),
        }],
        down_rows: projection.weight_transposed,
        h,
        panels: &[panel],
        adapters: false,
        chunks: &chunks,
        lower,
        bits: 0,
        bias: bias_of(projection, layout, workspace, i),
        out: Matrix::new(projection.y, input.m, projection.n),
        gated: None,
        together: 0,
    };
    // SAFETY: the caller's promise.
    unsafe { gemm::launch(device, stream, input.dtype, &carried) }
}

/// What is multiplied for a projection's H, and how much of it is of lower parts.
fn chunks_of(input: &Input, projection: &Projection) -> (Vec<Chunk>, usize) {
    let columns: Vec<_> = (0..projection.segments())
        .map(|part| (projection.h_column + 16 * part as u64, 16 * part as u64))
        .collect();
    gemm::chunks(
        input.planes,
        &columns,
        input.h_columns,
        projection.columns(),
    )
}
