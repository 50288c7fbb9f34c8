//! The inner loops of products in vectors.
//!
//! They read words of four bytes: f32, or, of bf16, two neighbours along the inner dimension.

#[allow(clippy::wildcard_imports)] // the vector instructions
use std::arch::x86_64::*;

use super::panels::STRIDE;

/// Rows of a strip of the left side.
pub const HEIGHT: usize = 6;

/// Words of a block along the inner dimension, at most.
pub const WORDS: usize = 192;

/// Words from one row of the left side to the next: no multiple of what the cache takes for the same place.
pub const PITCH: usize = WORDS + 16;

/// Columns of a panel of the right side.
pub const COLUMNS: usize = 16;

/// Columns of the widest block of sums.
pub const WIDEST: usize = 2 * COLUMNS;

/// Rows [`PITCH`] apart, whole strips of them, and panels `[words][COLUMNS]`, [`STRIDE`] apart.
#[derive(Clone, Copy)]
pub struct Sides {
    pub left: *const f32,
    pub right: *const f32,
    pub words: usize,
}

/// A block of sums, `stride` elements from row to row; with `add`, what is there stays in them.
#[derive(Clone, Copy)]
pub struct Sums {
    pub to: *mut f32,
    pub stride: usize,
    pub add: bool,
}

/// What the sides hold, and what multiplies it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loop {
    /// f32 (AVX2 with FMA): one strip and one panel at a time.
    Narrow,
    /// f32 (AVX-512): two strips and two panels.
    Wide,
    /// Pairs of bf16 (AVX-512 BF16), likewise.
    Pairs,
    /// Pairs of bf16 on the left, on the right f32 in two rows for each of them (AVX-512).
    Widened,
}

impl Loop {
    /// Strips and panels of the largest block.
    pub const fn most(self) -> usize {
        match self {
            Self::Narrow => 1,
            _ => 2,
        }
    }

    /// The sums of `strips` by `panels` (each 1 or [`Self::most`], as many panels as strips or more).
    ///
    /// # Safety
    /// The CPU has the instructions; the sides and the block have the elements, which nothing else writes.
    pub unsafe fn multiply(self, sides: &Sides, sums: Sums, strips: usize, panels: usize) {
        // SAFETY: the caller's.
        unsafe {
            match (self, strips, panels) {
                (Self::Narrow, 1, 1) => narrow(sides, sums),
                (Self::Wide, 1, 1) => wide::<1, 1>(sides, sums),
                (Self::Wide, 1, 2) => wide::<1, 2>(sides, sums),
                (Self::Wide, 2, 2) => wide::<2, 2>(sides, sums),
                (Self::Pairs, 1, 1) => pairs::<1, 1>(sides, sums),
                (Self::Pairs, 1, 2) => pairs::<1, 2>(sides, sums),
                (Self::Pairs, 2, 2) => pairs::<2, 2>(sides, sums),
                (Self::Widened, 1, 1) => widened::<1>(sides, sums),
                (Self::Widened, 1, 2) => widened::<2>(sides, sums),
                _ => unreachable!("{self:?}: {strips} strips, {panels} panels"),
            }
        }
    }

    /// A block of `height` rows and `size` columns, at most the largest one, of sides padded to whole strips and panels.
    ///
    /// # Safety
    /// As `multiply`.
    pub unsafe fn block(self, sides: &Sides, sums: Sums, height: usize, size: usize) {
        let most = self.most();
        // SAFETY: the caller's; a strip's sums are whole beside the block's where that ends within them.
        unsafe {
            if (height, size) == (most * HEIGHT, most * COLUMNS) {
                self.multiply(sides, sums, most, most);
                return;
            }
            for row in (0..height).step_by(HEIGHT) {
                let strip = Sides {
                    left: sides.left.add(row * PITCH),
                    ..*sides
                };
                let to = sums.to.add(row * sums.stride);
                let panels = size.div_ceil(COLUMNS);
                if height - row >= HEIGHT && size == panels * COLUMNS {
                    self.multiply(&strip, Sums { to, ..sums }, 1, panels);
                } else {
                    let height = HEIGHT.min(height - row);
                    self.edge(&strip, Sums { to, ..sums }, panels, height, size);
                }
            }
        }
    }

