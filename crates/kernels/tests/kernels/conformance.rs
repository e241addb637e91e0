//! The operations on every backend that the tests are built with, through `Tensor` and autodiff.
//!
//! Values are compared with sums in `f64`, because a device may give zeros, and no error, for an
//! operation that it does not support. A family of operations is a module with a function of [`On`].

mod batches;
mod on;
mod quant_matmul;
mod step;

#[cfg(any(feature = "wgpu", feature = "vulkan", feature = "metal"))]
use burn::tensor::DeviceKind;
use burn::tensor::{DType, Device};

use on::{Kind, On};

/// The tests of a device: each is a process of its own under cargo-nextest, and compiles its kernels beside
/// the others.
macro_rules! conformance {
    ($name:ident, $device:expr, $kind:ident) => {
        mod $name {
            use super::*;

            conformance!(quant_matmul, $device, $kind, packed_f32: F32, packed_f16: F16, packed_bf16: BF16);
            conformance!(step, $device, $kind, step_f32: F32, step_f16: F16, step_bf16: BF16);
            conformance!(batches, $device, $kind, batches_f32: F32, batches_f16: F16, batches_bf16: BF16);
        }
    };
    ($family:ident, $device:expr, $kind:ident, $($test:ident: $dtype:ident),+) => {
        $(
            #[test]
            fn $test() {
                conform($device, DType::$dtype, Kind::$kind, $family::conform);
            }
        )+
    };
}

conformance!(flex, Device::flex(), Host);
#[cfg(feature = "ndarray")]
conformance!(ndarray, Device::ndarray(), Host);
#[cfg(all(feature = "wgpu", not(any(feature = "vulkan", feature = "metal"))))]
conformance!(wgpu, Device::wgpu(DeviceKind::DefaultDevice), Cube);
#[cfg(feature = "vulkan")]
conformance!(vulkan, Device::vulkan(DeviceKind::DefaultDevice), Cube);
#[cfg(feature = "metal")]
conformance!(metal, Device::metal(DeviceKind::DefaultDevice), Cube);
#[cfg(feature = "cuda")]
conformance!(cuda, Device::cuda(0), CubeWithTf32);
#[cfg(feature = "rocm")]
conformance!(rocm, Device::rocm(0), CubeWithTf32);

/// Runs a family of operations in a dtype, if the device has it.
fn conform(device: Device, dtype: DType, kind: Kind, family: fn(&On)) {
    if !device.supports_dtype(dtype) {
        assert!(dtype != DType::F32, "a device without f32");
        return;
    }
    let on = On::new(device, dtype, kind);
    family(&on);
    let failures = on.into_failures();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
