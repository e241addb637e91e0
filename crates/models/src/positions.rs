use burn::tensor::{Int, Tensor};
use peft::Spans;

use crate::Config;
use crate::rope::Rope;

/// What a [`Model`](crate::Model) knows of the places of tokens.
#[derive(Clone, Debug)]
pub struct Positions {
    /// Where in its sequence the text of each token begins, `[batch, seq]`, if not at its start.
    starts: Option<Tensor<2, Int>>,
    encoding: Encoding,
}

#[derive(Clone, Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "a model has one; handles are small"
)]
enum Encoding {
    /// Queries and keys are turned.
    Rotary(Rope),
    /// The rows of a table are added to the embeddings: one for each token, `[batch or 1, seq]`.
    Learned(Tensor<2, Int>),
}

/// Rows of OPT's table before that of the first token.
pub(crate) const FIRST_ROW: usize = 2;

impl Positions {
    pub(crate) fn new(config: &Config, spans: &Spans) -> Self {
        let encoding = match config {
            Config::Llama(config) => Encoding::Rotary(Rope::new(config, spans)),
            Config::Opt(_) => Encoding::Learned(spans.positions() + FIRST_ROW as i64),
        };
        Self {
            starts: spans.starts(),
            encoding,
        }
    }

    /// Those of `seq` tokens of each sequence from `start` on, where each sequence is one text.
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

    /// Queries or keys, `[batch, seq, heads, head_dim]`, turned where places are told so.
    pub(crate) fn turn(&self, x: Tensor<4>) -> Tensor<4> {
        match &self.encoding {
            Encoding::Rotary(rope) => rope.apply(x),
            Encoding::Learned(_) => x,
        }
    }

    /// The rows of a table, `[batch or 1, seq]`, where places are told so.
    pub(crate) fn rows(&self) -> Option<Tensor<2, Int>> {
        match &self.encoding {
            Encoding::Rotary(_) => None,
            Encoding::Learned(rows) => Some(rows.clone()),
        }
    }
}

#[cfg(test)]
impl Positions {
    /// The same with queries and keys turned by `rope`, `[seq, head_dim]`.
    pub(crate) fn with_rope(mut self, rope: Rope, spans: &Spans) -> Self {
        self.encoding = Encoding::Rotary(rope.of_spans(spans));
        self
    }
}
