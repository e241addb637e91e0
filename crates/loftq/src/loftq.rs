//! LoftQ (Li et al. 2023, arXiv:2310.08659): quantizing and factoring in turn.
//!
//! `Q_t = quantize(W - L_{t-1})`, `L_t` the best of rank `r` near `W - Q_t`, from `L_0 = 0`. One round is
//! QLoRA's `Q` and the best adapter for it, so that its error is below QLoRA's at any rank. More rounds
//! mostly lower it at 4 bits; at 2 bits it rises again after some, for the grids of `Q_t` are made anew
//! in each: the best round is kept.

use peft::{Lora, Weight};
use quant_core::Quantizer;

use crate::{Layer, LayerMethod, Result, Start, Truncation};

/// Quantizes and factors in turn, and keeps the best round.
#[derive(Clone, Debug)]
pub struct Loftq {
    lora: Lora,
    rounds: usize,
    truncation: Truncation,
}

impl Loftq {
    /// Of this rank, or with these adapters; 5 rounds.
    pub fn new(lora: impl Into<Lora>) -> Self {
        let lora = lora.into();
        let seed = lora.seed();
        Self {
            lora,
            rounds: 5,
            truncation: Truncation {
                seed,
                ..Truncation::default()
            },
        }
    }

    /// Rounds, the paper's `T`; one at least.
    pub fn with_rounds(mut self, rounds: usize) -> Self {
        self.rounds = rounds;
        self
    }

    /// How the factors are found.
    pub fn with_truncation(mut self, truncation: Truncation) -> Self {
        self.truncation = truncation;
        self
    }

    /// The squared errors `‖W - Q_t - L_t‖²` of all rounds, beside the best start.
    ///
    /// # Errors
    /// As [`LayerMethod::start`].
    pub fn trace(&self, layer: &Layer<'_>, quantizer: &dyn Quantizer) -> Result<(Start, Vec<f64>)> {
        let rank = self.lora.rank();
        let (mut best, mut errors) = (None::<Start>, Vec::new());
        let (mut low, mut plain) = (None::<crate::LowRank>, None);
        for round in 1..=self.rounds.max(1) {
            let target = match &low {
                Some(low) => low.taken_from(layer.weight.clone()),
                None => layer.weight.clone(),
            };
            let (quantized, dense) = layer.quantize(target, quantizer)?;
            let residual = layer.weight.clone() - dense;
            let start = low.take().map(|low| low.directions);
            let next = layer.cut(&self.truncation, residual, rank, start)?;
            errors.push(next.error);
            if round == 1 {
                plain = Some(quantized.weight.clone());
            }
            if best.as_ref().is_none_or(|best| next.error < best.error) {
                best = Some(Start {
                    weight: Weight::Quant(quantized.weight),
                    factors: Some([next.left.clone(), next.right.clone()]),
                    plain: None,
                    round,
                    error: next.error,
                    notes: quantized.notes,
                });
            }
            low = Some(next);
        }
        let best = best.expect("there is a round");
        Ok((Start { plain, ..best }, errors))
    }
}

impl LayerMethod for Loftq {
    fn lora(&self) -> &Lora {
        &self.lora
    }

    fn start(&self, layer: &Layer<'_>, quantizer: &dyn Quantizer) -> Result<Start> {
        Ok(self.trace(layer, quantizer)?.0)
    }
}
