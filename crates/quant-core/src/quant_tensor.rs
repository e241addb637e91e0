use burn::module::{Module, Param};
use burn::tensor::{Device, Int, Tensor};
use kernels::{Layout, Levels, Precision};

use crate::values::{
    check_finite, check_length, floats, frozen, frozen_floats, frozen_words, words,
};
use crate::{Distortion, DoubleScaleParams, DoubleScales, Error, Format, Result};

/// A packed weight `[d_in, d_out]`, frozen, with a differentiable product.
///
/// `w = scales (q - zeros)` on an affine grid, `w = scales (q - 2^(bits - 1))` on a symmetric one,
/// `w = scales table[q]` on a codebook.
///
/// # Examples
/// ```
/// use burn::tensor::{Device, Tensor};
/// use quant_core::{Error, Format, Grid, Parts, QuantTensor, Quantizer, Rtn};
///
/// let device = Device::flex();
/// let weight = Tensor::<2>::from_data([[0.0], [0.3], [1.1], [3.0]], &device);
/// let packed = Rtn::new().with_bits(2).quantize(weight, None)?.weight;
/// let x = Tensor::<2>::from_data([[1.0, 1.0, 1.0, 2.0]], &device);
/// assert_eq!(packed.matmul(x).into_scalar::<f32>(), 7.0);
///
/// let parts = Parts { zeros: None, ..packed.to_parts() };
/// let error = QuantTensor::from_parts(parts, packed.format(), [4, 1], &device).unwrap_err();
/// assert_eq!(error, Error::Zeros { grid: Grid::Affine, found: false });
/// # Ok::<(), quant_core::Error>(())
/// ```
#[derive(Module, Debug)]
pub struct QuantTensor {
    words: Param<Tensor<3, Int>>,
    scales: ScaleParams,
    zeros: Option<Param<Tensor<2>>>,
    order: Option<InputOrder>,
    #[module(skip)]
    format: Format,
    #[module(skip)]
    layout: Layout,
    #[module(skip)]
    precision: Precision,
}

#[derive(Module, Debug)]
enum ScaleParams {
    Float(Param<Tensor<2>>),
    Double(DoubleScaleParams),
}

/// The inputs in the order in which their rows are packed.
#[derive(Module, Debug)]
struct InputOrder {
    /// The input of each row.
    inputs: Param<Tensor<1, Int>>,
    /// The row of each input.
    rows: Param<Tensor<1, Int>>,
}

/// The scales of [`Parts`].
#[derive(Clone, Debug, PartialEq)]
pub enum Scales {
    /// Floats, `[n_groups, d_out]`.
    Float(Vec<f32>),
    /// Codes, with the numbers that turn them into floats.
    Double(DoubleScales),
}

/// The values of a [`QuantTensor`], on the host.
#[derive(Clone, Debug, PartialEq)]
pub struct Parts {
    /// Packed codes in tiles, [`Layout::words_shape`]; see [`Parts::from_columns`].
    pub words: Vec<u32>,
    /// One scale for each group and output.
    pub scales: Scales,
    /// Zero-points in units of a code, `[n_groups, d_out]`; `None` unless the grid is affine.
    pub zeros: Option<Vec<f32>>,
    /// The input of each packed row, if groups are not of consecutive inputs: GPTQ's `desc_act`.
    pub input_order: Option<Vec<u32>>,
}

impl Parts {
    /// Parts with scales that are floats, and inputs in their order.
    pub fn new(words: Vec<u32>, scales: Vec<f32>, zeros: Option<Vec<f32>>) -> Self {
        Self {
            words,
            scales: Scales::Float(scales),
            zeros,
            input_order: None,
        }
    }

    /// Parts with words in the order of GPTQ's `qweight`: `[word_rows, d_out]`, row by row.
    ///
    /// # Errors
    /// [`Error::Length`] if `columns` has another length than the layout asks for.
    pub fn from_columns(
        columns: &[u32],
        layout: &Layout,
        scales: Vec<f32>,
        zeros: Option<Vec<f32>>,
    ) -> Result<Self> {
        let n_words = layout.word_rows() * layout.d_out();
        check_length("words", n_words, columns.len())?;
        let words = kernels::columns_to_tiles(columns, layout);
        Ok(Self::new(words, scales, zeros))
    }
}

