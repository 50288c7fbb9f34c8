//! The processor's tile unit (AMX, Intel SDM volume 1, chapter 18): detection, configuration, the micro-kernel.

use std::arch::asm;
use std::sync::OnceLock;

/// Bytes of a tile: 16 rows of 64 bytes, which are 32 bf16 or 16 f32.
pub const TILE_BYTES: usize = 1024;

/// Whether bf16 tile products can be used: the CPU and the system have them, and AVX-512 F, BW, VL, VBMI and BF16.
pub fn available() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| {
        const TILES: u32 = 1 << 24;
        const BF16: u32 = 1 << 22;
        let leaf = std::arch::x86_64::__cpuid_count(7, 0).edx;
        leaf & TILES != 0
            && leaf & BF16 != 0
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vbmi")
            && is_x86_feature_detected!("avx512bf16")
            && permitted()
    })
}

/// Asks Linux for the tile registers' state (ARCH_REQ_XCOMP_PERM of XFEATURE_XTILEDATA): for the whole process, for good.
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const REQUEST: i64 = 0x1023;
    const TILE_DATA: i64 = 18;
    let result: i64;
    // SAFETY: a system call that reads and writes none of the program's memory.
    unsafe {
        asm!(
            "syscall", inlateout("rax") ARCH_PRCTL => result, in("rdi") REQUEST, in("rsi") TILE_DATA,
            lateout("rcx") _, lateout("r11") _, options(nostack),
        );
    }
    result == 0
}

#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

#[repr(C, align(64))]
struct Config([u8; 64]);

/// The calling thread's tiles as [`multiply`] needs them; the configuration that it had comes back at the end.
pub struct Tiles {
    before: Config,
}

impl Tiles {
    /// # Safety
    /// [`available`] is true.
    pub unsafe fn configure() -> Self {
        let mut config = Config([0; 64]);
        config.0[0] = 1; // palette
        for tile in 0..8 {
            config.0[16 + 2 * tile] = 64; // bytes a row
            config.0[48 + tile] = 16; // rows
        }
        let mut before = Config([0; 64]);
        // SAFETY: both operands are 64 bytes, and the caller's.
        unsafe {
            asm!("sttilecfg [{}]", in(reg) &raw mut before, options(nostack));
            asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, readonly));
        }
        Self { before }
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: the tile unit is there, or `configure`'s contract was broken; the configuration was valid before.
        unsafe {
            if self.before.0[0] == 0 {
                asm!("tilerelease", options(nostack, nomem));
            } else {
                asm!("ldtilecfg [{}]", in(reg) &raw const self.before, options(nostack, readonly));
            }
        }
    }
}

/// A part of the sum over the inner dimension: addresses of two row tiles of the left operand and two column tiles of
/// the right one, each `steps` steps of 32 inner elements, one behind the other. With `planes` 3 a step is three tiles,
/// the parts of f32 values, largest first.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Segment {
    pub left: [*const u8; 2],
    pub right: [*const u8; 2],
    pub steps: usize,
    pub planes: usize,
}

/// `C = ` or `+=` the sum of the segments, C being 32 by 32 f32 with `stride` bytes between rows. A step of three
/// planes is the six largest of the nine products of parts.
///
/// # Safety
/// The thread holds a [`Tiles`]; the segments' tiles and C are valid, the latter for writes.
#[expect(
    clippy::too_many_lines,
    reason = "one piece of assembly: tiles must last from its start to its end"
)]
pub unsafe fn multiply(segments: &[Segment], c: *mut f32, stride: usize, accumulate: bool) {
    // SAFETY: the caller's; the labels' loops end with their counts, and empty segments are passed over.
    unsafe {
        asm!(
            "test {acc:e}, {acc:e}",
            "jz 20f",
            "tileloadd tmm0, [{c} + {l}]",
            "tileloadd tmm1, [{c} + {l} + 64]",
            "mov {n}, {l}",
            "shl {n}, 4",
            "lea {d}, [{c} + {n}]",
            "tileloadd tmm2, [{d} + {l}]",
            "tileloadd tmm3, [{d} + {l} + 64]",
            "jmp 21f",
            "20:",
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "21:",
            "test {count}, {count}",
            "jz 27f",
            "22:",
            "mov {n}, [{p} + 32]",
            "test {n}, {n}",
            "jz 26f",
            "mov {a0}, [{p}]",
            "mov {a1}, [{p} + 8]",
            "mov {b0}, [{p} + 16]",
            "mov {b1}, [{p} + 24]",
            "cmp qword ptr [{p} + 40], 3",
            "je 25f",
            // One plane.
            "24:",
            "tileloadd tmm4, [{a0} + {s}]",
            "tileloadd tmm6, [{b0} + {s}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{b1} + {s}]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{a1} + {s}]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {a0}, 1024",
            "add {a1}, 1024",
            "add {b0}, 1024",
            "add {b1}, 1024",
            "dec {n}",
            "jnz 24b",
            "jmp 26f",
            // Three planes: 0·2, 0·1, 1·1, 1·0, 2·0, 0·0.
            "25:",
            "tileloadd tmm4, [{a0} + {s}]",
            "tileloadd tmm6, [{b0} + {s} + 2048]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{b1} + {s} + 2048]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{a1} + {s}]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "tileloadd tmm6, [{b0} + {s} + 1024]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{b1} + {s} + 1024]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "tileloadd tmm4, [{a0} + {s} + 1024]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{a1} + {s} + 1024]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "tileloadd tmm6, [{b0} + {s}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{b1} + {s}]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "tileloadd tmm4, [{a0} + {s} + 2048]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{a1} + {s} + 2048]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "tileloadd tmm4, [{a0} + {s}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{a1} + {s}]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {a0}, 3072",
            "add {a1}, 3072",
            "add {b0}, 3072",
            "add {b1}, 3072",
            "dec {n}",
            "jnz 25b",
            "26:",
            "add {p}, 48",
            "dec {count}",
            "jnz 22b",
            "27:",
            "tilestored [{c} + {l}], tmm0",
            "tilestored [{c} + {l} + 64], tmm1",
            "mov {n}, {l}",
            "shl {n}, 4",
            "lea {d}, [{c} + {n}]",
            "tilestored [{d} + {l}], tmm2",
            "tilestored [{d} + {l} + 64], tmm3",
            p = inout(reg) segments.as_ptr() => _,
            count = inout(reg) segments.len() => _,
            acc = in(reg) u32::from(accumulate),
            c = in(reg) c,
            d = out(reg) _,
            l = in(reg) stride,
            s = in(reg) 64_usize,
            n = out(reg) _,
            a0 = out(reg) _,
            a1 = out(reg) _,
            b0 = out(reg) _,
            b1 = out(reg) _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}
