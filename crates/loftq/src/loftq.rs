//! LoftQ (Li et al. 2023, arXiv:2310.08659): quantizing and factoring in turn.
//!
//! `Q_t = quantize(W - L_{t-1})`, `L_t` the best of rank `r` near `W - Q_t`, from `L_0 = 0`. One round is
//! QLoRA's `Q` and the best adapter for it, so that its error is below QLoRA's at any rank. More rounds
//! mostly lower it at 4 bits; at 2 bits it rises again after some, because the grids of `Q_t` are made
//! anew in each. The best round is kept.

use peft::Lora;
use quant_core::Quantizer;

use crate::factoring::Factoring;
use crate::{Layer, LayerMethod, Result, Start, Truncation};

/// Quantizes and factors in turn, and keeps the best round.
#[derive(Clone, Debug)]
pub struct Loftq {
    factoring: Factoring,
    rounds: usize,
}

impl Loftq {
    /// LoftQ of this rank, or with these adapters; 5 rounds.
    pub fn new(lora: impl Into<Lora>) -> Self {
        Self {
            factoring: Factoring::new(lora),
            rounds: 5,
        }
    }

    /// Rounds, the paper's `T`; at least one.
    pub fn with_rounds(mut self, rounds: usize) -> Self {
        self.rounds = rounds;
        self
    }

    /// The decomposition that computes the factors.
    pub fn with_truncation(mut self, truncation: Truncation) -> Self {
        self.factoring.truncation = truncation;
        self
    }

    /// The best start, and the squared errors `‖W - Q_t - L_t‖²` of all rounds.
    ///
    /// # Errors
    /// As [`LayerMethod::start`].
    pub fn trace(&self, layer: &Layer<'_>, quantizer: &dyn Quantizer) -> Result<(Start, Vec<f64>)> {
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
            let next = self.factoring.cut(layer, residual, start)?;
            errors.push(next.error);
            if round == 1 {
                plain = Some(quantized.weight.clone());
            }
            if best.as_ref().is_none_or(|best| next.error < best.error) {
                let factors = [next.left.clone(), next.right.clone()];
                best = Some(Start::packed(quantized, Some(factors), round, next.error));
            }
            low = Some(next);
        }
        let best = best.expect("there is a round");
        Ok((Start { plain, ..best }, errors))
    }
}

impl LayerMethod for Loftq {
    fn lora(&self) -> &Lora {
        &self.factoring.lora
    }

    fn start(&self, layer: &Layer<'_>, quantizer: &dyn Quantizer) -> Result<Start> {
        Ok(self.trace(layer, quantizer)?.0)
    }
}
