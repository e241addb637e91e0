//! The product with a packed weight: an extension of burn's backends.

use burn::backend::{Backend, Dispatch, backend_extension, tensor::FloatTensor};
use burn::tensor::{Int, Tensor};

use crate::layout::Layout;

mod autodiff;
mod composed;
#[cfg(feature = "cubecl")]
mod cube;
#[cfg(all(feature = "flex", target_arch = "x86_64"))]
mod fixed;
#[cfg(feature = "flex")]
mod flex;
#[cfg(feature = "flex")]
mod host;
mod packed;
#[cfg(feature = "flex")]
mod simd;
#[cfg(all(test, feature = "flex"))]
mod tests;

pub use packed::Precision;
use packed::{Packed, Zeros};

/// Operations on a packed weight, composed from burn's primitive operations unless a backend
/// overrides them; `x` is `[rows, d_in]` and `dy` is `[rows, d_out]`.
#[backend_extension(
    Autodiff,
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    Cube: cfg(feature = "cubecl"),
    Fusion: cfg(feature = "cubecl")
)]
pub(crate) trait QuantOps: Backend {
    /// The dense weight, `[d_in, d_out]`.
    #[fusion(dtype = w.scales.dtype, shape = burn::tensor::Shape::new([w.layout.d_in(), w.layout.d_out()]))]
    fn quant_unpack(#[extension_type] w: Packed<Self>) -> FloatTensor<Self> {
        composed::unpack(w)
    }

    /// `x · w`, `[rows, d_out]`.
    #[fusion(dtype = x, shape = burn::tensor::Shape::new([x[0], w.layout.d_out()]))]
    fn quant_matmul(x: FloatTensor<Self>, #[extension_type] w: Packed<Self>) -> FloatTensor<Self> {
        Self::float_matmul(x, Self::quant_unpack(w))
    }

    /// The gradient of [`QuantOps::quant_matmul`] for `x`: `dy · wᵀ`, `[rows, d_in]`.
    #[fusion(dtype = dy, shape = burn::tensor::Shape::new([dy[0], w.layout.d_in()]))]
    fn quant_matmul_dx(
        dy: FloatTensor<Self>,
        #[extension_type] w: Packed<Self>,
    ) -> FloatTensor<Self> {
        Self::float_matmul(dy, Self::float_transpose(Self::quant_unpack(w)))
    }

    /// The gradients of [`QuantOps::quant_matmul`] for the scales and for the zeros.
    ///
    /// With `p = xᵀ · dy` and `i` over the inputs of group `g`:
    /// `dscales[g, o] = Σ p[i, o] (level[i, o] - zeros[g, o])`,
    /// `dzeros[g, o] = -scales[g, o] Σ p[i, o]`.
    #[fusion(meta = |_dy, _x, w| (w.scales.clone(), w.scales.clone()))]
    fn quant_matmul_dgrid(
        dy: FloatTensor<Self>,
        x: FloatTensor<Self>,
        #[extension_type] w: Packed<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        composed::dgrid(dy, x, w)
    }
}

#[cfg(feature = "ndarray")]
impl QuantOps for burn::backend::NdArray {}

/// The dense weight of a packed one, `[d_in, d_out]`.
///
/// # Panics
/// If a shape is not the layout's.
pub fn dequantize(
    words: Tensor<3, Int>,
    scales: Tensor<2>,
    zeros: Option<Tensor<2>>,
    layout: Layout,
) -> Tensor<2> {
    let packed = packed(words, scales, zeros, layout, Precision::Full);
    Tensor::from_dispatch(Dispatch::quant_unpack(packed))
}

/// `x · w` with a packed `w`, differentiable in `x`, `scales` and `zeros`.
///
/// # Shapes
/// - `x`: `[.., d_in]`
/// - `words`: [`Layout::words_shape`], dtype `U32`
/// - `scales`, `zeros`: [`Layout::grid_shape`]
/// - result: `[.., d_out]`
///
/// # Panics
/// If a shape is not the layout's.
pub fn quant_matmul<const D: usize>(
    x: Tensor<D>,
    words: Tensor<3, Int>,
    scales: Tensor<2>,
    zeros: Option<Tensor<2>>,
    layout: Layout,
    precision: Precision,
) -> Tensor<D> {
    let mut dims = x.dims();
    let d_in = dims[D - 1];
    assert_eq!(d_in, layout.d_in(), "inputs of x and of the packed weight");
    let rows = dims[..D - 1].iter().product::<usize>();
    dims[D - 1] = layout.d_out();
    let x = x.reshape([rows, d_in]).into_dispatch();
    let y = Dispatch::quant_matmul(x, packed(words, scales, zeros, layout, precision));
    Tensor::<2>::from_dispatch(y).reshape(dims)
}

fn packed(
    words: Tensor<3, Int>,
    scales: Tensor<2>,
    zeros: Option<Tensor<2>>,
    layout: Layout,
    precision: Precision,
) -> Packed<Dispatch> {
    assert_eq!(words.dims(), layout.words_shape(), "the shape of the words");
    assert_eq!(
        scales.dims(),
        layout.grid_shape(),
        "the shape of the scales"
    );
    Packed {
        words: words.into_dispatch(),
        scales: scales.into_dispatch(),
        zeros: match zeros {
            Some(zeros) => {
                assert_eq!(zeros.dims(), layout.grid_shape(), "the shape of the zeros");
                Zeros::Each(zeros.into_dispatch())
            }
            None => Zeros::Absent,
        },
        layout,
        precision,
    }
}
