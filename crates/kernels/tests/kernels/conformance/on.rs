//! A device and a dtype, and the comparison of tensors on it with sums in `f64`.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};

use burn::tensor::{DType, Device, Int, Tensor, TensorData};

/// The kind of a device.
#[derive(Clone, Copy, PartialEq)]
#[allow(
    dead_code,
    reason = "some kinds are of backends that the tests are not built with"
)]
pub(super) enum Kind {
    /// The processor.
    Host,
    /// CubeCL's kernels.
    Cube,
    /// CubeCL's kernels, with a product of burn that may round `f32` factors to the 11 bits of TF32.
    CubeWithTf32,
}

/// The device and the dtype that an operation is tested with.
pub(super) struct On {
    pub(super) device: Device,
    pub(super) dtype: DType,
    pub(super) kind: Kind,
    failures: RefCell<Vec<String>>,
}

impl On {
    pub(super) fn new(device: Device, dtype: DType, kind: Kind) -> Self {
        Self {
            device,
            dtype,
            kind,
            failures: RefCell::default(),
        }
    }

    /// Runs a case, whose failure is kept: a device is seldom at hand, and one run shows all that fail.
    pub(super) fn case(&self, name: &str, run: impl FnOnce()) {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(run)) {
            let message = panic.downcast_ref::<String>().map(String::as_str);
            let message = message.or_else(|| panic.downcast_ref::<&str>().copied());
            let message = message.unwrap_or("a panic without a message");
            let failure = format!("{name} in {:?}: {message}", self.dtype);
            self.failures.borrow_mut().push(failure);
        }
    }

    pub(super) fn into_failures(self) -> Vec<String> {
        self.failures.into_inner()
    }

    /// The unit roundoff of the dtype, or the error of a long sum in `f32` where that is larger.
    fn roundoff(&self) -> f64 {
        match self.dtype {
            DType::BF16 => 1.0 / 256.0,
            DType::F16 => 1.0 / 2048.0,
            _ => 2.5e-6,
        }
    }

    /// The largest error of a sum of the kernels, relative to the sum of the magnitudes.
    pub(super) fn bound(&self) -> f64 {
        4.0 * self.roundoff()
    }

    /// The same for sums of the device's own product.
    pub(super) fn product_bound(&self) -> f64 {
        match self.kind {
            Kind::Host | Kind::Cube => self.bound(),
            Kind::CubeWithTf32 => self.bound().max(4.0 / 2048.0),
        }
    }

    pub(super) fn tensor<const D: usize>(&self, values: &[f32], shape: [usize; D]) -> Tensor<D> {
        let data = TensorData::new(values.to_vec(), shape).convert_dtype(self.dtype);
        Tensor::from_data(data, (&self.device, self.dtype))
    }

    pub(super) fn words<const D: usize>(
        &self,
        words: Vec<u32>,
        shape: [usize; D],
    ) -> Tensor<D, Int> {
        Tensor::from_data(TensorData::new(words, shape), (&self.device, DType::U32))
    }

    /// The values rounded to the dtype.
    pub(super) fn rounded(&self, values: Vec<f32>) -> Vec<f32> {
        let n = values.len();
        let data = TensorData::new(values, [n]).convert_dtype(self.dtype);
        data.convert::<f32>().try_into_vec().unwrap()
    }

    /// Asserts that each value is within `bound` of a sum, relative to the magnitudes of its terms.
    #[track_caller]
    pub(super) fn assert_near<const D: usize>(
        &self,
        name: &str,
        found: Tensor<D>,
        expected: &[Sum],
        bound: f64,
    ) {
        let found = values(found);
        assert_eq!(found.len(), expected.len(), "{name}: the number of values");
        for (at, (&found, sum)) in found.iter().zip(expected).enumerate() {
            let error = (f64::from(found) - sum.value).abs();
            let tolerated = bound * sum.magnitude;
            assert!(
                error <= tolerated,
                "{name} in {:?}: {found} for {} at {at}, off by {error:e} > {tolerated:e}",
                self.dtype,
                sum.value,
            );
        }
    }
}

pub(super) fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().convert::<f32>().try_into_vec().unwrap()
}

/// A sum in `f64`, and the sum of the magnitudes of its terms.
#[derive(Clone, Copy, Default)]
pub(super) struct Sum {
    value: f64,
    magnitude: f64,
}

impl FromIterator<f64> for Sum {
    fn from_iter<I: IntoIterator<Item = f64>>(terms: I) -> Self {
        terms.into_iter().fold(Self::default(), |sum, term| Self {
            value: sum.value + term,
            magnitude: sum.magnitude + term.abs(),
        })
    }
}

/// One sum per row and column.
pub(super) fn sums(
    [rows, columns]: [usize; 2],
    terms: usize,
    term: impl Fn(usize, usize, usize) -> f64,
) -> Vec<Sum> {
    let at = |at: usize| {
        let (row, column) = (at / columns, at % columns);
        (0..terms).map(|k| term(row, column, k)).collect()
    };
    (0..rows * columns).map(at).collect()
}

/// Uniform random numbers from a seed, the same on every machine.
pub(super) struct Uniform(u64);

impl Uniform {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    fn between(&mut self, low: f32, high: f32) -> f32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        low + (high - low) * ((self.0 >> 40) as f32 / (1 << 24) as f32)
    }

    pub(super) fn vec(&mut self, n: usize, low: f32, high: f32) -> Vec<f32> {
        (0..n).map(|_| self.between(low, high)).collect()
    }
}
