use burn::module::{Module, Param, ParamId};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use kernels::{Layout, Precision};

use crate::double_quant::{DoubleScales, scale_levels};
use crate::{Distortion, DoubleQuant, Error, Format, Grid, Result};

/// A packed weight `[d_in, d_out]`: a frozen module, and a differentiable operand.
///
/// `w = scales (q - zeros)` on an affine grid, `w = scales (q - 2^(bits - 1))` on a symmetric one,
/// `w = scales table[q]` on a codebook.
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
    Double(DoubleParams),
}

#[derive(Module, Debug)]
struct DoubleParams {
    /// Four codes in a word.
    codes: Param<Tensor<1, Int>>,
    absmax: Param<Tensor<1>>,
    offset: Param<Tensor<1>>,
    #[module(skip)]
    format: DoubleQuant,
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
    /// `[n_groups, d_out]`.
    Float(Vec<f32>),
    /// Codes of scales.
    Double(DoubleScales),
}

/// The numbers of a [`QuantTensor`].
#[derive(Clone, Debug, PartialEq)]
pub struct Parts {
    /// Words in tiles, [`Layout::words_shape`]; see [`Parts::from_columns`].
    pub words: Vec<u32>,
    /// One for each group and output.
    pub scales: Scales,
    /// `[n_groups, d_out]` in units of a code; `None` on a grid without zeros.
    pub zeros: Option<Vec<f32>>,
    /// The input of each packed row, where the groups do not take the inputs as they come: GPTQ's
    /// `desc_act`.
    pub input_order: Option<Vec<u32>>,
}

impl Parts {
    /// With scales that are floats and inputs in their order.
    pub fn new(words: Vec<u32>, scales: Vec<f32>, zeros: Option<Vec<f32>>) -> Self {
        Self {
            words,
            scales: Scales::Float(scales),
            zeros,
            input_order: None,
        }
    }

    /// With words as files hold them, `[word_rows, d_out]` row by row: GPTQ's `qweight`.
    ///
    /// # Errors
    /// [`Error::Length`] if there are not as many as the layout has.
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
    /// A packed weight `[d_in, d_out]` from its parts.
    ///
    /// # Errors
    /// [`Error::Length`], [`Error::Zeros`], [`Error::Scales`], [`Error::ScaleCode`] or
    /// [`Error::InputOrder`] if a part does not fit the format, [`Error::NonFinite`] if a scale or a
    /// zero is NaN or infinite, and those of [`Format::layout`].
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
        let found = parts.zeros.is_some();
        if found != (format.grid() == Grid::Affine) {
            let grid = format.grid();
            return Err(Error::Zeros { grid, found });
        }
        if let Some(zeros) = &parts.zeros {
            check_length("zeros", n_grid, zeros.len())?;
            check_finite("the zeros", zeros, layout.d_out())?;
        }

