//! Intel's tile unit: 16 rows of 64 bytes times 16 columns of 64 bytes in one instruction.
//!
//! The intrinsics are not stable, so the instructions stand here as such. Nothing that the compiler
//! makes touches a tile.

use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::Range;

use super::panel::{PART, PARTS};
use super::vnni::join;
use super::{Finish, Limbs, Panel, Rows, STRIP};
use crate::TILE;

/// Whether the processor has tiles of bytes, and the system lets this process use them.
pub(super) fn permitted() -> bool {
    #[cfg(target_os = "linux")]
    {
        const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
        const XFEATURE_XTILEDATA: libc::c_long = 18;
        let leaf = __cpuid_count(7, 0);
        let (tiles, bytes) = (leaf.edx >> 24 & 1, leaf.edx >> 25 & 1);
        // SAFETY: the call asks for a permission, and changes nothing if it is refused.
        tiles == 1
            && bytes == 1
            && unsafe {
                libc::syscall(
                    libc::SYS_arch_prctl,
                    ARCH_REQ_XCOMP_PERM,
                    XFEATURE_XTILEDATA,
                ) == 0
            }
    }
    #[cfg(not(target_os = "linux"))]
    false
}

/// The shapes of all tiles, as the processor reads them.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    bytes_per_row: [u16; 16],
    rows: [u8; 16],
}

/// What the tiles are while this lives, on this thread.
struct Configured;

impl Configured {
    /// Sums in the tiles below `first`, limbs of rows in those below `second`, and columns in the
    /// others; of each, `step` bytes at a time.
    ///
    /// # Safety
    /// [`permitted`].
    unsafe fn new(step: usize, [first, second]: [usize; 2]) -> Self {
        let mut shapes = Shapes {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            bytes_per_row: [0; 16],
            rows: [0; 16],
        };
        for tile in 0..8 {
            let (bytes, rows) = match tile {
                _ if tile < first => (64, STRIP),
                _ if tile < second => (step, STRIP),
                _ => (64, step / 4),
            };
            shapes.bytes_per_row[tile] = bytes as u16;
            shapes.rows[tile] = rows as u8;
        }
        // SAFETY: a valid palette.
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

/// The sums of up to six pairs of strip and limb, in 16 columns.
#[repr(C, align(64))]
struct Sums([[[i32; PART]; STRIP]; 6]);

/// See [`super::multiply`].
///
/// # Safety
/// [`permitted`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) unsafe fn multiply(
    rows: &Rows,
    blocks: Range<usize>,
    panel: &Panel,
    finish: &mut impl Finish,
) {
    // SAFETY: the caller's promise.
    unsafe {
        match (rows.limbs, panel.planes) {
            (Limbs::Three, 1) if panel.signed => {
                each::<3, 2>(rows, blocks, panel, finish, signed_three, [6, 7])
            }
            (Limbs::Two, 1) if panel.signed => {
                each::<2, 2>(rows, blocks, panel, finish, signed_two, [6, 7])
            }
            (Limbs::Three, 1) => each::<3, 2>(rows, blocks, panel, finish, codes_three, [6, 7]),
            (Limbs::Two, 1) => each::<2, 2>(rows, blocks, panel, finish, codes_two, [6, 7]),
            (Limbs::Two, 2) => each::<2, 1>(rows, blocks, panel, finish, limbs_two, [3, 6]),
            (limbs, planes) => unreachable!("{limbs:?} with {planes} planes"),
        }
    }
}

/// What a product of one block reads.
struct Operands {
    /// The limbs of two strips.
    a: [*const i8; 2],
    /// From a row to the next.
    a_row: usize,
    /// From a limb to the next, and from the last of a step to the first of the next.
    a_limb: usize,
    b: *const u8,
    b_plane: usize,
    b_step: usize,
    n_steps: usize,
}

/// `L` limbs of `S` strips at a time.
///
/// # Safety
/// [`permitted`], and `product` fits `L`, `S` and the planes of the panel.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn each<const L: usize, const S: usize>(
    rows: &Rows,
    blocks: Range<usize>,
    panel: &Panel,
    finish: &mut impl Finish,
    product: unsafe fn(&Operands, &mut Sums),
    tiles: [usize; 2],
) {
    assert_eq!(rows.height, STRIP, "whole tiles of rows");
    let step = rows.blocks.step();
    // SAFETY: the caller's promise.
    let _configured = unsafe { Configured::new(step, tiles) };
    let first_step = rows.blocks.steps(blocks.start).start;
    let n_scales = rows.blocks.n() * STRIP;
    let mut sums = [(); 2].map(|()| Sums([[[0; PART]; STRIP]; 6]));
    for pair in (0..rows.n_strips()).step_by(S) {
        // A last strip without a partner is its own.
        let strips = [pair, (pair + S - 1).min(rows.n_strips() - 1)];
        let n_strips = S.min(rows.n_strips() - pair);
        let product = |block: usize, part: usize, sums: &mut Sums| {
            let steps = rows.blocks.steps(block);
            let b = (steps.start - first_step) * panel.step_bytes() + part * step * PART;
            let operands = Operands {
                a: strips.map(|strip| rows.bytes[rows.at(strip, steps.start)..].as_ptr()),
                a_row: step,
                a_limb: STRIP * step,
                b: panel.bytes[b..].as_ptr(),
                b_plane: step * PARTS * PART,
                b_step: panel.step_bytes(),
                n_steps: steps.len(),
            };
            // SAFETY: the steps of the strips and of the panel are there.
            unsafe { product(&operands, sums) };
        };
        let take = |block: usize, part: usize, sums: &Sums, finish: &mut _| {
            // SAFETY: these instructions are there.
            let center = unsafe { Finish::center(finish, block, part) };
            for (k, &strip) in strips[..n_strips].iter().enumerate() {
                let scales = &rows.scales[strip * n_scales + block * STRIP..][..STRIP];
                let n = rows.rows_of(strip);
                for (row, &scale) in scales.iter().enumerate().take(n) {
                    let limbs: [__m512i; L] = std::array::from_fn(|l| {
                        // SAFETY: 16 sums.
                        unsafe { _mm512_load_si512(sums.0[k * L + l][row].as_ptr().cast()) }
                    });
                    let place = strip * STRIP + row;
                    let mut value = join(limbs, center, rows.limb_sums(place, block), scale);
                    if let Some(scales) = panel
                        .scales
                        .get((block - blocks.start) * TILE + part * PART..)
                        .filter(|_| panel.planes > 1)
                    {
                        // SAFETY: a scale for each column.
                        let scales = unsafe { _mm512_loadu_ps(scales.as_ptr()) };
                        value = _mm512_mul_ps(value, scales);
                    }
                    // SAFETY: these instructions are there.
                    unsafe { Finish::take(finish, place, block, part, value) };
                }
            }
        };
        // While the tiles multiply, the sums before are taken.
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
        let first = pair * STRIP;
        finish.rows_done(first..rows.n_rows.min(first + n_strips * STRIP));
    }
}

