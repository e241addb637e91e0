//! Double quantization: the scales of a weight as codes.

use rayon::prelude::*;

use crate::{DoubleQuant, ScaleLevels, codebook};

/// Double-quantized scales: `s = level(code) · absmax + offset`.
#[derive(Clone, Debug, PartialEq)]
pub struct DoubleScales {
    /// `[d_out, n_groups]`, row by row: output by output, as bitsandbytes flattens a weight.
    pub codes: Vec<u8>,
    /// One for each block of codes.
    pub absmax: Vec<f32>,
    /// What is added to all.
    pub offset: f32,
}

impl DoubleScales {
    /// Quantizes scales, `[n_groups, d_out]`.
    pub(crate) fn quantize(scales: &[f32], n_groups: usize, format: DoubleQuant) -> Self {
        let d_out = scales.len() / n_groups;
        let by_output: Vec<f32> = (0..d_out)
            .flat_map(|o| (0..n_groups).map(move |g| scales[g * d_out + o]))
            .collect();
        let offset = match format.levels {
            ScaleLevels::Dynamic => {
                let sum: f64 = by_output.iter().map(|&s| f64::from(s)).sum();
                (sum / by_output.len() as f64) as f32
            }
            ScaleLevels::Unsigned { .. } => by_output.iter().copied().fold(f32::INFINITY, f32::min),
        };
        let levels = scale_levels(format.levels);
        let midpoints: Vec<f32> = levels.windows(2).map(|w| (w[0] + w[1]) / 2.0).collect();
        let mut codes = vec![0; by_output.len()];
        let blocks = by_output.par_chunks(format.block_size);
        let absmax = blocks
            .zip(codes.par_chunks_mut(format.block_size))
            .map(|(block, codes)| {
                let largest = block.iter().map(|s| (s - offset).abs()).fold(0.0, f32::max);
                let divisor = largest.max(f32::MIN_POSITIVE);
                for (code, s) in codes.iter_mut().zip(block) {
                    let value = (s - offset) / divisor;
                    *code = midpoints.partition_point(|&midpoint| midpoint < value) as u8;
                }
                largest
            })
            .collect();
        Self {
            codes,
            absmax,
            offset,
        }
    }

    /// The scales, `[n_groups, d_out]`.
    pub(crate) fn dequantize(&self, n_groups: usize, format: DoubleQuant) -> Vec<f32> {
        let levels = scale_levels(format.levels);
        let d_out = self.codes.len() / n_groups;
        let mut scales = vec![0.0; self.codes.len()];
        for (k, &code) in self.codes.iter().enumerate() {
            let (o, g) = (k / n_groups, k % n_groups);
            let absmax = self.absmax[k / format.block_size];
            scales[g * d_out + o] = levels[usize::from(code)] * absmax + self.offset;
        }
        scales
    }
}

/// What the codes of double-quantized scales stand for, ascending.
///
/// # Panics
/// If the codes have more than 8 bits, which no [`Format`](crate::Format) has.
pub fn scale_levels(levels: ScaleLevels) -> Vec<f32> {
    match levels {
        ScaleLevels::Dynamic => codebook::dynamic_map().into(),
        ScaleLevels::Unsigned { bits } => {
            assert!(bits <= 8, "a code of a scale is a byte");
            let steps = (1 << bits) - 1;
            (0..=steps).map(|k| k as f32 / steps as f32).collect()
        }
    }
}
