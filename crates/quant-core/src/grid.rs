//! From the range of a group to its grid, and from a value to its code.
//!
//! The arithmetic is that of the reference quantizer of OPTQ (Frantar et al. 2023,
//! arXiv:2210.17323), in `f32` with halves rounded to even.

/// The scale and the zero of a group that spans `low ..= high`, or `None` if no `f32` can step it.
///
/// Zero is always inside the range, and so is a value of the grid.
pub(crate) fn affine(low: f32, high: f32, bits: usize) -> Option<(f32, f32)> {
    let (low, high) = (low.min(0.0), high.max(0.0));
    let max_code = ((1 << bits) - 1) as f32;
    let scale = step(low, high, max_code)?;
    if scale == 0.0 {
        return affine(-1.0, 1.0, bits);
    }
    let zero = (-low / scale).round_ties_even().clamp(0.0, max_code);
    Some((scale, zero))
}

/// The scale of a symmetric group that spans `low ..= high`, or `None` if no `f32` can step it.
///
/// The largest positive value is clipped to the last level, `(2^(bits - 1) - 1)` steps.
pub(crate) fn symmetric(low: f32, high: f32, bits: usize) -> Option<f32> {
    let high = high.max(-low).max(0.0);
    let scale = step(-high, high, ((1 << bits) - 1) as f32)?;
    if scale == 0.0 {
        return symmetric(-1.0, 1.0, bits);
    }
    Some(scale)
}

fn step(low: f32, high: f32, max_code: f32) -> Option<f32> {
    let step = (high - low) / max_code;
    step.is_finite().then_some(step)
}

/// The code nearest to `value`, for a whole `zero`.
#[inline(always)]
pub(crate) fn code(value: f32, scale: f32, zero: f32, max_code: f32) -> u8 {
    ((value / scale).round_ties_even() + zero).clamp(0.0, max_code) as u8
}
