//! The operations on every backend that the tests are built with, through `Tensor` and autodiff,
//! against sums in f64: values are compared, because what a device cannot compute may be zeros
//! without an error.
//!
//! A family of operations is a module with a function of [`On`], called in [`conform`].

mod quant_matmul;
mod step;

use burn::tensor::{DType, Device, Int, Tensor, TensorData};

#[test]
fn flex() {
    conform(Device::flex(), Kind::Host);
}

#[cfg(feature = "ndarray")]
#[test]
fn ndarray() {
    conform(Device::ndarray(), Kind::Host);
}

#[cfg(all(feature = "wgpu", not(any(feature = "vulkan", feature = "metal"))))]
#[test]
fn wgpu() {
    conform(
        Device::wgpu(burn::tensor::DeviceKind::DefaultDevice),
        Kind::Cube,
    );
}

#[cfg(feature = "vulkan")]
#[test]
fn vulkan() {
    conform(
        Device::vulkan(burn::tensor::DeviceKind::DefaultDevice),
        Kind::Cube,
    );
}

#[cfg(feature = "metal")]
#[test]
fn metal() {
    conform(
        Device::metal(burn::tensor::DeviceKind::DefaultDevice),
        Kind::Cube,
    );
}

#[cfg(feature = "cuda")]
#[test]
fn cuda() {
    conform(Device::cuda(0), Kind::CubeWithTf32);
}

#[cfg(feature = "rocm")]
#[test]
fn rocm() {
    conform(Device::rocm(0), Kind::CubeWithTf32);
}

/// What computes.
#[derive(Clone, Copy, PartialEq)]
#[allow(dead_code, reason = "not every kind is built for")]
enum Kind {
    /// The processor.
    Host,
    /// CubeCL's kernels.
    Cube,
    /// The same, where burn's own product may round `f32` factors to the 11 bits of TF32.
    CubeWithTf32,
}

fn conform(device: Device, kind: Kind) {
    assert!(device.supports_dtype(DType::F32), "a device without f32");
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        if device.supports_dtype(dtype) {
            let on = On {
                device: device.clone(),
                dtype,
                kind,
            };
            quant_matmul::conform(&on);
            step::conform(&on);
        }
    }
}

/// Where and in what an operation is tried.
struct On {
    device: Device,
    dtype: DType,
    kind: Kind,
}

impl On {
    /// The unit roundoff of the dtype, and of at least what a sum of many terms has.
    fn roundoff(&self) -> f64 {
        match self.dtype {
            DType::BF16 => 1.0 / 256.0,
            DType::F16 => 1.0 / 2048.0,
            _ => 2.5e-6,
        }
    }

    /// The error of what the kernels sum up, relative to the sum of the magnitudes.
    fn bound(&self) -> f64 {
        4.0 * self.roundoff()
    }

    /// The same, of what the device's own product sums up.
    fn product_bound(&self) -> f64 {
        match self.kind {
            Kind::Host | Kind::Cube => self.bound(),
            Kind::CubeWithTf32 => self.bound().max(4.0 / 2048.0),
        }
    }

    fn tensor<const D: usize>(&self, values: &[f32], shape: [usize; D]) -> Tensor<D> {
        let data = TensorData::new(values.to_vec(), shape).convert_dtype(self.dtype);
        Tensor::from_data(data, (&self.device, self.dtype))
    }

    fn words<const D: usize>(&self, words: Vec<u32>, shape: [usize; D]) -> Tensor<D, Int> {
        Tensor::from_data(TensorData::new(words, shape), (&self.device, DType::U32))
    }

    /// What the dtype makes of values: what a tensor of them holds.
    fn rounded(&self, values: Vec<f32>) -> Vec<f32> {
        let n = values.len();
        let data = TensorData::new(values, [n]).convert_dtype(self.dtype);
        data.convert::<f32>().try_into_vec().unwrap()
    }

    /// Each value is within `bound` of a sum, relative to the sum of the magnitudes of its terms.
    #[track_caller]
    fn assert_near<const D: usize>(
        &self,
        what: &str,
        found: Tensor<D>,
        expected: &[Sum],
        bound: f64,
    ) {
        let found = values(found);
        assert_eq!(found.len(), expected.len(), "{what}: the number of values");
        for (at, (&found, sum)) in found.iter().zip(expected).enumerate() {
            let error = (f64::from(found) - sum.value).abs();
            let tolerated = bound * sum.magnitude;
            assert!(
                error <= tolerated,
                "{what} in {:?}: {found} for {} at {at}, off by {error:e} > {tolerated:e}",
                self.dtype,
                sum.value,
            );
        }
    }
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().convert::<f32>().try_into_vec().unwrap()
}

/// A sum in f64 with the sum of the magnitudes of its terms.
#[derive(Clone, Copy, Default)]
struct Sum {
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

/// One sum for each row and column.
fn sums(
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

/// Numbers between 0 and 1 from a seed, the same on every machine.
struct Uniform(u64);

impl Uniform {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    fn between(&mut self, low: f32, high: f32) -> f32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        low + (high - low) * ((self.0 >> 40) as f32 / (1 << 24) as f32)
    }

    fn vec(&mut self, n: usize, low: f32, high: f32) -> Vec<f32> {
        (0..n).map(|_| self.between(low, high)).collect()
    }
}
