//! CUDA, ROCm and wgpu.

use burn::backend::DType;
use burn::backend::{ops::FloatTensorOps, tensor::FloatTensor};
use burn_cubecl::{
    CubeBackend,
    kernel::matmul::{MatmulStrategy, matmul},
    tensor::CubeTensor,
};

use super::MatmulOps;
#[cfg(feature = "cuda")]
use super::cuda;
use crate::cube::empty;
use crate::dtype::{cast, widened};

/// The product of two matrices of one dtype, in a dtype: with kernels of this crate where a device has them.
/// Where it is of another dtype than they are, its sums are rounded once.
pub(crate) fn product(a: CubeTensor, b: CubeTensor, dtype: DType) -> CubeTensor {
    #[cfg(feature = "cuda")]
    if let Some(product) = cuda::product(&a, &b, dtype) {
        return product;
    }
    if a.dtype == dtype {
        return device_product(a, b);
    }
    let [a, b] = [a, b].map(widened::<CubeBackend>);
    cast::<CubeBackend>(device_product(a, b), dtype)
}

/// The products of matrices, `[.., m, k]` and `[.., k, n]`, of one dtype, with CubeCL's kernels. The rows of the
/// result are not padded as CubeCL pads them on CUDA: what reads it would copy it first.
pub(crate) fn device_product(a: CubeTensor, b: CubeTensor) -> CubeTensor {
    debug_assert_eq!(a.dtype, b.dtype, "the dtypes of the factors");
    let mut shape = a.meta.shape().clone();
    let last = shape.num_dims() - 1;
    shape[last] = b.meta.shape()[last];
    let (product, dtype) = (empty(&a, shape, a.dtype), a.dtype);
    let product = matmul(a, b, Some(product), MatmulStrategy::default(), dtype);
    product.expect("one of CubeCL's kernels multiplies any matrices")
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