impl QuantTensor {
    /// Builds a packed weight `[d_in, d_out]` from its parts.
    ///
    /// # Errors
    /// [`Error::Length`], [`Error::Zeros`], [`Error::Scales`], [`Error::ScaleCode`] or
    /// [`Error::InputOrder`] if a part does not fit the format, [`Error::NonFinite`] if a scale or a
    /// zero is NaN or infinite, [`Error::Overflow`] if a weight can be, and those of
    /// [`Format::layout`].
    pub fn from_parts(
        parts: Parts,
        format: Format,
        dims: [usize; 2],
        device: &Device,
    ) -> Result<Self> {
        let layout = format.layout(dims)?;
        let n_grid = layout.n_groups() * layout.d_out();
        let n_words = layout.words_shape().iter().product();
        check_length("words", n_words, parts.words.len())?;
        format.check_zeros(parts.zeros.is_some())?;
        if let Some(zeros) = &parts.zeros {
            check_length("zeros", n_grid, zeros.len())?;
            check_finite("the zeros", zeros, layout.d_out())?;
        }

        let grid = |values| frozen_floats(values, layout.grid_shape(), device);
        let scales = match (parts.scales, format.double_quant()) {
            (Scales::Float(scales), None) => {
                check_length("scales", n_grid, scales.len())?;
                check_finite("the scales", &scales, layout.d_out())?;
                check_range(&scales, parts.zeros.as_deref(), &layout)?;
                ScaleParams::Float(grid(scales))
            }
            (Scales::Double(scales), Some(double)) => {
                ScaleParams::Double(DoubleScaleParams::new(scales, double, n_grid, device)?)
            }
            (Scales::Float(_), Some(_)) | (Scales::Double(_), None) => {
                return Err(Error::Scales { format });
            }
        };
        let order = parts
            .input_order
            .map(|order| InputOrder::new(order, dims[0], device));
        Ok(Self {
            words: frozen_words(parts.words, layout.words_shape(), device),
            scales,
            zeros: parts.zeros.map(grid),
            order: order.transpose()?,
            format,
            layout,
            precision: Precision::default(),
        })
    }

    /// Rounds `weight`, `[d_in, d_out]`, to nearest on a uniform grid with given scales and zeros.
    ///
    /// # Shapes
    /// - `scales`, `zeros`: `[n_groups, d_out]`; no zeros on a symmetric grid
    ///
    /// # Errors
    /// [`Error::NoGrid`] if a scale is not positive or a zero is not an integer; [`Error::Scales`] if
    /// the grid of `format` is a codebook; [`Error::NonFinite`], [`Error::Zeros`], and those of
    /// [`Format::layout`].
    ///
    /// # Panics
    /// If `scales` or `zeros` have another shape.
    pub fn on_grid(
        weight: Tensor<2>,
        format: Format,
        scales: Tensor<2>,
        zeros: Option<Tensor<2>>,
    ) -> Result<Self> {
        let (dims, device) = (weight.dims(), weight.device());
        let layout = format.layout(dims)?;
        format.check_zeros(zeros.is_some())?;
        if format.grid().is_codebook() {
            return Err(Error::Scales { format });
        }
        assert_eq!(scales.dims(), layout.grid_shape(), "the shape of scales");
        let (scales, zeros) = (floats(scales), zeros.map(floats));
        let refused = |what, values: &[f32], fits: fn(f32) -> bool| {
            let at = values.iter().position(|&value| !fits(value));
            at.map_or(Ok(()), |at| {
                Err(Error::NoGrid {
                    what,
                    value: values[at],
                    row: at / layout.d_out(),
                    column: at % layout.d_out(),
                })
            })
        };
        refused("the scales", &scales, |scale| scale > 0.0)?;
        refused("the zeros", zeros.as_deref().unwrap_or_default(), |zero| {
            zero.fract() == 0.0
        })?;
        let words = kernels::with_values(weight, |weight| -> Result<_> {
            check_finite("the weight", weight, layout.d_out())?;
            Ok(kernels::encode(weight, &scales, zeros.as_deref(), &layout))
        })?;
        Self::from_parts(Parts::new(words, scales, zeros), format, dims, &device)
    }

