//! The type of float that a program computes in.

use burn::tensor::DType;
use clap::{Args, ValueEnum};
use models::FloatType;

/// The option of a program that names the type of its activations.
#[derive(Args, Clone, Copy, Debug)]
pub struct DtypeArg {
    /// Type of float to compute in; norms, softmax, losses and what is trained stay f32
    #[arg(id = "dtype", long, value_enum, value_name = "NAME", default_value_t = DtypeName::F32)]
    pub name: DtypeName,
}

impl DtypeArg {
    /// The type.
    pub fn float(self) -> FloatType {
        match self.name {
            DtypeName::F32 => FloatType::F32,
            DtypeName::Bf16 => FloatType::Bf16,
            DtypeName::F16 => FloatType::F16,
        }
    }
}

/// The names of the types.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DtypeName {
    /// `f32`
    F32,
    /// `bf16`
    Bf16,
    /// `f16`
    F16,
}

impl DtypeName {
    /// The name, as on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }

    /// The dtype of tensors.
    pub fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
            Self::F16 => DType::F16,
        }
    }
}
