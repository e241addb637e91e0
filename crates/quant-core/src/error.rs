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
    /// The values of a group span more than an `f32` holds.
    #[error("output {column} spans {low} to {high} in group {group}, which no f32 scale can step")]
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
