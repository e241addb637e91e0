//! The devices that a binary was built for.

use burn::tensor::Device;

/// A device by its name on the command line.
pub struct Named {
    /// The name, which is that of the feature.
    pub name: &'static str,
    /// Opens the device.
    pub open: fn() -> Device,
}

/// The devices of the compiled features, the fastest kind first.
pub fn devices() -> Vec<Named> {
    vec![
        #[cfg(feature = "cuda")]
        named("cuda", || Device::cuda(0)),
        #[cfg(feature = "rocm")]
        named("rocm", || Device::rocm(0)),
        #[cfg(feature = "metal")]
        named("metal", || {
            Device::metal(burn::tensor::DeviceKind::DefaultDevice)
        }),
        #[cfg(feature = "vulkan")]
        named("vulkan", || {
            Device::vulkan(burn::tensor::DeviceKind::DefaultDevice)
        }),
        #[cfg(feature = "wgpu")]
        named("wgpu", || {
            Device::wgpu(burn::tensor::DeviceKind::DefaultDevice)
        }),
        #[cfg(feature = "flex")]
        named("flex", Device::flex),
    ]
}

fn named(name: &'static str, open: fn() -> Device) -> Named {
    Named { name, open }
}
