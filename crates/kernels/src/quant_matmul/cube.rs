//! CUDA, ROCm, wgpu: the composed operations.

use burn_cubecl::CubeBackend;

use super::QuantOps;

impl QuantOps for CubeBackend {}
