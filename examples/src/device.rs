//! The devices that a program was compiled for.

use burn::tensor::Device;
use clap::Args;
use clap::builder::{PossibleValuesParser, ValueParser};

/// The option of a program that names its device.
#[derive(Args, Clone, Debug)]
pub struct DeviceArg {
    /// Device to compute on
    #[arg(id = "device", long, value_name = "NAME", default_value = DEVICES[0].0,
          value_parser = names())]
    pub name: String,
}

impl DeviceArg {
    /// Opens the device.
    pub fn open(&self) -> Device {
        let named = DEVICES.iter().find(|(name, _)| *name == self.name);
        let (_, open) = named.expect("checked by the parser");
        open()
    }
}

type Open = fn() -> Device;

/// The devices of the enabled features under the names of the features, the fastest kind first.
const DEVICES: &[(&str, Open)] = &[
    #[cfg(feature = "cuda")]
    ("cuda", || Device::cuda(0)),
    #[cfg(feature = "rocm")]
    ("rocm", || Device::rocm(0)),
    #[cfg(feature = "metal")]
    ("metal", || {
        Device::metal(burn::tensor::DeviceKind::DefaultDevice)
    }),
    #[cfg(feature = "vulkan")]
    ("vulkan", || {
        Device::vulkan(burn::tensor::DeviceKind::DefaultDevice)
    }),
    #[cfg(feature = "wgpu")]
    ("wgpu", || {
        Device::wgpu(burn::tensor::DeviceKind::DefaultDevice)
    }),
    #[cfg(feature = "flex")]
    ("flex", Device::flex),
];

fn names() -> ValueParser {
    PossibleValuesParser::new(DEVICES.iter().map(|(name, _)| name)).into()
}