    /// As `block`, of one strip at the right or lower end.
    #[cold]
    unsafe fn edge(self, sides: &Sides, sums: Sums, panels: usize, height: usize, size: usize) {
        let mut whole = [0.0_f32; HEIGHT * WIDEST];
        let beside = Sums {
            to: whole.as_mut_ptr(),
            stride: WIDEST,
            add: false,
        };
        // SAFETY: the caller's.
        unsafe {
            self.multiply(sides, beside, 1, panels);
            for row in 0..height {
                let to = std::slice::from_raw_parts_mut(sums.to.add(row * sums.stride), size);
                for (to, found) in to.iter_mut().zip(&whole[row * WIDEST..]) {
                    *to = if sums.add { *to + found } else { *found };
                }
            }
        }
    }
}

/// # Safety
/// As [`Loop::multiply`].
#[target_feature(enable = "avx2,fma")]
unsafe fn narrow(sides: &Sides, sums: Sums) {
    let (mut left, mut right) = (sides.left, sides.right);
    let mut found = [[_mm256_setzero_ps(); 2]; HEIGHT];
    // SAFETY: the caller's.
    unsafe {
        for row in 0..HEIGHT {
            _mm_prefetch::<_MM_HINT_T0>(sums.to.add(row * sums.stride).cast());
        }
        for _ in 0..sides.words {
            let (first, second) = (_mm256_loadu_ps(right), _mm256_loadu_ps(right.add(8)));
            for (row, found) in found.iter_mut().enumerate() {
                let value = _mm256_broadcast_ss(&*left.add(row * PITCH));
                found[0] = _mm256_fmadd_ps(value, first, found[0]);
                found[1] = _mm256_fmadd_ps(value, second, found[1]);
            }
            left = left.add(1);
            right = right.add(COLUMNS);
        }
        for (row, found) in found.into_iter().enumerate() {
            let to = sums.to.add(row * sums.stride);
            for (i, mut found) in found.into_iter().enumerate() {
                let to = to.add(8 * i);
                if sums.add {
                    found = _mm256_add_ps(found, _mm256_loadu_ps(to));
                }
                _mm256_storeu_ps(to, found);
            }
        }
    }
}

/// `$do` for every row of a strip. Sums stay in registers where all their indices are literals.
macro_rules! each_row {
    ($do:ident) => {
        $do!(0);
        $do!(1);
        $do!(2);
        $do!(3);
        $do!(4);
        $do!(5);
    };
}

/// A loop in vectors of 512 bits over words, of `STRIPS` by `PANELS`: `$step` adds to `$sum` what a word of a row and a
/// vector of the right side give.
macro_rules! in_512_bits {
    ($name:ident, $features:literal, |$sum:ident, $word:ident, $right:ident| $step:expr) => {
        /// # Safety
        /// As [`Loop::multiply`].
        #[target_feature(enable = $features)]
        unsafe fn $name<const STRIPS: usize, const PANELS: usize>(sides: &Sides, sums: Sums) {
            let (mut left, mut right) = (sides.left, sides.right);
            let mut found = [[[_mm512_setzero_ps(); 2]; HEIGHT]; 2];
            // SAFETY: the caller's.
            unsafe {
                for row in 0..HEIGHT * STRIPS {
                    for panel in 0..PANELS {
                        let to = sums.to.add(row * sums.stride + panel * COLUMNS);
                        _mm_prefetch::<_MM_HINT_T0>(to.cast());
                    }
                }
                for _ in 0..sides.words {
                    let first = _mm512_loadu_ps(right);
                    let second = if PANELS > 1 {
                        _mm512_loadu_ps(right.add(STRIDE))
                    } else {
                        first
                    };
                    let next = left.wrapping_add(HEIGHT * PITCH);
                    macro_rules! one {
                        ($row:literal, $strip:literal, $left:ident) => {
                            let $word = _mm512_set1_ps(*$left.add($row * PITCH));
                            let ($sum, $right) = (found[$strip][$row][0], first);
                            found[$strip][$row][0] = $step;
                            if PANELS > 1 {
                                let ($sum, $right) = (found[$strip][$row][1], second);
                                found[$strip][$row][1] = $step;
                            }
                        };
                    }
                    macro_rules! row {
                        ($row:literal) => {
                            one!($row, 0, left);
                            if STRIPS > 1 {
                                one!($row, 1, next);
                            }
                        };
                    }
                    each_row!(row);
                    left = left.add(1);
                    right = right.add(COLUMNS);
                }
                macro_rules! row {
                    ($row:literal) => {
                        store::<PANELS>(found[0][$row], sums, $row);
                        if STRIPS > 1 {
                            store::<PANELS>(found[1][$row], sums, HEIGHT + $row);
                        }
                    };
                }
                each_row!(row);
            }
        }
    };
}

