//! The mean of an f32 array, bit-equal to `torch.mean` on x86-64.

/// Elements below which torch sums on one thread.
const GRAIN: usize = 32_768;
/// f32 lanes of torch's sum kernel on x86-64: 8 with AVX2, with AVX-512 (its AVX-512 build leaves this kernel out) and
/// with neither. aarch64 builds use 4, so a torch there may differ from this in the last bit.
const LANES: usize = 8;
/// Independent accumulators a lane.
const UNROLL: usize = 4;
/// Levels of the cascade that keeps partial sums of like size.
const LEVELS: usize = 4;

/// `torch.mean` of a contiguous f32 tensor on a CPU where torch uses `threads` threads; 0 for no values.
///
/// torch splits sums of 32,768 elements or more evenly over its threads, so from there on the last bit depends on
/// their number. Callers pass rayon's count, which like torch's is the machine's cores unless set otherwise.
pub fn torch_mean(values: &[f32], threads: usize) -> f32 {
    if values.is_empty() {
        return 0.0;
    }
    torch_sum(values, threads) / values.len() as f32
}

fn torch_sum(values: &[f32], threads: usize) -> f32 {
    if values.len() < GRAIN || threads < 2 {
        return serial_sum(values);
    }
    let used = threads.min(values.len().div_ceil(GRAIN));
    let mut partial = vec![0.0; threads];
    for (sum, chunk) in partial
        .iter_mut()
        .zip(values.chunks(values.len().div_ceil(used)))
    {
        *sum = serial_sum(chunk);
    }
    serial_sum(&partial)
}

fn serial_sum(values: &[f32]) -> f32 {
    if values.len() < LANES {
        return strided_sum::<1, UNROLL>(values)[0];
    }
    let (body, tail) = values.split_at(values.len() / LANES * LANES);
    let lanes = strided_sum::<LANES, { LANES * UNROLL }>(body);
    let tail = tail.iter().fold(0.0, |sum, value| sum + value);
    lanes.iter().fold(tail, |sum, value| sum + value)
}

/// Sums `values`, rows of `W`, down to one row: `UNROLL` interleaved cascades (`WU` = W × UNROLL wide), then the rows
/// left over into the first, then the cascades together.
fn strided_sum<const W: usize, const WU: usize>(values: &[f32]) -> [f32; W] {
    let (body, rest) = values.split_at(values.len() / WU * WU);
    let mut wide = cascade_sum::<WU>(body);
    for row in rest.chunks_exact(W) {
        add(&mut wide[..W], row);
    }
    let (first, others) = wide.split_at_mut(W);
    for row in others.chunks_exact(W) {
        add(first, row);
    }
    let mut sum = [0.0; W];
    sum.copy_from_slice(first);
    sum
}

/// Column sums of rows of `N`: level 0 adds rows, and every 2^power sums of one level move up to the next.
fn cascade_sum<const N: usize>(values: &[f32]) -> [f32; N] {
    let rows = values.len() / N;
    let power = (ceil_log2(rows) / LEVELS as u32).max(4);
    let step = 1_usize << power;
    let mut levels = [[0.0_f32; N]; LEVELS];
    let mut done = 0;
    for chunk in values.chunks(step * N) {
        for row in chunk.chunks_exact(N) {
            add(&mut levels[0], row);
        }
        if chunk.len() < step * N {
            break;
        }
        done += step;
        for level in 1..LEVELS {
            let lower = std::mem::replace(&mut levels[level - 1], [0.0; N]);
            add(&mut levels[level], &lower);
            if done & ((step - 1) << (level as u32 * power)) != 0 {
                break;
            }
        }
    }
    let [mut sum, upper @ ..] = levels;
    for level in &upper {
        add(&mut sum, level);
    }
    sum
}

fn add(sum: &mut [f32], row: &[f32]) {
    for (sum, value) in sum.iter_mut().zip(row) {
        *sum += value;
    }
}

fn ceil_log2(n: usize) -> u32 {
    if n <= 2 { 1 } else { (n - 1).ilog2() + 1 }
}
