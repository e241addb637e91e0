//! LQ-LoRA (Guo et al. 2023, arXiv:2311.12023) and PiSSA (Meng et al. 2024, arXiv:2404.02948): the low
//! rank first.
//!
//! `L_t` is the best of rank `r` near `W - Q_{t-1}`, `Q_t = quantize(W - L_t)`, from `Q_0 = 0`: the
//! adapter holds what is largest in the weight, and the quantizer's error is left. LQ-LoRA goes on until
//! the error rises; PiSSA takes one round, or a few.
//!
//! LQ-LoRA can weigh the errors by the diagonal Fisher information `F` of the weights, in the form in
//! which a singular value decomposition can take it: `‖diag(ρ) (W - Q - L) diag(κ)‖` with
//! `ρ_i = √mean_o F`, `κ_o = √(mean_i F / mean F)`: in the unit of `‖√F ∘ (W - Q - L)‖`, so that errors of
//! layers can be compared.

use burn::tensor::Tensor;
use peft::{Lora, Weight};
use quant_core::{Quantizer, sum_of_squares};

use crate::{FisherRoots, Layer, LayerMethod, LowRank, Result, Start, Truncation};

/// Factors and quantizes in turn until the error rises, and keeps the best round.
///
/// With [`sensitivities`](crate::sensitivities) and [`quant_core::allocate`] each layer gets its own
/// bits, under a budget for the whole model.
#[derive(Clone, Debug)]
pub struct LqLora {
    lora: Lora,
    max_rounds: usize,
    fisher: bool,
    truncation: Truncation,
}

impl LqLora {
    /// Of this rank, or with these adapters; at most 100 rounds, all errors alike.
    pub fn new(lora: impl Into<Lora>) -> Self {
        let lora = lora.into();
        Self {
            truncation: Truncation {
                seed: lora.seed(),
                ..Truncation::default()
            },
            lora,
            max_rounds: 100,
            fisher: false,
        }
    }

    /// Rounds at most; one at least.
    pub fn with_max_rounds(mut self, max_rounds: usize) -> Self {
        self.max_rounds = max_rounds;
        self
    }

    /// Whether errors are weighed by the Fisher information of the weights, which takes a calibration.
    pub fn with_fisher(mut self, fisher: bool) -> Self {
        self.fisher = fisher;
        self
    }

    /// How the factors are found.
    pub fn with_truncation(mut self, truncation: Truncation) -> Self {
        self.truncation = truncation;
        self
    }
}

impl LayerMethod for LqLora {
    fn lora(&self) -> &Lora {
        &self.lora
    }

    fn needs_fisher(&self) -> bool {
        self.fisher
    }

    fn measure(&self, layer: &Layer<'_>, found: Tensor<2>) -> f64 {
        let weights = layer.fisher.and_then(weights);
        sum_of_squares(weighed(layer.weight.clone() - found, &weights))
    }

    fn start(&self, layer: &Layer<'_>, quantizer: &dyn Quantizer) -> Result<Start> {
        let rounds = self.max_rounds.max(1);
        low_rank_first(layer, quantizer, self.lora.rank(), rounds, &self.truncation)
    }
}

/// The adapter takes the largest singular values of the weight, and the quantizer the rest: QPiSSA. A
/// layer that stays dense keeps the rest in floats: PiSSA.
///
/// Trained adapters are those of this base. Of the unchanged base, an adapter of twice the rank is the
/// difference of what is trained and where it began.
#[derive(Clone, Debug)]
pub struct Pissa {
    lora: Lora,
    rounds: usize,
    truncation: Truncation,
}

impl Pissa {
    /// Of this rank, or with these adapters; one round.
    pub fn new(lora: impl Into<Lora>) -> Self {
        let lora = lora.into();
        Self {
            truncation: Truncation {
                seed: lora.seed(),
                ..Truncation::default()
            },
            lora,
            rounds: 1,
        }
    }

    /// Rounds at most; the first that raises the error is the last.
    pub fn with_rounds(mut self, rounds: usize) -> Self {
        self.rounds = rounds;
        self
    }

    /// How the factors are found.
    pub fn with_truncation(mut self, truncation: Truncation) -> Self {
        self.truncation = truncation;
        self
    }
}

impl LayerMethod for Pissa {
    fn lora(&self) -> &Lora {
        &self.lora
    }

    fn start(&self, layer: &Layer<'_>, quantizer: &dyn Quantizer) -> Result<Start> {
        let rounds = self.rounds.max(1);
        low_rank_first(layer, quantizer, self.lora.rank(), rounds, &self.truncation)
    }

    fn start_dense(&self, layer: &Layer<'_>) -> Result<Start> {
        let low = layer.cut(
            &self.truncation,
            layer.weight.clone(),
            self.lora.rank(),
            None,
        )?;
        let rest = low.taken_from(layer.weight.clone());
        Ok(Start {
            weight: Weight::frozen(rest),
            factors: Some([low.left, low.right]),
            plain: None,
            round: 1,
            error: 0.0,
            notes: Vec::new(),
        })
    }
}

fn low_rank_first(
    layer: &Layer<'_>,
    quantizer: &dyn Quantizer,
    rank: usize,
    rounds: usize,
    truncation: &Truncation,
) -> Result<Start> {
    let weights = layer.fisher.and_then(weights);
    let factor = |residual: Tensor<2>, start| -> Result<LowRank> {
        let mut low = layer.cut(truncation, weighed(residual, &weights), rank, start)?;
        if let Some([rows, columns]) = &weights {
            low.left = low.left / rows.clone();
            low.right = low.right / columns.clone();
        }
        Ok(low)
    };
    let mut best: Option<Start> = None;
    let mut residual = layer.weight.clone();
    let mut directions = None;
    for round in 1..=rounds {
        let low = factor(residual, directions.take())?;
        let rest = low.taken_from(layer.weight.clone());
        let (quantized, dense) = layer.quantize(rest.clone(), quantizer)?;
        let error = sum_of_squares(weighed(rest - dense.clone(), &weights));
        if best.as_ref().is_some_and(|best| error >= best.error) {
            break;
        }
        best = Some(Start {
            weight: Weight::Quant(quantized.weight),
            factors: Some([low.left, low.right]),
            plain: None,
            round,
            error,
            notes: quantized.notes,
        });
        residual = layer.weight.clone() - dense;
        directions = Some(low.directions);
    }
    Ok(best.expect("there is a round"))
}

/// What the rows and the columns of an error are multiplied by; none where there were no gradients.
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

fn weighed(matrix: Tensor<2>, weights: &Option<[Tensor<2>; 2]>) -> Tensor<2> {
    match weights {
        Some([rows, columns]) => matrix * rows.clone() * columns.clone(),
        None => matrix,
    }
}
