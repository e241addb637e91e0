//! Intel's AMX: 16 rows of 64 bytes times 16 columns of 64 bytes in one instruction.
//!
//! Its intrinsics are unstable, so the instructions are inline assembly. The compiler itself emits no
//! instruction that touches a tile.

use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::Range;

use super::blocks::{Limbs, STRIP};
use super::finish::Finish;
use super::panel::{Panel, SIGNED};
use super::split::Rows;
use super::vectors::{PART, PARTS};
use super::vnni::{join, join_whole};

/// The operand of `ldtilecfg`: the shapes of all tiles.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    bytes_per_row: [u16; 16],
    rows: [u8; 16],
}

/// A guard: the tiles of this thread are configured while it lives.
struct Configured;

impl Configured {
    /// Configures tiles 0 to 5 for sums, tile 6 for `step` limbs of each row, and tile 7 for `step`
    /// bytes of each column. With steps of 64, all tiles have one shape.
    ///
    /// # Safety
    /// The system permits AMX.
    unsafe fn new(step: usize) -> Self {
        let mut shapes = Shapes {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            bytes_per_row: [0; 16],
            rows: [0; 16],
        };
        for tile in 0..8 {
            let (bytes, rows) = match tile {
                0..6 => (64, STRIP),
                6 => (step, STRIP),
                _ => (64, step / 4),
            };
            shapes.bytes_per_row[tile] = bytes as u16;
            shapes.rows[tile] = rows as u8;
        }
        // SAFETY: the palette and the shapes are valid, and the caller promises AMX.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &shapes, options(nostack, readonly)) };
        Self
    }
}

impl Drop for Configured {
    fn drop(&mut self) {
        // SAFETY: the tiles were configured.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

/// The sums of up to six pairs of a strip and a limb in 16 columns.
#[repr(C, align(64))]
struct Sums([[[i32; PART]; STRIP]; 6]);

/// Multiplies a slab by a panel, see [`super::multiply`].
///
/// # Safety
/// The system permits AMX.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) unsafe fn multiply(
    rows: &Rows,
    slab: (Range<usize>, Range<usize>),
    panel: &Panel,
    finish: &mut impl Finish,
) {
    // SAFETY: the caller's promise.
    unsafe {
        match (rows.limbs, panel.planes) {
            (Limbs::Three, 1) => each::<_, 3, 2>(rows, slab, panel, finish, codes_three),
            (Limbs::Two, 1) => each::<_, 2, 2>(rows, slab, panel, finish, codes_two),
            (Limbs::Three, 3) => each::<_, 4, 1>(rows, slab, panel, finish, limbs_three),
            (Limbs::Two, 2) => each::<_, 2, 2>(rows, slab, panel, finish, limbs_two),
            (limbs, planes) => unreachable!("{limbs:?} with {planes} planes"),
        }
    }
}

/// The operands of the product of a block.
struct Operands {
    /// The limbs of two strips.
    a: [*const i8; 2],
    /// The bytes from a row to the next.
    a_row: usize,
    /// The bytes from a limb to the next, and from the last of a step to the first of the next step.
    a_limb: usize,
    /// The first step of the panel in 16 columns.
    b: *const u8,
    /// The bytes from a step of the panel to the next.
    b_step: usize,
    n_steps: usize,
}

/// Multiplies `S` strips at a time, with `L` sums for each.
///
/// # Safety
/// The system permits AMX, and `product` is that of `L`, `S` and the planes of the panel.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn each<F: Finish, const L: usize, const S: usize>(
    rows: &Rows,
    (strips, blocks): (Range<usize>, Range<usize>),
    panel: &Panel,
    finish: &mut F,
    product: unsafe fn(&Operands, &mut Sums),
) {
    assert_eq!(rows.height, STRIP, "whole tiles of rows");
    let step = rows.blocks.step();
    // SAFETY: the caller's promise.
    let _configured = unsafe { Configured::new(step) };
    let first_step = rows.blocks.steps(blocks.start).start;
    let mut sums = [(); 2].map(|()| Sums([[[0; PART]; STRIP]; 6]));
    for pair in strips.clone().step_by(S) {
        // A last strip without a partner takes the place of both.
        let n_strips = S.min(strips.end - pair);
        let strips = [pair, pair + n_strips - 1];
        let of_pair = pair * STRIP..rows.n_rows.min((pair + n_strips) * STRIP);
        finish.prefetch_rows(of_pair.clone());
        let product = |block: usize, part: usize, sums: &mut Sums| {
            let steps = rows.blocks.steps(block);
            let b = (steps.start - first_step) * panel.step_bytes() + part * step * PART;
            let operands = Operands {
                a: strips.map(|strip| rows.bytes[rows.at(strip, steps.start)..].as_ptr()),
                a_row: step,
                a_limb: STRIP * step,
                b: panel.bytes[b..].as_ptr(),
                b_step: panel.step_bytes(),
                n_steps: steps.len(),
            };
            // SAFETY: the tiles are configured, and the strips and the panel have these steps.
            unsafe { product(&operands, sums) };
        };
        let take = |block: usize, part: usize, sums: &Sums, finish: &mut F| {
            // SAFETY: the processor has AVX-512.
            let columns = unsafe { finish.columns(block, part) };
            let of_panel = panel.scales(block - blocks.start, part);
            let center = (panel.planes == 1 && !panel.centered).then(|| {
                let signed = _mm512_set1_ps(f32::from(SIGNED));
                _mm512_sub_ps(F::center(columns), signed)
            });
            for (k, &strip) in strips[..n_strips].iter().enumerate() {
                let of = rows.part(strip, block);
                let mut joined = [_mm512_setzero_ps(); STRIP];
                for (row, joined) in joined.iter_mut().enumerate() {
                    let limbs: [__m512i; L] = std::array::from_fn(|l| {
                        let sums = &sums.0[k * L + l][row];
                        // SAFETY: 16 sums.
                        unsafe { _mm512_load_si512(sums.as_ptr().cast()) }
                    });
                    let whole = limbs.map(|sums| _mm512_cvtepi32_ps(sums));
                    *joined = match (of_panel, center) {
                        (None, None) => join_whole(whole, of.scales[row]),
                        (None, Some(center)) => join(limbs, center, &of, row),
                        (Some(of_panel), _) => {
                            _mm512_mul_ps(join_limbs(whole, of.scales[row]), of_panel)
                        }
                    };
                }
                let n = rows.rows_of(strip);
                // SAFETY: the processor has AVX-512.
                unsafe {
                    let row = strip * STRIP;
                    finish.take(row, part, columns, &joined[..n], &of.sums[..n]);
                }
            }
        };
        // The sums of the previous product are taken while the tiles multiply.
        let mut before: Option<(usize, usize)> = None;
        for block in blocks.clone() {
            for part in 0..PARTS {
                product(block, part, &mut sums[part % 2]);
                if let Some((block, part)) = before.replace((block, part)) {
                    take(block, part, &sums[part % 2], finish);
                }
            }
        }
        if let Some((block, part)) = before {
            take(block, part, &sums[part % 2], finish);
        }
        finish.rows_done(of_pair);
    }
}

