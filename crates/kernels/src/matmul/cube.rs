//! CUDA, ROCm and wgpu.

use burn::backend::DType;
use burn::backend::{ops::FloatTensorOps, tensor::FloatTensor};
use burn_cubecl::{CubeBackend, tensor::CubeTensor};

use super::MatmulOps;
#[cfg(feature = "cuda")]
use super::cuda;
use crate::dtype::cast;

/// The product of two matrices of one dtype, in a dtype: with kernels of this crate where a device has them.
pub(crate) fn product(a: CubeTensor, b: CubeTensor, dtype: DType) -> CubeTensor {
    #[cfg(feature = "cuda")]
    if let Some(product) = cuda::product(&a, &b, dtype) {
        return product;
    }
    let [a, b] = [a, b].map(|t| cast::<CubeBackend>(t, dtype));
    CubeBackend::float_matmul(a, b)
}

impl MatmulOps for CubeBackend {
    fn dense_matmul(x: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        let dtype = x.dtype;
        product(x, cast::<Self>(weight, dtype), dtype)
    }

    fn dense_matmul_dx(dy: FloatTensor<Self>, weight: FloatTensor<Self>) -> FloatTensor<Self> {
        let dtype = dy.dtype;
        let weight = cast::<Self>(weight, dtype);
        product(dy, Self::float_transpose(weight), dtype)
    }

    fn dense_matmul_dweight(
        x: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        dtype: DType,
    ) -> FloatTensor<Self> {
        product(Self::float_transpose(x), dy, dtype)
    }
}
