//! Arithmetic on slices with the same bits in every instruction set.
//!
//! All functions are inlined into bodies of [`crate::isa::by_instruction_set`]: plain loops over arrays
//! of [`LANES`] values, without fused multiply-adds, which some processors lack.

/// The number of partial sums, whatever the width of a vector.
pub(crate) const LANES: usize = 32;

/// `eˣ` within 1 ulp, subnormal results included (0.98 ulp at most over every third float).
///
/// With `n = round(x / ln 2)`, `eˣ = 2ⁿ eʳ` where `|r| <= ln 2 / 2`. The polynomial for `eʳ` and the
/// two parts of `ln 2` are those of `expf` in Cephes (Moshier).
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    /// The product with `n` is exact.
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    /// A sum with it is rounded to a whole number, which is in its low bits.
    const ROUND: f32 = 12_582_912.0;

    // Beyond these the result is 0 or infinity; comparisons leave NaN as it is.
    let x = if x < -104.0 { -104.0 } else { x };
    let x = if x > 89.0 { 89.0 } else { x };
    let rounded = x * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = x - n * LN_2_HIGH - n * LN_2_LOW;
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 5e-1;
    let p = p * (r * r) + r + 1.0;
    // In two steps, because 2ⁿ may not be a normal number.
    let n = rounded.to_bits().wrapping_sub(ROUND.to_bits()) as i32;
    let half = n >> 1;
    p * power_of_two(half) * power_of_two(n.wrapping_sub(half))
}

#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32) << 23)
}

/// The logistic function, `1 / (1 + e⁻ˣ)`.
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// `tanh x` within 2 ulp.
///
/// Below 0.625 a polynomial, beyond it `1 - 2 / (e²ˣ + 1)`, as in `tanhf` of Cephes (Moshier), whose
/// coefficients these are.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    let magnitude = x.abs();
    let beyond = 1.0 - 2.0 / (exp(2.0 * magnitude) + 1.0);
    let square = x * x;
    let p = -5.704_988_7e-3;
    let p = p * square + 2.063_909e-2;
    let p = p * square - 5.373_971_6e-2;
    let p = p * square + 1.333_144_2e-1;
    let p = p * square - 3.333_328e-1;
    let near = p * square * x + x;
    // NaN is near, and so is a negative zero, which the sum makes positive.
    let y = if magnitude > 0.625 { beyond } else { near };
    y.copysign(x)
}

/// The sum of the lanes, in a fixed order.
#[inline(always)]
pub(crate) fn sum(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
    }
    lanes[0]
}

/// `Σ a b` over the length of the shorter slice.
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let n = a.len().min(b.len());
    let (a, a_rest) = a[..n].as_chunks::<LANES>();
    let (b, b_rest) = b[..n].as_chunks::<LANES>();
    let mut sums = [0.0; LANES];
    for (a, b) in a.iter().zip(b) {
        for lane in 0..LANES {
            sums[lane] += a[lane] * b[lane];
        }
    }
    for ((sum, a), b) in sums.iter_mut().zip(a_rest).zip(b_rest) {
        *sum += a * b;
    }
    sum(sums)
}

/// Multiplies by `scale` and returns the largest product, or `-inf` if there is none.
#[inline(always)]
pub(crate) fn scale_max(values: &mut [f32], scale: f32) -> f32 {
    let (chunks, rest) = values.as_chunks_mut::<LANES>();
    let mut most = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        for lane in 0..LANES {
            chunk[lane] *= scale;
            most[lane] = larger(chunk[lane], most[lane]);
        }
    }
    for (value, most) in rest.iter_mut().zip(&mut most) {
        *value *= scale;
        *most = larger(*value, *most);
    }
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        for lane in 0..width {
            most[lane] = larger(most[lane], most[lane + width]);
        }
    }
    most[0]
}

/// The larger of two numbers, `b` if `a` is NaN; one instruction, unlike [`f32::max`].
#[inline(always)]
pub(crate) fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// Replaces each value by `e^(value - shift)` and returns their sum.
#[inline(always)]
pub(crate) fn exp_sum(values: &mut [f32], shift: f32) -> f32 {
    exp_sum_times(values, shift, |_| 1.0)
}

/// Replaces each value by `e^(value - shift) factor(value)` and returns the sum of the exponentials.
#[inline(always)]
pub(crate) fn exp_sum_times(values: &mut [f32], shift: f32, factor: impl Fn(f32) -> f32) -> f32 {
    let (chunks, rest) = values.as_chunks_mut::<LANES>();
    let mut sums = [0.0; LANES];
    for chunk in chunks {
        for lane in 0..LANES {
            let exp = exp(chunk[lane] - shift);
            sums[lane] += exp;
            chunk[lane] = exp * factor(chunk[lane]);
        }
    }
    for (value, sum) in rest.iter_mut().zip(&mut sums) {
        let exp = exp(*value - shift);
        *sum += exp;
        *value = exp * factor(*value);
    }
    sum(sums)
}