/// Combines the sums of each significance, the lowest first, in units of the highest.
///
/// In units of the lowest, large values would overflow `f32`.
///
/// # Safety
/// The processor has these instructions.
#[inline]
#[target_feature(enable = "avx512f")]
fn join_limbs<const L: usize>(sums: [__m512; L], scale: f32) -> __m512 {
    let mut value = sums[0];
    for sums in &sums[1..] {
        value = _mm512_fmadd_ps(value, _mm512_set1_ps(1.0 / 256.0), *sums);
    }
    _mm512_mul_ps(value, _mm512_set1_ps(scale))
}

/// Defines a product with codes: each limb of two strips times the only plane.
macro_rules! codes {
    ($name:ident, [$($sum:literal),*], [$($first:literal),*], [$($second:literal),*]) => {
        /// # Safety
        /// The tiles are configured, and the operands lie within their allocations.
        unsafe fn $name(o: &Operands, sums: &mut Sums) {
            // SAFETY: the caller's promise; `sums` has room for six tiles.
            unsafe {
                asm!(
                    $(concat!("tilezero ", $sum),)*
                    "2:",
                    "tileloadd tmm7, [{b} + {c64}]",
                    $("tileloadd tmm6, [{a0} + {row}]", concat!("tdpbssd ", $first, ", tmm6, tmm7"), "add {a0}, {limb}",)*
                    $("tileloadd tmm6, [{a1} + {row}]", concat!("tdpbssd ", $second, ", tmm6, tmm7"), "add {a1}, {limb}",)*
                    "add {b}, {b_step}",
                    "dec {n}",
                    "jnz 2b",
                    $(concat!("tilestored [{sums} + {c64}], ", $sum), "add {sums}, 1024",)*
                    a0 = inout(reg) o.a[0] => _,
                    a1 = inout(reg) o.a[1] => _,
                    b = inout(reg) o.b => _,
                    n = inout(reg) o.n_steps => _,
                    limb = in(reg) o.a_limb,
                    row = in(reg) o.a_row,
                    b_step = in(reg) o.b_step,
                    sums = inout(reg) &raw mut sums.0 => _,
                    c64 = in(reg) 64usize,
                    options(nostack),
                );
            }
        }
    };
}

