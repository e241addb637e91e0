// Errors name formats and grids, whose functions return errors: the one circle between the files of
// this crate.

/// An invalid weight, format, packed tensor, Gram matrix or setting.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Codes cannot have this number of bits.
    #[error("codes have 2, 3, 4 or 8 bits, not {bits}")]
    Bits {
        /// The requested bits.
        bits: usize,
    },
    /// The group size is 0.
    #[error("group size 0; use a positive size, or none for one group per channel")]
    EmptyGroup,
    /// The group size exceeds the number of inputs.
    #[error(
        "group size {group_size} does not fit {d_in} inputs; use 1 to {d_in}, or none for one group per channel"
    )]
    GroupSize {
        /// The requested group size.
        group_size: usize,
        /// The inputs of the weight.
        d_in: usize,
    },
    /// The weight is empty, or its size in bits overflows.
    #[error("a weight of {d_in} x {d_out} is empty or too large to be packed")]
    Size {
        /// The inputs of the weight.
        d_in: usize,
        /// The outputs of the weight.
        d_out: usize,
    },
    /// A tensor holds a NaN or an infinity.
    #[error("{what} holds {value} at [{row}, {column}]; non-finite values in all: {count}")]
    NonFinite {
        /// The tensor: the weight, the scales, the zeros.
        what: &'static str,
        /// The first such value.
        value: f32,
        /// Its row, an input or a group.
        row: usize,
        /// Its column, an output.
        column: usize,
        /// The number of such values.
        count: usize,
    },
    /// The scale and the zero of a group make weights beyond the range of `f32`.
    #[error(
        "output {column} has the scale {scale} in group {group}: its weights reach {largest:e}, beyond f32"
    )]
    Overflow {
        /// The index of the group.
        group: usize,
        /// The index of the output.
        column: usize,
        /// The scale.
        scale: f32,
        /// The largest magnitude of a weight that a code can give.
        largest: f64,
    },
    /// The scale of a group exceeds the range of `f32`, or of `f16` if scales are rounded to it.
    #[error("output {column} spans {low} to {high} in group {group}, which overflows its scale")]
    Span {
        /// The index of the group.
        group: usize,
        /// The index of the output.
        column: usize,
        /// The lower end of the range.
        low: f32,
        /// The upper end of the range.
        high: f32,
    },
    /// A scale is to be rounded to `f16`, and is too large for it.
    #[error("output {column} has the scale {scale} in group {group}, which is beyond f16")]
    BeyondF16 {
        /// The scale.
        scale: f32,
        /// The index of the group.
        group: usize,
        /// The index of the output.
        column: usize,
    },
    /// A part of a packed tensor has the wrong length.
    #[error("{what}: expected {expected} values, found {found}")]
    Length {
        /// The part: words, scales, zeros, codes.
        what: &'static str,
        /// The length that the format requires.
        expected: usize,
        /// The length of the part.
        found: usize,
    },
    /// The grid does not exist with this number of bits.
    #[error("there is no {grid} grid of {bits} bits; normal floats have 2, 3 or 4, FP4 has 4")]
    GridBits {
        /// The requested bits.
        bits: usize,
        /// The grid.
        grid: crate::Grid,
    },
    /// The double quantization does not fit the format.
    #[error(
        "{format} with {double_quant}: double quantization needs a codebook grid, codes of 2 to 8 bits, and blocks of at least one scale"
    )]
    DoubleQuant {
        /// The format.
        format: crate::Format,
        /// The requested double quantization.
        double_quant: crate::DoubleQuant,
    },
    /// The scales are floats where the format requires codes, or codes where it requires floats.
    #[error("the scales do not fit the format {format}")]
    Scales {
        /// The format.
        format: crate::Format,
    },
    /// The code of a scale exceeds the last level.
    #[error("scale code {code} exceeds the last of {n_levels} levels")]
    ScaleCode {
        /// The code.
        code: u8,
        /// The number of levels.
        n_levels: usize,
    },
    /// The input order is not a permutation.
    #[error(
        "row {row} of the input order has input {input} of {d_in}, which does not exist or is repeated"
    )]
    InputOrder {
        /// The index of the packed row.
        row: usize,
        /// The index of the input.
        input: u32,
        /// The inputs of the weight.
        d_in: usize,
    },
    /// The quantizer needs a Gram matrix, and there is none.
    #[error("this quantizer needs the Gram of the layer's inputs; calibrate on some text")]
    NoGram,
    /// The quantizer compensates the drift of inputs, and the Gram matrix has none.
    #[error("this quantizer needs the drift of the inputs; sum it with `update_with_drift`")]
    NoDrift,
    /// The Gram matrix is a sum over no tokens.
    #[error("the Gram is a sum over no tokens; calibrate on some text")]
    EmptyGram,
    /// Weights cannot be rounded to the given scales and zeros.
    #[error(
        "{what} hold {value} at [{row}, {column}]; rounding needs positive scales and integer zeros"
    )]
    NoGrid {
        /// The tensor: the scales or the zeros.
        what: &'static str,
        /// The first such value.
        value: f32,
        /// Its row, a group.
        row: usize,
        /// Its column, an output.
        column: usize,
    },
    /// The Gram matrix has no Cholesky factor.
    #[error("the Gram has no Cholesky factor, as a sum over inputs would; calibrate on more text")]
    NotPositive,
    /// The diagonal of the Gram matrix has a negative entry.
    #[error(
        "the Gram has {value} as the sum of squares of input {input}, which must not be negative"
    )]
    NegativeMoment {
        /// The index of the input.
        input: usize,
        /// The entry of the diagonal.
        value: f32,
    },
    /// A search for ranges was requested with one grid for the whole tensor.
    #[error(
        "one grid for the whole tensor spans the full range; search ranges per channel or group"
    )]
    SearchPerTensor,
    /// The Gram matrix has another number of inputs than the weight.
    #[error("the Gram has {found} inputs, the weight {d_in}; use that of the same layer")]
    GramSize {
        /// The inputs of the weight.
        d_in: usize,
        /// The inputs of the Gram matrix.
        found: usize,
    },
    /// There is no allocation of bits.
    #[error(transparent)]
    Allocation(#[from] crate::AllocationError),
    /// A damping or a fraction of the drift is not between 0 and 1.
    #[error("{value} is not between 0 and 1, as damping and drift must be")]
    Fraction {
        /// The value.
        value: f64,
    },
    /// There are zeros on a grid that has none, or none on an affine grid.
    #[error("a {grid} grid has {}", if *.found { "no zeros" } else { "a zero for each scale, but there are none" })]
    Zeros {
        /// The grid.
        grid: crate::Grid,
        /// Whether there are zeros.
        found: bool,
    },
}

/// A result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
