use burn::tensor::{Int, Tensor};
use peft::Spans;

use crate::rope::Rope;

/// The positions of the tokens of a batch, as a [`Model`](crate::Model) encodes them.
#[derive(Clone, Debug)]
pub struct Positions {
    /// The first token of each token's document, `[batch, seq]`, if a sequence may have several.
    starts: Option<Tensor<2, Int>>,
    encoding: Encoding,
}

#[derive(Clone, Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "a model has one; handles are small"
)]
enum Encoding {
    /// Queries and keys are rotated.
    Rotary(Rope),
    /// Rows of a table are added to the embeddings: one for each token, `[batch or 1, seq]`.
    Learned(Tensor<2, Int>),
}

impl Positions {
    pub(crate) fn rotary(rope: Rope, spans: &Spans) -> Self {
        Self {
            starts: spans.starts(),
            encoding: Encoding::Rotary(rope),
        }
    }

    /// Positions encoded by rows of a table, `[batch or 1, seq]`.
    pub(crate) fn learned(rows: Tensor<2, Int>, spans: &Spans) -> Self {
        Self {
            starts: spans.starts(),
            encoding: Encoding::Learned(rows),
        }
    }

    /// Selects `seq` positions from `start` on, of sequences of one document each.
    pub(crate) fn narrow(&self, start: usize, seq: usize) -> Self {
        let encoding = match &self.encoding {
            Encoding::Rotary(rope) => Encoding::Rotary(rope.narrow(start, seq)),
            Encoding::Learned(rows) => Encoding::Learned(rows.clone().narrow(1, start, seq)),
        };
        Self {
            starts: None,
            encoding,
        }
    }

    pub(crate) fn starts(&self) -> Option<Tensor<2, Int>> {
        self.starts.clone()
    }

    /// Rotates queries or keys, `[batch, seq, heads, head_dim]`, if the model has rotary embeddings.
    pub(crate) fn rotate(&self, x: Tensor<4>) -> Tensor<4> {
        match &self.encoding {
            Encoding::Rotary(rope) => rope.apply(x),
            Encoding::Learned(_) => x,
        }
    }

    /// The rows of the table, `[batch or 1, seq]`, if the model has learned positions.
    pub(crate) fn rows(&self) -> Option<Tensor<2, Int>> {
        match &self.encoding {
            Encoding::Rotary(_) => None,
            Encoding::Learned(rows) => Some(rows.clone()),
        }
    }
}
