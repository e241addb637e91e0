use burn::tensor::{Int, Tensor};
use peft::{Identity, Spans};

use crate::rope::{Rope, Rotary};

/// What the attention of a layer reads of the sequence.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Reach {
    /// The most tokens that a token attends to, itself included.
    pub(crate) window: Option<usize>,
    /// The rotation of queries and keys.
    pub(crate) rotary: Option<Rotary>,
}

impl Reach {
    /// What is read of texts of up to `max_len` tokens: a longer window is none.
    pub(crate) fn within(self, max_len: usize) -> Self {
        Self {
            window: self.window.filter(|&window| window < max_len),
            ..self
        }
    }

    /// States what layers read: once if they are alike.
    pub(crate) fn state(mut identity: Identity, layers: &[Self]) -> Identity {
        let is_alike = layers.iter().all(|layer| *layer == layers[0]);
        let n_stated = if is_alike { 1 } else { layers.len() };
        for (index, layer) in layers.iter().enumerate().take(n_stated) {
            let prefix = if is_alike {
                String::new()
            } else {
                format!("layers.{index}.")
            };
            if let Some(window) = layer.window {
                identity = identity.with_setting(format!("{prefix}sliding_window"), window);
            }
            if let Some(rotary) = &layer.rotary {
                identity = rotary.state(identity, &prefix);
            }
        }
        identity
    }
}

/// The positions of the tokens of a batch, as a [`Model`](crate::Model) encodes them.
#[derive(Clone, Debug)]
pub struct Positions {
    /// Those of the layers, one for each [`Reach`].
    reaches: Vec<Reached>,
    /// The row of a table for each token, `[batch or 1, seq]`, which is added to the embeddings.
    rows: Option<Tensor<2, Int>>,
}

/// The positions of the tokens as layers of one [`Reach`] read them.
#[derive(Clone, Debug)]
struct Reached {
    /// The first token that each token attends to, `[batch or 1, seq]`, if that is not the first of all.
    starts: Option<Tensor<2, Int>>,
    rope: Option<Rope>,
}

impl Positions {
    pub(crate) fn new(reaches: &[Reach], rows: Option<Tensor<2, Int>>, spans: &Spans) -> Self {
        let reached = reaches.iter().map(|reach| Reached {
            starts: starts(reach.window, spans),
            rope: (reach.rotary.as_ref()).map(|rotary| Rope::new(rotary, spans)),
        });
        Self {
            reaches: reached.collect(),
            rows,
        }
    }

    /// The same positions with another table of rotations.
    #[cfg(test)]
    pub(crate) fn with_rope(mut self, rope: Rope) -> Self {
        for reached in &mut self.reaches {
            reached.rope = Some(rope.clone());
        }
        self
    }

    /// Selects `seq` positions from `start` on, of sequences of one document each.
    pub(crate) fn narrow(&self, start: usize, seq: usize) -> Self {
        let narrow = |rows: &Tensor<2, Int>| rows.clone().narrow(1, start, seq);
        let reaches = self.reaches.iter().map(|reached| Reached {
            starts: reached.starts.as_ref().map(narrow),
            rope: (reached.rope.as_ref()).map(|rope| rope.narrow(start, seq)),
        });
        Self {
            reaches: reaches.collect(),
            rows: self.rows.as_ref().map(narrow),
        }
    }

    /// The first token that each token attends to, `[batch, seq]`, in layers of the reach of this index.
    pub(crate) fn starts(&self, reach: usize, batch: usize) -> Option<Tensor<2, Int>> {
        let starts = self.reaches[reach].starts.clone()?;
        let [_, seq] = starts.dims();
        Some(starts.expand([batch, seq]))
    }

    /// Rotates queries or keys, `[batch, seq, heads, head_dim]`, in layers of the reach of this index.
    pub(crate) fn rotate(&self, reach: usize, x: Tensor<4>) -> Tensor<4> {
        match &self.reaches[reach].rope {
            Some(rope) => rope.apply(x),
            None => x,
        }
    }

    /// The rows of the table, `[batch or 1, seq]`, if the model has learned positions.
    pub(crate) fn rows(&self) -> Option<Tensor<2, Int>> {
        self.rows.clone()
    }
}

/// The first token that each token attends to: that of its document, or of its window.
fn starts(window: Option<usize>, spans: &Spans) -> Option<Tensor<2, Int>> {
    let documents = spans.starts();
    let Some(window) = window.filter(|&window| window < spans.seq()) else {
        return documents;
    };
    let own = Tensor::<1, Int>::arange(0..spans.seq() as i64, spans.device()).unsqueeze::<2>();
    let first = (own - (window as i64 - 1)).clamp_min(0);
    Some(match documents {
        Some(documents) => {
            let [batch, seq] = documents.dims();
            documents.max_pair(first.expand([batch, seq]))
        }
        None => first,
    })
}
