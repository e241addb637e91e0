//! The devices that a program was compiled for.

use burn::tensor::Device;
use clap::Args;
use clap::builder::{PossibleValuesParser, ValueParser};
use quant_core::{Arithmetic, UnsupportedArithmetic, set_arithmetic};

use crate::eprintln;

/// The option of a program that names its device.
#[derive(Args, Clone, Debug)]
pub struct DeviceArg {
    /// Device to compute on
    #[arg(id = "device", long, value_name = "NAME", default_value = DEVICES[0].0,
          value_parser = names())]
    pub name: String,
    /// How the CPU multiplies, if not in the fastest way: float, vnni or amx
    #[arg(long, value_name = "NAME", value_parser = arithmetic)]
    pub arithmetic: Option<Arithmetic>,
}

impl DeviceArg {
    /// Opens the device, and says which one it is unless it is the CPU.
    pub fn open(&self) -> Device {
        let named = DEVICES.iter().find(|(name, _)| *name == self.name);
        let (_, open) = named.expect("checked by the parser");
        let device = open();
        if let Some(arithmetic) = self.arithmetic {
            set_arithmetic(arithmetic).expect("checked by the parser");
        }
        if let Some(part) = part(&device) {
            eprintln!("device `{}`: {part}", self.name);
        }
        device
    }
}

/// The name of a device for itself, and what its kernels are compiled for. burn does not tell its memory.
#[cfg(any(
    feature = "cuda",
    feature = "rocm",
    feature = "metal",
    feature = "vulkan",
    feature = "wgpu"
))]
fn part(device: &Device) -> Option<String> {
    let identity = device.identity()?;
    Some(format!("{}, {}", identity.name, identity.fingerprint))
}

#[cfg(not(any(
    feature = "cuda",
    feature = "rocm",
    feature = "metal",
    feature = "vulkan",
    feature = "wgpu"
)))]
fn part(_: &Device) -> Option<String> {
    None
}

fn arithmetic(name: &str) -> Result<Arithmetic, String> {
    let arithmetic = match name {
        "float" => Arithmetic::Float,
        "vnni" => Arithmetic::Vnni,
        "amx" => Arithmetic::Amx,
        _ => return Err("expected float, vnni or amx".into()),
    };
    if arithmetic.is_supported() {
        Ok(arithmetic)
    } else {
        Err(UnsupportedArithmetic(arithmetic).to_string())
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
