use burn::tensor::{Int, Tensor};
use kernels::Mask;
use peft::{Identity, Spans};

use crate::rope::{Rope, Rotary};

/// What the attention of a layer reads of the sequence.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Reach {
    /// Whether a token attends to none after it.
    pub(crate) causal: bool,
    /// The most tokens that a token attends to on a side, itself included.
    pub(crate) window: Option<usize>,
    /// The rotation of queries and keys.
    pub(crate) rotary: Option<Rotary>,
}

/// All tokens up to each, as in a decoder, without a rotation.
impl Default for Reach {
    fn default() -> Self {
        Self {
            causal: true,
            window: None,
            rotary: None,
        }
    }
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
            if !layer.causal {
                identity = identity.with_setting(format!("{prefix}is_causal"), false);
            }
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
    causal: bool,
    /// The first token that each token attends to, `[batch or 1, seq]`, if that is not the first of all.
    starts: Option<Tensor<2, Int>>,
    /// The token after the last that each token attends to, `[batch or 1, seq]`, if that is not the one after
    /// itself or the end of the sequence.
    ends: Option<Tensor<2, Int>>,
    rope: Option<Rope>,
}

impl Positions {
    pub(crate) fn new(reaches: &[Reach], rows: Option<Tensor<2, Int>>, spans: &Spans) -> Self {
        let reached = reaches.iter().map(|reach| Reached {
            causal: reach.causal,
            starts: starts(reach.window, spans),
            ends: (!reach.causal).then(|| ends(reach.window, spans)).flatten(),
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
            causal: reached.causal,
            starts: reached.starts.as_ref().map(narrow),
            ends: reached.ends.as_ref().map(narrow),
            rope: (reached.rope.as_ref()).map(|rope| rope.narrow(start, seq)),
        });
        Self {
            reaches: reaches.collect(),
            rows: self.rows.as_ref().map(narrow),
        }
    }

    /// Whether tokens attend to none after them in layers of the reach of this index.
    pub(crate) fn are_causal(&self, reach: usize) -> bool {
        self.reaches[reach].causal
    }

    /// The tokens that each token of `batch` sequences attends to in layers of the reach of this index.
    pub(crate) fn mask(&self, reach: usize, batch: usize) -> Mask {
        let reached = &self.reaches[reach];
        let of_batch = |bounds: &Tensor<2, Int>| {
            let [_, seq] = bounds.dims();
            bounds.clone().expand([batch, seq])
        };
        let mask = if reached.causal {
            Mask::causal()
        } else {
            Mask::full()
        };
        mask.with_starts(reached.starts.as_ref().map(of_batch))
            .with_ends(reached.ends.as_ref().map(of_batch))
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
    let first = of_window(window, spans, |own, window| {
        (own - (window - 1)).clamp_min(0)
    });
    inner(spans.starts(), first, Tensor::max_pair)
}

/// The token after the last that each token attends to on both sides.
fn ends(window: Option<usize>, spans: &Spans) -> Option<Tensor<2, Int>> {
    let end = of_window(window, spans, |own, window| own + window);
    inner(spans.ends(), end, Tensor::min_pair)
}

/// A bound of the window of each token, `[1, seq]`, if the window is shorter than the sequence.
fn of_window(
    window: Option<usize>,
    spans: &Spans,
    bound: impl Fn(Tensor<2, Int>, i64) -> Tensor<2, Int>,
) -> Option<Tensor<2, Int>> {
    let window = window.filter(|&window| window < spans.seq())?;
    let own = Tensor::<1, Int>::arange(0..spans.seq() as i64, spans.device()).unsqueeze::<2>();
    Some(bound(own, window as i64))
}

/// The bounds of documents, `[batch, seq]`, or those of windows, `[1, seq]`, whichever is nearer.
fn inner(
    documents: Option<Tensor<2, Int>>,
    windows: Option<Tensor<2, Int>>,
    nearer: fn(Tensor<2, Int>, Tensor<2, Int>) -> Tensor<2, Int>,
) -> Option<Tensor<2, Int>> {
    match (documents, windows) {
        (Some(documents), Some(windows)) => {
            let windows = windows.expand(documents.dims());
            Some(nearer(documents, windows))
        }
        (documents, windows) => documents.or(windows),
    }
}
