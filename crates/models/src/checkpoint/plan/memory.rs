//! The memory that a planned quantization takes.

use quant_core::Needs;

use super::{Plan, PlannedLayer};

/// The program, its threads and their buffers.
const PROGRAM: u64 = 30 << 20;
/// The size of an `f32`.
const F32: u64 = 4;

impl Plan {
    /// The memory that [`quantize_to`](crate::quantize_to) takes on the CPU at its peak, in bytes, with a
    /// calibration of `n_tokens` in batches of `batch_tokens`; 0 and 0 without a calibration.
    ///
    /// It is that of the block with the largest layers: the block in the type of its file, the layer that is
    /// quantized in `f32`, and with a calibration its activations, the Gram of the layer and what its quantizer
    /// makes of it.
    pub fn memory(&self, needs: Needs, n_tokens: usize, batch_tokens: usize) -> u64 {
        let blocks = self.blocks();
        let of_block = |layers: &[PlannedLayer]| {
            let at_rest: u64 = layers.iter().map(|layer| layer.n_bytes_stored).sum();
            let of_layer = |layer: &PlannedLayer| {
                self.of_layer(layer, needs, n_tokens as u64, batch_tokens as u64)
            };
            at_rest + layers.iter().map(of_layer).max().unwrap_or(0)
        };
        let of_blocks = blocks.into_iter().map(of_block).max().unwrap_or(0);
        let copied = self.copied.iter().copied().max().unwrap_or(0);
        // An embedding that is looked up is in memory as it was read, too.
        let copied = if n_tokens == 0 {
            copied
        } else {
            copied.saturating_mul(2)
        };
        PROGRAM.saturating_add(of_blocks.max(copied))
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
        let [d_in, d_out] = layer.dims.map(|n| n as u64);
        // As it is read, and in the order of a model.
        let loading = 2 * layer.n_bytes_stored;
        if layer.format.is_none() {
            return loading;
        }
        // Dense, and as it is packed.
        let weight = F32 * d_in * d_out;
        let quantizing = 2 * weight + layer.n_bytes;
        if n_tokens == 0 {
            return loading.max(quantizing);
        }
        let hidden = self.config.hidden_size() as u64;
        let streams = if needs == Needs::Drift { 2 } else { 1 };
        let states = streams * F32 * n_tokens * (hidden + d_in);
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
}