    /// The values of this weight, read from its device.
    pub fn to_parts(&self) -> Parts {
        Parts {
            words: words(self.words.val()),
            scales: match &self.scales {
                ScaleParams::Float(scales) => Scales::Float(floats(scales.val())),
                ScaleParams::Double(double) => Scales::Double(double.to_host()),
            },
            zeros: self.zeros().map(floats),
            input_order: self.input_order(),
        }
    }

    /// The shape of the dense weight, `[d_in, d_out]`.
    pub fn dims(&self) -> [usize; 2] {
        [self.layout.d_in(), self.layout.d_out()]
    }

    /// The bits, group size, grid and kind of scales.
    pub fn format(&self) -> Format {
        self.format
    }

    /// The memory layout of the packed codes.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// The scales, `[n_groups, d_out]`; computed on the device if they are double-quantized.
    pub fn scales(&self) -> Tensor<2> {
        match &self.scales {
            ScaleParams::Float(scales) => scales.val(),
            ScaleParams::Double(double) => double.dequantize(self.layout.grid_shape()),
        }
    }

    /// The device of the weight.
    pub fn device(&self) -> Device {
        match &self.scales {
            ScaleParams::Float(scales) => scales.val().device(),
            ScaleParams::Double(double) => double.device(),
        }
    }

    /// The double-quantized scales, if the format has them.
    pub fn double_scales(&self) -> Option<&DoubleScaleParams> {
        match &self.scales {
            ScaleParams::Float(_) => None,
            ScaleParams::Double(double) => Some(double),
        }
    }

    /// The zero-points in units of a code, `[n_groups, d_out]`; `None` unless the grid is affine.
    pub fn zeros(&self) -> Option<Tensor<2>> {
        self.zeros.as_ref().map(|zeros| zeros.val())
    }

    /// The input of each packed row; `None` if inputs are packed in their order.
    pub fn input_order(&self) -> Option<Vec<u32>> {
        let order = self.order.as_ref()?;
        Some(words(order.inputs.val()))
    }

    /// The packed words in the order of GPTQ's `qweight`: `[word_rows, d_out]`, row by row.
    pub fn columns(&self) -> Vec<u32> {
        kernels::tiles_to_columns(&words(self.words.val()), &self.layout)
    }

    /// The codes, `[d_in, d_out]`, row by row, with inputs in their order.
    pub fn codes(&self) -> Vec<u8> {
        let codes = kernels::unpack(&words(self.words.val()), &self.layout);
        let Some(order) = self.input_order() else {
            return codes;
        };
        let d_out = self.layout.d_out();
        let mut by_input = vec![0; codes.len()];
        for (row, input) in codes.chunks_exact(d_out).zip(order) {
            by_input[input as usize * d_out..][..d_out].copy_from_slice(row);
        }
        by_input
    }

    /// Replaces the scales and the zeros, and keeps the codes. Double-quantized scales become floats.
    ///
    /// # Shapes
    /// - `scales`, `zeros`: `[n_groups, d_out]`; zeros if and only if the grid is affine
    ///
    /// # Errors
    /// [`Error::NonFinite`] if a scale or a zero is NaN or infinite, [`Error::Overflow`] if a weight
    /// can be; [`Error::Zeros`] if zeros are given for a grid that has none, or missing for an affine
    /// one.
    ///
    /// # Panics
    /// If `scales` or `zeros` have another shape.
    pub fn with_grid(mut self, scales: Tensor<2>, zeros: Option<Tensor<2>>) -> Result<Self> {
        self.format.check_zeros(zeros.is_some())?;
        let d_out = self.layout.d_out();
        let checked = |what, values: &Tensor<2>| {
            assert_eq!(
                values.dims(),
                self.layout.grid_shape(),
                "the shape of {what}"
            );
            let values = floats(values.clone());
            check_finite(what, &values, d_out).map(|()| values)
        };
        let of_scales = checked("the scales", &scales)?;
        let of_zeros = zeros.as_ref().map(|zeros| checked("the zeros", zeros));
        check_range(&of_scales, of_zeros.transpose()?.as_deref(), &self.layout)?;
        self.scales = ScaleParams::Float(frozen(scales));
        self.zeros = zeros.map(frozen);
        self.format = self.format.without_double_quant();
        Ok(self)
    }

