//! The operations on every backend that the tests are built with, through `Tensor` and autodiff.
//!
//! Values are compared with sums in `f64`, because a device may give zeros, and no error, for an
//! operation that it does not support. A family of operations is a module with a function of [`On`],
//! called in [`conform`].

mod batches;
mod on;
mod quant_matmul;
mod step;

use burn::tensor::{DType, Device};

use on::{Kind, On};

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

fn conform(device: Device, kind: Kind) {
    assert!(device.supports_dtype(DType::F32), "a device without f32");
    let mut failures = Vec::new();
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        if device.supports_dtype(dtype) {
            let on = On::new(device.clone(), dtype, kind);
            quant_matmul::conform(&on);
            step::conform(&on);
            batches::conform(&on);
            failures.extend(on.into_failures());
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
