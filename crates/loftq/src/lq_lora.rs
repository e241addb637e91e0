//! LQ-LoRA (Guo et al. 2023, arXiv:2311.12023) and PiSSA (Meng et al. 2024, arXiv:2404.02948): the low
//! rank first.
//!
//! `L_t` is the best of rank `r` near `W - Q_{t-1}`, `Q_t = quantize(W - L_t)`, from `Q_0 = 0`: the
//! adapter holds the largest singular values of the weight, and the error of the quantizer remains.
//! LQ-LoRA goes on until the error rises; PiSSA takes one round, or a few.
//!
//! LQ-LoRA can weight the errors by the diagonal Fisher information `F` of the weights, in the form in
//! which a singular value decomposition can take it: `‖diag(ρ) (W - Q - L) diag(κ)‖` with
//! `ρ_i = √mean_o F`, `κ_o = √(mean_i F / mean F)`: in the unit of `‖√F ∘ (W - Q - L)‖`, so that errors of
//! layers can be compared.

use burn::tensor::Tensor;
use peft::{FisherRoots, Lora};
use quant_core::{Quantizer, sum_of_squares};

use crate::factoring::Factoring;
use crate::{Layer, LayerMethod, LowRank, Result, Start, Truncation};

/// Factors and quantizes in turn until the error rises, and keeps the best round.
///
/// With [`sensitivities`](crate::sensitivities) and [`quant_core::allocate`] each layer gets its own
/// bits, under a budget for the whole model.
#[derive(Clone, Debug)]
pub struct LqLora {
    factoring: Factoring,
    max_rounds: usize,
    fisher: bool,
}

impl LqLora {
    /// LQ-LoRA of this rank, or with these adapters; at most 100 rounds, all errors weighing the same.
    pub fn new(lora: impl Into<Lora>) -> Self {
        Self {
            factoring: Factoring::new(lora),
            max_rounds: 100,
            fisher: false,
        }
    }

    /// The most rounds; at least one.
    pub fn with_max_rounds(mut self, max_rounds: usize) -> Self {
        self.max_rounds = max_rounds;
        self
    }

    /// Whether errors are weighted by the Fisher information of the weights, which needs a calibration.
    pub fn with_fisher(mut self, fisher: bool) -> Self {
        self.fisher = fisher;
        self
    }

    /// The decomposition that computes the factors.
    pub fn with_truncation(mut self, truncation: Truncation) -> Self {
        self.factoring.truncation = truncation;
        self
    }
}

impl LayerMethod for LqLora {
    fn lora(&self) -> &Lora {
        &self.factoring.lora
    }

    fn needs_fisher(&self) -> bool {
        self.fisher
    }

    fn measure(&self, layer: &Layer<'_>, found: Tensor<2>) -> f64 {
        let weights = layer.fisher.and_then(weights);
        sum_of_squares(weighted(layer.weight.clone() - found, &weights))
    }

    fn start(&self, layer: &Layer<'_>, quantizer: &dyn Quantizer) -> Result<Start> {
        let weights = layer.fisher.and_then(weights);
        let factor = |residual: Tensor<2>, start| -> Result<LowRank> {
            let residual = weighted(residual, &weights);
            let mut low = self.factoring.cut(layer, residual, start)?;
            if let Some([rows, columns]) = &weights {
                low.left = low.left / rows.clone();
                low.right = low.right / columns.clone();
            }
            Ok(low)
        };
        let mut best: Option<Start> = None;
        let mut residual = layer.weight.clone();
        let mut directions = None;
        for round in 1..=self.max_rounds.max(1) {
            let low = factor(residual, directions.take())?;
            let rest = low.taken_from(layer.weight.clone());
            let (quantized, dense) = layer.quantize(rest.clone(), quantizer)?;
            let error = sum_of_squares(weighted(rest - dense.clone(), &weights));
            if best.as_ref().is_some_and(|best| error >= best.error) {
                break;
            }
            let factors = [low.left, low.right];
            best = Some(Start::packed(quantized, Some(factors), round, error));
            residual = layer.weight.clone() - dense;
            directions = Some(low.directions);
        }
        Ok(best.expect("there is a round"))
    }
}

/// Gives the adapter the largest singular values of the weight, and the quantizer the rest: QPiSSA. A
/// layer that stays dense keeps the rest in floats: PiSSA.
///
/// Trained adapters belong to this base. For the unchanged base, an adapter of twice the rank is the
/// difference of the trained factors and the initial ones.
#[derive(Clone, Debug)]
pub struct Pissa(LqLora);

impl Pissa {
    /// PiSSA of this rank, or with these adapters; one round.
    pub fn new(lora: impl Into<Lora>) -> Self {
        Self(LqLora::new(lora).with_max_rounds(1))
    }

    /// The most rounds; the first that raises the error is the last.
    pub fn with_rounds(self, rounds: usize) -> Self {
        Self(self.0.with_max_rounds(rounds))
    }

    /// The decomposition that computes the factors.
    pub fn with_truncation(self, truncation: Truncation) -> Self {
        Self(self.0.with_truncation(truncation))
    }
}

impl LayerMethod for Pissa {
    fn lora(&self) -> &Lora {
        self.0.lora()
    }

    fn start(&self, layer: &Layer<'_>, quantizer: &dyn Quantizer) -> Result<Start> {
        self.0.start(layer, quantizer)
    }

    fn start_dense(&self, layer: &Layer<'_>) -> Result<Start> {
        let low = self.0.factoring.cut(layer, layer.weight.clone(), None)?;
        let rest = low.taken_from(layer.weight.clone());
        Ok(Start::dense(rest, Some([low.left, low.right])))
    }
}

/// The factors of the rows and of the columns of an error; none where there were no gradients.
fn weights(fisher: &FisherRoots) -> Option<[Tensor<2>; 2]> {
    let floor = |roots: Tensor<1>| {
        let most = roots.clone().max().into_scalar::<f32>();
        // An input without gradients still counts a little: it is divided by.
        (most > 0.0).then(|| roots.clamp_min(most * 1e-3))
    };
    let rows = floor(fisher.of_inputs.clone())?.unsqueeze_dim::<2>(1);
    let columns = floor(fisher.of_outputs.clone())?.unsqueeze_dim::<2>(0);
    Some([rows, columns])
}

fn weighted(matrix: Tensor<2>, weights: &Option<[Tensor<2>; 2]>) -> Tensor<2> {
    match weights {
        Some([rows, columns]) => matrix * rows.clone() * columns.clone(),
        None => matrix,
    }
}
