//! The memory that a planned quantization takes.

use quant_core::{Format, Needs};

use super::{Plan, PlannedLayer};

/// The program, its threads and their buffers.
const PROGRAM: u64 = 30 << 20;
/// The size of an `f32`.
const F32: u64 = 4;

impl Plan {
    /// The memory that [`quantize_to`](crate::quantize_to) takes on the CPU at its peak, in bytes, with a
    /// calibration of `n_tokens` in batches of `batch_tokens`, 0 and 0 without a calibration, and with a head
    /// that is packed in a format, if there is one.
    ///
    /// It is that of the block with the largest layers, or of an end. Of a block: its weights in the type of
    /// their file, the layer that is quantized in `f32`, and with a calibration its activations, the Gram of
    /// the layer and what its quantizer makes of it.
    pub fn memory(
        &self,
        needs: Needs,
        head: Option<Format>,
        n_tokens: usize,
        batch_tokens: usize,
    ) -> u64 {
        let (n_tokens, batch_tokens) = (n_tokens as u64, batch_tokens as u64);
        let of_block = |layers: &[PlannedLayer]| {
            let at_rest: u64 = layers.iter().map(|layer| layer.n_bytes_stored).sum();
            let of_layer = |layer: &PlannedLayer| {
                // As it is read, beside the order of a model.
                let loading = layer.n_bytes_stored;
                loading.max(self.of_layer(layer, needs, n_tokens, batch_tokens))
            };
            at_rest + layers.iter().map(of_layer).max().unwrap_or(0)
        };
        let of_blocks = self.blocks().into_iter().map(of_block).max().unwrap_or(0);
        let copied = self.copied.iter().copied().max().unwrap_or(0);
        // An embedding that is looked up is in memory as it was read, too.
        let copied = if n_tokens == 0 {
            copied
        } else {
            copied.saturating_mul(2)
        };
        let of_head = head.map_or(0, |format| self.of_head(format, needs, n_tokens));
        PROGRAM.saturating_add(of_blocks.max(copied).max(of_head))
    }

    /// The layers of each block.
    fn blocks(&self) -> Vec<&[PlannedLayer]> {
        let n = self.layers.len() / self.config.num_hidden_layers().max(1);
        self.layers.chunks(n.max(1)).collect()
    }

    /// The memory that one layer takes beside its block.
    fn of_layer(
        &self,
        layer: &PlannedLayer,
        needs: Needs,
        n_tokens: u64,
        batch_tokens: u64,
    ) -> u64 {
        if layer.format.is_none() {
            return 0;
        }
        let [d_in, d_out] = layer.dims.map(|n| n as u64);
        // Dense, and as it is packed.
        let weight = layer.n_bytes_dense();
        let quantizing = dense(layer.n_bytes_stored, weight) + weight + layer.n_bytes;
        if n_tokens == 0 {
            return quantizing;
        }
        let streams = streams(needs);
        let states = streams * F32 * n_tokens * (self.config.hidden_size() as u64 + d_in);
        let gram = streams * F32 * d_in * d_in;
        // Three of an MLP's activations, and those that are added up.
        let running = 3 * F32 * batch_tokens * d_in.max(d_out);
        let learning = match needs {
            Needs::Nothing => 0,
            // The Hessian, which becomes its factor, and a part of it that the factorization works on; the
            // weight in the order of the rounding.
            Needs::Gram | Needs::Drift => gram + gram / 4 + weight,
        };
        states + gram + running.max(quantizing + learning)
    }

    /// The memory that a head takes which is packed.
    fn of_head(&self, format: Format, needs: Needs, n_tokens: u64) -> u64 {
        let shape = self.config.shape();
        let dims = [shape.embedding_width, shape.vocab_size];
        let weight = F32.saturating_mul(dims[0] as u64 * dims[1] as u64);
        // Of a tied head, the embedding.
        let stored = self.copied.last().copied().unwrap_or(0);
        let dense = if shape.tie_word_embeddings {
            weight
        } else {
            dense(stored, weight)
        };
        let states = streams(needs) * F32 * n_tokens * shape.hidden_size as u64;
        let parts = [
            stored,
            dense,
            weight,
            format.n_bytes(dims).unwrap_or(0),
            states,
        ];
        parts.into_iter().fold(0, u64::saturating_add)
    }
}

/// The streams of a calibration.
fn streams(needs: Needs) -> u64 {
    if needs == Needs::Drift { 2 } else { 1 }
}

/// The bytes of a weight in `f32` beside the stored one, which it is if that is `f32`.
fn dense(stored: u64, weight: u64) -> u64 {
    if stored == weight { 0 } else { weight }
}
