//! The devices that a binary was built for.

use burn::tensor::Device;

/// The devices of the compiled features by name, the fastest kind first.
pub fn devices() -> Vec<(&'static str, fn() -> Device)> {
    let mut all: Vec<(&'static str, fn() -> Device)> = Vec::new();
    #[cfg(feature = "cuda")]
    all.push(("cuda", || Device::cuda(0)));
    #[cfg(feature = "rocm")]
    all.push(("rocm", || Device::rocm(0)));
    #[cfg(feature = "metal")]
    all.push(("metal", || {
        Device::metal(burn::tensor::DeviceKind::DefaultDevice)
    }));
    #[cfg(feature = "vulkan")]
    all.push(("vulkan", || {
        Device::vulkan(burn::tensor::DeviceKind::DefaultDevice)
    }));
    #[cfg(feature = "wgpu")]
    all.push(("wgpu", || {
        Device::wgpu(burn::tensor::DeviceKind::DefaultDevice)
    }));
    #[cfg(feature = "flex")]
    all.push(("flex", Device::flex));
    all
}
