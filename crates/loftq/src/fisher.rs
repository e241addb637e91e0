use std::collections::BTreeMap;

use burn::module::Param;
use burn::tensor::{DType, Tensor};
use peft::{Batch, CausalLm, Weight, token_nll};

use crate::{Error, Result};

/// The diagonal Fisher information of the weights of a model's layers.
///
/// It has one number for each input and each output of a layer, the form that a weighted singular value
/// decomposition can take (LQ-LoRA, Guo et al. 2023, arXiv:2311.12023, §3.2).
#[derive(Clone, Debug)]
pub struct Fisher {
    layers: BTreeMap<String, FisherRoots>,
}

/// The Fisher information of one layer's weight, `F = Σ g²` over the gradients of sequences.
#[derive(Clone, Debug)]
pub struct FisherRoots {
    /// `√mean_o F`, `[d_in]`.
    pub of_inputs: Tensor<1>,
    /// `√(mean_i F / mean F)`, `[d_out]`.
    pub of_outputs: Tensor<1>,
}

impl Fisher {
    /// Sums the squared gradients of the sequences of `calibration`, one sequence at a time.
    ///
    /// In memory are the gradients of all layers at once: as much as the dense model.
    ///
    /// # Errors
    /// [`peft::Error::Token`] for a token that the model lacks, [`Error::NonFinite`] with the layer whose
    /// gradients are.
    pub fn sum<M: CausalLm>(model: &M, calibration: &[Batch]) -> Result<Self> {
        let mut tracked = model.clone().no_grad();
        for (_, linear) in tracked.linears_mut() {
            let weight = linear.weight().to_dense().cast(DType::F32);
            *linear = linear.with_weight(Weight::Dense(Param::from_tensor(weight)));
        }
        let tracked = tracked.train();
        let mut sums = BTreeMap::<String, [Tensor<1>; 2]>::new();
        for batch in calibration {
            batch.check(model).map_err(Error::Peft)?;
            for at in 0..batch.tokens().dims()[0] {
                // A sequence without targets has no gradient.
                let Ok(one) = batch.sequence(at) else {
                    continue;
                };
                let nll = token_nll(&tracked, &one).sum() / one.n_targets() as f32;
                let gradients = nll.backward();
                for (path, linear) in tracked.linears() {
                    let Weight::Dense(weight) = linear.weight() else {
                        unreachable!("made dense above");
                    };
                    // None for a layer that this sequence did not pass through.
                    let gradient = weight.val().grad(&gradients);
                    let gradient = gradient.unwrap_or_else(|| weight.val().inner().zeros_like());
                    let squares = gradient.square();
                    let of_inputs = squares.clone().mean_dim(1).squeeze_dim::<1>(1);
                    let of_outputs = squares.mean_dim(0).squeeze_dim::<1>(0);
                    let new = [of_inputs, of_outputs];
                    let sum = match sums.remove(&path) {
                        Some([inputs, outputs]) => {
                            let [of_inputs, of_outputs] = new;
                            [inputs + of_inputs, outputs + of_outputs]
                        }
                        None => new,
                    };
                    sums.insert(path, sum);
                }
            }
        }
        let mut layers = BTreeMap::new();
        for (path, [of_inputs, of_outputs]) in sums {
            if !of_inputs.clone().sum().into_scalar::<f32>().is_finite() {
                let what = "the Fisher information";
                return Err(Error::NonFinite { what, path });
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
