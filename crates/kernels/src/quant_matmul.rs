//! The product with a packed weight: an extension of burn's backends.

use burn::backend::{Backend, Dispatch, backend_extension, tensor::FloatTensor};
use burn::tensor::{DType, Int, Tensor};

use crate::dtype::assert_same;
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

/// Operations on a packed weight, composed from burn's primitive operations unless overridden.
///
/// `x` is `[rows, d_in]` and `dy` is `[rows, d_out]`.
#[backend_extension(
    Autodiff,
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    Cube: cfg(feature = "cubecl"),
    Fusion: cfg(feature = "fusion")
)]
pub(crate) trait QuantOps: Backend {
    /// The dense weight, `[d_in, d_out]`.
    #[fusion(dtype = w.scales.dtype, shape = burn::tensor::Shape::new([w.layout.d_in(), w.layout.d_out()]))]
    fn quant_unpack(#[extension_type] w: Packed<Self>) -> FloatTensor<Self> {
        composed::unpack(w)
    }

    /// `x · w`, `[rows, d_out]`, in the dtype of `x`.
    #[fusion(dtype = x, shape = burn::tensor::Shape::new([x[0], w.layout.d_out()]))]
    fn quant_matmul(x: FloatTensor<Self>, #[extension_type] w: Packed<Self>) -> FloatTensor<Self> {
        composed::matmul(x, w)
    }

    /// The gradient of [`QuantOps::quant_matmul`] for `x`, `dy · wᵀ`: `[rows, d_in]`.
    #[fusion(dtype = dy, shape = burn::tensor::Shape::new([dy[0], w.layout.d_in()]))]
    fn quant_matmul_dx(
        dy: FloatTensor<Self>,
        #[extension_type] w: Packed<Self>,
    ) -> FloatTensor<Self> {
        composed::dx(dy, w)
    }

    /// The gradients of [`QuantOps::quant_matmul`] for the scales and the zeros: `[n_groups, d_out]`, in
    /// their dtype.
    ///
    /// With `p = xᵀ · dy` and sums over the inputs `i` of group `g`:
    /// `dscales[g, o] = Σ p[i, o] (level[i, o] - zeros[g, o])` and
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

/// Unpacks a packed weight into a dense one, differentiable in `scales` and `zeros`.
///
/// # Shapes
/// - `words`: [`Layout::words_shape`], dtype `U32`
/// - `scales`, `zeros`: [`Layout::grid_shape`], of one dtype
/// - result: `[d_in, d_out]`, in the dtype of the scales
///
/// # Panics
/// If a shape is not the layout's, the dtype of the words is not `U32`, or those of scales and zeros
/// differ.
///
/// # Examples
/// ```
/// use burn::tensor::{DType, Device, Int, Tensor, TensorData};
/// use kernels::{Layout, Levels, dequantize, pack};
///
/// let device = Device::flex();
/// let layout = Layout::new(2, 2, 4, 2, Levels::Centered);
/// let words = TensorData::new(pack(&[8, 9, 7, 15], &layout), layout.words_shape());
/// let words = Tensor::<3, Int>::from_data(words, (&device, DType::U32));
/// let scales = Tensor::<2>::from_data([[0.5, 2.0]], &device);
/// let weight = dequantize(words, scales, None, layout);
/// assert_eq!(weight.into_data().try_to_vec::<f32>().unwrap(), [0.0, 2.0, -0.5, 14.0]);
/// ```
pub fn dequantize(
    words: Tensor<3, Int>,
    scales: Tensor<2>,
    zeros: Option<Tensor<2>>,
    layout: Layout,
) -> Tensor<2> {
    let packed = packed(words, scales, zeros, layout, Precision::Full);
    Tensor::from_dispatch(Dispatch::quant_unpack(packed))
}

/// Multiplies by a packed weight: `x · w`, differentiable in `x`, `scales` and `zeros`.
///
/// Backward unpacks the weight again, so no dense weight is kept for it. The grid may be of another
/// dtype than `x`.
///
/// # Shapes
/// - `x`: `[.., d_in]`
/// - `words`: [`Layout::words_shape`], dtype `U32`
/// - `scales`, `zeros`: [`Layout::grid_shape`], of one dtype
/// - result: `[.., d_out]`, in the dtype of `x`
///
/// # Panics
/// If a shape is not the layout's, the dtype of the words is not `U32`, or those of scales and zeros
/// differ.
///
/// # Examples
/// ```
/// use burn::tensor::{DType, Device, Int, Tensor, TensorData};
/// use kernels::{Layout, Levels, Precision, pack, quant_matmul};
///
/// let device = Device::flex();
/// // Four inputs in groups of two, one output, 4-bit codes.
/// let layout = Layout::new(4, 1, 4, 2, Levels::Unsigned);
/// let words = TensorData::new(pack(&[1, 2, 3, 4], &layout), layout.words_shape());
/// let words = Tensor::<3, Int>::from_data(words, (&device, DType::U32));
/// let scales = Tensor::<2>::from_data([[1.0], [10.0]], &device);
/// let zeros = Tensor::<2>::from_data([[0.0], [3.0]], &device);
/// let x = Tensor::<2>::ones([1, 4], &device);
/// let y = quant_matmul(x, words, scales, Some(zeros), layout, Precision::Full);
/// assert_eq!(y.into_scalar::<f32>(), 1.0 + 2.0 + 0.0 + 10.0);
/// ```
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
    assert_eq!(
        d_in,
        layout.d_in(),
        "the inputs of x and of the packed weight"
    );
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
    assert_eq!(words.dtype(), DType::U32, "the dtype of the words");
    assert_eq!(
        scales.dims(),
        layout.grid_shape(),
        "the shape of the scales"
    );
    let dtype = scales.dtype();
    Packed {
        words: words.into_dispatch(),
        scales: scales.into_dispatch(),
        zeros: match zeros {
            Some(zeros) => {
                assert_eq!(zeros.dims(), layout.grid_shape(), "the shape of the zeros");
                assert_same("zeros", zeros.dtype(), "scales", dtype);
                Zeros::Each(zeros.into_dispatch())
            }
            None => Zeros::Absent,
        },
        layout,
        precision,
    }
}
