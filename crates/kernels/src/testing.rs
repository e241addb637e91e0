//! Helpers of the unit tests.

use burn::backend::{Flex, flex::FlexTensor, ops::FloatTensorOps};
use burn::tensor::{Device, FloatDType, Tensor, TensorData};
use proptest::prelude::ProptestConfig;

use crate::host::{contiguous, floats};

/// A configuration of `n` cases, times `PROPTEST_CASES / 256` where that is set.
pub(crate) fn cases_of(n: u32) -> ProptestConfig {
    ProptestConfig::with_cases((ProptestConfig::default().cases * n / 256).max(1))
}

/// Random numbers from a seed (xorshift64, Marsaglia 2003).
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    /// `n` uniform numbers from `low` to `high`.
    pub(crate) fn floats(&mut self, n: usize, low: f32, high: f32) -> Vec<f32> {
        let mut uniform = || {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            (self.0 >> 40) as f32 / (1 << 24) as f32
        };
        (0..n).map(|_| low + (high - low) * uniform()).collect()
    }

    /// A tensor of uniform numbers from -1 to 1.
    pub(crate) fn tensor<const D: usize>(&mut self, shape: [usize; D]) -> Tensor<D> {
        tensor(&self.floats(shape.iter().product(), -1.0, 1.0), shape)
    }
}

pub(crate) fn tensor<const D: usize>(values: &[f32], shape: [usize; D]) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values.to_vec(), shape), &Device::flex())
}

pub(crate) fn leaf<const D: usize>(t: &Tensor<D>) -> Tensor<D> {
    t.clone().autodiff().require_grad()
}

pub(crate) fn primitive<const D: usize>(t: &Tensor<D>) -> FlexTensor {
    t.clone().try_into_primitive::<Flex>().unwrap()
}

/// The values of a tensor, row by row.
pub(crate) fn values<const D: usize>(t: &Tensor<D>) -> Vec<f32> {
    primitive_values(primitive(t))
}

pub(crate) fn primitive_values(t: FlexTensor) -> Vec<f32> {
    floats(&contiguous(t)).to_vec()
}

pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// Asserts that `run` gives the same bits with 1, 2 and 5 threads.
#[track_caller]
pub(crate) fn assert_same_on_any_threads(run: impl Fn() -> Vec<Vec<f32>> + Sync) {
    let on = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        let results = pool.build().unwrap().install(&run);
        results.iter().map(|t| bits(t)).collect::<Vec<_>>()
    };
    let one = on(1);
    assert!(on(2) == one, "two threads");
    assert!(on(5) == one, "five threads");
}

/// Asserts that no error exceeds `bound` times the largest magnitude of what is expected, in `F64`.
#[track_caller]
pub(crate) fn assert_within(found: FlexTensor, expected: &FlexTensor, bound: f64) {
    let found = contiguous(Flex::float_cast(found, FloatDType::F64));
    let (found, expected) = (
        found.as_slice::<f64>().unwrap(),
        contiguous(expected.clone()),
    );
    let expected = expected.as_slice::<f64>().unwrap();
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0.0f64, |most, v| most.max(v.abs()));
    for (at, (found, expected)) in found.iter().zip(expected).enumerate() {
        let error = (found - expected).abs();
        assert!(
            error <= bound * largest,
            "{found} for {expected} at {at}, the largest {largest}"
        );
    }
}

/// The gradient of `f` at `x` by central differences in `f64`.
pub(crate) fn slopes(x: &[f32], f: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    let h = 1e-4;
    let mut x = doubles(x);
    (0..x.len())
        .map(|i| {
            let at = x[i];
            x[i] = at + h;
            let high = f(&x);
            x[i] = at - h;
            let low = f(&x);
            x[i] = at;
            (high - low) / (2.0 * h)
        })
        .collect()
}

pub(crate) fn doubles(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&v| f64::from(v)).collect()
}

/// The tensor in `F64`, a dtype without native operations.
pub(crate) fn wide<const D: usize>(t: &Tensor<D>) -> Tensor<D> {
    t.clone().cast(FloatDType::F64)
}

pub(crate) fn wide_values<const D: usize>(t: Tensor<D>) -> Vec<f64> {
    t.into_data().try_to_vec().unwrap()
}

/// Asserts that no error exceeds `tolerance` times the largest expected magnitude, or times 0.1 if all
/// are smaller.
#[track_caller]
pub(crate) fn assert_close<F: Copy + Into<f64>>(found: &[F], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0.1f64, |most, v| most.max(v.abs()));
    for (at, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        let found: f64 = found.into();
        let error = (found - expected).abs();
        assert!(
            expected.is_finite() && error <= tolerance * largest,
            "{found} for {expected} at {at}, largest {largest}"
        );
    }
}
