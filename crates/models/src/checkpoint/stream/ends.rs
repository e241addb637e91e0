//! The parts of a model before its first block and after its last one, which are copied.

use peft::{LayerReport, Weight};
use quant_core::Quantizer;
use tensor_files::LazyTensor;

use super::super::load::Checkpoint;
use crate::Result;
use crate::config::Config;
use crate::norm::Norm;
use crate::source::{HEAD, Source, Vector, weight_name};

/// The tensors of a part, and the weights among them that may be packed.
#[derive(Default)]
pub(super) struct End {
    /// Tensors that are copied from file to file.
    pub(super) copies: Vec<(String, LazyTensor<'static>)>,
    /// Weights that are packed, with their paths.
    pub(super) packed: Vec<(String, Weight)>,
    /// The paths and the dimensions of projections that stay dense.
    pub(super) dense: Vec<(String, [usize; 2])>,
    /// The report of the head, if it was quantized here.
    pub(super) head: Option<LayerReport>,
}

impl End {
    /// The embeddings, and the projection behind them.
    pub(super) fn first(config: &Config, checkpoint: &mut Checkpoint) -> Result<Self> {
        let shape = config.shape();
        let (hidden, width) = (shape.hidden_size, shape.embedding_width);
        let mut end = Self::default();
        let tokens = weight_name(&shape.embedding_path());
        end.copy(tokens, [shape.vocab_size, width], checkpoint)?;
        if let Some(learned) = shape.learned_positions {
            let positions = weight_name(&shape.positions_path());
            end.copy(positions, [learned.n_rows, hidden], checkpoint)?;
        }
        if width != hidden {
            end.weight(shape.project_in_path(), [width, hidden], checkpoint)?;
        }
        Ok(end)
    }

    /// The last norm, the projection behind it, and the head, which `quantizer` packs if there is one.
    pub(super) fn last(
        config: &Config,
        checkpoint: &mut Checkpoint,
        quantizer: Option<&dyn Quantizer>,
    ) -> Result<Self> {
        let shape = config.shape();
        let (hidden, width) = (shape.hidden_size, shape.embedding_width);
        let mut end = Self::default();
        if shape.has_final_norm {
            let path = shape.norm_path();
            for kind in Norm::kinds(shape.norm) {
                end.copy(kind.name(&path), [hidden], checkpoint)?;
            }
        }
        if width != hidden {
            end.weight(shape.project_out_path(), [hidden, width], checkpoint)?;
        }
        if shape.has_head_bias {
            end.copy(Vector::Bias.name(HEAD), [shape.vocab_size], checkpoint)?;
        }
        let dims = [width, shape.vocab_size];
        match quantizer {
            Some(quantizer) => {
                let mut head = if shape.tie_word_embeddings {
                    let path = shape.embedding_path();
                    let table = checkpoint.table(&path, [shape.vocab_size, width])?;
                    Weight::frozen(table.val().transpose())
                } else {
                    checkpoint.head(dims)?
                };
                end.head = Some(head.quantize(HEAD, quantizer, None)?);
                end.packed.push((HEAD.into(), head));
            }
            None if shape.tie_word_embeddings => {}
            None if checkpoint.packed_tensor(HEAD).is_some() => {
                let head = checkpoint.head(dims)?;
                end.packed.push((HEAD.into(), head));
            }
            None => end.copy(weight_name(HEAD), [shape.vocab_size, width], checkpoint)?,
        }
        Ok(end)
    }

    fn copy<const D: usize>(
        &mut self,
        name: String,
        dims: [usize; D],
        checkpoint: &mut Checkpoint,
    ) -> Result<()> {
        let tensor = checkpoint.tensors.copy(&name, dims)?;
        self.copies.push((name, tensor));
        Ok(())
    }

    fn weight(
        &mut self,
        path: String,
        dims @ [d_in, d_out]: [usize; 2],
        checkpoint: &mut Checkpoint,
    ) -> Result<()> {
        if checkpoint.packed_tensor(&path).is_some() {
            let weight = checkpoint.weight(&path, dims)?;
            self.packed.push((path, weight));
            return Ok(());
        }
        self.copy(weight_name(&path), [d_out, d_in], checkpoint)?;
        self.dense.push((path, dims));
        Ok(())
    }
}
