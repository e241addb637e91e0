use burn::module::{Module, Param, ParamId};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use kernels::Layout;

use crate::{Distortion, Error, Format, Grid, Result};

/// A packed weight `[d_in, d_out]`: a frozen module, and a differentiable operand.
///
/// `w = scales (q - zeros)` on an affine grid, `w = scales (q - 2^(bits - 1))` on a symmetric one.
#[derive(Module, Debug)]
pub struct QuantTensor {
    words: Param<Tensor<3, Int>>,
    scales: Param<Tensor<2>>,
    zeros: Option<Param<Tensor<2>>>,
    #[module(skip)]
    format: Format,
    #[module(skip)]
    layout: Layout,
}

/// The numbers of a [`QuantTensor`] as files hold them.
#[derive(Clone, Debug, PartialEq)]
pub struct Parts {
    /// Words, `[word_rows, d_out]` row by row: GPTQ's `qweight`.
    pub columns: Vec<u32>,
    /// `[n_groups, d_out]`.
    pub scales: Vec<f32>,
    /// `[n_groups, d_out]` in units of a code; `None` on a grid without zeros.
    pub zeros: Option<Vec<f32>>,
}

impl QuantTensor {
    /// A packed weight `[d_in, d_out]` from its parts.
    ///
    /// # Errors
    /// [`Error::Length`] or [`Error::Zeros`] if a part does not fit the format, and
    /// [`Error::NonFinite`] if a scale or a zero is NaN or infinite.
    pub fn from_parts(
        parts: Parts,
        format: Format,
        dims: [usize; 2],
        device: &Device,
    ) -> Result<Self> {
        let layout = format.layout(dims)?;
        let n_grid = layout.n_groups() * layout.d_out();
        check_length(
            "words",
            layout.word_rows() * layout.d_out(),
            parts.columns.len(),
        )?;
        check_length("scales", n_grid, parts.scales.len())?;
        non_finite("the scales", &parts.scales, layout.d_out())?;
        let found = parts.zeros.is_some();
        if found != (format.grid() == Grid::Affine) {
            let grid = format.grid();
            return Err(Error::Zeros { grid, found });
        }
        if let Some(zeros) = &parts.zeros {
            check_length("zeros", n_grid, zeros.len())?;
            non_finite("the zeros", zeros, layout.d_out())?;
        }

        let words = kernels::columns_to_tiles(&parts.columns, &layout);
        let words = TensorData::new(words, layout.words_shape());
        let words = Tensor::from_data(words, (device, DType::U32));
        let grid = |values: Vec<f32>| {
            let values = TensorData::new(values, layout.grid_shape());
            Param::from_tensor(Tensor::from_data(values, (device, DType::F32)))
                .set_require_grad(false)
        };
        Ok(Self {
            words: Param::initialized(ParamId::new(), words),
            scales: grid(parts.scales),
            zeros: parts.zeros.map(grid),
            format,
            layout,
        })
    }

    /// The numbers of this weight, as files hold them.
    pub fn to_parts(&self) -> Parts {
        Parts {
            columns: self.columns(),
            scales: floats(self.scales()),
            zeros: self.zeros().map(floats),
        }
    }

    /// `[d_in, d_out]`.
    pub fn dims(&self) -> [usize; 2] {
        [self.layout.d_in(), self.layout.d_out()]
    }

    /// Bits, group size and grid.
    pub fn format(&self) -> Format {
        self.format
    }

    /// The shape in memory.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// The steps of the grid, `[n_groups, d_out]`.
    pub fn scales(&self) -> Tensor<2> {
        self.scales.val()
    }

    /// The zero-points in units of a code, `[n_groups, d_out]`; none on a symmetric grid.
    pub fn zeros(&self) -> Option<Tensor<2>> {
        self.zeros.as_ref().map(|zeros| zeros.val())
    }

    /// The words, `[word_rows, d_out]` row by row: GPTQ's `qweight`.
    pub fn columns(&self) -> Vec<u32> {
        kernels::tiles_to_columns(&self.words(), &self.layout)
    }

    /// The codes, `[d_in, d_out]` row by row.
    pub fn codes(&self) -> Vec<u8> {
        kernels::unpack(&self.words(), &self.layout)
    }

    fn words(&self) -> Vec<u32> {
        let words = self.words.val().into_data().try_into_vec::<u32>();
        words.expect("words are u32")
    }

    /// The same codes and zeros with other scales, `[n_groups, d_out]`, which are frozen.
    ///
    /// # Errors
    /// [`Error::NonFinite`] if a scale is NaN or infinite.
    ///
    /// # Panics
    /// If `scales` has another shape.
    pub fn with_scales(mut self, scales: Tensor<2>) -> Result<Self> {
        assert_eq!(
            scales.dims(),
            self.layout.grid_shape(),
            "the shape of the scales"
        );
        non_finite("the scales", &floats(scales.clone()), self.layout.d_out())?;
        self.scales = Param::from_tensor(scales).set_require_grad(false);
        Ok(self)
    }

    /// `x · w`, differentiable in `x`.
    ///
    /// # Shapes
    /// - `x`: `[.., d_in]`
    /// - result: `[.., d_out]`
    ///
    /// # Panics
    /// If `x` has other inputs.
    pub fn matmul<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        self.matmul_scaled(x, self.scales())
    }

    /// `x · w` with other scales, `[n_groups, d_out]`; differentiable in both.
    ///
    /// # Panics
    /// If `x` has other inputs, or `scales` another shape.
    pub fn matmul_scaled<const D: usize>(&self, x: Tensor<D>, scales: Tensor<2>) -> Tensor<D> {
        kernels::quant_matmul(x, self.words.val(), scales, self.zeros(), self.layout)
    }

    /// The dense weight, `[d_in, d_out]`.
    pub fn dequantize(&self) -> Tensor<2> {
        kernels::dequantize(self.words.val(), self.scales(), self.zeros(), self.layout)
    }

    /// How far this weight is from `weight`.
    ///
    /// # Panics
    /// If `weight` has another shape.
    pub fn distortion(&self, weight: Tensor<2>) -> Distortion {
        Distortion::between(&floats(weight), &floats(self.dequantize()))
    }

    /// Bytes of the words and of `f32` scales and zeros, without padding.
    pub fn n_bytes(&self) -> usize {
        let n_grid = self.layout.n_groups() * self.layout.d_out();
        let n_words = self.layout.word_rows() * self.layout.d_out();
        4 * (n_words + n_grid * (1 + usize::from(self.zeros.is_some())))
    }
}

/// The values of a tensor, in `f32`.
pub(crate) fn floats(t: Tensor<2>) -> Vec<f32> {
    let values = t.into_data().convert::<f32>().try_into_vec::<f32>();
    values.expect("converted to f32")
}

/// [`Error::NonFinite`] if there is a NaN or an infinity among `values`, rows of `d_out`.
pub(crate) fn non_finite(what: &'static str, values: &[f32], d_out: usize) -> Result<()> {
    match values.iter().position(|v| !v.is_finite()) {
        None => Ok(()),
        Some(at) => Err(Error::NonFinite {
            what,
            value: values[at],
            row: at / d_out,
            column: at % d_out,
            count: values.iter().filter(|v| !v.is_finite()).count(),
        }),
    }
}

fn check_length(what: &'static str, expected: usize, found: usize) -> Result<()> {
    if expected == found {
        Ok(())
    } else {
        Err(Error::Length {
            what,
            expected,
            found,
        })
    }
}
