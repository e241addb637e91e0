/// What can be wrong with a weight, a format or a packed tensor.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No codes of so many bits.
    #[error("codes have 2, 3, 4 or 8 bits, not {bits}")]
    Bits {
        /// The bits asked for.
        bits: usize,
    },
    /// A group of no inputs.
    #[error("group size 0; use a positive size, or none for one group per channel")]
    EmptyGroup,
    /// A group of more inputs than there are.
    #[error(
        "group size {group_size} does not fit {d_in} inputs; use 1 to {d_in}, or none for one group per channel"
    )]
    GroupSize {
        /// The inputs of a group.
        group_size: usize,
        /// The inputs of the weight.
        d_in: usize,
    },
    /// A weight without elements, or with more bits than can be counted.
    #[error("a weight of {d_in} x {d_out} cannot be packed")]
    Size {
        /// Inputs.
        d_in: usize,
        /// Outputs.
        d_out: usize,
    },
    /// NaN or infinity.
    #[error("{what} holds {value} at [{row}, {column}]; non-finite values in all: {count}")]
    NonFinite {
        /// What holds it: the weight, the scales, the zeros.
        what: &'static str,
        /// The first such value.
        value: f32,
        /// Its row, an input or a group.
        row: usize,
        /// Its column, an output.
        column: usize,
        /// How many there are.
        count: usize,
    },
    /// The values of a group span more than an `f32`, or an `f16` where that is asked for, holds.
    #[error("output {column} spans {low} to {high} in group {group}, which no scale can step")]
    Span {
        /// The group of inputs.
        group: usize,
        /// The output.
        column: usize,
        /// The smallest value.
        low: f32,
        /// The largest value.
        high: f32,
    },
    /// A part of a packed tensor that does not fit the others.
    #[error("{what}: expected {expected} values, found {found}")]
    Length {
        /// The part: words, scales, zeros, codes.
        what: &'static str,
        /// The length that the format asks for.
        expected: usize,
        /// The length given.
        found: usize,
    },
    /// A grid that has no codes of so many bits.
    #[error("there is no {grid} grid of {bits} bits; normal floats have 2, 3 or 4, FP4 has 4")]
    GridBits {
        /// The bits asked for.
        bits: usize,
        /// The grid.
        grid: crate::Grid,
    },
    /// Scales that cannot be quantized so.
    #[error(
        "{format} with {double_quant:?}: double quantization is for codebook grids, with codes of 2 to 8 bits in blocks of at least one"
    )]
    DoubleQuant {
        /// The format.
        format: crate::Format,
        /// How the scales were to be quantized.
        double_quant: crate::DoubleQuant,
    },
    /// Scales that are floats where the format has codes, or the other way round.
    #[error("the scales are not those of the format {format}")]
    Scales {
        /// The format.
        format: crate::Format,
    },
    /// The code of a scale above the last level.
    #[error("scale code {code}, but there are {n_levels} levels")]
    ScaleCode {
        /// The code.
        code: u8,
        /// Levels of a scale.
        n_levels: usize,
    },
    /// An order of inputs that is none.
    #[error("row {row} takes input {input} of {d_in}, which does not exist or was taken before")]
    InputOrder {
        /// The packed row.
        row: usize,
        /// The input.
        input: u32,
        /// Inputs of the weight.
        d_in: usize,
    },
    /// No statistics of the inputs for a quantizer that needs them.
    #[error("this quantizer needs the Gram of the layer's inputs; calibrate on some text")]
    NoGram,
    /// No drift for a quantizer that makes up for it.
    #[error("this quantizer needs the drift of the inputs; sum it with `update_with_drift`")]
    NoDrift,
    /// Statistics of nothing.
    #[error("the Gram has seen no token; calibrate on some text")]
    EmptyGram,
    /// A grid to which weights cannot be rounded.
    #[error(
        "{what} holds {value} at [{row}, {column}]; weights are rounded to positive scales and whole zeros"
    )]
    NoGrid {
        /// The scales or the zeros.
        what: &'static str,
        /// The first such value.
        value: f32,
        /// Its group.
        row: usize,
        /// Its output.
        column: usize,
    },
    /// A Gram without a Cholesky factor.
    #[error(
        "the Gram is not that of any inputs: it has no Cholesky factor; calibrate on more text"
    )]
    NotPositive,
    /// A sum of squares below zero.
    #[error("the Gram has {value} for the square of input {input}, which no inputs give")]
    NegativeMoment {
        /// The input.
        input: usize,
        /// The entry of the diagonal.
        value: f32,
    },
    /// One grid for a whole tensor with a search for its range.
    #[error(
        "a grid for the whole tensor takes the full range; search ranges of channels or groups"
    )]
    SearchPerTensor,
    /// Statistics of another layer.
    #[error("a Gram of {found} inputs for a weight of {d_in}")]
    GramSize {
        /// Inputs of the weight.
        d_in: usize,
        /// Inputs of the Gram.
        found: usize,
    },
    /// No allocation of bits.
    #[error(transparent)]
    Allocation(#[from] crate::AllocationError),
    /// A damping or a share outside of 0 to 1.
    #[error("{value} is no fraction; damping and drift are from 0 to 1")]
    Fraction {
        /// The value.
        value: f64,
    },
    /// Zeros on a grid that has none, or none on a grid that needs them.
    #[error("a {grid} grid has {} zeros", if *.found { "no" } else { "one for each scale, but there are no" })]
    Zeros {
        /// The grid.
        grid: crate::Grid,
        /// Whether there were any.
        found: bool,
    },
}

/// A result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