/// `y += a x` over the length of the shorter slice.
#[inline(always)]
pub(crate) fn add_scaled(y: &mut [f32], a: f32, x: &[f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += a * x;
    }
}

/// `y *= a`.
#[inline(always)]
pub(crate) fn scale(y: &mut [f32], a: f32) {
    for y in y {
        *y *= a;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::{Isa, by_instruction_set};

    by_instruction_set! {
        fn exp_each(values: &mut [f32]) = exp_each_body
    }

    #[inline(always)]
    fn exp_each_body<I: Isa>(values: &mut [f32]) {
        for value in values {
            *value = exp(*value);
        }
    }

    by_instruction_set! {
        fn tanh_each(values: &mut [f32]) = tanh_each_body
    }

    #[inline(always)]
    fn tanh_each_body<I: Isa>(values: &mut [f32]) {
        for value in values {
            *value = tanh(*value);
        }
    }

    /// The largest error in ulp over every 97th float: all binades, both signs, subnormal results and
    /// overflow. The bits are the same in every instruction set.
    fn worst_ulp(each: fn(&mut [f32]), portable: fn(f32) -> f32, exact: fn(f64) -> f64) -> f64 {
        let all: Vec<u32> = (0..=u32::MAX / 97).map(|k| k * 97).collect();
        let mut worst = 0.0f64;
        for bits in all.chunks(1 << 20) {
            let mut found: Vec<f32> = bits.iter().map(|&bits| f32::from_bits(bits)).collect();
            each(&mut found);
            for (&bits, &found) in bits.iter().zip(&found) {
                let x = f32::from_bits(bits);
                let portable = portable(x);
                if x.is_nan() {
                    assert!(found.is_nan() && portable.is_nan());
                    continue;
                }
                assert_eq!(
                    found.to_bits(),
                    portable.to_bits(),
                    "instruction sets at {x}"
                );
                let expected = exact(f64::from(x));
                let nearest = expected as f32;
                if !nearest.is_finite() || nearest == 0.0 {
                    assert_eq!(found, nearest, "at {x}");
                    continue;
                }
                let magnitude = nearest.abs();
                let ulp = f64::from(magnitude.next_up()) - f64::from(magnitude);
                let ulp = if ulp.is_finite() {
                    ulp
                } else {
                    f64::from(2.0f32.powi(104))
                };
                worst = worst.max((f64::from(found) - expected).abs() / ulp);
            }
        }
        worst
    }

    #[test]
    fn exp_is_within_one_ulp_in_every_instruction_set() {
        let worst = worst_ulp(exp_each, exp, f64::exp);
        assert!(worst <= 1.0, "{worst} ulp");
    }

    #[test]
    fn tanh_is_within_two_ulp_in_every_instruction_set() {
        let worst = worst_ulp(tanh_each, tanh, f64::tanh);
        assert!(worst <= 2.0, "{worst} ulp");
    }

    #[test]
    fn tanh_of_the_limits() {
        assert_eq!(tanh(f32::INFINITY), 1.0);
        assert_eq!(tanh(f32::MIN), -1.0);
        assert_eq!(tanh(-0.0).to_bits(), (-0.0f32).to_bits());
        let tiny = f32::from_bits(1);
        assert_eq!(tanh(tiny), tiny);
        assert!(tanh(f32::NAN).is_nan());
    }

    #[test]
    fn exp_of_the_limits() {
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(f32::MAX), f32::INFINITY);
        assert_eq!(exp(f32::MIN), 0.0);
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-0.0), 1.0);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn reductions_take_every_element_once() {
        for n in [0, 1, 31, 32, 33, 95, 96, 100] {
            let a: Vec<f32> = (0..n).map(|i| (i * 7 % 11) as f32 - 5.0).collect();
            let b: Vec<f32> = (0..n).map(|i| (i * 5 % 13) as f32 - 6.0).collect();
            let expected: f32 = a.iter().zip(&b).map(|(a, b)| a * b).sum();
            assert_eq!(dot(&a, &b), expected, "{n} elements");
            let mut scaled = a.clone();
            let most = scale_max(&mut scaled, -2.0);
            assert!(a.iter().zip(&scaled).all(|(a, s)| *s == -2.0 * a));
            assert_eq!(
                most,
                scaled.iter().copied().fold(f32::NEG_INFINITY, f32::max)
            );
            let mut ones = vec![3.0; n];
            assert_eq!(exp_sum(&mut ones, 3.0), n as f32);
            let mut halves = vec![3.0; n];
            let sum = exp_sum_times(&mut halves, 3.0, |value| value / 6.0);
            assert_eq!((sum, halves), (n as f32, vec![0.5; n]));
        }
    }
}