codes! {
    codes_three, ["tmm0", "tmm1", "tmm2", "tmm3", "tmm4", "tmm5"],
    ["tmm0", "tmm1", "tmm2"], ["tmm3", "tmm4", "tmm5"]
}
codes! {
    codes_two, ["tmm0", "tmm1", "tmm2", "tmm3"], ["tmm0", "tmm1"], ["tmm2", "tmm3"]
}

/// Defines a product with limbs in steps of 64: the sums of each significance but the lowest.
///
/// The `$line`s are one step: a limb of a strip has 1024 bytes, a plane of a panel 4096.
macro_rules! limbs {
    ($name:ident, $a_step:literal, [$($sum:literal),*], [$($line:literal),* $(,)?]) => {
        /// # Safety
        /// The tiles are configured, and the operands lie within their allocations.
        unsafe fn $name(o: &Operands, sums: &mut Sums) {
            assert!(o.a_row == 64, "steps of 64");
            // SAFETY: the caller's promise; `sums` has room for six tiles.
            unsafe {
                asm!(
                    $(concat!("tilezero ", $sum),)*
                    "2:",
                    $($line,)*
                    concat!("add {a0}, ", $a_step),
                    concat!("add {a1}, ", $a_step),
                    "add {b}, {b_step}",
                    "dec {n}",
                    "jnz 2b",
                    $(concat!("tilestored [{sums} + {c64}], ", $sum), "add {sums}, 1024",)*
                    a0 = inout(reg) o.a[0] => _,
                    a1 = inout(reg) o.a[1] => _,
                    b = inout(reg) o.b => _,
                    n = inout(reg) o.n_steps => _,
                    b_step = in(reg) o.b_step,
                    sums = inout(reg) &raw mut sums.0 => _,
                    c64 = in(reg) 64usize,
                    options(nostack),
                );
            }
        }
    };
}

limbs! {
    limbs_three, "3072", ["tmm0", "tmm1", "tmm2", "tmm3"],
    [
        "tileloadd tmm6, [{a0} + {c64} + 2048]",
        "tileloadd tmm7, [{b} + {c64}]",
        "tdpbssd tmm1, tmm6, tmm7",
        "tileloadd tmm5, [{a0} + {c64} + 1024]",
        "tdpbssd tmm0, tmm5, tmm7",
        "tileloadd tmm7, [{b} + {c64} + 4096]",
        "tdpbssd tmm2, tmm6, tmm7",
        "tdpbssd tmm1, tmm5, tmm7",
        "tileloadd tmm4, [{a0} + {c64}]",
        "tdpbssd tmm0, tmm4, tmm7",
        "tileloadd tmm7, [{b} + {c64} + 8192]",
        "tdpbssd tmm3, tmm6, tmm7",
        "tdpbssd tmm2, tmm5, tmm7",
        "tdpbssd tmm1, tmm4, tmm7",
    ]
}
limbs! {
    limbs_two, "2048", ["tmm0", "tmm1", "tmm2", "tmm3"],
    [
        "tileloadd tmm7, [{b} + {c64} + 4096]",
        "tileloadd tmm6, [{a0} + {c64} + 1024]",
        "tdpbssd tmm1, tmm6, tmm7",
        "tileloadd tmm6, [{a1} + {c64} + 1024]",
        "tdpbssd tmm3, tmm6, tmm7",
        "tileloadd tmm6, [{a0} + {c64}]",
        "tdpbssd tmm0, tmm6, tmm7",
        "tileloadd tmm6, [{a1} + {c64}]",
        "tdpbssd tmm2, tmm6, tmm7",
        "tileloadd tmm7, [{b} + {c64}]",
        "tileloadd tmm6, [{a0} + {c64} + 1024]",
        "tdpbssd tmm0, tmm6, tmm7",
        "tileloadd tmm6, [{a1} + {c64} + 1024]",
        "tdpbssd tmm2, tmm6, tmm7",
    ]
}