    /// The precision of products, forward and backward. It is not saved with the weight.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Sets the precision of products.
    pub fn with_precision(mut self, precision: Precision) -> Self {
        self.precision = precision;
        self
    }

    /// Returns `x · w`, differentiable in `x`.
    ///
    /// # Shapes
    /// - `x`: `[.., d_in]`
    /// - result: `[.., d_out]`
    ///
    /// # Panics
    /// If the last dimension of `x` is not `d_in`.
    pub fn matmul<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        self.matmul_on_grid(x, self.scales(), self.zeros())
    }

    /// Returns `x · w` with given scales and zeros, differentiable in `x`, `scales` and `zeros`.
    ///
    /// # Shapes
    /// - `x`: `[.., d_in]`
    /// - `scales`, `zeros`: `[n_groups, d_out]`; zeros if and only if the grid is affine
    /// - result: `[.., d_out]`
    ///
    /// # Panics
    /// If a tensor has another shape, or zeros are given for a grid that has none, or missing for an
    /// affine one.
    pub fn matmul_on_grid<const D: usize>(
        &self,
        x: Tensor<D>,
        scales: Tensor<2>,
        zeros: Option<Tensor<2>>,
    ) -> Tensor<D> {
        let x = match &self.order {
            Some(order) => x.select(D - 1, order.inputs.val()),
            None => x,
        };
        kernels::quant_matmul(
            x,
            self.words.val(),
            scales,
            zeros,
            self.layout,
            self.precision,
        )
    }

    /// The dense weight, `[d_in, d_out]`.
    pub fn dequantize(&self) -> Tensor<2> {
        let (scales, zeros) = (self.scales(), self.zeros());
        let weight = kernels::dequantize(self.words.val(), scales, zeros, self.layout);
        match &self.order {
            Some(order) => weight.select(0, order.rows.val()),
            None => weight,
        }
    }

    /// The distance between this weight and the dense `weight`.
    ///
    /// # Panics
    /// If `weight` has another shape.
    pub fn distortion(&self, weight: Tensor<2>) -> Distortion {
        kernels::with_values(weight, |weight| {
            kernels::with_values(self.dequantize(), |found| {
                Distortion::between(weight, found)
            })
        })
    }

    /// The bytes of this weight without padding: [`Format::n_bytes`], and two indices for each input
    /// if it has an order of inputs.
    pub fn n_bytes(&self) -> usize {
        let order = 8 * self.order.as_ref().map_or(0, |_| self.layout.d_in());
        let n_bytes = self.format.n_bytes(self.dims());
        n_bytes.expect("the format has its layout") as usize + order
    }
}

/// Checks that no code gives a weight beyond the range of `f32`. Scales that are codes need no check:
/// they are of codebooks, whose levels are at most 1.
///
/// # Errors
/// [`Error::Overflow`].
fn check_range(scales: &[f32], zeros: Option<&[f32]>, layout: &Layout) -> Result<()> {
    let codes = match layout.levels() {
        Levels::Table(_) => return Ok(()),
        Levels::Unsigned | Levels::Centered => [0, ((1 << layout.bits()) - 1) as u8],
    };
    let [low, high] = codes.map(|code| layout.level(code));
    for (at, &scale) in scales.iter().enumerate() {
        let zero = zeros.map_or(0.0, |zeros| zeros[at]);
        let level = (low - zero).abs().max((high - zero).abs());
        if !(scale * level).is_finite() {
            return Err(Error::Overflow {
                group: at / layout.d_out(),
                column: at % layout.d_out(),
                scale,
                largest: f64::from(scale).abs() * f64::from(level),
            });
        }
    }
    Ok(())
}

impl InputOrder {
    fn new(inputs: Vec<u32>, d_in: usize, device: &Device) -> Result<Self> {
        check_length("input order", d_in, inputs.len())?;
        let mut rows = vec![u32::MAX; d_in];
        for (row, &input) in inputs.iter().enumerate() {
            match rows.get_mut(input as usize) {
                Some(place) if *place == u32::MAX => *place = row as u32,
                _ => return Err(Error::InputOrder { row, input, d_in }),
            }
        }
        Ok(Self {
            inputs: frozen_words(inputs, [d_in], device),
            rows: frozen_words(rows, [d_in], device),
        })
    }
}