        let grid = |values: Vec<f32>| {
            let values = TensorData::new(values, layout.grid_shape());
            frozen(Tensor::from_data(values, (device, DType::F32)))
        };
        let scales = match (parts.scales, format.double_quant()) {
            (Scales::Float(scales), None) => {
                check_length("scales", n_grid, scales.len())?;
                check_finite("the scales", &scales, layout.d_out())?;
                ScaleParams::Float(grid(scales))
            }
            (Scales::Double(scales), Some(double)) => {
                ScaleParams::Double(DoubleParams::new(scales, double, n_grid, device)?)
            }
            (Scales::Float(_), Some(_)) | (Scales::Double(_), None) => {
                return Err(Error::Scales { format });
            }
        };
        let order = parts
            .input_order
            .map(|order| InputOrder::new(order, dims[0], device));
        let words = TensorData::new(parts.words, layout.words_shape());
        let words = Tensor::from_data(words, (device, DType::U32));
        Ok(Self {
            words: Param::initialized(ParamId::new(), words),
            scales,
            zeros: parts.zeros.map(grid),
            order: order.transpose()?,
            format,
            layout,
            precision: Precision::default(),
        })
    }

    /// `weight`, `[d_in, d_out]`, rounded to the nearest codes of a uniform grid that was found elsewhere.
    ///
    /// # Shapes
    /// - `scales`, `zeros`: `[n_groups, d_out]`; no zeros on a symmetric grid
    ///
    /// # Errors
    /// [`Error::NoGrid`] with a scale that is not positive or a zero that is a fraction,
    /// [`Error::NonFinite`], [`Error::Zeros`], [`Error::Scales`] for a format of codebooks, and those of
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
        let grid = format.grid();
        if zeros.is_some() != (grid == Grid::Affine) {
            let found = zeros.is_some();
            return Err(Error::Zeros { grid, found });
        }
        if !matches!(grid, Grid::Affine | Grid::Symmetric) {
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

    /// The numbers of this weight.
    pub fn to_parts(&self) -> Parts {
        Parts {
            words: self.words(),
            scales: match &self.scales {
                ScaleParams::Float(scales) => Scales::Float(floats(scales.val())),
                ScaleParams::Double(double) => Scales::Double(double.to_host(&self.layout)),
            },
            zeros: self.zeros().map(floats),
            input_order: self.input_order(),
        }
    }

    /// `[d_in, d_out]`.
    pub fn dims(&self) -> [usize; 2] {
        [self.layout.d_in(), self.layout.d_out()]
    }

    /// Bits, group size, grid and scales.
    pub fn format(&self) -> Format {
        self.format
    }

    /// The shape in memory.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// The steps of the grid, `[n_groups, d_out]`; computed where they are double-quantized.
    pub fn scales(&self) -> Tensor<2> {
        match &self.scales {
            ScaleParams::Float(scales) => scales.val(),
            ScaleParams::Double(double) => double.dequantize(self.layout.grid_shape()),
        }
    }

    /// The zero-points in units of a code, `[n_groups, d_out]`; only on an affine grid.
    pub fn zeros(&self) -> Option<Tensor<2>> {
        self.zeros.as_ref().map(|zeros| zeros.val())
    }

    /// The input of each packed row; none where they come in their order.
    pub fn input_order(&self) -> Option<Vec<u32>> {
        let order = self.order.as_ref()?.inputs.val().into_data();
        let order = order.convert::<u32>().try_into_vec::<u32>();
        Some(order.expect("converted to u32"))
    }

    /// The words as files hold them, `[word_rows, d_out]` row by row: GPTQ's `qweight`, rows in the
    /// order in which they are packed.
    pub fn columns(&self) -> Vec<u32> {
        kernels::tiles_to_columns(&self.words(), &self.layout)
    }

    /// The codes, `[d_in, d_out]` row by row, input by input.
    pub fn codes(&self) -> Vec<u8> {
        let codes = kernels::unpack(&self.words(), &self.layout);
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

    fn words(&self) -> Vec<u32> {
        let words = self.words.val().into_data().try_into_vec::<u32>();
        words.expect("words are u32")
    }

    /// The same codes on another grid: scales `[n_groups, d_out]`, and zeros of the same shape where
    /// the format has them. Both are frozen floats from then on.
    ///
    /// # Errors
    /// [`Error::NonFinite`] if a scale or a zero is NaN or infinite, [`Error::Zeros`] if there are
    /// zeros on a grid that has none, or none on one that has.
    ///
    /// # Panics
    /// If `scales` or `zeros` have another shape.
    pub fn with_grid(mut self, scales: Tensor<2>, zeros: Option<Tensor<2>>) -> Result<Self> {
        let (grid, found) = (self.format.grid(), zeros.is_some());
        if found != (grid == Grid::Affine) {
            return Err(Error::Zeros { grid, found });
        }
        let d_out = self.layout.d_out();
        let check = |what, values: &Tensor<2>| {
            assert_eq!(
                values.dims(),
                self.layout.grid_shape(),
                "the shape of {what}"
            );
            check_finite(what, &floats(values.clone()), d_out)
        };
        check("the scales", &scales)?;
        if let Some(zeros) = &zeros {
            check("the zeros", zeros)?;
        }
        self.scales = ScaleParams::Float(frozen(scales));
        self.zeros = zeros.map(frozen);
        self.format = self.format.without_double_quant();
        Ok(self)
    }

    /// How accurate its products are, forward and backward. Not part of the weight: no file has it.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// With products of this precision.
    pub fn with_precision(mut self, precision: Precision) -> Self {
        self.precision = precision;
        self
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
        self.matmul_on_grid(x, self.scales(), self.zeros())
    }

    /// `x · w` with the same codes on another grid; differentiable in `x`, `scales` and `zeros`.
    ///
    /// # Shapes
    /// - `x`: `[.., d_in]`
    /// - `scales`, `zeros`: `[n_groups, d_out]`; no zeros on a grid that has none
    /// - result: `[.., d_out]`
    ///
    /// # Panics
    /// If `x` has other inputs, `scales` or `zeros` another shape, or there are zeros where the
    /// format has none, or none where it has.
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

    /// How far this weight is from `weight`.
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

    /// Bytes of this weight without padding: see [`Format::n_bytes`]; an order of inputs adds two
    /// indices for each.
    pub fn n_bytes(&self) -> usize {
        let order = 8 * self.order.as_ref().map_or(0, |_| self.layout.d_in());
        let n_bytes = self.format.n_bytes(self.dims());
        n_bytes.expect("the format has its layout") as usize + order
    }
}

impl DoubleParams {
    fn new(scales: DoubleScales, format: DoubleQuant, n: usize, device: &Device) -> Result<Self> {
        let n_blocks = n.div_ceil(format.block_size);
        check_length("scale codes", n, scales.codes.len())?;
        check_length("absmax", n_blocks, scales.absmax.len())?;
        check_finite("the absmax of the scales", &scales.absmax, 1)?;
        check_finite("the offset of the scales", &[scales.offset], 1)?;
        let n_levels = scale_levels(format.levels).len();
        if let Some(&code) = scales.codes.iter().find(|&&c| usize::from(c) >= n_levels) {
            return Err(Error::ScaleCode { code, n_levels });
        }
        check_finite("the scales", &scales.dequantize(1, format), 1)?;
        let mut bytes = scales.codes;
        bytes.resize(n.next_multiple_of(4), 0);
        let (words, _) = bytes.as_chunks::<4>();
        let words: Vec<u32> = words.iter().map(|&word| u32::from_le_bytes(word)).collect();
        let codes = TensorData::new(words, [n.div_ceil(4)]);
        let floats = |values: Vec<f32>| {
            let shape = [values.len()];
            let values = TensorData::new(values, shape);
            frozen(Tensor::from_data(values, (device, DType::F32)))
        };
        Ok(Self {
            codes: Param::initialized(
                ParamId::new(),
                Tensor::from_data(codes, (device, DType::U32)),
            ),
            absmax: floats(scales.absmax),
            offset: floats(vec![scales.offset]),
            format,
        })
    }

    fn to_host(&self, layout: &Layout) -> DoubleScales {
        let words = self.codes.val().into_data().try_into_vec::<u32>();
        let words = words.expect("words are u32");
        let mut codes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        codes.truncate(layout.n_groups() * layout.d_out());
        DoubleScales {
            codes,
            absmax: floats(self.absmax.val()),
            offset: floats(self.offset.val())[0],
        }
    }

    fn dequantize(&self, [n_groups, d_out]: [usize; 2]) -> Tensor<2> {
        let n = n_groups * d_out;
        let device = self.absmax.val().device();
        let shifts =
            Tensor::<1, Int>::from_data(TensorData::from([0u32, 8, 16, 24]), (&device, DType::U32));
        let n_words = n.div_ceil(4);
        let words = self.codes.val().reshape([n_words, 1]).expand([n_words, 4]);
        let codes = words
            .bitwise_right_shift(shifts.reshape([1, 4]).expand([n_words, 4]))
            .bitwise_and_scalar(255)
            .reshape([4 * n_words])
            .narrow(0, 0, n);
        let table = scale_levels(self.format.levels);
        let n_levels = table.len();
        let table = Tensor::<1>::from_data(TensorData::new(table, [n_levels]), &device);
        let levels = table.select(0, codes);

        let block = self.format.block_size;
        let n_blocks = n.div_ceil(block);
        let absmax = self.absmax.val().reshape([n_blocks, 1]);
        let absmax = absmax.expand([n_blocks, block.min(n)]);
        let absmax = absmax.reshape([n_blocks * block.min(n)]).narrow(0, 0, n);
        let scales = levels * absmax + self.offset.val();
        scales.reshape([d_out, n_groups]).transpose()
    }
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
        let indices = |values: Vec<u32>| {
            let values = TensorData::new(values, [d_in]);
            let values = Tensor::from_data(values, (device, DType::U32));
            Param::initialized(ParamId::new(), values)
        };
        Ok(Self {
            inputs: indices(inputs),
            rows: indices(rows),
        })
    }
}

fn frozen<const D: usize>(values: Tensor<D>) -> Param<Tensor<D>> {
    Param::from_tensor(values).set_require_grad(false)
}

/// The values of a tensor, in `f32`.
pub(crate) fn floats<const D: usize>(t: Tensor<D>) -> Vec<f32> {
    let values = t.into_data().convert::<f32>().try_into_vec::<f32>();
    values.expect("converted to f32")
}

/// Checks `values`, rows of `d_out`, for what is not a number.
///
/// # Errors
/// [`Error::NonFinite`] if there is a NaN or an infinity.
pub fn check_finite(what: &'static str, values: &[f32], d_out: usize) -> Result<()> {
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