/// Products with codes: for each of two strips, each limb times the one plane.
macro_rules! codes {
    ($name:ident, $product:literal, [$($zero:literal),*], [$($first:literal),*], [$($second:literal),*], [$($store:literal),*]) => {
        /// # Safety
        /// Tiles are configured, and the operands lie within their allocations.
        unsafe fn $name(o: &Operands, sums: &mut Sums) {
            // SAFETY: the caller's promise; `sums` has six tiles.
            unsafe {
                asm!(
                    $(concat!("tilezero ", $zero),)*
                    "2:",
                    "tileloadd tmm7, [{b} + {c64}]",
                    $("tileloadd tmm6, [{a0} + {row}]", concat!($product, " ", $first, ", tmm6, tmm7"), "add {a0}, {limb}",)*
                    $("tileloadd tmm6, [{a1} + {row}]", concat!($product, " ", $second, ", tmm6, tmm7"), "add {a1}, {limb}",)*
                    "add {b}, {b_step}",
                    "dec {n}",
                    "jnz 2b",
                    $(concat!("tilestored [{sums} + {c64}], ", $store), "add {sums}, 1024",)*
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
    codes_three, "tdpbsud", ["tmm0", "tmm1", "tmm2", "tmm3", "tmm4", "tmm5"],
    ["tmm0", "tmm1", "tmm2"], ["tmm3", "tmm4", "tmm5"],
    ["tmm0", "tmm1", "tmm2", "tmm3", "tmm4", "tmm5"]
}
codes! {
    codes_two, "tdpbsud", ["tmm0", "tmm1", "tmm2", "tmm3"], ["tmm0", "tmm1"], ["tmm2", "tmm3"],
    ["tmm0", "tmm1", "tmm2", "tmm3"]
}
codes! {
    signed_three, "tdpbssd", ["tmm0", "tmm1", "tmm2", "tmm3", "tmm4", "tmm5"],
    ["tmm0", "tmm1", "tmm2"], ["tmm3", "tmm4", "tmm5"],
    ["tmm0", "tmm1", "tmm2", "tmm3", "tmm4", "tmm5"]
}
codes! {
    signed_two, "tdpbssd", ["tmm0", "tmm1", "tmm2", "tmm3"], ["tmm0", "tmm1"], ["tmm2", "tmm3"],
    ["tmm0", "tmm1", "tmm2", "tmm3"]
}

/// Products of two limbs with two: those of the same significance are summed up together, and that
/// of the lower ones is left out.
///
/// # Safety
/// Tiles are configured, and the operands lie within their allocations.
unsafe fn limbs_two(o: &Operands, sums: &mut Sums) {
    // SAFETY: the caller's promise; `sums` has six tiles.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "2:",
            "tileloadd tmm3, [{a} + {row}]",
            "add {a}, {limb}",
            "tileloadd tmm4, [{a} + {row}]",
            "add {a}, {limb}",
            "tileloadd tmm6, [{b} + {c64}]",
            "tdpbssd tmm0, tmm4, tmm6",
            "lea {t}, [{b} + {plane}]",
            "tileloadd tmm7, [{t} + {c64}]",
            "tdpbssd tmm0, tmm3, tmm7",
            "tdpbssd tmm1, tmm4, tmm7",
            "add {b}, {b_step}",
            "dec {n}",
            "jnz 2b",
            "tilestored [{sums} + {c64}], tmm0",
            "tilestored [{sums} + {c64} + 1024], tmm1",
            a = inout(reg) o.a[0] => _,
            b = inout(reg) o.b => _,
            t = out(reg) _,
            n = inout(reg) o.n_steps => _,
            limb = in(reg) o.a_limb,
            row = in(reg) o.a_row,
            plane = in(reg) o.b_plane,
            b_step = in(reg) o.b_step,
            sums = in(reg) &raw mut sums.0,
            c64 = in(reg) 64usize,
            options(nostack),
        );
    }
}