in_512_bits!(wide, "avx512f", |sum, word, right| _mm512_fmadd_ps(
    word, right, sum
));
in_512_bits!(pairs, "avx512f,avx512bf16", |sum, word, right| {
    _mm512_dpbf16_ps(sum, bf16(word), bf16(right))
});

#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn bf16(words: __m512) -> __m512bh {
    // SAFETY: both are 512 bits of any content.
    unsafe { std::mem::transmute(words) }
}

/// # Safety
/// As [`Loop::multiply`].
#[target_feature(enable = "avx512f")]
unsafe fn widened<const PANELS: usize>(sides: &Sides, sums: Sums) {
    let (mut left, mut right) = (sides.left.cast::<i32>(), sides.right);
    let mut found = [[_mm512_setzero_ps(); 2]; HEIGHT];
    let upper = _mm512_set1_epi32(0xffff_0000_u32.cast_signed());
    // SAFETY: the caller's.
    unsafe {
        for _ in 0..sides.words {
            let other = if PANELS > 1 { STRIDE } else { 0 };
            let below = right.add(COLUMNS);
            let first = [_mm512_loadu_ps(right), _mm512_loadu_ps(right.add(other))];
            let second = [_mm512_loadu_ps(below), _mm512_loadu_ps(below.add(other))];
            macro_rules! row {
                ($row:literal) => {
                    let pair = _mm512_set1_epi32(*left.add($row * PITCH));
                    let even = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(pair));
                    let odd = _mm512_castsi512_ps(_mm512_and_si512(pair, upper));
                    found[$row][0] = _mm512_fmadd_ps(even, first[0], found[$row][0]);
                    found[$row][0] = _mm512_fmadd_ps(odd, second[0], found[$row][0]);
                    if PANELS > 1 {
                        found[$row][1] = _mm512_fmadd_ps(even, first[1], found[$row][1]);
                        found[$row][1] = _mm512_fmadd_ps(odd, second[1], found[$row][1]);
                    }
                };
            }
            each_row!(row);
            left = left.add(1);
            right = right.add(2 * COLUMNS);
        }
        macro_rules! row {
            ($row:literal) => {
                store::<PANELS>(found[$row], sums, $row);
            };
        }
        each_row!(row);
    }
}

/// The first `PANELS` vectors of the row `row` of a block.
///
/// # Safety
/// As [`Loop::multiply`].
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store<const PANELS: usize>(found: [__m512; 2], sums: Sums, row: usize) {
    // SAFETY: the caller's.
    unsafe {
        let to = sums.to.add(row * sums.stride);
        store_one(found[0], to, sums.add);
        if PANELS > 1 {
            store_one(found[1], to.add(COLUMNS), sums.add);
        }
    }
}

/// # Safety
/// `to` has 16 elements, which nothing else uses.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn store_one(found: __m512, to: *mut f32, add: bool) {
    // SAFETY: the caller's.
    unsafe {
        let found = if add {
            _mm512_add_ps(found, _mm512_loadu_ps(to))
        } else {
            found
        };
        _mm512_storeu_ps(to, found);
    }
}
