use std::collections::BTreeMap;

use burn::module::Param;
use burn::tensor::{DType, Tensor};

use crate::{Batch, CausalLm, Error, Result, Weight, token_nll};

/// The diagonal Fisher information of the weights of a model's layers, for each target.
///
/// `F = Σ g² / n`, where `g` is the gradient of the loss summed over one sequence, the sum is over
/// sequences, and `n` is the number of their targets. A change `Δ` of a weight raises the loss of a target
/// by about `F Δ² / 2` nats.
///
/// Of each layer there is one number for each input and each output, the form that a weighted singular
/// value decomposition can take (LQ-LoRA, Guo et al. 2023, arXiv:2311.12023, §3.2).
#[derive(Clone, Debug)]
pub struct Fisher {
    layers: BTreeMap<String, FisherRoots>,
}

/// The Fisher information of one layer's weight.
#[derive(Clone, Debug)]
pub struct FisherRoots {
    /// `√mean_o F`, `[d_in]`.
    pub of_inputs: Tensor<1>,
    /// `√(mean_i F / mean F)`, `[d_out]`.
    pub of_outputs: Tensor<1>,
}

impl Fisher {
    /// Sums the squared gradients of the sequences of `calibration`, one sequence at a time. `on_sequence`
    /// is called after each of them.
    ///
    /// In memory are the gradients of all layers at once: as much as the dense model.
    ///
    /// # Errors
    /// [`Error::Token`] for a token that the model lacks, [`Error::NonFiniteGradient`] with the layer
    /// whose gradients are not finite.
    pub fn sum<M: CausalLm>(
        model: &M,
        calibration: &[Batch],
        mut on_sequence: impl FnMut(),
    ) -> Result<Self> {
        let mut tracked = model.clone().no_grad();
        for (_, linear) in tracked.linears_mut() {
            let weight = linear.weight().to_dense().cast(DType::F32);
            *linear = linear.with_weight(Weight::Dense(Param::from_tensor(weight)));
        }
        let tracked = tracked.train();
        let mut sums = BTreeMap::<String, [Tensor<1>; 2]>::new();
        let mut n_targets = 0;
        for batch in calibration {
            batch.check(model)?;
            n_targets += batch.n_targets();
            for at in 0..batch.tokens().dims()[0] {
                // A sequence without targets has no gradient.
                if let Ok(one) = batch.sequence(at) {
                    add_sequence(&mut sums, &tracked, &one);
                }
                on_sequence();
            }
        }
        let mut layers = BTreeMap::new();
        for (path, sums) in sums {
            let [of_inputs, of_outputs] = sums.map(|sum| sum / n_targets as f32);
            if !of_inputs.clone().sum().into_scalar::<f32>().is_finite() {
                return Err(Error::NonFiniteGradient { path });
            }
            let mean = of_inputs.clone().mean().clamp_min(f32::MIN_POSITIVE);
            let roots = FisherRoots {
                of_inputs: of_inputs.sqrt(),
                of_outputs: (of_outputs / mean).sqrt(),
            };
            layers.insert(path, roots);
        }
        Ok(Self { layers })
    }

    /// The Fisher information of the layer at `path`.
    pub fn of(&self, path: &str) -> Option<&FisherRoots> {
        self.layers.get(path)
    }
}

impl FisherRoots {
    /// `√mean_i F`, `[d_out]`: `of_outputs` in the unit of `√F`.
    pub fn of_outputs_absolute(&self) -> Tensor<1> {
        let mean = self.of_inputs.clone().square().mean();
        self.of_outputs.clone() * mean.sqrt()
    }
}

/// Adds the means over outputs and over inputs of the squared gradients of one sequence.
fn add_sequence<M: CausalLm>(
    sums: &mut BTreeMap<String, [Tensor<1>; 2]>,
    tracked: &M,
    one: &Batch,
) {
    let gradients = token_nll(tracked, one).sum().backward();
    for (path, linear) in tracked.linears() {
        let Weight::Dense(weight) = linear.weight() else {
            unreachable!("made dense");
        };
        // None for a layer that this sequence did not pass through.
        let gradient = weight.val().grad(&gradients);
        let gradient = gradient.unwrap_or_else(|| weight.val().inner().zeros_like());
        let squares = gradient.square();
        let of_inputs = squares.clone().mean_dim(1).squeeze_dim::<1>(1);
        let of_outputs = squares.mean_dim(0).squeeze_dim::<1>(0);
        let sum = match sums.remove(&path) {
            Some([inputs, outputs]) => [inputs + of_inputs, outputs + of_outputs],
            None => [of_inputs, of_outputs],
        };
        sums.insert(path, sum);
    }
}
